// Sharpness against the gap, one measure at a time.

(() => {
  if (!D.gap) {
    section('gap', 'Sharpness and gap').append(el('p', null, D.filter));
    return;
  }
  const drawable = (r) => R.failed[r] < 0 && Number.isFinite(R.value[r]) && Number.isFinite(D.models.gap[R.model[r]]);
  const byLabel = D.labels.map(() => []);
  R.label.forEach((l, r) => { if (l >= 0) byLabel[l].push(r); });
  const named = D.labels.map((t, i) => [String(i), t]).filter(([i]) => byLabel[i].some(drawable)).sort((a, b) => (a[1] < b[1] ? -1 : 1));
  const box = section('gap', 'Sharpness and gap');
  if (!named.length) {
    box.append(el('p', null, `No score has a finite value and a finite ${D.gap}.`));
    return;
  }
  let now = Number((named.find(([, t]) => t.startsWith('top_eigenvalues')) || named[0])[0]);
  let logX = null, logY = false, redraw = () => {};
  const rowsOf = () => byLabel[now].filter(drawable);
  const positive = (values) => values.every((v) => v > 0);
  const wide = (values) => positive(values) && most(values) > 5 * least(values);

  function range(values, ends, log) {
    const low = least(values), high = most(values);
    const f = log ? Math.log10 : (v) => v, g = log ? (v) => 10 ** v : (v) => v;
    let a = f(low), b = f(high);
    const span = b - a || Math.abs(a) * 0.1 || 1;
    // Long bars leave the frame: at most half a range on each side is theirs.
    for (const [from, to] of ends) {
      if (!log || from > 0) a = Math.min(a, Math.max(f(from), f(low) - span / 2));
      if (!log || to > 0) b = Math.max(b, Math.min(f(to), f(high) + span / 2));
    }
    return [g(a - span * 0.05), g(b + span * 0.05)];
  }

  function draw(width, ink) {
    const rows = rowsOf(), g = svg('g');
    const x = rows.map((r) => R.value[r]), y = rows.map((r) => D.models.gap[R.model[r]]);
    const onLogX = logX === null ? wide(x) : logX && positive(x), onLogY = logY && positive(y);
    const ends = rows.map((r) => {
      const e = Number.isFinite(R.error[r]) ? R.error[r] : 0;
      return [R.value[r] - (R.kind[r] === 2 ? 0 : e), R.value[r] + e];
    });
    const present = [...new Set(rows.map((r) => D.models.group[R.model[r]]))].sort((a, b) => a - b);
    const colour = (k) => ink.groups[Math.max(k, 0) % 7];
    const keys = D.group ? present.map((k) => [k < 0 ? '(none)' : D.groups[k], (u, v) => marker(u, v, 5, Math.max(k, 0), {fill: colour(k)})]) : [];
    if (rows.some((r) => !R.ok[r])) keys.push(['hollow: not converged', (u, v) => marker(u, v, 5, 0, {fill: ink.page, stroke: ink.dim, 'stroke-width': 1.5})]);
    const left = 66, top = legend(g, keys, left, width - left - 12, ink) + 6, height = Math.min(420, Math.max(260, width * 0.6)), bottom = top + height;
    const sx = scale(onLogX ? 'log' : 'linear', ...range(x, ends, onLogX), left, width - 12);
    const sy = scale(onLogY ? 'log' : 'linear', ...range(y, [], onLogY), bottom, top);
    axisX(g, sx, bottom, height, ink, fits(visible(D.labels[now]), width - left, 12));
    axisY(g, sy, left, width - left - 12, ink, fits(visible(D.gap), height, 12));
    const clip = svg('clipPath', {id: 'frame'}, svg('rect', {x: left, y: top - 8, width: width - left - 4, height: height + 16}));
    const bars = svg('g', {'clip-path': 'url(#frame)', 'stroke-width': 1.2});
    const dots = svg('g', {'stroke-width': 1.5});
    const points = rows.map((r, i) => {
      const k = D.models.group[R.model[r]], px = sx(x[i]), py = sy(y[i]);
      const [from, to] = ends[i].map((v) => (onLogX && v <= 0 ? left : Math.max(left - 50, Math.min(width + 50, sx(v)))));
      if (to - from > 0.5) {
        bars.append(svg('line', {x1: from, x2: to, y1: py, y2: py, stroke: colour(k)}));
        // The exact maximum may be larger than this: an open arrow.
        if (R.kind[r] === 2) bars.append(svg('path', {d: `M${to - 4},${py - 3}L${to},${py}L${to - 4},${py + 3}`, fill: 'none', stroke: colour(k)}));
      }
      dots.append(marker(px, py, 4.5, Math.max(k, 0), {fill: R.ok[r] ? colour(k) : ink.page, stroke: R.ok[r] ? ink.page : colour(k), 'stroke-width': R.ok[r] ? 0.7 : 1.5}));
      return {x: px, y: py, lines: () => {
        const [value, error] = parted(R.shown[r], R.kind[r]);
        return [D.models.name[R.model[r]], `${D.labels[now]}: ${value}${error ? ', error ' + error : ''}`, `${D.gap}: ${brief(y[i])}`]
          .concat(D.group ? [`${D.group}: ${groupName(R.model[r])}`] : [], R.ok[r] ? [] : ['not converged']);
      }};
    });
    g.append(clip, bars, dots);
    const missing = byLabel[now].length - rows.length;
    const lower = rows.some((r) => R.kind[r] === 2);
    const caption = `${rows.length} models${missing ? `; ${missing} without a finite value and gap are not drawn` : ''}.`
      + ` Bars: ${lower ? 'above a lower bound, the room that is left' : [...new Set(rows.map((r) => KINDS[R.kind[r]]))].map((k) => ({'1 se': 'one standard error', bound: 'bounds', rounding: 'rounding'}[k] || 'unknown')).join(', ')}.`
      + tauText();
    return {node: g, height: bottom + 44, points, caption};
  }

  function tauText() {
    const at = D.taus.columns, row = D.taus.rows.find((t) => t[at.indexOf('measure')] === D.labels[now]);
    if (!row) return '';
    const get = (name) => num(at.includes(name) ? row[at.indexOf(name)] : null);
    const one = (ending, what) => {
      const t = get('tau' + ending);
      if (!Number.isFinite(t)) return '';
      const [a, b] = [get('low' + ending), get('high' + ending)];
      return `${what}${t.toFixed(2)}${Number.isFinite(a) ? ` [${a.toFixed(2)}, ${b.toFixed(2)}]` : ''}`;
    };
    const found = [one('', D.group ? 'pooled ' : ''), D.group ? one('_within', `within ${D.group} `) : ''].filter((t) => t);
    return found.length ? ` Tau of ${get('n')} models: ${found.join(', ')}.` : '';
  }

  const tickX = tick('logarithmic sharpness', (v) => { logX = v; redraw(); });
  function follow() { logX = null; tickX.querySelector('input').checked = wide(rowsOf().map((r) => R.value[r])); }
  box.append(el('div', {class: 'controls'},
    choice('Measure', named, String(now), (v) => { now = Number(v); follow(); redraw(); }),
    tickX, tick('logarithmic gap', (v) => { logY = v; redraw(); })));
  follow();
  redraw = figure(box, () => 'gap_' + D.labels[now], () => `${D.labels[now]} against ${D.gap}`, draw, () => [
    ['checkpoint', 'group', D.labels[now], 'probe_error', 'error_kind', 'converged', D.gap],
    rowsOf().map((r) => [D.models.name[R.model[r]], groupName(R.model[r]), R.value[r], R.error[r],
      ['stderr', 'bound', 'lower_bound', 'rounding'][R.kind[r]], R.ok[r] ? 'True' : 'False', D.models.gap[R.model[r]]]),
  ]);
})();
