// Tau of each measure with its interval, pooled and within groups.

(() => {
  if (!D.taus.rows.length) {
    if (D.gap) section('tau', 'Correlation with the gap').append(el('p', null, D.filter));
    return;
  }
  const box = section('tau', 'Correlation with the gap');
  const at = D.taus.columns;
  const get = (row, name) => { const i = at.indexOf(name); return i < 0 ? NaN : num(row[i]); };
  const text = (row, name) => row[at.indexOf(name)];
  const kinds = [['', 'pooled', 'circle']];
  if (at.includes('tau_within')) kinds.push(['_within', `within ${D.group}`, 'square']);
  let by = 'tau';
  let redraw = () => {};
  const down = (row) => { const t = get(row, 'tau'); return Number.isFinite(t) ? -t : 2; };
  const rows = () => [...D.taus.rows].sort((a, b) =>
    (by === 'tau' && down(a) - down(b)) || (text(a, 'measure') < text(b, 'measure') ? -1 : 1));

  box.append(el('p', null, D.filter));
  const split = D.taus.rows.filter((row) => at.includes('disagree') && text(row, 'disagree')).map((row) => text(row, 'measure'));
  if (split.length) {
    box.append(el('p', {class: 'warn', role: 'note'}, `Pooled values and those within ${D.group} disagree for ${split.length} of ${D.taus.rows.length} measures`
      + ` (${split.slice(0, 5).join(', ')}${split.length > 5 ? ', ...' : ''}): the pooled ones are then an effect of ${D.group}.`));
  }
  if (D.remarks.length) {
    const few = D.remarks.length <= 4;
    box.append(el('details', {open: few}, el('summary', null, `Remarks on these numbers (${D.remarks.length})`),
      el('ul', null, D.remarks.map((t) => el('li', null, t)))));
  }
  box.append(el('div', {class: 'controls'}, choice('Order', [['tau', 'by tau'], ['name', 'by name']], by, (v) => { by = v; redraw(); })));

  function draw(width, ink) {
    const narrow = width < 620, g = svg('g'), list = rows(), points = [];
    const left = narrow ? 10 : Math.min(300, width * 0.4), right = width - 14;
    const keys = kinds.map(([, name], i) => [name, (u, v) => marker(u, v, 5, i, {fill: i ? ink.page : ink.groups[0], stroke: ink.groups[i], 'stroke-width': 1.5})]);
    const corrected = list.some((row) => Math.abs(get(row, 'tau_exact') - get(row, 'tau')) > 0.005);
    if (corrected) keys.push(['without measurement noise', (u, v) => svg('line', {x1: u, x2: u, y1: v - 6, y2: v + 6, stroke: ink.groups[0], 'stroke-width': 2})]);
    if (at.includes('disagree')) keys.push(['pooled and within disagree', (u, v) => label(u - 2, v + 4, '!', {fill: ink.groups[1], 'font-weight': 'bold'})]);
    const top = legend(g, keys, narrow ? 10 : 14, width - 30, ink) + 4, each = (narrow ? 22 : 6) + 15 * kinds.length;
    const bottom = top + list.length * each + 6, s = scale('linear', -1, 1, left, right);
    axisX(g, s, bottom, bottom - top, ink, `Kendall's tau with ${D.gap}`);
    g.append(svg('line', {x1: s(0), x2: s(0), y1: top, y2: bottom, stroke: ink.dim}));
    list.forEach((row, i) => {
      const y0 = top + i * each, name = visible(text(row, 'measure'));
      const mark = at.includes('disagree') && text(row, 'disagree') ? '! ' : '';
      const attributes = {fill: mark ? ink.groups[1] : ink.ink, 'font-weight': mark ? 'bold' : null};
      if (narrow) g.append(label(left, y0 + 16, mark + fits(name, width - 40, 12), attributes));
      else g.append(label(left - 10, y0 + each / 2 + 4, mark + fits(name, left - 30, 12), {...attributes, 'text-anchor': 'end'}));
      kinds.forEach(([ending, what], k) => {
        const tau = get(row, 'tau' + ending), low = get(row, 'low' + ending), high = get(row, 'high' + ending);
        if (!Number.isFinite(tau)) return;
        const y = y0 + (narrow ? 26 : 10) + 15 * k, colour = ink.groups[k];
        if (Number.isFinite(low)) g.append(svg('line', {x1: s(low), x2: s(high), y1: y, y2: y, stroke: colour, 'stroke-width': 2}));
        const exact = get(row, 'tau_exact' + ending);
        if (Math.abs(exact - tau) > 0.005) g.append(svg('line', {x1: s(exact), x2: s(exact), y1: y - 6, y2: y + 6, stroke: colour, 'stroke-width': 2}));
        g.append(marker(s(tau), y, 4.5, k, {fill: k ? ink.page : colour, stroke: colour, 'stroke-width': 1.5}));
        points.push({x: s(tau), y, lines: () => {
          const p = get(row, 'p' + ending), adjusted = get(row, `p${ending}_adjusted`);
          return [name, `${what}: tau ${tau.toFixed(2)}` + (Number.isFinite(low) ? `, 95% interval ${low.toFixed(2)} to ${high.toFixed(2)}` : ', no interval')]
            .concat(Math.abs(exact - tau) > 0.005 ? [`without measurement noise ${exact.toFixed(2)}`] : [],
              Number.isFinite(p) ? [`p ${brief(p, 2)}` + (Number.isFinite(adjusted) ? `, adjusted ${brief(adjusted, 2)}` : '')] : [],
              [`${get(row, 'n')} models`], mark ? ['pooled and within groups disagree'] : []);
        }});
      });
    });
    const caption = list.some((row) => Number.isFinite(get(row, 'low')))
      ? 'Dots: tau of the measured values. Lines: 95% intervals for tau of the exact values.'
      : 'Dots: tau of the measured values. There are no intervals.';
    return {node: g, height: bottom + 44, points, caption};
  }
  redraw = figure(box, 'tau', () => `Kendall's tau of each measure with ${D.gap}`, draw, () => [at, rows()]);
})();
