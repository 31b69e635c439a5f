// Builds the page from its data and ties the controls to it.

function store(name, value) {
  try { // A page opened from a file may be allowed no storage.
    if (value === undefined) return localStorage.getItem(name);
    localStorage.setItem(name, value);
  } catch { /* then the choice lasts as long as the page */ }
  return null;
}

function startTheme() {
  const root = document.documentElement;
  const chosen = store('mindrlhf-theme');
  if (chosen === 'light' || chosen === 'dark') root.dataset.theme = chosen;
  document.getElementById('theme').addEventListener('click', () => {
    const dark = root.dataset.theme ? root.dataset.theme === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches;
    root.dataset.theme = dark ? 'light' : 'dark';
    store('mindrlhf-theme', root.dataset.theme);
  });
}

let asked = false;
function redraw() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    for (const chart of shared.charts) chart.draw();
  });
}

function startLegend() {
  for (const button of document.querySelectorAll('button.run')) {
    button.addEventListener('click', () => {
      const index = Number(button.dataset.run);
      const hide = !shared.hidden.has(index);
      if (hide) shared.hidden.add(index);
      else shared.hidden.delete(index);
      button.setAttribute('aria-pressed', String(!hide));
      hoverAt(null);
      redraw();
    });
  }
}

function chartTools() {
  const longest = Math.max(...data.runs.map((run) => run.last.length));
  shared.smoothing = longest > 60 ? 0.6 : 0;
  const value = element('span', {}, shared.smoothing.toFixed(2));
  const slider = element('input', {
    type: 'range', min: 0, max: 0.98, step: 0.02, value: shared.smoothing, 'aria-label': 'Smoothing', oninput() {
      shared.smoothing = Number(slider.value);
      value.textContent = shared.smoothing.toFixed(2);
      redraw();
    },
  });
  const together = data.runs.some((run) => run.iterations > run.last.length);
  const note = together ? element('span', {}, `Line: mean of neighbouring ${data.unit}s; band: lowest to highest.`) : null;
  return element('div', { class: 'tools' }, element('label', {}, 'Smoothing', slider, value), note);
}

function startCharts() {
  const host = document.getElementById('charts');
  host.append(chartTools());
  for (const group of data.groups) {
    const cards = group.charts.map(chartCard);
    if (group.title === 'Speed') cards.push(...data.runs.filter((run) => run.phases.length).map(stackCard));
    host.append(element('div', { class: 'group' }, element('h3', {}, group.title), element('div', { class: 'grid' }, ...cards)));
  }
  let width = 0;
  new ResizeObserver(() => {
    if (host.clientWidth === width) return;
    width = host.clientWidth;
    redraw();
  }).observe(host);
  redraw();
}

startTheme();
startLegend();
startCharts();
const sampleHost = document.getElementById('sample-view');
if (sampleHost) sampleView(sampleHost);
const pairHost = document.getElementById('pair-view');
if (pairHost) pairView(pairHost);
document.body.dataset.ready = 'true';
