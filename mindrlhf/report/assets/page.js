// Draws the page's data. Text from a run goes through textContent only.
(() => {
'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const several = data.runs.length > 1;
const all = (selector, host = document) => [...host.querySelectorAll(selector)];

function element(name, options = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(options)) {
    if (key.startsWith('on')) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function format(value) {
  if (value === null || value === undefined) return '–';
  return typeof value === 'string' ? value : String(Number(value.toPrecision(3))).replaceAll('-', '−');
}

// Curves. A plot is drawn when it comes into view, and again when it has become stale.
const plots = all('.plot');
const shown = new Set();
const stale = new Set(plots);
const hidden = new Set();
let weight = data.smoothing;

// Exponential moving average without the pull of its start, as TensorBoard draws it; gaps stay gaps.
// One huge first value (the first iteration compiles) would pull the next ones along, so it stays out.
function smoothed(values, slow) {
  let sum = 0;
  let total = 0;
  return values.map((value, place) => {
    if (value === null || (slow && place === 0)) return value;
    sum = sum * weight + value * (1 - weight);
    total = total * weight + (1 - weight);
    return sum / total;
  });
}

function tracesOf(traces) {
  return traces.filter((trace) => !hidden.has(trace.meta.run)).flatMap((trace) => {
    if (!weight || !trace.meta.smooth) return [trace];
    const line = { ...trace, y: smoothed(trace.y, trace.meta.slow), mode: 'lines', hoverinfo: 'skip', hovertemplate: null };
    return [{ ...trace, opacity: 0.3 }, line];
  });
}

function layoutOf(layout) {
  const style = getComputedStyle(document.documentElement);
  const [ink, soft, grid, card] = ['--ink', '--soft', '--grid', '--card'].map((name) => style.getPropertyValue(name).trim());
  // On a touch screen a drag scrolls the page.
  const fixedrange = matchMedia('(pointer: coarse)').matches;
  const axis = { gridcolor: grid, linecolor: grid, fixedrange };
  return {
    ...layout, paper_bgcolor: card, plot_bgcolor: card, font: { color: soft, size: 11 }, hoverlabel: { bgcolor: card, bordercolor: grid, font: { color: ink, size: 12 } },
    xaxis: { ...layout.xaxis, ...axis }, yaxis: { ...layout.yaxis, ...axis },
  };
}

function draw(plot) {
  const { data: traces, layout } = data.plots[plot.dataset.plot];
  const first = !plot.data;
  stale.delete(plot);
  Plotly.react(plot, tracesOf(traces), layoutOf(layout), { displayModeBar: false, responsive: true });
  if (first) {
    plot.on('plotly_hover', ({ xvals }) => readAt(xvals[0], plot));
    plot.on('plotly_unhover', () => readAt(null, plot));
  }
}

let asked = 0;
function redraw() {
  plots.forEach((plot) => stale.add(plot));
  cancelAnimationFrame(asked);
  asked = requestAnimationFrame(() => shown.forEach(draw));
}

// All plots in view tell their values at the same iteration.
function readAt(x, from) {
  for (const plot of shown) {
    if (plot === from || !plot.data) continue;
    if (x === null) Plotly.Fx.unhover(plot);
    else Plotly.Fx.hover(plot, { xval: x }, 'xy', true);
  }
}

function readByKey(plot) {
  let place = -1;
  plot.addEventListener('keydown', (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === 'Escape') readAt(null);
    if (!step || !plot.data || !plot.data.length) return;
    event.preventDefault();
    const { x } = plot.data[0];
    place = Math.min(x.length - 1, Math.max(0, place + step));
    readAt(x[place]);
  });
}

function startCurves() {
  const observer = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) shown.add(target);
      else shown.delete(target);
      if (isIntersecting && stale.has(target)) draw(target);
    }
  }, { rootMargin: '200px' });
  plots.forEach((plot) => { observer.observe(plot); readByKey(plot); });
  addEventListener('beforeprint', () => stale.forEach(draw));
  const slider = document.getElementById('smoothing');
  slider.value = weight;
  slider.nextElementSibling.value = weight.toFixed(2);
  slider.addEventListener('input', () => {
    weight = Number(slider.value);
    slider.nextElementSibling.value = weight.toFixed(2);
    redraw();
  });
  for (const button of all('button.run')) {
    button.addEventListener('click', () => {
      const run = Number(button.dataset.run);
      if (!hidden.delete(run)) hidden.add(run);
      button.setAttribute('aria-pressed', String(!hidden.has(run)));
      redraw();
    });
  }
}

