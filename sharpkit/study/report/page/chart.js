// Figures: axes, markers, points that keys can reach, and saving as SVG, PNG and CSV.

const SVG = 'http://www.w3.org/2000/svg';
const FONT = 'system-ui, sans-serif';

function svg(tag, attributes, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== null) node.setAttribute(name, value);
  }
  for (const child of children.flat()) node.append(child instanceof Node ? child : visible(child));
  return node;
}

function paint() {
  const style = getComputedStyle(document.documentElement);
  const get = (name) => style.getPropertyValue(name).trim();
  return {
    ink: get('--ink'), dim: get('--dim'), line: get('--line'), page: get('--page'), accent: get('--accent'),
    groups: [0, 1, 2, 3, 4, 5, 6].map((i) => get('--group-' + i)),
  };
}

const SHAPES = ['circle', 'square', 'up', 'diamond', 'down', 'plus', 'cross'];
function marker(x, y, r, i, attributes) {
  const shape = SHAPES[(i + Math.floor(i / 7)) % 7];
  const a = r * 1.15, b = r * 0.42;
  const outline = {
    circle: `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0Z`,
    square: `M${-r * .9},${-r * .9}h${r * 1.8}v${r * 1.8}h${-r * 1.8}Z`,
    up: `M0,${-a}L${a},${r * .9}L${-a},${r * .9}Z`,
    down: `M0,${a}L${a},${-r * .9}L${-a},${-r * .9}Z`,
    diamond: `M0,${-a * 1.1}L${a * 1.1},0L0,${a * 1.1}L${-a * 1.1},0Z`,
    plus: `M${-b},${-a}h${2 * b}v${a - b}h${a - b}v${2 * b}h${b - a}v${a - b}h${-2 * b}v${b - a}h${b - a}v${-2 * b}h${a - b}Z`,
    cross: `M0,${-b}L${a - b},${-a}L${a},${b - a}L${b},0L${a},${a - b}L${a - b},${a}L0,${b}L${b - a},${a}L${-a},${a - b}L${-b},0L${-a},${b - a}L${b - a},${-a}Z`,
  }[shape];
  return svg('path', {d: outline, transform: `translate(${x.toFixed(1)},${y.toFixed(1)})`, ...attributes});
}

// From numbers to places. Symmetric logarithm: linear within `small` of zero.
function scale(kind, low, high, from, to) {
  const small = Math.max(Math.abs(low), Math.abs(high)) * 1e-4 || 1;
  const f = {
    linear: (v) => v, log: (v) => Math.log10(v), symlog: (v) => Math.asinh(v / (2 * small)) / Math.LN10,
  }[kind];
  const a = f(low), b = f(high);
  const place = (v) => from + (to - from) * (b === a ? 0.5 : (f(v) - a) / (b - a));
  return Object.assign(place, {kind, low, high, small});
}

function ticksOf(s, many) {
  const {low, high, kind} = s;
  if (kind === 'log') {
    const decades = Math.log10(high / low);
    if (decades > 0.9) {
      const steps = decades < 3 ? [1, 2, 5] : [1];
      const every = Math.max(1, Math.ceil(decades / many));
      const found = [];
      for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++) {
        if (e % every) continue;
        for (const k of steps) {
          const v = Number(`${k}e${e}`);
          if (v >= low && v <= high) found.push(v);
        }
      }
      if (found.length > 1) return found;
    }
  }
  if (kind === 'symlog') {
    const found = [0].filter((v) => low <= v && v <= high);
    const top = Math.floor(Math.log10(Math.max(Math.abs(low), Math.abs(high))));
    for (let e = top; e > top - 4; e -= many < 6 ? 2 : 1) {
      for (const v of [Number(`1e${e}`), Number(`-1e${e}`)]) if (v >= low && v <= high) found.push(v);
    }
    return found;
  }
  const raw = (high - low) / many || 1;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = unit * ([1, 2, 5, 10].find((k) => k * unit >= raw) || 10);
  const found = [];
  for (let k = Math.ceil(low / step); k * step <= high * (1 + 1e-12) + 1e-300; k++) {
    found.push(Number((k * step).toPrecision(10)));
  }
  return found;
}

const fits = (text, width, size) => {
  const most = Math.max(3, Math.floor(width / (size * 0.56)));
  return text.length <= most ? text : text.slice(0, Math.ceil(most / 2) - 1) + '…' + text.slice(text.length - Math.floor(most / 2));
};

const tail = (text, many) => (text.length <= many ? text : '…' + text.slice(1 - many));

function label(x, y, text, attributes) {
  return svg('text', {x: x.toFixed(1), y: y.toFixed(1), 'font-size': 12, ...attributes}, text);
}

function axisX(g, s, y, height, ink, title) {
  for (const v of ticksOf(s, Math.max(3, Math.abs(s(s.high) - s(s.low)) / 80))) {
    g.append(svg('line', {x1: s(v), x2: s(v), y1: y, y2: y - height, stroke: ink.line}));
    g.append(label(s(v), y + 16, brief(v), {'text-anchor': 'middle', fill: ink.dim}));
  }
  g.append(svg('line', {x1: s(s.low), x2: s(s.high), y1: y, y2: y, stroke: ink.dim}));
  g.append(label((s(s.low) + s(s.high)) / 2, y + 34, title, {'text-anchor': 'middle', fill: ink.ink}));
}

