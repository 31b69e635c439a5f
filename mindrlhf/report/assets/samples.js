// Samples as a table to search, sort and page through, and evaluation replies side by side.

const PAGE_ROWS = 25;
const [RUN, ITERATION, PROMPT, REPLY, SCORE, KL] = [0, 1, 2, 3, 4, 5];
const TURN = /<\|im_start\|>([^\n<]*)\n([\s\S]*?)(?:<\|im_end\|>\n?|(?=<\|im_start\|>)|$)/g;

// Text with what was searched for marked and control tokens set apart.
function rich(text, wanted) {
  return text.split(/(<\|[\w.-]+\|>)/).flatMap((part) => {
    if (/^<\|[\w.-]+\|>$/.test(part)) return [element('span', { class: 'token' }, part)];
    if (!wanted) return [part];
    const found = [];
    const lower = part.toLowerCase();
    let from = 0;
    for (let at = lower.indexOf(wanted); at >= 0 && lower.length === part.length; at = lower.indexOf(wanted, from)) {
      found.push(part.slice(from, at), element('mark', {}, part.slice(at, at + wanted.length)));
      from = at + wanted.length;
    }
    return [...found, part.slice(from)];
  });
}

// [role, content] of each ChatML turn; null when the text is something else.
function turnsOf(text) {
  const turns = [...text.matchAll(TURN)];
  const covered = turns.reduce((sum, turn) => sum + turn[0].length, 0);
  return turns.length && covered === text.length ? turns.map(([, role, content]) => [role, content]) : null;
}

function systemOf(text) {
  const turn = (turnsOf(text) || []).find(([role]) => role === 'system');
  return turn ? turn[1] : null;
}

// The system prompt that all prompts share is said once and not in every row.
const sharedSystem = data.prompts.length > 1 && data.prompts.every((text) => systemOf(text) === systemOf(data.prompts[0]))
  ? systemOf(data.prompts[0]) : null;

function systemNote() {
  return sharedSystem === null ? null : element('p', { class: 'small system-note' }, element('span', { class: 'role' }, 'system'), 'of all prompts: ', sharedSystem);
}

// A prompt as its ChatML turns; anything else as it stands. Long texts are folded.
function textBlock(text, wanted = '') {
  const block = element('div', { class: 'block', dir: 'auto' });
  const turns = turnsOf(text);
  if (turns) {
    for (const [role, content] of turns) {
      if (!content || (role === 'system' && content === sharedSystem)) continue;
      block.append(element('div', { class: role === 'system' ? 'turn system' : 'turn' }, element('span', { class: 'role' }, role), ...rich(content, wanted)));
    }
  } else block.append(...rich(text, wanted));
  if (text.length < 420 && text.split('\n').length < 9) return [block];
  block.classList.add('clamped');
  const more = element('button', {
    type: 'button', class: 'more', onclick() {
      more.textContent = block.classList.toggle('clamped') ? 'Show all' : 'Show less';
    },
  }, 'Show all');
  return [block, more];
}

function scoreScale(rows) {
  const known = rows.map((row) => row[SCORE]).filter((score) => typeof score === 'number').sort((a, b) => a - b);
  const low = known[Math.floor(known.length * 0.03)];
  const high = known[Math.ceil(known.length * 0.97) - 1];
  return (score) => {
    const pill = element('span', { class: 'pill' }, threeDigits(score));
    const part = typeof score === 'number' && high > low ? (score - low) / (high - low) : 0.5;
    pill.style.setProperty('--t', Math.min(1, Math.max(0, part)).toFixed(2));
    return pill;
  };
}

function compareBy(column, direction) {
  const isNumber = (value) => typeof value === 'number';
  return (a, b) => {
    const [left, right] = [a[column], b[column]];
    if (isNumber(left) !== isNumber(right)) return isNumber(left) ? -1 : 1;
    return isNumber(left) && left !== right ? (left - right) * direction : 0;
  };
}