function startTheme() {
  const root = document.documentElement;
  const dark = matchMedia('(prefers-color-scheme: dark)');
  const paint = (scheme) => { root.dataset.theme = scheme; redraw(); };
  let chosen = null;
  try { chosen = localStorage.getItem('mindrlhf-theme'); } catch { /* A page opened from a file may have no storage. */ }
  root.dataset.theme = chosen || (dark.matches ? 'dark' : 'light');
  dark.addEventListener('change', () => { if (!chosen) paint(dark.matches ? 'dark' : 'light'); });
  document.getElementById('theme').addEventListener('click', () => {
    chosen = root.dataset.theme === 'dark' ? 'light' : 'dark';
    try { localStorage.setItem('mindrlhf-theme', chosen); } catch { /* Then it lasts as long as the page. */ }
    paint(chosen);
  });
}

// Texts of samples.
const [RUN, ITERATION, PROMPT, RESPONSE, SCORE, KL] = [0, 1, 2, 3, 4, 5];
const TURN = /<\|im_start\|>([^\n<]*)\n([\s\S]*?)(?:<\|im_end\|>\n?|(?=<\|im_start\|>)|$)/g;

// Text with what was searched for marked and control tokens set apart.
function rich(text, wanted) {
  return text.split(/(<\|[\w.-]+\|>)/).flatMap((part) => {
    if (/^<\|[\w.-]+\|>$/.test(part)) return [element('span', { class: 'token' }, part)];
    const lower = part.toLowerCase();
    if (!wanted || lower.length !== part.length) return [part];
    const found = [];
    let from = 0;
    for (let at = lower.indexOf(wanted); at >= 0; at = lower.indexOf(wanted, from)) {
      found.push(part.slice(from, at), element('mark', {}, part.slice(at, at + wanted.length)));
      from = at + wanted.length;
    }
    return [...found, part.slice(from)];
  });
}

// [role, content] of each ChatML turn; none when the text is something else.
function turnsOf(text) {
  const turns = [...text.matchAll(TURN)];
  return turns.reduce((sum, turn) => sum + turn[0].length, 0) === text.length ? turns.map(([, role, content]) => [role, content]) : [];
}

const systemOf = (text) => (turnsOf(text).find(([role]) => role === 'system') || [])[1];
// The system prompt that all prompts share is shown once and not in every row.
const system = data.prompts.length > 1 && data.prompts.every((text) => systemOf(text) === systemOf(data.prompts[0])) ? systemOf(data.prompts[0]) : undefined;
for (const note of all('.system-note')) note.textContent = system === undefined ? '' : `System prompt of all: ${system}`;

// A prompt as its ChatML turns; anything else as it stands. Long texts are folded.
function textBlock(text, wanted = '') {
  const block = element('div', { class: 'block', dir: 'auto' });
  const turns = turnsOf(text);
  for (const [role, content] of turns) {
    if (!content || (role === 'system' && content === system)) continue;
    block.append(element('div', { class: `turn ${role === 'system' ? 'small' : ''}` }, element('span', { class: 'role' }, role), ...rich(content, wanted)));
  }
  if (!turns.length) block.append(...rich(text, wanted));
  if (text.length < 420 && text.split('\n').length < 9) return [block];
  block.classList.add('clamped');
  const more = element('button', { type: 'button', class: 'more', onclick() { more.textContent = block.classList.toggle('clamped') ? 'Show all' : 'Show less'; } }, 'Show all');
  return [block, more];
}