function axisY(g, s, x, width, ink, title) {
  for (const v of ticksOf(s, 5)) {
    g.append(svg('line', {x1: x, x2: x + width, y1: s(v), y2: s(v), stroke: ink.line}));
    g.append(label(x - 6, s(v) + 4, brief(v), {'text-anchor': 'end', fill: ink.dim}));
  }
  g.append(svg('line', {x1: x, x2: x, y1: s(s.low), y2: s(s.high), stroke: ink.dim}));
  const middle = (s(s.low) + s(s.high)) / 2;
  g.append(label(14, middle, title, {'text-anchor': 'middle', fill: ink.ink, transform: `rotate(-90 14 ${middle})`}));
}

// A row of keys above a figure; returns the height that it takes.
function legend(g, items, left, width, ink) {
  let x = left, y = 14;
  for (const [text, draw] of items) {
    const shown = fits(visible(text), width - 24, 12);
    const need = 26 + shown.length * 6.6;
    if (x > left && x + need > left + width) { x = left; y += 18; }
    g.append(draw(x + 7, y - 4), label(x + 18, y, shown, {fill: ink.ink}));
    x += need;
  }
  return items.length ? y + 8 : 4;
}

// One figure: `draw(width, ink)` returns {node, height, points}; a point has x, y and lines.
function figure(parent, name, title, draw, table) {
  const box = el('div', {class: 'plot'});
  const caption = el('figcaption', {'aria-live': 'polite'});
  const button = (text, action) => el('button', {type: 'button', onclick: action}, text);
  const file = (kind) => fileName(`${typeof name === 'function' ? name() : name}.${kind}`);
  let canvas = null, points = [], at = -1, shown = 0;

  function redraw() {
    const width = Math.max(Math.floor(box.clientWidth), 280);
    const made = draw(width, paint());
    canvas = svg('svg', {
      xmlns: SVG, width, height: made.height, viewBox: `0 0 ${width} ${made.height}`, 'font-family': FONT,
      role: 'application', tabindex: 0, 'aria-label': visible(`${title()}. Arrow keys go through ${made.points.length} points.`),
    }, svg('rect', {width, height: made.height, fill: paint().page}), made.node);
    points = made.points;
    at = -1;
    shown = width;
    const ring = svg('circle', {r: 9, fill: 'none', stroke: paint().accent, 'stroke-width': 2, visibility: 'hidden', class: 'ring'});
    canvas.append(ring);
    const tell = (p, spoken) => {
      ring.setAttribute('cx', p.x);
      ring.setAttribute('cy', p.y);
      ring.setAttribute('visibility', 'visible');
      const place = canvas.getBoundingClientRect();
      showTip(p.lines(), place.left + p.x, place.top + p.y);
      if (spoken) speak(p.lines().join('; '));
    };
    const leave = () => { ring.setAttribute('visibility', 'hidden'); hideTip(); };
    canvas.addEventListener('pointermove', (event) => {
      const place = canvas.getBoundingClientRect();
      const x = event.clientX - place.left, y = event.clientY - place.top;
      let best = null, near = 400;
      for (const p of points) {
        const away = p.box
          ? (Math.abs(x - p.x) <= p.box[0] / 2 && Math.abs(y - p.y) <= p.box[1] / 2 ? 0 : Infinity)
          : (x - p.x) ** 2 + (y - p.y) ** 2;
        if (away < near) { best = p; near = away; }
      }
      if (best) tell(best); else leave();
    });
    canvas.addEventListener('pointerleave', leave);
    canvas.addEventListener('blur', leave);
    canvas.addEventListener('keydown', (event) => {
      const step = {ArrowRight: 1, ArrowDown: made.row || 1, ArrowLeft: -1, ArrowUp: -(made.row || 1)}[event.key];
      const end = {Home: 0, End: points.length - 1}[event.key];
      if (!points.length || (step === undefined && end === undefined)) return;
      event.preventDefault();
      at = end !== undefined ? end : at < 0 ? 0 : Math.max(0, Math.min(points.length - 1, at + step));
      tell(points[at], true);
    });
    box.replaceChildren(canvas);
    caption.textContent = visible(made.caption || '');
  }

  const text = () => {
    const copy = canvas.cloneNode(true);
    copy.querySelectorAll('.ring').forEach((ring) => ring.remove());
    for (const a of ['role', 'tabindex']) copy.removeAttribute(a);
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + new XMLSerializer().serializeToString(copy);
  };
  const png = () => {
    const image = new Image();
    const url = URL.createObjectURL(new Blob([text()], {type: 'image/svg+xml'}));
    image.onload = () => {
      const board = el('canvas', {width: image.width * 2, height: image.height * 2});
      board.getContext('2d').drawImage(image, 0, 0, board.width, board.height);
      URL.revokeObjectURL(url);
      board.toBlob((blob) => save(file('png'), 'image/png', blob));
    };
    image.src = url;
  };
  parent.append(el('figure', null, box, caption, el('div', {class: 'buttons', role: 'group', 'aria-label': 'Save the figure'},
    el('span', {class: 'dim'}, 'Save as'),
    button('SVG', () => save(file('svg'), 'image/svg+xml', text())),
    button('PNG', png),
    button('CSV', () => { const [columns, rows] = table(); save(file('csv'), 'text/csv', csv(columns, rows)); }))));
  redraws.push(redraw);
  new ResizeObserver(() => {
    if (Math.max(Math.floor(box.clientWidth), 280) !== shown) redraw();
  }).observe(box);
  redraw();
  return redraw;
}
