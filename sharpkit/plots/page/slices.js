(() => {
'use strict';
const D = JSON.parse(document.getElementById('data').textContent);
const plot = document.getElementById('plot');
const PALETTE = ['#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#8a8a8a'];
const INK = '#ff8f45';

// The library reads some markup in texts: none of the user's is markup.
const plain = (text) => String(text).replace(/&/g, '&amp;').replace(/</g, '&lt;').replace(/>/g, '&gt;');
const digits = (v) => (v === null ? 'not known' : Number(v.toPrecision(5)).toString());

function hasWebGL() {
  try {
    const canvas = document.createElement('canvas');
    return Boolean(canvas.getContext('webgl') || canvas.getContext('experimental-webgl'));
  } catch (error) {
    return false;
  }
}

const flat = D.dim === 1;
const solid = !flat && hasWebGL();
const state = {slice: 0, value: 0, view: flat ? 'line' : solid ? 'surface' : 'contour', log: D.log};

function element(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function choice(label, id, options, key) {
  const control = element('select', {id}, ...options.map(([value, text, disabled]) =>
    element('option', {value, disabled: Boolean(disabled)}, text)));
  control.value = String(state[key]);
  control.addEventListener('change', () => {
    state[key] = typeof state[key] === 'number' ? Number(control.value) : control.value;
    draw();
  });
  return element('label', {}, label + ' ', control);
}

function controls() {
  const bar = document.getElementById('controls');
  const one = D.slices[0];
  if (D.slices.length > 1 && !flat) {
    bar.append(choice('Slice', 'slice', D.slices.map((s, i) => [String(i), s.name]), 'slice'));
  }
  if (one.values.length > 1) {
    bar.append(choice('Value', 'value', one.values.map((v, i) => [String(i), v.name]), 'value'));
  }
  if (!flat) {
    bar.append(choice('View', 'view', [['surface', 'surface', !solid], ['contour', 'contours']], 'view'));
  }
  const tick = element('input', {type: 'checkbox', id: 'log', checked: state.log});
  tick.addEventListener('change', () => { state.log = tick.checked; draw(); });
  bar.append(element('label', {}, tick, ' logarithmic'));
  if (!flat && !solid) {
    const message = document.getElementById('message');
    message.textContent = 'This browser shows no three-dimensional graphics (WebGL is missing or switched off): contours are shown instead.';
    message.hidden = false;
  }
}

// The range over all slices, so that they can be compared.
function range() {
  const known = D.slices.flatMap((s) => s.values[state.value].values.flat()).filter((v) => v !== null);
  let low = Infinity, high = -Infinity, least = Infinity;
  for (const v of known) {
    if (v < low) low = v;
    if (v > high) high = v;
    if (v > 0 && v < least) least = v;
  }
  const log = state.log && low >= 0 && high > 0;
  if (log) low = Math.max(least, high * 1e-6);
  if (!(high > low)) [low, high] = log ? [low / 1.1, low * 1.1] : [low - 0.5, high + 0.5];
  return {low, high, log, onto: (v) => (v === null ? null : log ? Math.log10(Math.max(v, low)) : v)};
}

function ticks(scale) {
  if (!scale.log) return {};
  const decades = Math.log10(scale.high / scale.low);
  const marks = decades > 3 ? [1] : [1, 2, 5];
  const step = Math.max(1, Math.ceil(decades / 7));
  const values = [];
  for (let k = Math.floor(Math.log10(scale.low)); k <= Math.log10(scale.high); k += step) {
    for (const m of marks) {
      const v = m * 10 ** k;
      if (v >= scale.low * 0.999 && v <= scale.high * 1.001) values.push(v);
    }
  }
  if (values.length < 2) values.splice(0, values.length, scale.low, scale.high);
  return {tickvals: values.map(Math.log10), ticktext: values.map((v) => String(Number(v.toPrecision(3))))};
}

function texts(s, value) {
  const coordinate = (i, j) => (flat ? [s.x[i]] : [s.x[i], s.y[j]])
    .map((c, k) => plain(s.axes[k]) + ': ' + digits(c));
  const one = (i, j) => {
    const pick = (a) => (a === null ? null : flat ? a[i] : a[j][i]);
    const error = pick(value.errors);
    const lines = [...coordinate(i, j),
      plain(value.name) + ': ' + digits(pick(value.values)) + (error === null ? '' : ' ± ' + digits(error)),
      plain(D.words[pick(s.status)])];
    return lines.join('<br>');
  };
  return flat ? s.x.map((_, i) => one(i)) : s.y.map((_, j) => s.x.map((_, i) => one(i, j)));
}

const ink = () => getComputedStyle(document.documentElement);

function base(scale, s, value) {
  const style = ink();
  const color = style.getPropertyValue('--ink').trim();
  const line = style.getPropertyValue('--line').trim();
  const axis = (text, more) => ({title: {text: plain(text), font: {size: 13}}, gridcolor: line, zerolinecolor: line, color, ...more});
  const page = style.getPropertyValue('--page').trim();
  return {
    axis,
    layout: {
      paper_bgcolor: page, plot_bgcolor: page, font: {color, size: 12}, showlegend: flat, autosize: true,
      margin: {l: 60, r: 10, t: 30, b: 60}, legend: {orientation: 'h', y: 1.12}, uirevision: 'kept',
      hoverlabel: {align: 'left'},
    },
    bar: {title: {text: plain(value.name), side: 'right'}, thickness: 14, tickcolor: color, ...ticks(scale)},
  };
}

function marks(s, scale, three) {
  const path = s.markers.filter((m) => m.joined), others = s.markers.filter((m) => !m.joined);
  const trace = (list, mode, symbol) => ({
    type: three ? 'scatter3d' : 'scatter', mode, name: 'markers',
    x: list.map((m) => m.at[0]), y: list.map((m) => m.at[1]),
    ...(three ? {z: list.map((m) => scale.onto(m.heights[state.value]))} : {}),
    text: list.map((m) => plain(m.label)), hoverinfo: 'text', textposition: 'top center',
    marker: {color: INK, size: three ? 5 : 9, symbol, line: {color: '#000000', width: 1}},
    line: {color: INK, width: three ? 4 : 2}, showlegend: false,
  });
  return [...(path.length ? [trace(path, 'lines+markers', 'circle')] : []),
    ...(others.length ? [trace(others, 'markers+text', 'diamond')] : [])];
}

function surface(s, value, scale) {
  const {axis, layout, bar} = base(scale, s, value);
  const z = value.values.map((row) => row.map(scale.onto));
  const ends = {cmin: scale.onto(scale.low), cmax: scale.onto(scale.high)};
  const trace = {type: 'surface', x: s.x, y: s.y, z, colorscale: 'Viridis', ...ends, colorbar: bar,
    connectgaps: false, text: texts(s, value), hoverinfo: 'text', lighting: {ambient: 0.75, diffuse: 0.5, specular: 0.05}};
  layout.margin = {l: 0, r: 0, t: 36, b: 0};
  const bars = ticks(scale);
  layout.scene = {
    xaxis: axis(s.axes[0]), yaxis: axis(s.axes[1]),
    zaxis: axis(value.name, {range: [ends.cmin, ends.cmax], ...bars}),
    aspectmode: 'manual', aspectratio: {x: 1, y: 1, z: 0.7}, camera: {eye: {x: 1.4, y: -1.4, z: 0.95}, center: {x: 0, y: 0, z: -0.15}},
  };
  return [[trace, ...marks(s, scale, true)], layout];
}

function contour(s, value, scale) {
  const {axis, layout, bar} = base(scale, s, value);
  const [start, end] = [scale.onto(scale.low), scale.onto(scale.high)];
  const trace = {type: 'contour', x: s.x, y: s.y, z: value.values.map((row) => row.map(scale.onto)),
    colorscale: 'Viridis', zmin: start, zmax: end, autocontour: false, colorbar: bar, connectgaps: false,
    contours: {start, end, size: (end - start) / 14, coloring: 'fill'}, line: {width: 0.5},
    text: texts(s, value), hoverinfo: 'text'};
  const hover = texts(s, value);
  const lost = {x: [], y: [], text: [], symbol: []};
  s.y.forEach((y, j) => s.x.forEach((x, i) => {
    if (value.values[j][i] !== null) return;
    lost.x.push(x); lost.y.push(y); lost.text.push(hover[j][i]);
    lost.symbol.push(s.status[j][i] === 3 ? 'x-thin' : s.status[j][i] === 2 ? 'triangle-up' : 'circle');
  }));
  const gaps = {type: 'scatter', mode: 'markers', name: 'gaps', x: lost.x, y: lost.y, text: lost.text, hoverinfo: 'text',
    marker: {symbol: lost.symbol, size: 4, color: '#8a8a8a', line: {color: '#8a8a8a', width: 1}}, showlegend: false};
  layout.xaxis = axis(s.axes[0], {range: [s.x[0], s.x[s.x.length - 1]]});
  const square = s.alike ? {scaleanchor: 'x', constrain: 'domain'} : {};
  layout.xaxis.constrain = 'domain';
  layout.yaxis = axis(s.axes[1], {range: [s.y[0], s.y[s.y.length - 1]], ...square});
  return [[trace, ...(lost.x.length ? [gaps] : []), ...marks(s, scale, false)], layout];
}

function lines(scale) {
  const first = D.slices[0], value = first.values[state.value];
  const {axis, layout} = base(scale, first, value);
  const traces = D.slices.map((s, k) => {
    const v = s.values[state.value];
    return {type: 'scatter', mode: s.x.length > 80 ? 'lines' : 'lines+markers', connectgaps: false, x: s.x, y: v.values,
      name: plain(s.name), text: texts(s, v), hoverinfo: 'text', showlegend: D.slices.length > 1,
      line: {color: PALETTE[k % PALETTE.length]}, marker: {size: 5}};
  });
  layout.xaxis = axis(first.axes[0]);
  layout.yaxis = axis(value.name, {type: scale.log ? 'log' : 'linear'});
  return [traces, layout];
}

function draw() {
  const s = D.slices[state.slice], value = s.values[state.value], scale = range();
  const [traces, layout] = flat ? lines(scale) : state.view === 'surface' ? surface(s, value, scale) : contour(s, value, scale);
  const log = document.getElementById('log');
  log.disabled = state.log && !scale.log;
  // Only what needs no network.
  const buttons = state.view === 'surface'
    ? ['orbitRotation', 'pan3d', 'zoom3d', 'resetCameraDefault3d', 'toImage']
    : ['zoom2d', 'pan2d', 'zoomIn2d', 'zoomOut2d', 'resetScale2d', 'toImage'];
  Plotly.react(plot, traces, layout, {responsive: true, displaylogo: false, modeBarButtons: [buttons], toImageButtonOptions: {filename: 'slice'}});
  document.getElementById('caption').textContent = flat ? D.caption : s.caption;
  document.getElementById('gaps').textContent = flat ? D.slices.filter((t) => t.gaps).map((t) => t.name + ': ' + t.gaps).join(' ') : s.gaps;
  const notes = flat ? [...new Set(D.slices.flatMap((t) => t.notes))] : s.notes;
  document.getElementById('notes').replaceChildren(...notes.map((n) => element('li', {}, n)));
}

controls();
draw();
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);
})();
