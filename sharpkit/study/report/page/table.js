// The table of all scores: sorted, filtered and shown a page at a time.

(() => {
  const rows = R.model.length;
  const collator = new Intl.Collator('en', {numeric: true, sensitivity: 'base'});
  // Texts are compared once each; rows are then sorted by numbers.
  const ranks = (texts) => {
    const order = texts.map((_, i) => i).sort((a, b) => collator.compare(texts[a], texts[b]) || (texts[a] < texts[b] ? -1 : 1));
    const rank = new Float64Array(texts.length);
    order.forEach((i, place) => { rank[i] = place; });
    return rank;
  };
  const nameRank = ranks(D.models.name), labelRank = ranks(D.labels), groupRank = ranks(D.groups);
  const orNaN = (i, rank) => (i < 0 ? NaN : rank[i]);
  const failed = (r) => R.failed[r] >= 0;
  const columns = [
    {name: 'checkpoint', key: (r) => nameRank[R.model[r]], text: (r) => D.models.name[R.model[r]]},
    {name: D.group || 'group', key: (r) => orNaN(D.models.group[R.model[r]], groupRank), text: (r) => groupName(R.model[r])},
    {name: 'measure', key: (r) => orNaN(R.label[r], labelRank), text: (r) => (R.label[r] < 0 ? '' : D.labels[R.label[r]])},
    {name: 'value', number: true, key: (r) => R.value[r], text: (r) => (failed(r) ? 'failed' : parted(R.shown[r], R.kind[r])[0])},
    {name: 'error', number: true, key: (r) => R.error[r], text: (r) => (failed(r) ? '' : parted(R.shown[r], R.kind[r])[1])},
    {name: 'data error', number: true, key: (r) => R.data[r], text: (r) => brief(R.data[r], 2)},
    {name: D.gap || 'gap', number: true, key: (r) => D.models.gap[R.model[r]], text: (r) => brief(D.models.gap[R.model[r]])},
    {name: 'converged', key: (r) => (failed(r) ? 0 : 1 + R.ok[r]), text: (r) => (failed(r) ? D.errors[R.failed[r]] : R.ok[r] ? 'yes' : 'no')},
  ];
  const shown = columns.filter((c, i) => (i !== 1 || D.group) && (i !== 6 || D.gap));
  const low = (texts) => texts.map((t) => t.toLowerCase());
  const lowNames = low(D.models.name), lowLabels = low(D.labels), lowGroups = low(D.groups), lowErrors = low(D.errors);

  let order = Uint32Array.from({length: rows}, (_, i) => i);
  let kept = order, page = 0, size = 25, sorted = null, up = true;
  const want = {text: '', label: '', group: '', problems: false};

  const box = section('table', 'Scores');
  const controls = el('div', {class: 'controls', role: 'search', 'aria-label': 'Filters of the table'});
  const body = el('tbody');
  const heads = shown.map((column) => {
    const button = el('button', {type: 'button', onclick: () => sort(column)}, column.name, el('span', {'aria-hidden': 'true', class: 'arrow'}));
    return el('th', {scope: 'col', 'aria-sort': 'none', class: column.number ? 'number' : null}, button);
  });
  const turned = pager('the table', (by) => { page += by; fill(); });

  function filter() {
    const text = want.text.toLowerCase();
    const hit = (list, i) => i >= 0 && list[i].includes(text);
    const names = lowNames.map((t) => t.includes(text)), labels = lowLabels.map((t) => t.includes(text));
    const one = want.label === '' ? -2 : Number(want.label), group = want.group === '' ? -2 : Number(want.group);
    kept = order.filter((r) => {
      const m = R.model[r], g = D.models.group[m];
      return (one === -2 || R.label[r] === one) && (group === -2 || g === group)
        && (!want.problems || failed(r) || !R.ok[r] || !Number.isFinite(R.value[r]))
        && (!text || names[m] || (R.label[r] >= 0 && labels[R.label[r]]) || hit(lowGroups, g) || hit(lowErrors, R.failed[r]));
    });
    page = 0;
    fill();
  }

  function sort(column) {
    up = sorted === column ? !up : true;
    sorted = column;
    const keys = Float64Array.from({length: rows}, (_, r) => column.key(r));
    const sign = up ? 1 : -1;
    // What has no number comes last either way; rows of one key keep their order in the study.
    order = Uint32Array.from({length: rows}, (_, i) => i).sort((a, b) => {
      const x = keys[a], y = keys[b];
      if (x === y) return a - b;
      if (x !== x || y !== y) return x !== x && y !== y ? a - b : x !== x ? 1 : -1;
      return x < y ? -sign : sign;
    });
    heads.forEach((head, i) => head.setAttribute('aria-sort', shown[i] !== column ? 'none' : up ? 'ascending' : 'descending'));
    filter();
  }

  function fill() {
    page = Math.max(0, Math.min(page, Math.ceil(kept.length / size) - 1));
    const first = page * size, last = Math.min(first + size, kept.length);
    body.replaceChildren(...Array.from(kept.subarray(first, last), (r) => {
      const bad = failed(r) || !R.ok[r];
      return el('tr', {class: bad ? 'bad' : null}, shown.map((column, i) =>
        el(i ? 'td' : 'th', {scope: i ? null : 'row', class: column.number ? 'number' : null}, column.number ? column.text(r) : broken(column.text(r)))));
    }));
    turned.show(first, last, kept.length, kept.length < rows ? `, filtered from ${rows.toLocaleString('en')}` : ' rows');
  }

  const indexed = (texts) => texts.map((t, i) => [String(i), t]).sort((a, b) => collator.compare(a[1], b[1]));
  controls.append(
    textbox('Text', (v) => { want.text = v; filter(); }),
    choice('Measure', [['', 'all'], ...indexed(D.labels)], '', (v) => { want.label = v; filter(); }));
  if (D.group) {
    controls.append(choice(D.group, [['', 'all'], ...indexed(D.groups)], '', (v) => { want.group = v; filter(); }));
  }
  controls.append(
    tick('only problems', (v) => { want.problems = v; filter(); }),
    choice('Rows', [['25', '25'], ['100', '100'], ['500', '500']], '25', (v) => { size = Number(v); page = 0; fill(); }));
  const all = () => [
    ['checkpoint', 'group', 'measure', 'value', 'probe_error', 'error_kind', 'data_error', 'gap', 'converged', 'error'],
    Array.from(kept, (r) => [
      D.models.name[R.model[r]], groupName(R.model[r]), R.label[r] < 0 ? '' : D.labels[R.label[r]], R.value[r], R.error[r],
      ['stderr', 'bound', 'lower_bound', 'rounding'][R.kind[r]], R.data[r], D.models.gap[R.model[r]],
      R.ok[r] ? 'True' : 'False', R.failed[r] < 0 ? '' : D.errors[R.failed[r]],
    ]),
  ];
  box.append(controls,
    el('div', {class: 'scroll tall', tabindex: 0, role: 'region', 'aria-label': 'Table of scores'},
      el('table', {id: 'scores'}, el('thead', null, el('tr', null, heads)), body)),
    turned,
    el('div', {class: 'buttons'}, el('span', {class: 'dim'}, 'Save these rows as'),
      el('button', {type: 'button', onclick: () => save('scores.csv', 'text/csv', csv(...all()))}, 'CSV')));
  filter();
})();