// A score on a ground between red (the lowest 3 %) and green (the highest).
function scoreScale(rows) {
  const known = rows.map((row) => row[SCORE]).filter(Number.isFinite).sort((a, b) => a - b);
  const [low, high] = [known[Math.floor(known.length * 0.03)], known[Math.ceil(known.length * 0.97) - 1]];
  return (score) => {
    const pill = element('span', { class: 'pill' }, format(score));
    const part = Number.isFinite(score) && high > low ? (score - low) / (high - low) : 0.5;
    pill.style.setProperty('--t', Math.min(1, Math.max(0, part)).toFixed(2));
    return pill;
  };
}

// Numbers in order, what is not a number last.
function compareBy(column, direction) {
  return (a, b) => {
    const [left, right] = [a[column], b[column]].map(Number.isFinite);
    return left && right ? (a[column] - b[column]) * direction : right - left;
  };
}

// Samples as a table to search, sort and page through.
function sampleView(host) {
  const { samples: rows } = data;
  const at = (selector) => host.querySelector(selector);
  const state = { page: 0, column: ITERATION, direction: -1, wanted: '', from: -Infinity, to: Infinity, run: -1 };
  const pill = scoreScale(rows);
  const pageRows = 25;
  let texts = null;

  function rowOf(row) {
    const cell = (label, kind, ...children) => element('td', { class: kind, 'data-label': label }, ...children);
    const name = several ? [cell('Run', 'run-name', element('i', { class: `swatch c${row[RUN] % 8}` }), data.runs[row[RUN]])] : [];
    return element(
      'tr', {}, ...name, cell('Iteration', 'number', String(row[ITERATION])),
      cell('Prompt', 'text', ...textBlock(data.prompts[row[PROMPT]], state.wanted)), cell('Response', 'text', ...textBlock(row[RESPONSE], state.wanted)),
      cell('Score', 'number', pill(row[SCORE])), cell('KL', 'number', format(row[KL])),
    );
  }

  function update(change) {
    Object.assign(state, { page: 0 }, change);
    if (state.wanted && !texts) texts = new Map(rows.map((row) => [row, `${data.prompts[row[PROMPT]]}\n${row[RESPONSE]}`.toLowerCase()]));
    const found = rows.filter((row) => row[ITERATION] >= state.from && row[ITERATION] <= state.to
      && (state.run < 0 || row[RUN] === state.run) && (!state.wanted || texts.get(row).includes(state.wanted))).sort(compareBy(state.column, state.direction));
    const pages = Math.max(1, Math.ceil(found.length / pageRows));
    at('tbody').replaceChildren(...found.slice(state.page * pageRows, (state.page + 1) * pageRows).map(rowOf));
    if (!found.length) at('tbody').append(element('tr', {}, element('td', { colspan: 6 }, 'No sample matches.')));
    for (const button of all('th button', host)) {
      const sorted = Number(button.dataset.column) === state.column;
      button.parentNode.setAttribute('aria-sort', !sorted ? 'none' : state.direction > 0 ? 'ascending' : 'descending');
    }
    at('#sort').value = `${state.column},${state.direction}`;
    at('.count').textContent = `${found.length.toLocaleString('en-US')} of ${rows.length.toLocaleString('en-US')} samples`;
    at('.pager span').textContent = `page ${state.page + 1} of ${pages}`;
    at('.back').disabled = state.page === 0;
    at('.next').disabled = state.page + 1 === pages;
  }

  function turn(step) {
    update({ page: state.page + step });
    at('table').scrollIntoView({ block: 'start' });
  }

  const limit = (input, none) => (input.value === '' ? none : Number(input.value));
  at('input[type=search]').addEventListener('input', (event) => update({ wanted: event.target.value.trim().toLowerCase() }));
  at('#from').addEventListener('input', (event) => update({ from: limit(event.target, -Infinity) }));
  at('#to').addEventListener('input', (event) => update({ to: limit(event.target, Infinity) }));
  if (several) at('#run').addEventListener('change', (event) => update({ run: Number(event.target.value) }));
  at('#sort').addEventListener('change', (event) => {
    const [column, direction] = event.target.value.split(',').map(Number);
    update({ column, direction });
  });
  for (const button of all('th button', host)) {
    const column = Number(button.dataset.column);
    button.addEventListener('click', () => update({ column, direction: state.column === column ? -state.direction : -1 }));
  }
  at('.back').addEventListener('click', () => turn(-1));
  at('.next').addEventListener('click', () => turn(1));
  update({});
}

