// What all parts of the page use: the data, elements, tips, saving.

const D = JSON.parse(document.getElementById('data').textContent);
const main = document.getElementById('main');
const tip = document.getElementById('tip');
const redraws = [];

const num = (v) => (v === null ? NaN : typeof v === 'string' ? (v === 'inf' ? Infinity : -Infinity) : v);

// Characters that steer text, or that no one sees, are written out.
const visible = (text) => String(text).replace(
  /[\u0000-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]/gu,
  (c) => '\\u' + c.charCodeAt(0).toString(16).padStart(4, '0'));

// Children are nodes, or texts that become text nodes: nothing is ever read as HTML.
function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, '');
    else if (value !== false && value !== null) node.setAttribute(name, visible(value));
  }
  for (const child of children.flat()) {
    node.append(child instanceof Node ? child : visible(child));
  }
  return node;
}

// Long names may break after what separates their parts.
function broken(text) {
  const parts = visible(text).split(/(?<=[_/,(=\s])/);
  return parts.flatMap((part, i) => (i ? [document.createElement('wbr'), document.createTextNode(part)] : [document.createTextNode(part)]));
}

function section(id, title) {
  const heading = el('h2', {id: id + '-title'}, title);
  const node = el('section', {id, 'aria-labelledby': id + '-title'}, heading);
  main.append(node);
  document.getElementById('nav').append(el('a', {href: '#' + id}, title));
  return node;
}

function choice(label, options, value, change) {
  const control = el('select', {onchange: () => change(control.value)},
    options.map(([key, text]) => el('option', {value: key, selected: key === value}, text)));
  // The key itself, not as it is shown.
  options.forEach(([key], i) => { control.options[i].value = key; });
  return el('label', null, label + ' ', control);
}

function tick(label, change) {
  const control = el('input', {type: 'checkbox', onchange: () => change(control.checked)});
  return el('label', {class: 'tick'}, control, ' ' + label);
}

function textbox(label, change) {
  let waiting = 0;
  const control = el('input', {type: 'search', oninput: () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => change(control.value), 120);
  }});
  return el('label', null, label + ' ', control);
}

// Buttons that turn pages, and say which one it is.
function pager(what, turn) {
  const state = el('span', {'aria-live': 'polite'});
  const back = el('button', {type: 'button', onclick: () => turn(-1)}, 'Back');
  const on = el('button', {type: 'button', onclick: () => turn(1)}, 'Next');
  const node = el('div', {class: 'pager', role: 'group', 'aria-label': 'Pages of ' + what}, back, on, state);
  node.show = (first, last, total, more) => {
    back.disabled = first <= 0;
    on.disabled = last >= total;
    state.textContent = total
      ? `${(first + 1).toLocaleString('en')} to ${last.toLocaleString('en')} of ${total.toLocaleString('en')}${more || ''}`
      : 'none' + (more || '');
  };
  return node;
}

function speak(text) { document.getElementById('spoken').textContent = visible(text); }

function showTip(lines, x, y) {
  tip.replaceChildren(...lines.map((line) => el('div', null, line)));
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const edge = document.documentElement.clientWidth - box.width - 8;
  tip.style.left = Math.max(4, Math.min(x + 12, edge)) + 'px';
  tip.style.top = (y + 16 + box.height > window.innerHeight ? y - box.height - 10 : y + 14) + 'px';
}

function hideTip() { tip.hidden = true; }

document.addEventListener('keydown', (event) => { if (event.key === 'Escape') hideTip(); });
document.addEventListener('scroll', hideTip, true);

function save(name, kind, content) {
  const blob = content instanceof Blob ? content : new Blob([content], {type: kind});
  const link = el('a', {download: name});
  link.href = URL.createObjectURL(blob);
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

const quoted = (v) => (/[",\n\r]/.test(v) ? '"' + v.replace(/"/g, '""') + '"' : v);
function csv(columns, rows) {
  const cell = (v) => (v === null || v === undefined || v !== v ? '' : quoted(String(v)));
  return [columns, ...rows].map((row) => row.map(cell).join(',')).join('\r\n') + '\r\n';
}

const least = (values) => values.reduce((a, b) => Math.min(a, b), Infinity);
const most = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity);

const fileName = (text) => text.replace(/[^A-Za-z0-9_.=-]+/g, '_').slice(0, 80);

// A number without an error: four digits.
function brief(v, digits = 4) {
  if (Number.isNaN(v)) return '';
  if (!Number.isFinite(v)) return v > 0 ? 'inf' : '-inf';
  if (v !== 0 && (Math.abs(v) < 1e-3 || Math.abs(v) >= 1e6)) {
    return v.toExponential(digits - 1).replace(/\.?0+e/, 'e');
  }
  return String(Number(v.toPrecision(digits)));
}

const KINDS = ['1 se', 'bound', 'room', 'rounding'];
// What a row says of its error: the digits come with the data.
function parted(shown, kind) {
  const bound = /^>= (.*?)(?: \(\+(.*)\))?$/.exec(shown);
  if (bound) return ['\u2265 ' + bound[1], bound[2] ? `+${bound[2]} room` : 'unknown room'];
  const [value, error] = shown.split(' ± ');
  if (error === '?') return [value, 'unknown'];
  if (error === undefined) return [value, kind === 3 ? 'rounding' : ''];
  return [value, `${error} ${KINDS[kind] || ''}`];
}

const R = D.rows;
R.value = Float64Array.from(R.value, num);
R.error = Float64Array.from(R.error, num);
R.data = Float64Array.from(R.data, num);
D.models.gap = Float64Array.from(D.models.gap, num);
const groupName = (model) => (D.models.group[model] < 0 ? '' : D.groups[D.models.group[model]]);
const shortName = (path) => path.slice(path.lastIndexOf('/') + 1).replace(/\.(safetensors|pth?|ckpt|bin)$/, '');

document.getElementById('about').textContent = visible(
  `${new Set(D.models.name).size.toLocaleString('en')} checkpoints, ${R.label.filter((l) => l >= 0).length.toLocaleString('en')} scores of `
  + `${D.labels.length} measures and settings in ${D.study}. Made ${D.made} by sharpkit ${D.version}.`);
if (D.warnings.length) {
  main.append(el('div', {class: 'warn', role: 'note'},
    D.warnings.map((text) => el('p', null, text))));
}

document.getElementById('theme').addEventListener('change', (event) => {
  document.documentElement.dataset.theme = event.target.value;
  redraws.forEach((draw) => draw());
});
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => redraws.forEach((draw) => draw()));
