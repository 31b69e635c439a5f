"""Which metrics are drawn, and their figures: plain mappings as ``Plotly.newPlot`` takes them.

Colours of text and grid depend on the page's scheme and are added there, with smoothing and hidden runs.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from mindrlhf.report.diagnostics import Finding
from mindrlhf.report.run_data import Run, Series

COLORS = ("#3b7de0", "#e0701a", "#159a78", "#c4479a", "#8062e6", "#a88400", "#2499bd", "#95654f")
"""Of runs, or of phases; readable on a light and on a dark background."""
LEVEL_COLORS = {"error": "#d6453b", "warning": "#c77700", "note": "#3b7de0"}
MAX_POINTS = 3000
"""Maximum points per curve: more than a screen has pixels."""
MARKED_POINTS = 40
"""Maximum number of points that are marked one by one."""

_TOTAL_TIME = "time/iteration"
_REST = "time/other"
_PHASE_NAMES = {"time/rollout": "generate", "time/sync": "sync weights", _REST: "rest"}


class Chart(NamedTuple):
    """One curve of the page.

    Attributes:
        metric: name in ``metrics.jsonl``, or ``eval/...`` where only evaluations have it.
        title: for people.
        unit: what the axis counts.
        help: what to look for.
        low, high: values that the axis always shows.
        better: for the overview: 1 when high values are good, -1 when low ones are (held-out ones appear
            there, too), 0 when neither; ``None`` where it does not appear there.
        columns: how many of the page's three it spans.
    """

    metric: str
    title: str
    unit: str = ""
    help: str = ""
    low: float | None = None
    high: float | None = None
    better: int | None = None
    columns: int = 1

    @property
    def is_share(self) -> bool:
        """Whether it is a fraction of 1, shown in per cent."""
        return self.unit.startswith("of the ")

    @property
    def held_out(self) -> str:
        """Name of the same metric on held-out rows."""
        return "eval/loss" if self.metric == "loss/train" else f"eval/{self.metric.rpartition('/')[2]}"


GROUPS: dict[str, tuple[Chart, ...]] = {
    "Goal": (
        Chart("objective/scores", "Score", help="Mean score of the responses; should rise.",
              better=1, columns=2),
        Chart("objective/kl", "KL to the reference", "nats per response",
              "How far the policy has moved; should grow slowly and stay near the target.", 0.0, better=0),
        Chart("objective/rlhf_reward", "Reward", help="What is maximised: the score minus the KL penalty."),
        Chart("objective/kl_coef", "KL coefficient", help="Weight of the KL penalty."),
        Chart("objective/scores_std", "Spread of the scores", "standard deviation",
              "Within one batch; 0 leaves nothing to learn from.", 0.0),
        Chart("loss/train", "Loss", help="Should fall, on held-out rows too.", better=-1, columns=2),
        Chart("eval/perplexity", "Held-out perplexity",
              help="Exponential of the held-out loss: tokens it hesitates between.", better=-1),
        Chart("train/accuracy", "Accuracy", "of the pairs",
              "The preferred response scores higher; 0.5 is chance (a loss of 0.69).", 0.0, 1.0, better=1),
        Chart("train/margin", "Margin", help="Score of the preferred response minus that of the other."),
        Chart("eval/scores", "Held-out score", "mean", "Before calibration."),
        Chart("eval/scores_std", "Spread of held-out scores", "standard deviation", "Before calibration."),
    ),
    "Responses": (
        Chart("response/length", "Response length", "tokens", "Stop token included.", better=0),
        Chart("response/eos_rate", "Stop rate", "of the responses", "They end by themselves.", 0, 1, 0),
        Chart("objective/entropy", "Surprise", "nats per response", "Minus log-probability of the samples."),
    ),
    "Policy": (
        Chart("loss/policy", "Policy loss", help="Near 0; it does not measure progress."),
        Chart("policy/entropy", "Entropy", "nats per token", "Falls slowly; near 0: collapsed.", better=0),
        Chart("policy/clipfrac", "Clip fraction", "of the tokens", "0.05 to 0.3 is usual.", 0.0, better=0),
        Chart("policy/approxkl", "KL of the update", "nats per token", "New policy to old.", 0.0),
        Chart("policy/ratio", "Ratio", "new / old", "Hovers around 1."),
        Chart("policy/ratio_var", "Variance of the ratio", low=0.0),
    ),
    "Critic": (
        Chart("loss/value", "Value loss", low=0.0, columns=2),
        Chart("value/explained_var", "Explained variance",
              help="1 is perfect, 0 a constant, below 0 worse than that.", better=1),
        Chart("value/clipfrac", "Value clip fraction", "of the tokens", low=0.0),
        Chart("value/error", "Value error", "squared", low=0.0),
        Chart("value/mean", "Mean value"),
    ),
    "Optimizer": (
        Chart("lr", "Learning rate", low=0.0),
        Chart("grad_norm", "Gradient norm", "before clipping", low=0.0),
        Chart("grad_norm/critic", "Gradient norm, critic", "before clipping", low=0.0),
        Chart("loss/total", "Total loss"),
        Chart("objective/non_score_reward", "KL penalty"),
        Chart("policy/steps", "Optimizer steps", "per iteration", "Fewer under target_kl.", 0.0),
        Chart("loss/pretrain", "Pre-training loss"),
        Chart("update/skipped", "Skipped updates",
              help="A loss, gradient or reward was not finite; see skipped_updates.jsonl.", low=0.0),
    ),
    "Speed": (
        Chart("tokens_per_second", "Throughput", "tokens per second", low=0.0, better=1),
        Chart("tokens_per_second/rollout", "Throughput of generation", "response tokens per second", low=0.0),
        Chart(_TOTAL_TIME, "Time", "seconds", low=0.0),
    ),
}  # fmt: skip


class Figure(NamedTuple):
    """A chart with its content.

    Attributes:
        chart: what it shows.
        plot: ``data`` and ``layout`` for plotly. A trace's ``meta`` holds the place of its ``run``, whether
            to ``smooth`` it, and whether its first value is ``slow``.
        last: last value of each run, ``None`` where it has none.
        notes: sentences about peculiarities.
        legend: names of the colours, in their order.
    """

    chart: Chart
    plot: dict[str, Any]
    last: list[float | None]
    notes: list[str]
    legend: Sequence[str] = ()


def make_figures(runs: Sequence[Run], findings: Sequence[Sequence[Finding]]) -> dict[str, list[Figure]]:
    """The figures of a page by the title of their group.

    Args:
        runs: one or several, of one kind.
        findings: those of each run.
    """
    drawn = dict.fromkeys(name for run in runs for name in drawn_metrics(run))
    evaluated = dict.fromkeys(name for run in runs for name in run.evaluation_names())
    groups = {
        title: [_figure(chart, runs, findings) for chart in charts]
        for title, charts in charts_of(drawn, evaluated).items()
    }
    phases = [_phase_figure(place, run, len(runs) > 1) for place, run in enumerate(runs) if phases_of(run)]
    if phases:
        groups["Speed"] = groups.get("Speed", []) + phases
    return groups


def charts_of(metrics: Iterable[str], evaluated: Iterable[str] = ()) -> dict[str, list[Chart]]:
    """The charts that runs have data for, by group, and under "Other" the metrics without a group.

    Args:
        metrics: names of all runs; phases of an iteration (``time/...``) have their own chart.
        evaluated: names of the metrics of evaluations.
    """
    metrics = dict.fromkeys(metrics)
    placed = [chart for charts in GROUPS.values() for chart in charts]
    known = {chart.metric for chart in placed} | {"iteration", "episode", "epoch"}
    other = [Chart(name, name) for name in metrics if name not in known and not _is_phase(name)]
    shown = {chart.held_out for chart in [*placed, *other] if chart.metric in metrics}
    alone = [name for name in evaluated if name not in shown]
    other += [Chart(name, name) for name in alone if name not in known]
    there = {*metrics, *alone}
    groups = {title: [chart for chart in charts if chart.metric in there] for title, charts in GROUPS.items()}
    return {title: charts for title, charts in (groups | {"Other": other}).items() if charts}


def drawn_metrics(run: Run) -> list[str]:
    """Metrics of a run, except those that are always 0, such as a loss that is turned off."""
    return [name for name in run.metric_names() if run.series(name).values.any()]


def phases_of(run: Run) -> dict[str, Series]:
    """Seconds of each phase of an iteration, and of its remainder, by metric name."""
    found = {name: run.series(name) for name in drawn_metrics(run) if _is_phase(name)}
    timed = [line for line in run.metrics if line.get(_TOTAL_TIME)]
    if found and timed:
        rest = [line[_TOTAL_TIME] - sum(line.get(name) or 0.0 for name in found) for line in timed]
        iterations = np.array([line["iteration"] for line in timed], dtype=np.int64)
        found[_REST] = Series(iterations, np.maximum(np.array(rest, dtype=np.float64), 0.0))
    return found


def thin(series: Series, most: int = MAX_POINTS) -> Series:
    """At most ``most`` entries, the lowest and the highest of each stretch, so that no spike is lost.

    Entries that are not finite count as gaps and are dropped with the rest of their stretch.
    """
    count = len(series.values)
    if count <= most:
        return series
    low, high = (np.where(np.isfinite(series.values), series.values, fill) for fill in (np.inf, -np.inf))
    starts = np.linspace(0, count, most // 2 + 1).astype(int)
    places = {0, count - 1}
    for start, end in pairwise(starts.tolist()):
        places |= {int(start + low[start:end].argmin()), int(start + high[start:end].argmax())}
    keep = sorted(places)
    return Series(series.iterations[keep], series.values[keep])


def rounded(value: float) -> float | None:
    """To six significant digits, which halves the size of the page; ``None`` for what is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _is_phase(name: str) -> bool:
    return name.startswith("time/") and name != _TOTAL_TIME


