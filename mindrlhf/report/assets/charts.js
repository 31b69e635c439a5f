// Curves: one chart a metric, all with the same iterations and one hover line.

const MARGIN = { top: 8, right: 10, bottom: 20, left: 52 };
const HEIGHT = 176;

// Exponential moving average without the pull of its start, as TensorBoard draws it; gaps stay gaps.
// One huge first value would pull the next ones along, so it stays out.
function smoothed(values, weight, startsSlow = false) {
  if (!weight) return values;
  const alone = startsSlow && isSlowStart(values);
  let sum = 0;
  let total = 0;
  return values.map((value, place) => {
    if (value === null || (alone && place === 0)) return value;
    sum = sum * weight + value * (1 - weight);
    total = total * weight + (1 - weight);
    return sum / total;
  });
}

function isSlowStart(values) {
  return values.length > 3 && values[0] > 2.5 * Math.max(...values.slice(1));
}

function iterationRange() {
  let low = Infinity;
  let high = -Infinity;
  for (const { run } of visibleRuns()) {
    low = Math.min(low, run.first[0], ...Object.values(run.evaluations).flatMap((points) => points.x.slice(0, 1)));
    high = Math.max(high, run.last[run.last.length - 1]);
  }
  if (low > high) return [0, 1];
  return low === high ? [low - 1, high + 1] : [low, high];
}

function linePath(xs, ys, x, y) {
  let path = '';
  let open = false;
  xs.forEach((place, index) => {
    const value = ys[index];
    if (value === null || value === undefined) { open = false; return; }
    path += `${open ? 'L' : 'M'}${x(place).toFixed(1)},${y(value).toFixed(1)}`;
    open = true;
  });
  return path;
}

function bandPath(xs, lows, highs, x, y) {
  let path = '';
  let start = null;
  const close = (end) => {
    if (start === null) return;
    const places = Array.from({ length: end - start }, (_, offset) => start + offset);
    const there = places.map((place) => `${x(xs[place]).toFixed(1)},${y(highs[place]).toFixed(1)}`);
    const back = places.reverse().map((place) => `${x(xs[place]).toFixed(1)},${y(lows[place]).toFixed(1)}`);
    path += `M${there.join('L')}L${back.join('L')}Z`;
    start = null;
  };
  lows.forEach((low, index) => {
    if (low === null) close(index);
    else if (start === null) start = index;
  });
  close(lows.length);
  return path;
}

// What every chart has: frame, axes, hover line, keyboard; `parts` draws and tells what is where.
class Chart {
  constructor(card, label, parts) {
    this.parts = parts;
    this.id = shared.charts.length;
    this.svg = shape('svg', { height: HEIGHT, tabindex: 0, role: 'img', 'aria-label': label });
    this.svg.addEventListener('pointermove', (event) => this.point(event));
    this.svg.addEventListener('pointerdown', (event) => this.point(event));
    this.svg.addEventListener('pointerleave', () => hoverAt(null));
    this.svg.addEventListener('blur', () => hoverAt(null));
    this.svg.addEventListener('keydown', (event) => this.step(event));
    card.append(this.svg);
    this.width = 0;
    shared.charts.push(this);
  }

  draw() {
    const width = this.svg.clientWidth || this.svg.parentNode.clientWidth;
    if (!width) return;
    this.width = width;
    this.range = iterationRange();
    const [low, high] = this.parts.values(this.range);
    const inner = { left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top, bottom: HEIGHT - MARGIN.bottom };
    this.x = (place) => inner.left + (place - this.range[0]) / (this.range[1] - this.range[0]) * (inner.right - inner.left);
    this.y = (value) => inner.bottom - (value - low) / (high - low) * (inner.bottom - inner.top);
    this.inner = inner;
    const clip = `clip${this.id}`;
    const frame = shape('g');
    const { ticks, step } = ticksOf(low, high, 5);
    for (const tick of ticks) {
      frame.append(
        shape('line', { class: tick === 0 ? 'zero' : 'gridline', x1: inner.left, x2: inner.right, y1: this.y(tick), y2: this.y(tick) }),
        shape('text', { x: inner.left - 6, y: this.y(tick) + 4, 'text-anchor': 'end' }, formatTick(tick, step)),
      );
    }
    const along = ticksOf(this.range[0], this.range[1], Math.max(2, width / 90), true);
    for (const tick of along.ticks) {
      if (tick % 1) continue;
      const anchor = this.x(tick) > inner.right - 12 ? 'end' : 'middle';
      frame.append(shape('text', { x: this.x(tick), y: HEIGHT - 5, 'text-anchor': anchor }, formatTick(tick, along.step)));
    }
    const body = shape('g', { 'clip-path': `url(#${clip})` });
    this.parts.draw(body, this);
    this.overlay = shape('g');
    this.svg.replaceChildren(
      shape('defs', {}, shape('clipPath', { id: clip }, shape('rect', {
        x: inner.left - 3, y: inner.top - 3, width: Math.max(inner.right - inner.left + 6, 1), height: inner.bottom - inner.top + 6,
      }))),
      frame, body, this.overlay,
    );
  }

