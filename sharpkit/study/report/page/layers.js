// Numbers of layers: a row a checkpoint, a column a layer.

// Rows of parts by score, with a text filter and pages, for two figures.
function perCheckpoint(data, size) {
  const value = Float64Array.from(data.value, num), error = Float64Array.from(data.error, num);
  const byLabel = data.labels.map(() => new Map());
  data.value.forEach((_, i) => {
    const rows = byLabel[data.label[i]];
    if (!rows.has(data.checkpoint[i])) rows.set(data.checkpoint[i], []);
    rows.get(data.checkpoint[i]).push(i);
  });
  const model = new Map(D.models.name.map((name, m) => [name, m]));
  const state = {label: 0, text: '', page: 0, value, error};
  state.all = () => [...byLabel[state.label].entries()].filter(([c]) => {
    const name = data.checkpoints[c];
    return (name + ' ' + groupName(model.get(name))).toLowerCase().includes(state.text);
  });
  state.rows = () => state.all().slice(state.page * size, (state.page + 1) * size);
  state.model = (c) => model.get(data.checkpoints[c]);
  state.controls = (refresh, extra) => {
    const turned = pager('checkpoints', (by) => { state.page += by; show(); });
    const show = () => {
      const total = state.all().length, first = state.page * size;
      turned.show(Math.min(first, total), Math.min(first + size, total), total, ' checkpoints');
      refresh();
    };
    const again = () => { state.page = 0; show(); };
    const node = el('div', {class: 'controls'},
      choice('Measure', data.labels.map((t, i) => [String(i), t]), '0', (v) => { state.label = Number(v); again(); }),
      textbox('Checkpoints with', (v) => { state.text = v.toLowerCase(); again(); }), extra);
    return [node, turned, show];
  };
  return state;
}

const leftOut = (data) => (data.left_out
  ? ` ${data.left_out.toLocaleString('en')} further checkpoints are not in this page: sharpkit export has them.` : '');