// Responses to the same held-out prompts at two moments, or of two runs, side by side.
function pairView(host) {
  const at = (selector) => host.querySelector(selector);
  const moments = new Map();
  for (const row of data.pairs) {
    const key = `${row[RUN]},${row[ITERATION]}`;
    const when = row[ITERATION] === 0 ? 'before training' : `after ${data.unit} ${row[ITERATION]}`;
    const name = several ? `${data.runs[row[RUN]]}, ${when}` : when;
    moments.set(key, { key, name, run: row[RUN], iteration: row[ITERATION], rows: [...(moments.get(key)?.rows || []), row] });
  }
  const ordered = [...moments.values()].sort((a, b) => a.run - b.run || a.iteration - b.iteration);
  const lasts = [...new Map(ordered.map((moment) => [moment.run, moment])).values()];
  const [left, right] = lasts.length > 1 ? lasts : [ordered[0], ordered[ordered.length - 1]];
  const pill = scoreScale(data.pairs);
  let count = 5;

  function pairsOf(before, after) {
    const waiting = new Map();
    for (const row of after.rows) waiting.set(row[PROMPT], [...(waiting.get(row[PROMPT]) || []), row]);
    return before.rows.flatMap((row) => {
      const other = (waiting.get(row[PROMPT]) || []).shift();
      return other ? [{ before: row, after: other, gain: other[SCORE] - row[SCORE] }] : [];
    });
  }

  function side(moment, row) {
    const head = element('p', { class: 'small' }, `${moment.name}, score `, pill(row[SCORE]), ` KL ${format(row[KL])}`);
    return element('div', { class: 'side' }, head, ...textBlock(row[RESPONSE]));
  }

  function update(change = 5) {
    count = change;
    const [before, after] = [moments.get(at('#left').value), moments.get(at('#right').value)];
    const pairs = pairsOf(before, after);
    const direction = Number(at('#order').value);
    if (direction) pairs.sort(compareBy('gain', direction));
    const mean = (name) => {
      const known = pairs.map((pair) => pair[name][SCORE]).filter(Number.isFinite);
      return format(known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null);
    };
    const [better, worse] = [pairs.filter((pair) => pair.gain > 0).length, pairs.filter((pair) => pair.gain < 0).length];
    at('.verdict').textContent = pairs.length
      ? `Mean score ${mean('before')} → ${mean('after')}; ${better} better, ${worse} worse, ${pairs.length - better - worse} equal.`
      : 'The two have no prompt in common.';
    at('.list').replaceChildren(...pairs.slice(0, count).map((pair) => element(
      'article', { class: 'pair' }, ...textBlock(data.prompts[pair.before[PROMPT]]),
      element('div', { class: 'sides' }, side(before, pair.before), side(after, pair.after)),
    )));
    at('.pager').hidden = pairs.length <= count;
  }

  for (const [selector, moment] of [['#left', left], ['#right', right]]) {
    at(selector).append(...ordered.map(({ key, name }) => element('option', { value: key }, name)));
    at(selector).value = moment.key;
  }
  all('select', host).forEach((select) => select.addEventListener('change', () => update()));
  at('.pager .more').addEventListener('click', () => update(count + 20));
  update();
}

startTheme();
startCurves();
if (data.samples.length && document.getElementById('samples')) sampleView(document.getElementById('samples'));
if (data.pairs.length) pairView(document.getElementById('pairs'));
document.body.dataset.ready = 'true';
})();