def _figure(chart: Chart, runs: Sequence[Run], findings: Sequence[Sequence[Finding]]) -> Figure:
    several = len(runs) > 1
    data: list[dict[str, Any]] = []
    shapes: list[dict[str, Any]] = []
    tops = []
    for place, run in enumerate(runs):
        series = run.series(chart.metric)
        name = run.name if several else chart.title
        if len(series.values):
            slow = _starts_slow(chart.metric, series)
            data += _curve(series, name, {"run": place, "smooth": True, "slow": slow})
            tops.append(_top(series) if slow else None)
        data += _held_out(run, chart.held_out, place, name if several else "held-out")
        shapes += [
            shape
            for finding in findings[place]
            if finding.metric == chart.metric
            for shape in _marks(finding, int(run.iterations[-1]), place if several else None)
        ]
    layout = _layout(runs)
    always = [value for value in (chart.low, chart.high) if value is not None]
    values = {value for trace in data for value in trace["y"]} - {None}
    # Left to itself, plotly shows a constant learning rate of 1e-6 on an axis from -1 to 1.
    if len(values) == 1 and rounded(twice := 2 * values.pop()):
        layout["yaxis"]["range"] = [min(0.0, twice, *always), max(0.0, twice, *always)]
    layout["yaxis"]["autorangeoptions"] = {"include": always} if always else {}
    if tops and all(tops):
        layout["yaxis"]["autorangeoptions"]["clipmax"] = max(top for top in tops if top)
    notes = ["◇ held-out."] if any(trace["meta"].get("held_out") for trace in data) else []
    held_out = chart.metric.startswith("eval/")
    shown = [run.evaluation_series(chart.metric) if held_out else run.series(chart.metric) for run in runs]
    last = [float(series.values[-1]) if len(series.values) else None for series in shown]
    return Figure(chart, {"data": data, "layout": layout | {"shapes": shapes}}, last, notes)