  point(event) {
    const box = this.svg.getBoundingClientRect();
    const part = (event.clientX - box.left - this.inner.left) / (this.inner.right - this.inner.left);
    const place = this.range[0] + Math.min(1, Math.max(0, part)) * (this.range[1] - this.range[0]);
    this.hover(Math.round(place), event.clientX, event.clientY);
  }

  step(event) {
    const direction = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const visible = visibleRuns();
    if (event.key === 'Escape') hoverAt(null);
    if (!direction || !visible.length) return;
    event.preventDefault();
    const { first } = visible[0].run;
    const now = this.at === undefined || this.at === null ? (direction > 0 ? -1 : first.length) : placeOf(first, this.at);
    const next = first[Math.min(first.length - 1, Math.max(0, now + direction))];
    const box = this.svg.getBoundingClientRect();
    this.hover(next, box.left + this.x(next), box.top + HEIGHT / 2);
  }

  hover(iteration, clientX, clientY) {
    this.at = iteration;
    const { title, rows } = this.parts.describe(iteration);
    tooltip.show(clientX, clientY, title, rows);
    hoverAt(iteration);
  }

  cross(iteration) {
    if (!this.overlay) return;
    this.overlay.replaceChildren();
    if (iteration === null) { this.at = null; return; }
    const place = this.x(iteration);
    this.overlay.append(
      shape('line', { class: 'cross', x1: place, x2: place, y1: this.inner.top, y2: this.inner.bottom }),
      ...this.parts.dots(iteration, this),
    );
  }
}

function hoverAt(iteration) {
  if (iteration === null) tooltip.hide();
  for (const chart of shared.charts) chart.cross(iteration);
}

function stretchTitle(iteration) {
  const [{ run }] = visibleRuns();
  const place = placeOf(run.first, iteration);
  const [first, last] = [run.first[place], run.last[place]];
  return first === last || iteration < first || iteration > last ? `${data.unit} ${iteration}` : `${data.unit}s ${first} to ${last}, mean`;
}

// Low and high of what is drawn, with air around it; one huge first iteration (it compiles) does not count.
function valueRange(columns, spec, others) {
  let low = spec.low === null ? Infinity : spec.low;
  let high = spec.high === null ? -Infinity : spec.high;
  for (const column of columns) {
    const known = column.filter((value) => value !== null && value !== undefined);
    if (spec.startsSlow && isSlowStart(known)) known.shift();
    for (const value of known) { low = Math.min(low, value); high = Math.max(high, value); }
  }
  for (const value of others) { low = Math.min(low, value); high = Math.max(high, value); }
  if (low > high) return [0, 1];
  if (low === high) return low === 0 ? [0, 1] : [Math.min(0, 2 * low), Math.max(0, 2 * high)];
  const air = (high - low) * 0.06;
  return [spec.low === low ? low : low - air, spec.high === high ? high : high + air];
}