function sampleView(host) {
  const { rows, longest } = data.samples;
  const total = data.runs.reduce((sum, run) => sum + run.sampleCount, 0);
  if (!rows.length) {
    host.append(element('p', { class: 'empty' }, 'No samples: log_samples is 0, or the run has no samples.jsonl.'));
    return;
  }
  const state = { page: 0, column: ITERATION, direction: -1, wanted: '', from: -Infinity, to: Infinity, run: -1 };
  const pill = scoreScale(rows);
  let searchable = null;
  const search = element('input', { type: 'search', placeholder: 'Search prompts and replies', 'aria-label': 'Search prompts and replies' });
  const from = element('input', { type: 'number', placeholder: 'first', 'aria-label': 'From iteration' });
  const to = element('input', { type: 'number', placeholder: 'last', 'aria-label': 'To iteration' });
  const chooseRun = element('select', { 'aria-label': 'Run' }, element('option', { value: -1 }, 'all runs'), ...data.runs.map((run, index) => element('option', { value: index }, run.name)));
  const columns = [[ITERATION, 'Iteration'], [SCORE, 'Score'], [KL, 'KL']];
  const sorter = element('select', { 'aria-label': 'Sort' }, ...columns.flatMap(([column, label]) => [
    element('option', { value: `${column},-1` }, `${label}, highest first`), element('option', { value: `${column},1` }, `${label}, lowest first`),
  ]));
  const count = element('span', { class: 'push', role: 'status' });
  const heads = columns.map(([column, label]) => element('th', { class: 'number', scope: 'col' }, element('button', {
    type: 'button', onclick() {
      const again = state.column === column;
      update({ column, direction: again ? -state.direction : -1 });
    },
  }, label)));
  const runHead = severalRuns ? element('th', { scope: 'col' }, 'Run') : null;
  const body = element('tbody');
  const table = element('table', {}, element('thead', {}, element(
    'tr', {}, runHead, heads[0], element('th', { class: 'text', scope: 'col' }, 'Prompt'), element('th', { class: 'text', scope: 'col' }, 'Reply'), heads[1], heads[2],
  )), body);
  const pager = element('div', { class: 'pager' });

  function matching() {
    if (state.wanted && !searchable) searchable = rows.map((row) => `${data.prompts[row[PROMPT]]}\n${row[REPLY]}`.toLowerCase());
    return rows.filter((row, index) => row[ITERATION] >= state.from && row[ITERATION] <= state.to
      && (state.run < 0 || row[RUN] === state.run) && (!state.wanted || searchable[index].includes(state.wanted)));
  }

  function rowOf(row) {
    return element(
      'tr', {},
      severalRuns ? element('td', { class: 'run-name' }, swatch(row[RUN]), data.runs[row[RUN]].name) : null,
      element('td', { class: 'number', 'data-label': 'Iteration' }, formatNumber(row[ITERATION])),
      element('td', { class: 'text', 'data-label': 'Prompt' }, ...textBlock(data.prompts[row[PROMPT]], state.wanted)),
      element('td', { class: 'text', 'data-label': 'Reply' }, ...textBlock(row[REPLY], state.wanted)),
      element('td', { class: 'number', 'data-label': 'Score' }, pill(row[SCORE])),
      element('td', { class: 'number', 'data-label': 'KL' }, threeDigits(row[KL])),
    );
  }

  function update(change) {
    Object.assign(state, { page: 0 }, change);
    const found = matching().sort(compareBy(state.column, state.direction));
    const pages = Math.max(1, Math.ceil(found.length / PAGE_ROWS));
    state.page = Math.min(Math.max(state.page, 0), pages - 1);
    body.replaceChildren(...found.slice(state.page * PAGE_ROWS, (state.page + 1) * PAGE_ROWS).map(rowOf));
    const columnsShown = severalRuns ? 6 : 5;
    if (!found.length) body.append(element('tr', {}, element('td', { colspan: columnsShown, class: 'empty' }, 'No sample matches.')));
    heads.forEach((head, index) => {
      if (columns[index][0] === state.column) head.setAttribute('aria-sort', state.direction > 0 ? 'ascending' : 'descending');
      else head.removeAttribute('aria-sort');
    });
    sorter.value = `${state.column},${state.direction}`;
    count.textContent = `${found.length.toLocaleString('en-US')} of ${rows.length.toLocaleString('en-US')} samples`;
    const turn = (label, page) => element('button', { type: 'button', disabled: page < 0 || page >= pages, onclick() { update({ page }); table.scrollIntoView({ block: 'start' }); } }, label);
    pager.replaceChildren(turn('‹ Back', state.page - 1), element('span', {}, `page ${state.page + 1} of ${pages}`), turn('Next ›', state.page + 1));
    pager.hidden = pages < 2;
  }

  let waiting = 0;
  search.addEventListener('input', () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => update({ wanted: search.value.trim().toLowerCase() }), 120);
  });
  from.addEventListener('input', () => update({ from: from.value === '' ? -Infinity : Number(from.value) }));
  to.addEventListener('input', () => update({ to: to.value === '' ? Infinity : Number(to.value) }));
  chooseRun.addEventListener('change', () => update({ run: Number(chooseRun.value) }));
  sorter.addEventListener('change', () => {
    const [column, direction] = sorter.value.split(',').map(Number);
    update({ column, direction });
  });
  host.append(element(
    'div', { class: 'tools' }, search, element('label', {}, 'Iterations', from, '–', to), severalRuns ? chooseRun : null,
    element('label', { class: 'sorter', hidden: false }, sorter), count,
  ), systemNote() || '', element('div', { class: 'scroll samples' }, table), pager);
  if (rows.length < total) {
    host.append(element('p', { class: 'small' }, `${rows.length.toLocaleString('en-US')} of ${total.toLocaleString('en-US')} samples, spread over the run with the best and the worst, texts cut at ${longest} characters; samples.jsonl has them all.`));
  } else if (rows.some((row) => row[REPLY].length > longest)) {
    host.append(element('p', { class: 'small' }, `Texts are cut at ${longest} characters; samples.jsonl has them whole.`));
  }
  update({});
}