def _curve(series: Series, name: str, meta: dict[str, Any]) -> list[dict[str, Any]]:
    """A line with gaps, and a mark below each gap, which plotly would skip silently."""
    color = COLORS[meta["run"] % len(COLORS)]
    shown = thin(series)
    line = _trace(shown, name, meta, color) | {
        "mode": "lines+markers" if len(series.values) <= MARKED_POINTS else "lines",
        "line": {"color": color, "width": 1.8},
    }
    broken = series.iterations[~np.isfinite(series.values)][:200]
    if not len(broken):
        return [line]
    bottom = Series(broken, np.full(len(broken), 0.03))
    return [line, _trace(bottom, name, {"run": meta["run"]}, LEVEL_COLORS["error"]) | {
        "mode": "markers", "yaxis": "y2", "hovertemplate": "NaN or infinite",
        "marker": {"symbol": "triangle-up", "size": 9, "color": LEVEL_COLORS["error"]},
    }]  # fmt: skip


def _held_out(run: Run, metric: str, place: int, name: str) -> list[dict[str, Any]]:
    """Evaluations as diamonds; mean scores with two standard errors."""
    series = run.evaluation_series(metric).finite
    if not len(series.values):
        return []
    color = COLORS[place % len(COLORS)]
    trace = _trace(series, f"◇ {name}", {"run": place, "held_out": True}, color) | {
        "mode": "lines+markers",
        "line": {"color": color, "width": 1.1, "dash": "dot"},
        "marker": {"symbol": "diamond-open", "size": 9, "color": color},
    }
    if metric == "eval/scores":
        lines = {line["iteration"]: line for line in run.evaluations}
        errors = [_two_errors(lines[iteration]) for iteration in series.iterations.tolist()]
        if all(error is not None for error in errors):
            trace["error_y"] = {"array": errors, "thickness": 1.2, "width": 3}
    return [trace]


