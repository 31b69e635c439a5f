// Replies to the same held-out prompts at two moments, or of two runs, side by side.

const PAIRS_AT_ONCE = 5;

function mean(values) {
  const known = values.filter((value) => typeof value === 'number');
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}

function pairsOf(left, right) {
  const waiting = new Map();
  for (const row of right.rows) waiting.set(row[PROMPT], [...(waiting.get(row[PROMPT]) || []), row]);
  return left.rows.flatMap((row) => {
    const other = (waiting.get(row[PROMPT]) || []).shift();
    return other ? [{ left: row, right: other, gain: other[SCORE] - row[SCORE] }] : [];
  });
}

function pairView(host) {
  const { rows } = data.evalSamples;
  const moments = new Map();
  for (const row of rows) {
    const key = `${row[RUN]},${row[ITERATION]}`;
    if (!moments.has(key)) {
      const name = row[ITERATION] === 0 ? 'before training' : `after iteration ${row[ITERATION]}`;
      moments.set(key, { key, run: row[RUN], iteration: row[ITERATION], rows: [], name: severalRuns ? `${data.runs[row[RUN]].name}, ${name}` : name });
    }
    moments.get(key).rows.push(row);
  }
  const all = [...moments.values()].sort((a, b) => a.run - b.run || a.iteration - b.iteration);
  const lastOf = (run) => all.filter((moment) => moment.run === run).pop();
  const runs = [...new Set(all.map((moment) => moment.run))];
  const state = {
    left: runs.length > 1 ? lastOf(runs[0]) : all[0],
    right: runs.length > 1 ? lastOf(runs[1]) : all[all.length - 1],
    order: 'gain', shown: PAIRS_AT_ONCE,
  };
  const pill = scoreScale(rows);
  const chooser = (side, label) => {
    const select = element('select', { 'aria-label': label, onchange() { update({ [side]: moments.get(select.value), shown: PAIRS_AT_ONCE }); } },
      ...all.map((moment) => element('option', { value: moment.key, selected: moment === state[side] }, moment.name)));
    return select;
  };
  const order = element('select', { 'aria-label': 'Order', onchange() { update({ order: order.value, shown: PAIRS_AT_ONCE }); } },
    element('option', { value: 'gain' }, 'largest gain first'), element('option', { value: 'loss' }, 'largest loss first'), element('option', { value: 'file' }, 'in the order of the file'));
  const verdict = element('div', { class: 'verdict' });
  const list = element('div');
  const more = element('button', { type: 'button', onclick() { update({ shown: state.shown + 20 }); } }, 'Show more');

  function side(moment, row) {
    return element('div', { class: 'side' },
      element('div', { class: 'side-head' }, element('span', {}, moment.name), element('span', {}, 'score ', pill(row[SCORE]), row[KL] === null ? '' : `  KL ${threeDigits(row[KL])}`)),
      ...textBlock(row[REPLY]));
  }

  function update(change) {
    Object.assign(state, change);
    const pairs = pairsOf(state.left, state.right);
    const sign = { gain: -1, loss: 1, file: 0 }[state.order];
    if (sign) pairs.sort((a, b) => sign * ((Number.isFinite(a.gain) ? a.gain : 0) - (Number.isFinite(b.gain) ? b.gain : 0)));
    const [before, after] = [mean(pairs.map((pair) => pair.left[SCORE])), mean(pairs.map((pair) => pair.right[SCORE]))];
    const better = pairs.filter((pair) => pair.gain > 0).length;
    const worse = pairs.filter((pair) => pair.gain < 0).length;
    const fact = (label, value) => element('span', {}, `${label} `, element('b', {}, value));
    verdict.replaceChildren(
      fact('Mean score', `${threeDigits(before)} → ${threeDigits(after)}`), fact('better', String(better)), fact('worse', String(worse)), fact('equal', String(pairs.length - better - worse)),
    );
    list.replaceChildren(...pairs.slice(0, state.shown).map((pair) => element(
      'article', { class: 'pair' }, ...textBlock(data.prompts[pair.left[PROMPT]]),
      element('div', { class: 'sides' }, side(state.left, pair.left), side(state.right, pair.right)),
    )));
    if (!pairs.length) list.append(element('p', { class: 'empty' }, 'The two have no prompt in common.'));
    more.hidden = pairs.length <= state.shown;
  }

  host.append(element('div', { class: 'tools' }, chooser('left', 'Left'), 'against', chooser('right', 'Right'), order), verdict, systemNote() || '', list, element('div', { class: 'pager' }, more));
  update({});
}
