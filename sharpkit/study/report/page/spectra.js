// Single eigenvalues at both ends of the spectrum.

(() => {
  const data = D.eigenvalues;
  if (!data.value.length) return;
  const box = section('spectra', 'Spectra');
  const state = perCheckpoint(data, 24);
  let log = false, redraw = () => {};

  function draw(width, ink) {
    const g = svg('g'), rows = state.rows(), points = [];
    const every = rows.flatMap(([, parts]) => parts);
    if (!every.length) return {node: g, height: 30, points, caption: 'No checkpoint of this measure fits the text.'};
    const values = every.map((i) => state.value[i]).filter(Number.isFinite);
    const low = Math.min(0, least(values)), high = Math.max(0, most(values)), room = (high - low || 1) * 0.03;
    const narrow = width < 620, left = narrow ? 10 : Math.min(240, width * 0.3), tall = narrow ? 34 : 22;
    const bottom = 12 + rows.length * tall, s = scale(log ? 'symlog' : 'linear', low - room, high + room, left, width - 14);
    axisX(g, s, bottom, bottom - 8, ink, 'eigenvalue');
    if (low < 0) g.append(svg('rect', {x: left, width: s(0) - left, y: 8, height: bottom - 8, fill: ink.line, opacity: 0.5}));
    g.append(svg('line', {x1: s(0), x2: s(0), y1: 8, y2: bottom, stroke: ink.dim}));
    rows.forEach(([c, parts], row) => {
      const y0 = 10 + row * tall, y = y0 + (narrow ? 24 : tall / 2), k = D.models.group[state.model(c)];
      const name = visible(shortName(data.checkpoints[c])), colour = ink.groups[Math.max(k, 0) % 7];
      if (narrow) g.append(label(left, y0 + 12, fits(name, width - 20, 12), {fill: ink.ink}));
      else g.append(label(left - 8, y + 4, fits(name, left - 14, 12), {fill: ink.ink, 'text-anchor': 'end'}));
      parts.forEach((i) => {
        const v = state.value[i], e = state.error[i];
        if (!Number.isFinite(v)) return;
        const clamp = (u) => Math.max(left, Math.min(width - 14, s(u)));
        if (Number.isFinite(e) && clamp(v + e) - clamp(v - e) > 1) g.append(svg('line', {x1: clamp(v - e), x2: clamp(v + e), y1: y, y2: y, stroke: colour}));
        g.append(marker(s(v), y, 4, Math.max(k, 0), {fill: data.ok[i] ? colour : ink.page, stroke: data.ok[i] ? ink.page : colour, 'stroke-width': data.ok[i] ? 0.7 : 1.5}));
        points.push({x: s(v), y, lines: () => [data.checkpoints[c], data.parts[data.part[i]].replace(/^lambda_/, 'eigenvalue '), data.shown[i] + (data.ok[i] ? '' : ', not converged')]});
      });
    });
    const names = [...new Set(every.map((i) => data.parts[data.part[i]]))];
    const up = names.filter((n) => !n.includes('-')).length, down = names.length - up;
    const caption = `What is drawn: the ${up ? `${up} largest` : ''}${up && down ? ' and the ' : ''}${down ? `${down} smallest` : ''} eigenvalues that ${visible(data.labels[state.label])} measured, a row a checkpoint, with their bounds;`
      + ' hollow ones did not converge. A study holds no density of eigenvalues: sharpkit spectrum draws one.' + leftOut(data);
    return {node: g, height: bottom + 44, points, caption};
  }
  const [controls, turned, show] = state.controls(() => redraw(), tick('logarithmic on both sides of 0', (v) => { log = v; redraw(); }));
  box.append(controls);
  redraw = figure(box, () => 'spectra_' + data.labels[state.label], () => `Eigenvalues of ${data.labels[state.label]}`, draw, () => [
    ['checkpoint', 'measure', 'eigenvalue', 'value', 'probe_error', 'converged'],
    state.all().flatMap(([c, parts]) => parts.map((i) => [data.checkpoints[c], data.labels[state.label], data.parts[data.part[i]], state.value[i], state.error[i], data.ok[i] ? 'True' : 'False'])),
  ]);
  box.append(turned);
  show();
})();