def _two_errors(line: dict[str, Any]) -> float | None:
    """Two standard errors of the mean score of an evaluation."""
    spread, prompts = line.get("eval/scores_std"), line.get("prompts")
    if not isinstance(spread, (int, float)) or not isinstance(prompts, int) or prompts < 1:
        return None
    return rounded(2 * spread / prompts**0.5)


def _trace(series: Series, name: str, meta: dict[str, Any], color: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "name": html.escape(name, quote=False),  # plotly reads some markup in names
        "x": series.iterations.tolist(),
        "y": [rounded(value) for value in series.values.tolist()],
        "meta": meta,
        "marker": {"color": color, "size": 5},
        "hovertemplate": "%{y:.4~g}",
        "showlegend": False,
    }


def _marks(finding: Finding, end: int, place: int | None) -> list[dict[str, Any]]:
    """Marks since when a warning holds, and its threshold.

    Args:
        finding: the warning.
        end: the last iteration of its run.
        place: of the run among several: areas would overlap, so a line in its colour is drawn.
    """
    level = LEVEL_COLORS[finding.level]
    since = {"x0": finding.since, "y0": 0, "y1": 1, "yref": "paper", "layer": "below"}
    if place is None:
        shapes = [
            since | {"type": "rect", "x1": end, "fillcolor": level, "opacity": 0.09, "line": {"width": 0}}
        ]
    else:
        line = {"color": COLORS[place % len(COLORS)], "dash": "dot", "width": 1.5}
        shapes = [since | {"type": "line", "x1": finding.since, "line": line}]
    if finding.threshold is not None and math.isfinite(finding.threshold):
        limit = {"x0": 0, "x1": 1, "xref": "paper", "y0": finding.threshold, "y1": finding.threshold}
        shapes.append(limit | {"type": "line", "line": {"color": level, "dash": "dash", "width": 1}})
    return shapes


def _phase_figure(place: int, run: Run, several: bool) -> Figure:
    """Seconds of each phase, one on top of the other."""
    phases = phases_of(run)
    data, legend, notes = [], [], []
    whole: dict[int, float] = {}
    for level, (metric, series) in enumerate(phases.items()):
        color = COLORS[level % len(COLORS)]
        name = _PHASE_NAMES.get(metric, metric.removeprefix("time/"))
        for iteration, value in zip(series.iterations.tolist(), series.values.tolist(), strict=True):
            whole[iteration] = whole.get(iteration, 0.0) + value
        # The same iterations in every phase, or the stack would not add up.
        step = -(-len(series.values) // MAX_POINTS)
        shown = Series(series.iterations[::step], series.values[::step])
        trace = _trace(shown, name, {"run": place}, color) | {"hovertemplate": "%{y:.3~g} s"}
        if len(series.values) > MARKED_POINTS:
            trace |= {"mode": "lines", "stackgroup": "phases", "line": {"width": 0, "color": color}}
        else:
            trace |= {"type": "bar", "marker": {"color": color}}
        data.append(trace)
        median = float(np.median(series.finite.values)) if len(series.finite.values) else 0.0
        legend.append(f"{name}, median {median:.3g} s")
    layout = _layout([run]) | {"barmode": "stack"}
    total = Series(np.array(list(whole)), np.array(list(whole.values()), dtype=np.float64))
    if _starts_slow(_TOTAL_TIME, total):
        layout["yaxis"]["autorangeoptions"] = {"clipmax": _top(total)}
        notes.append(f"The first {run.unit} took {total.values[0]:.3g} s, above the axis: it compiles.")
    title = f"Time per phase: {run.name}" if several else "Time per phase"
    chart = Chart("time/*", title, f"seconds per {run.unit}", columns=3)
    return Figure(chart, {"data": data, "layout": layout}, [], notes, legend)


def _layout(runs: Sequence[Run]) -> dict[str, Any]:
    every = {"dtick": 1} if all(len(run.metrics) < 9 for run in runs) else {}  # no half iterations
    return {
        "height": 190,
        "margin": {"l": 50, "r": 10, "t": 8, "b": 24},
        "hovermode": "x unified",
        "xaxis": {
            "unifiedhovertitle": {"text": f"{runs[0].unit} %{{x}}"},
            "hoverformat": "d",
            "zeroline": False,
            **every,
        },
        "yaxis": {"zeroline": False, "exponentformat": "e", "minexponent": 5},
        "yaxis2": {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True},
    }


def _starts_slow(metric: str, series: Series) -> bool:
    """Whether the first iteration took far more time than any other: it compiles."""
    values = series.values
    return bool(metric.startswith("time/") and len(values) > 3 and values[0] > 2.5 * values[1:].max())


def _top(series: Series) -> float | None:
    """Top of the axis without the first value."""
    return rounded(1.06 * float(series.values[1:].max()))
