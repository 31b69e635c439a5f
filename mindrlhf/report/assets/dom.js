// Elements, numbers and what the whole page shares. Text from the run goes through textContent only.

const data = JSON.parse(document.getElementById('data').textContent);
const severalRuns = data.runs.length > 1;
const shared = { smoothing: 0, hidden: new Set(), charts: [] };

function element(name, options = {}, ...children) {
  const made = document.createElement(name);
  fill(made, options, children);
  return made;
}

function shape(name, options = {}, ...children) {
  const made = document.createElementNS('http://www.w3.org/2000/svg', name);
  fill(made, options, children);
  return made;
}

function fill(made, options, children) {
  for (const [key, value] of Object.entries(options)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith('on')) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value === true ? '' : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
}

function swatch(index) {
  return element('i', { class: `swatch c${index % 8}` });
}

function formatNumber(value) {
  if (value === null || value === undefined) return '–';
  if (typeof value === 'string') return value;
  const size = Math.abs(value);
  let text;
  if (value === 0) text = '0';
  else if (size >= 1e7 || size < 1e-4) text = value.toExponential(1).replace('e+', 'e');
  else if (size >= 1000) text = Math.round(value).toLocaleString('en-US');
  else text = String(Number(value.toPrecision(4)));
  return text.replaceAll('-', '−');
}

function threeDigits(value) {
  return formatNumber(typeof value === 'number' ? Number(value.toPrecision(3)) : value);
}

function formatTick(value, step) {
  if (value === 0) return '0';
  const size = Math.abs(value);
  if (size >= 1e4) return `${Number((value / 1000).toPrecision(6))}k`.replace('-', '−');
  if (step < 1e-4) return value.toExponential(1).replaceAll('-', '−');
  let digits = Math.max(0, Math.min(8, -Math.floor(Math.log10(step) + 1e-9)));
  if (Math.abs(step * 10 ** digits - Math.round(step * 10 ** digits)) > 1e-6) digits += 1; // 0.25
  return value.toFixed(digits).replace('-', '−');
}

// Round numbers inside low..high, about `wanted` of them.
function ticksOf(low, high, wanted, whole = false) {
  const rough = (high - low) / Math.max(wanted, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough * 0.999);
  if (whole) step = Math.max(1, Math.round(step));
  const ticks = [];
  for (let count = Math.ceil(low / step - 1e-9); count * step <= high + step * 1e-9; count += 1) ticks.push(count * step);
  return { ticks, step };
}

// Place of the last entry of rising `values` that is not above `wanted`; 0 when all are.
function placeOf(values, wanted) {
  let low = 0;
  let high = values.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (values[middle] <= wanted) low = middle;
    else high = middle - 1;
  }
  return low;
}

function visibleRuns() {
  return data.runs.map((run, index) => ({ run, index })).filter(({ index }) => !shared.hidden.has(index));
}

const tooltip = {
  box: document.getElementById('tooltip'),
  show(x, y, title, rows) {
    this.box.replaceChildren(
      element('div', { class: 'small' }, title),
      ...rows.map(({ color, name, value }) => element(
        'div', { class: 'row' }, color === undefined ? null : swatch(color), element('span', {}, name), element('b', {}, value),
      )),
    );
    this.box.hidden = false;
    const { width, height } = this.box.getBoundingClientRect();
    const right = x + 16 + width < window.innerWidth;
    this.box.style.left = `${Math.max(4, right ? x + 16 : x - 16 - width)}px`;
    this.box.style.top = `${Math.max(4, Math.min(y - height / 2, window.innerHeight - height - 4))}px`;
  },
  hide() { this.box.hidden = true; },
};