(() => {
  const data = D.layers;
  if (!data.value.length) return;
  const box = section('layers', 'Layers');
  const state = perCheckpoint(data, 24);
  let within = false, redraw = () => {};
  // Cividis: even in lightness for every colour vision. With both signs blue and orange.
  const CIVIDIS = ['#00224e', '#123570', '#3b496c', '#575d6d', '#707173', '#8a8678', '#a59c74', '#c3b369', '#e1cc55', '#fee838'];
  const DIVERGING = ['#0b4f8a', '#4a8fc4', '#a6cbe6', '#f2f2f2', '#f2c08d', '#d97b25', '#8f3d00'];
  function colour(stops, t) {
    const place = Math.max(0, Math.min(1, t)) * (stops.length - 1), i = Math.min(Math.floor(place), stops.length - 2);
    const part = (hex, k) => parseInt(hex.slice(1 + 2 * k, 3 + 2 * k), 16);
    const mix = [0, 1, 2].map((k) => Math.round(part(stops[i], k) + (place - i) * (part(stops[i + 1], k) - part(stops[i], k))));
    return '#' + mix.map((c) => c.toString(16).padStart(2, '0')).join('');
  }
  function shades(values) {
    const finite = values.filter(Number.isFinite);
    let low = least(finite), high = most(finite);
    if (low < 0 && high > 0) {
      const far = Math.max(-low, high);
      return {stops: DIVERGING, kind: 'linear', low: -far, high: far};
    }
    const kind = low > 0 && high > 10 * low ? 'log' : 'linear';
    return {stops: CIVIDIS, kind, low, high};
  }
  const tone = (s, v) => colour(s.stops, scale(s.kind, s.low, s.high, 0, 1)(v));

  function draw(width, ink) {
    const g = svg('g'), rows = state.rows(), points = [], names = [], place = new Map();
    rows.forEach(([, parts]) => parts.forEach((i) => {
      const p = data.part[i];
      if (!place.has(p)) { place.set(p, names.length); names.push(p); }
    }));
    if (!names.length) return {node: g, height: 30, points, caption: 'No checkpoint of this measure fits the text.'};
    const narrow = width < 620, left = narrow ? 10 : Math.min(240, width * 0.3);
    const longest = most(names.map((p) => Math.min(visible(data.parts[p]).length, 24)));
    const head = longest * 5 + 20, tall = narrow ? 34 : 22, wide = Math.min(70, (width - left - head * 0.6 - 8) / names.length);
    const every = Math.ceil(13 / wide);
    names.forEach((p, k) => {
      if (k % every) return;
      const x = left + (k + 0.5) * wide;
      g.append(label(x, head, tail(visible(data.parts[p]), 24), {fill: ink.ink, transform: `rotate(-50 ${x.toFixed(1)} ${head})`}));
    });
    const shared = shades(rows.flatMap(([, parts]) => parts.map((i) => state.value[i])));
    rows.forEach(([c, parts], row) => {
      const y = head + 8 + row * tall, s = within ? shades(parts.map((i) => state.value[i])) : shared;
      const name = visible(shortName(data.checkpoints[c]));
      if (narrow) g.append(label(left, y + 11, fits(name, width - 20, 12), {fill: ink.ink}));
      else g.append(label(left - 8, y + tall / 2 + 4, fits(name, left - 14, 12), {fill: ink.ink, 'text-anchor': 'end'}));
      parts.forEach((i) => {
        const k = place.get(data.part[i]), x = left + k * wide, v = state.value[i];
        const from = narrow ? y + 15 : y + 1, high = narrow ? tall - 18 : tall - 2;
        g.append(svg('rect', {x: (x + 0.5).toFixed(2), y: from, width: Math.max(wide - 1, 1).toFixed(2), height: high, fill: Number.isFinite(v) ? tone(s, v) : ink.page, stroke: ink.line}));
        if (!data.ok[i]) g.append(label(x + wide / 2, from + high / 2 + 4, '!', {'text-anchor': 'middle', fill: '#ffffff', stroke: '#000000', 'stroke-width': 2.5, 'paint-order': 'stroke', 'font-weight': 'bold'}));
        points.push({x: x + wide / 2, y: from + high / 2, box: [wide, high], lines: () =>
          [data.checkpoints[c], data.parts[data.part[i]], data.shown[i] + (data.ok[i] ? '' : ', not converged')]});
      });
    });
    let bottom = head + 8 + rows.length * tall + 14;
    if (!within) {
      const s = scale(shared.kind, shared.low, shared.high, left, Math.min(width - 40, left + 320)), span = s(s.high) - s(s.low);
      for (let k = 0; k < 64; k++) g.append(svg('rect', {x: (s(s.low) + span * k / 64).toFixed(2), y: bottom, width: (span / 64 + 0.5).toFixed(2), height: 12, fill: colour(shared.stops, k / 63)}));
      const ticks = shared.low === shared.high ? [shared.low] : ticksOf(s, span / 70);
      ticks.forEach((v) => g.append(label(s(v), bottom + 26, brief(v), {fill: ink.dim, 'text-anchor': 'middle'})));
      bottom += 34;
    }
    const caption = `${visible(data.labels[state.label])}, a row a checkpoint.`
      + (within ? ' Colours run from the least to the largest of each row.' : ` Colours are ${shared.kind === 'log' ? 'logarithmic' : 'linear'} over these rows.`)
      + (every > 1 ? ' Not every layer is named; all have tips.' : '') + (points.length && rows.some(([, parts]) => parts.some((i) => !data.ok[i])) ? ' ! did not converge.' : '') + leftOut(data);
    return {node: g, height: bottom + 6, points, caption, row: names.length};
  }
  const [controls, turned, show] = state.controls(() => redraw(), tick('colours by row', (v) => { within = v; redraw(); }));
  box.append(controls);
  redraw = figure(box, () => 'layers_' + data.labels[state.label], () => `${data.labels[state.label]} of each layer`, draw, () => [
    ['checkpoint', 'measure', 'layer', 'value', 'probe_error', 'converged'],
    state.all().flatMap(([c, parts]) => parts.map((i) => [data.checkpoints[c], data.labels[state.label], data.parts[data.part[i]], state.value[i], state.error[i], data.ok[i] ? 'True' : 'False'])),
  ]);
  box.append(turned);
  show();
})();
