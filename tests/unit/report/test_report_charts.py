"""Figures: each metric that is there in one place, with gaps, evaluations and warnings; plotly takes them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mindrlhf.report.charts import GROUPS, Figure, charts_of, make_figures, thin
from mindrlhf.report.diagnostics import diagnose
from mindrlhf.report.run_data import Series, read_runs
from tests.unit.report.conftest import plain_line, reward_lines, stage_config, stage_lines, synthetic_metrics

MakeRun = Callable[..., Path]


def figures_of(*directories: Path) -> dict[str, Figure]:
    """The figures about runs by metric."""
    runs = read_runs(directories)
    groups = make_figures(runs, [diagnose(run) for run in runs])
    return {figure.chart.metric: figure for figures in groups.values() for figure in figures}


def test_curves_have_gaps_and_marks(make_run: MakeRun) -> None:
    lines = [
        {"iteration": 1, "objective/kl": 0.1234567891, "off": 0.0, "late": None},
        {"iteration": 2, "objective/kl": float("nan"), "off": 0.0, "late": 5},
    ]
    evaluations = [{"iteration": 0, "eval/kl": float("nan")}, {"iteration": 2, "eval/kl": 1.5, "prompts": 8}]
    found = figures_of(make_run(metrics=lines, evaluations=evaluations))
    assert list(found) == ["objective/kl", "late"]
    line, broken, held_out = found["objective/kl"].plot["data"]
    assert (line["x"], line["y"]) == ([1, 2], [0.123457, None])
    assert (broken["x"], broken["hovertemplate"]) == ([2], "NaN or infinite")
    assert (held_out["x"], held_out["y"]) == ([2], [1.5])
    (late,) = found["late"].plot["data"]
    assert (late["x"], late["y"], found["late"].last) == ([2], [5.0], [5.0])


def test_phases_add_up_to_the_iteration(make_run: MakeRun) -> None:
    lines = [
        {"iteration": 1, "time/rollout": 3.0, "time/train": 4.0, "time/iteration": 8.0},
        {"iteration": 2, "time/rollout": 2.0, "time/train": 4.0, "time/iteration": 5.0},
    ]
    stack = figures_of(make_run(metrics=lines))["time/*"]
    # 8 - 7, and never below 0
    assert {trace["name"]: trace["y"] for trace in stack.plot["data"]} == {
        "generate": [3.0, 2.0], "train": [4.0, 4.0], "rest": [1.0, 0.0],
    }  # fmt: skip
    assert stack.legend == ["generate, median 2.5 s", "train, median 4 s", "rest, median 0.5 s"]


def test_a_slow_first_iteration_does_not_flatten_the_axis(make_run: MakeRun) -> None:
    lines = [
        plain_line(n, **{"time/iteration": 50.0 if n == 1 else 2.0, "time/train": 1.0}) for n in range(1, 6)
    ]
    found = figures_of(make_run(metrics=lines))
    assert found["time/iteration"].plot["layout"]["yaxis"]["autorangeoptions"] == {
        "include": [0.0],
        "clipmax": 2.12,
    }
    assert found["time/iteration"].plot["data"][0]["meta"] == {"run": 0, "smooth": True, "slow": True}
    assert found["time/*"].notes == ["The first iteration took 50 s, above the axis: it compiles."]


def test_the_axis_of_a_constant_starts_at_zero(make_run: MakeRun) -> None:
    found = figures_of(make_run(metrics=[plain_line(n, lr=1e-6, below=-2.0) for n in (1, 2)]))
    assert found["lr"].plot["layout"]["yaxis"]["range"] == [0.0, 2e-6]
    assert found["below"].plot["layout"]["yaxis"]["range"] == [-4.0, 0.0]


def test_warnings_are_marked(make_run: MakeRun) -> None:
    runs = [
        make_run(
            name, metrics=[plain_line(n, **{"policy/clipfrac": 0.1 if n < 5 else 0.4}) for n in range(1, 11)]
        )
        for name in ("a", "b")
    ]
    since, limit = figures_of(runs[0])["policy/clipfrac"].plot["layout"]["shapes"]
    assert (since["type"], since["x0"], since["x1"]) == ("rect", 5, 10)
    assert (limit["y0"], limit["y1"]) == (0.3, 0.3)
    both = figures_of(*runs)["policy/clipfrac"].plot["layout"]["shapes"]
    assert [shape["type"] for shape in both] == ["line"] * 4


def test_held_out_scores_show_two_standard_errors(make_run: MakeRun) -> None:
    evaluations = [{"iteration": 0, "eval/scores": 1.0, "eval/scores_std": 0.8, "prompts": 64}]
    trace = figures_of(make_run(evaluations=evaluations))["objective/scores"].plot["data"][-1]
    assert trace["error_y"]["array"] == [0.2]  # 2 x 0.8 / 8
    del evaluations[0]["prompts"]
    trace = figures_of(make_run("unknown", evaluations=evaluations))["objective/scores"].plot["data"][-1]
    assert "error_y" not in trace


def test_names_are_text_for_plotly(make_run: MakeRun) -> None:
    name = "<a href='x'>b&amp;"
    found = figures_of(make_run(name), make_run("other"))
    assert found["objective/kl"].plot["data"][0]["name"] == "&lt;a href='x'&gt;b&amp;amp;"


def test_long_curves_keep_their_spikes() -> None:
    values = np.zeros(100_000)
    values[12_345], values[77_777], values[50_000] = 9.0, -9.0, np.nan
    thinned = thin(Series(np.arange(100_000), values), 100)
    assert len(thinned.values) <= 102
    assert (np.nanmax(thinned.values), np.nanmin(thinned.values)) == (9.0, -9.0)
    assert (thinned.iterations[0], thinned.iterations[-1]) == (0, 99_999)
    assert (np.diff(thinned.iterations) > 0).all()
    short = Series(np.arange(3), np.arange(3.0))
    assert thin(short) is short


def test_plotly_takes_every_figure(make_run: MakeRun, whole_run: Path) -> None:
    from plotly.graph_objects import Figure as Checked

    short = make_run("short", metrics=[*synthetic_metrics(5)[:4], plain_line(9, lr=float("inf"))])
    for figure in figures_of(whole_run, short).values():
        Checked(figure.plot)


def test_without_a_critic_there_is_nothing_of_one(make_run: MakeRun) -> None:
    lines = [
        {name: value for name, value in line.items() if "value" not in name and "critic" not in name}
        for line in synthetic_metrics(30)
    ]
    runs = read_runs([make_run(metrics=lines)])
    findings = diagnose(runs[0])
    assert "Critic" not in make_figures(runs, [findings])
    assert "critic" not in str(findings)


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_the_charts_of_a_stage(make_run: MakeRun, kind: str) -> None:
    lines = reward_lines(0.8) if kind == "reward" else stage_lines([3.0, 2.0, 1.0])
    for line in lines:
        if kind == "sft" and "eval/loss" in line:
            line["eval/perplexity"] = 2.0
    runs = read_runs([make_run("mine", metrics=lines, config=stage_config(kind))])
    groups = make_figures(runs, [[]])
    wanted = {
        "sft": ["loss/train", "eval/perplexity"],
        "reward": ["loss/train", "train/accuracy", "train/margin", "eval/scores", "eval/scores_std"],
    }
    assert {title: [figure.chart.metric for figure in figures] for title, figures in groups.items()} == {
        "Goal": wanted[kind],
        "Optimizer": ["lr", "grad_norm"],  # nothing was skipped
        "Speed": ["tokens_per_second", "time/iteration"],
    }
    assert groups["Goal"][0].plot["data"][1]["x"] == [0, 2, 4]
    assert groups["Goal"][0].plot["layout"]["xaxis"]["unifiedhovertitle"]["text"] == "step %{x}"


def test_metrics_have_one_place_each() -> None:
    metrics = [chart.metric for charts in GROUPS.values() for chart in charts]
    assert len(metrics) == len(set(metrics))
    groups = charts_of(["iteration", "lr", "time/rollout", "new/metric"], ["eval/new"])
    assert {title: [chart.metric for chart in charts] for title, charts in groups.items()} == {
        "Optimizer": ["lr"],
        "Other": ["new/metric", "eval/new"],
    }


def test_the_metrics_of_the_trainer_have_a_place(repo_root: Path) -> None:
    sources = [path.read_text(encoding="utf-8") for path in (repo_root / "mindrlhf/trainer").rglob("*.py")]
    names = r"(?:objective|response|policy|loss|value|grad_norm|update|train|eval|tokens_per_second)/\w+"
    written = {name for source in sources for name in re.findall(rf'"({names})"', source)}
    assert {
        "objective/scores",
        "loss/policy",
        "value/mean",
        "loss/train",
        "train/accuracy",
        "eval/loss",
    } <= written
    placed = [chart for charts in GROUPS.values() for chart in charts]
    assert written <= {chart.metric for chart in placed} | {chart.held_out for chart in placed}