function lineChart(card, spec) {
  const withMetric = () => visibleRuns().filter(({ run }) => run.curves[spec.metric]);
  const marks = () => visibleRuns().flatMap(({ run, index }) => run.marks
    .filter((mark) => mark.metric === spec.metric).map((mark) => ({ ...mark, index })));
  const evaluations = () => visibleRuns().flatMap(({ run, index }) => {
    const points = run.evaluations[spec.evaluation];
    return points && points.x.length ? [{ points, index }] : [];
  });
  spec.startsSlow = spec.metric.startsWith('time/');

  function drawRun(body, { run, index }, chart) {
    const curve = run.curves[spec.metric];
    const { x, y } = chart;
    const group = shape('g', { class: `c${index % 8}` });
    if (curve.low) group.append(shape('path', { class: 'band', d: bandPath(run.last, curve.low, curve.high, x, y) }));
    if (shared.smoothing) group.append(shape('path', { class: 'curve raw', d: linePath(run.last, curve.mean, x, y) }));
    const values = smoothed(curve.mean, shared.smoothing, spec.startsSlow);
    group.append(shape('path', { class: 'curve', d: linePath(run.last, values, x, y) }));
    if (run.last.length <= 40) {
      values.forEach((value, place) => {
        if (value !== null) group.append(shape('circle', { class: 'point', cx: x(run.last[place]), cy: y(value), r: 2.4 }));
      });
    }
    body.append(group);
    for (const place of curve.broken || []) {
      const at = x(place);
      body.append(shape('path', { class: 'broken', d: `M${at - 4},${chart.inner.bottom + 2}h8l-4,-8z` }));
    }
  }

  function drawEvaluations(body, chart) {
    for (const { points, index } of evaluations()) {
      const group = shape('g', { class: `c${index % 8}` });
      group.append(shape('path', { class: 'evaluation-line', d: linePath(points.x, points.y, chart.x, chart.y) }));
      points.x.forEach((place, at) => group.append(shape('path', {
        class: 'evaluation', d: `M${chart.x(place)},${chart.y(points.y[at]) - 4.5}l4.5,4.5l-4.5,4.5l-4.5,-4.5z`,
      })));
      body.append(group);
    }
  }

  const chart = new Chart(card, `${spec.title} over ${data.unit}s`, {
    values() {
      const columns = withMetric().map(({ run }) => run.curves[spec.metric].mean);
      const others = evaluations().flatMap(({ points }) => points.y);
      const limits = marks().map((mark) => mark.threshold).filter((value) => value !== null);
      return valueRange(columns, spec, [...others, ...limits]);
    },
    draw(body, drawn) {
      for (const mark of marks()) {
        const group = shape('g', { class: `mark ${mark.level}` });
        const from = drawn.x(mark.since);
        const height = drawn.inner.bottom - drawn.inner.top;
        // Areas of several runs would lie on each other, so there a line in the run's colour.
        if (severalRuns) body.append(shape('line', { class: `since-line c${mark.index % 8}`, x1: from, x2: from, y1: drawn.inner.top, y2: drawn.inner.bottom }));
        else group.append(shape('rect', { class: 'since', x: from, y: drawn.inner.top, width: Math.max(drawn.inner.right - from, 2), height }));
        if (mark.threshold !== null) {
          group.append(shape('line', { class: 'threshold', x1: drawn.inner.left, x2: drawn.inner.right, y1: drawn.y(mark.threshold), y2: drawn.y(mark.threshold) }));
        }
        body.append(group);
      }
      for (const entry of withMetric()) drawRun(body, entry, drawn);
      drawEvaluations(body, drawn);
    },
    describe(iteration) {
      const rows = withMetric().flatMap(({ run, index }) => {
        const curve = run.curves[spec.metric];
        const place = placeOf(run.first, iteration);
        if (iteration > run.last[run.last.length - 1]) return [];
        const spread = curve.low && curve.low[place] !== curve.high[place]
          ? ` (${formatNumber(curve.low[place])} … ${formatNumber(curve.high[place])})` : '';
        const broken = (curve.broken || []).includes(iteration) ? 'NaN or infinite' : null;
        return [{ color: index, name: severalRuns ? run.name : spec.title, value: broken || formatNumber(curve.mean[place]) + spread }];
      });
      for (const { points, index } of evaluations()) {
        const place = placeOf(points.x, iteration);
        if (points.x[place] > iteration) continue;
        rows.push({ color: index, name: `◇ held-out after ${points.x[place]}`, value: formatNumber(points.y[place]) });
      }
      return { title: visibleRuns().length ? stretchTitle(iteration) : '', rows };
    },
    dots(iteration, drawn) {
      return withMetric().flatMap(({ run, index }) => {
        const place = placeOf(run.first, iteration);
        const value = smoothed(run.curves[spec.metric].mean, shared.smoothing, spec.startsSlow)[place];
        if (value === null || value === undefined || iteration > run.last[run.last.length - 1]) return [];
        if (drawn.y(value) < 0 || drawn.y(value) > HEIGHT) return [];
        return [shape('circle', { class: `hover-dot c${index % 8}`, cx: drawn.x(run.last[place]), cy: drawn.y(value), r: 4 })];
      });
    },
  });
  return chart;
}

function chartCard(spec) {
  const last = data.runs.flatMap((run, index) => {
    const curve = run.curves[spec.metric];
    return curve ? [element('span', { class: severalRuns ? `c${index % 8}` : '' }, formatNumber(curve.mean[curve.mean.length - 1]))] : [];
  });
  const evaluated = data.runs.some((run) => (run.evaluations[spec.evaluation] || { x: [] }).x.length);
  const card = element(
    'figure', { class: spec.wide ? 'card double' : 'card', 'data-metric': spec.metric },
    element('figcaption', {}, element('h3', { title: spec.metric }, spec.title), last.length <= 4 ? element('output', {}, ...last) : null),
    element('p', { class: 'small help' }, [spec.unit, spec.help, evaluated ? '◇ on held-out prompts.' : ''].filter(Boolean).join(' · ')),
  );
  lineChart(card, spec);
  return card;
}
