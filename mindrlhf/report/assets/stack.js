// Seconds of each phase of an iteration, one on top of the other; one chart a run.

const PHASE_NAMES = { rollout: 'generate', score: 'score', train: 'train', sync: 'sync weights', other: 'rest' };

function phaseName(metric) {
  const name = metric.slice('time/'.length);
  return PHASE_NAMES[name] || name;
}

function stackCard(run) {
  const columns = run.phases.map((phase) => run.curves[phase].mean.map((value) => value || 0));
  const tops = [];
  columns.forEach((column, level) => {
    tops.push(column.map((value, place) => value + (level ? tops[level - 1][place] : 0)));
  });
  const whole = tops[tops.length - 1] || [];
  const index = data.runs.indexOf(run);
  const spec = { low: 0, high: null, startsSlow: true };
  const title = severalRuns ? `Time per phase: ${run.name}` : 'Time per phase';
  const card = element(
    'figure', { class: severalRuns ? 'card' : 'card wide', 'data-stack': index },
    element('figcaption', {}, element('h3', {}, severalRuns ? swatch(index) : null, title, element('span', { class: 'small' }, 'seconds per iteration'))),
    element('div', { class: 'phases' }, ...run.phases.map((phase, level) => {
      const ranked = [...columns[level]].sort((a, b) => a - b);
      const middle = ranked[ranked.length >> 1]; // not the mean: the first iteration compiles
      return element('span', {}, swatch(level), `${phaseName(phase)}, median ${threeDigits(middle)} s`);
    })),
  );
  if (isSlowStart(whole)) card.append(element('p', { class: 'small' }, `The first iteration took ${threeDigits(whole[0])} s, beyond the top: it compiles.`));
  new Chart(card, title, {
    values() { return valueRange([whole], spec, []); },
    draw(body, drawn) {
      // A single iteration has no width to fill, so every stretch is a bar.
      const half = run.last.length < 40 ? Math.min(14, (drawn.inner.right - drawn.inner.left) / (run.last.length + 1) / 2.4) : 0;
      for (let level = columns.length - 1; level >= 0; level -= 1) {
        const group = shape('g', { class: `c${level % 8}` });
        const floor = level ? tops[level - 1] : tops[level].map(() => 0);
        if (half) {
          run.last.forEach((place, at) => group.append(shape('rect', {
            class: 'area', x: drawn.x(place) - half, width: 2 * half, y: drawn.y(tops[level][at]), height: Math.max(drawn.y(floor[at]) - drawn.y(tops[level][at]), 0),
          })));
        } else group.append(shape('path', { class: 'area', d: bandPath(run.last, floor, tops[level], drawn.x, drawn.y) }));
        body.append(group);
      }
    },
    describe(iteration) {
      const place = placeOf(run.first, iteration);
      const rows = run.phases.map((phase, level) => ({ color: level, name: phaseName(phase), value: `${threeDigits(columns[level][place])} s` })).reverse();
      rows.push({ name: 'together', value: `${threeDigits(whole[place])} s` });
      return { title: `iteration ${run.last[place]}`, rows };
    },
    dots() { return []; },
  });
  return card;
}
