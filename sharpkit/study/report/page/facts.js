// Failures, notes, settings and origin.

(() => {
  const plain = (title, columns, rows) => el('div', {class: 'scroll', tabindex: 0, role: 'region', 'aria-label': title},
    el('table', null, el('caption', null, title),
      el('thead', null, el('tr', null, columns.map((c) => el('th', {scope: 'col'}, c)))),
      el('tbody', null, rows.map((row) => el('tr', null, row.map((v, i) =>
        el(i ? 'td' : 'th', {scope: i ? null : 'row', class: typeof v === 'number' ? 'number' : String(v).length > 40 ? 'long' : null},
          v === null ? '' : typeof v === 'number' ? v.toLocaleString('en') : broken(v))))))));
  const few = 200;
  if (D.failures.rows.length || D.notes.rows.length) {
    const box = section('problems', 'Failures and notes');
    if (D.failures.rows.length) {
      const rows = D.failures.rows;
      box.append(plain(`Failures (${rows.length.toLocaleString('en')})`, D.failures.columns, rows.slice(0, few)));
      if (rows.length > few) box.append(el('p', {class: 'dim'}, `${few} are shown; the table of scores has all.`));
    }
    if (D.notes.rows.length) {
      box.append(el('details', {open: D.notes.rows.length <= 12}, el('summary', null, `Notes (${(D.notes.rows.length + D.notes_left_out).toLocaleString('en')})`),
        plain('Notes of the measures', ['measure', 'note', 'times', 'first at'], D.notes.rows),
        D.notes_left_out ? [el('p', {class: 'dim'}, `${D.notes_left_out.toLocaleString('en')} more are in the study.`)] : []));
    }
  }
  const box = section('settings', 'Settings and origin');
  for (const facts of D.facts) if (facts.rows.length) box.append(plain(facts.title, facts.columns, facts.rows));
})();
