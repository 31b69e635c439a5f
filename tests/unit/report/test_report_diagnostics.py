"""Warnings of hand-worked runs: each rule fires where it must, names its iteration, and else is silent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindrlhf.report import diagnostics as d
from mindrlhf.report.diagnostics import running_median, score_change, since_iteration, standard_error
from mindrlhf.report.run_data import read_run
from tests.unit.report.conftest import (
    CONFIG,
    plain_line,
    reward_lines,
    series,
    stage_config,
    stage_lines,
    synthetic_metrics,
)

MakeRun = Callable[..., Path]


def check(kind: str, values: Sequence[float]) -> d.Finding | None:
    """What the rule of a kind says about the values of iterations 1, 2, ..."""
    (rule,) = [rule for rule in d.RULES if rule.kind == kind]
    return rule.check(series(values))


def test_running_median_by_hand() -> None:
    # Windows of 5: [1,9,2] [1,9,2,3] [1,9,2,3,4] [9,2,3,4] [2,3,4]
    assert running_median(np.array([1.0, 9, 2, 3, 4])).tolist() == [2.0, 2.5, 3.0, 3.5, 3.0]
    assert running_median(np.array([])).tolist() == []
    assert running_median(np.array([7.0])).tolist() == [7.0]


def test_running_median_leaves_out_what_is_not_finite() -> None:
    found = running_median(np.array([math.nan, 1, math.inf, 3, math.nan, math.nan, math.nan, math.nan]))
    assert found[:6].tolist() == [1.0, 2.0, 2.0, 2.0, 3.0, 3.0]
    assert np.isnan(found[6:]).all()


def test_since_is_the_start_of_the_last_stretch() -> None:
    run = series([0] * 6, first=10, step=5)
    assert since_iteration(run, np.array([1, 0, 1, 1, 1, 1], dtype=bool)) == 20
    assert since_iteration(run, np.array([1, 1, 1, 1, 1, 0], dtype=bool)) is None
    assert since_iteration(run, np.ones(6, dtype=bool)) == 10
    assert since_iteration(series([]), np.zeros(0, dtype=bool)) is None


def test_standard_error_by_hand() -> None:
    # Variances 2 and 8 of two values each: sqrt(2/2 + 8/2) = sqrt(5)
    assert standard_error(np.array([1.0, 3.0]), np.array([0.0, 4.0])) == pytest.approx(math.sqrt(5))


def test_score_change_by_hand() -> None:
    first, last, errors = score_change(series([0, 2, *[9] * 6, 3, 5])) or (0, 0, 0)
    # Means 1 and 4; each variance 2, so the error is sqrt(2/2 + 2/2).
    assert (first, last) == (1.0, 4.0)
    assert errors == pytest.approx(3 / math.sqrt(2))
    assert score_change(series([1] * 9)) is None
    assert score_change(series([1] * 10)) == (1.0, 1.0, 0.0)


def test_kl_above_target() -> None:
    # 1.2 x 6 = 7.2 is the limit.
    settings = ("adaptive", 6.0)
    found = d.kl_above_target(series([1.0] * 11 + [8.0] * 9), *settings)
    assert found is not None
    assert (found.text, found.level, found.since) == ("KL above target since iteration 12", "warning", 12)
    assert found.threshold == 6.0
    assert found.detail == "Last 8 nats per sequence; target is 6."
    assert d.kl_above_target(series([7.1] * 20), *settings) is None
    assert d.kl_above_target(series([8.0] * 10 + [1.0] * 10), *settings) is None


def test_a_spike_is_no_stretch() -> None:
    assert d.kl_above_target(series([1.0, 1, 1, 99, 99, 1, 1, 1]), None, None) is None
    found = d.kl_above_target(series([9.0] * 5 + [1.0, 1.0] + [9.0] * 5), None, None)
    assert found is not None
    assert found.since == 1


def test_kl_with_a_fixed_coefficient_is_a_note() -> None:
    found = d.kl_above_target(series([8.0] * 5), "fixed", "wrong")
    assert found is not None
    assert (found.level, found.text) == ("note", "KL above the usual target since iteration 1")


@pytest.mark.parametrize(
    ("kind", "values", "text", "detail", "threshold"),
    [
        ("kl_negative", [1.0] * 5 + [-0.1] * 10, "KL below 0 since iteration 6", "Last -0.1 nats", 0.0),
        ("clip_fraction", [0.1] * 4 + [0.31] * 6,
         "Clip fraction over 0.3 since iteration 5: lower the learning rate", "Last 0.31 of the tokens", 0.3),
        ("ratio", [1.0] * 5 + [2.1] * 5,
         "Ratio of new to old policy far from 1 since iteration 6", "Last 2.1.", 2.0),
        ("ratio", [1.0] * 5 + [0.4] * 5,
         "Ratio of new to old policy far from 1 since iteration 6", "Last 0.4.", 0.5),
        # At 6 the window is [2, 1, .39, .39, .39].
        ("entropy", [2.0, 2.0, 2.0, 2.0, 1.0, 0.39, 0.39, 0.39], "Entropy collapsed since iteration 6",
         "Last 0.39 nats per token, at the start 2.", 0.4),
        ("stop_rate", [0.5, 0.9, 0.9, 0.9, 0.9, 0.9, 0.6, 0.6, 0.6], "Stop rate falling since iteration 7",
         "Last 60% of the responses stopped, before up to 90%.", None),
        ("never_stops", [0.0] * 4, "Hardly any response stops by itself since iteration 1", "Last 0%", None),
        ("explained_variance", [0.5] * 6 + [-0.2] * 6, "Explained variance below 0 since iteration 7",
         "Last -0.2: worse than a constant", 0.0),
        ("scores_equal", [0.5, 0.5, 0.0, 0.0, 0.0, 0.0],
         "All scores of an iteration equal since iteration 3", "The standard deviation", None),
    ],
)  # fmt: skip
def test_rules_fire(kind: str, values: list[float], text: str, detail: str, threshold: float | None) -> None:
    found = check(kind, values)
    assert found is not None
    assert (found.text, found.threshold) == (text, threshold)
    assert found.detail.startswith(detail)
    assert text.partition(":")[0].endswith(f"since iteration {found.since}")
    assert found.level == ("note" if kind == "never_stops" else "warning")


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("kl_negative", [1.0] * 5 + [-0.1] * 9),  # the estimate of a few batches may be
        ("clip_fraction", [0.3] * 10),
        ("ratio", [1.0] * 5 + [1.9] * 5),
        ("ratio", [1.0] * 5 + [0.6] * 5),
        ("entropy", [2.0, 2.0, 2.0, 0.41, 0.41, 0.41]),
        ("entropy", [0.0] * 9),
        ("entropy", [2.0, 0.1]),
        ("stop_rate", [0.9] * 5 + [0.75] * 5),
        ("stop_rate", [0.2] * 5 + [0.9] * 5),
        ("never_stops", [0.0, 0.0]),
        ("never_stops", [0.0] * 4 + [0.5] * 4),
        ("explained_variance", [-0.2] * 10),  # a fresh critic may
        ("explained_variance", [-0.2] * 6 + [0.1] * 6),
        ("scores_equal", [0.0, 0.0]),
        *((rule.kind, []) for rule in d.RULES),
    ],
)
def test_rules_are_silent(kind: str, values: list[float]) -> None:
    assert check(kind, values) is None


def test_no_progress() -> None:
    flat = [0.0, 1.0] * 10
    found = d.no_progress(series(flat))
    assert found is not None
    assert found.text == "No progress in score since iteration 1"
    assert d.no_progress(series([value + 0.5 * place for place, value in enumerate(flat)])) is None
    assert d.no_progress(series(flat[:9])) is None


def test_score_falling() -> None:
    up_and_down = [0.0, 0.1, 1.0, 1.1, 2.0, 2.1, 1.0, 1.1, 0.0, 0.1]
    found = d.score_falling(series(up_and_down))
    assert found is not None
    # Stretches of two: the best mean is that of iterations 5 and 6.
    assert (found.text, found.since) == ("Score falling since iteration 6", 6)
    assert found.detail == "Mean 2.05 up to there, 0.05 in the last fifth."
    assert d.score_falling(series(sorted(up_and_down))) is None
    assert d.score_falling(series([0.0, 1.0] * 10)) is None


def test_not_finite_names_the_first() -> None:
    found = d.not_finite(
        {
            "a": series([1, 2, math.nan, 4]),
            "b": series([1, math.inf, 3]),
            "c": series([1, math.nan, math.nan]),
            "d": series([1, 2, 3]),
        }
    )
    assert found is not None
    assert (found.text, found.level) == ("NaN or infinity in b, c since iteration 2", "error")
    assert found.detail == "3 metric(s) hold such values: a, b, c."
    assert d.not_finite({"d": series([1, 2, 3]), "e": series([])}) is None


def test_rules_bear_missing_metrics_and_nan(make_run: MakeRun) -> None:
    assert d.diagnose(read_run(make_run("few", metrics=[{"iteration": 1}]))) == []
    lines = [
        {"iteration": number, "objective/kl": math.nan, "policy/clipfrac": None} for number in range(1, 30)
    ]
    (found,) = d.diagnose(read_run(make_run("nan", metrics=lines)))
    assert found.kind == "nan"


def test_a_run_that_learns(make_run: MakeRun) -> None:
    lines = synthetic_metrics(300, seed=1)
    kinds = {found.kind: found for found in d.diagnose(read_run(make_run("a", metrics=lines, config=CONFIG)))}
    assert set(kinds) == {"kl", "clip_fraction"}
    # 9.5 x part^0.8 passes 7.2 at part 0.707.
    assert abs(kinds["kl"].since - 212) < 15
    calm = [plain_line(number, **{"objective/scores": number / 50}) for number in range(1, 101)]
    assert d.diagnose(read_run(make_run("calm", metrics=calm))) == []


def test_the_worst_comes_first(make_run: MakeRun) -> None:
    lines = [
        plain_line(number, **{"objective/kl": 9.0, "policy/clipfrac": 0.5, "loss/value": math.nan})
        for number in range(1, 6)
    ]
    levels = [found.level for found in d.diagnose(read_run(make_run(metrics=lines)))]
    assert levels == ["error", "warning", "note"]


def test_overfitting_by_hand() -> None:
    """From 3 down to 1 and up to 1.3: 15 % of the fall; up to 1.1 is 5 %."""
    found = d.held_out_loss_rising(series([3.0, 1.5, 1.0, 1.2, 1.3], 0, 10))
    assert found is not None
    assert found.text == "Held-out loss rising since step 20: overfitting"
    assert found.detail == "Lowest 1 after step 20, last 1.3."
    for values in ([3.0, 1.0, 1.1], [3.0, 2.0, 1.0], [1.0, 1.3], [1.0, 1.0, 1.0], []):
        assert d.held_out_loss_rising(series(values)) is None


def test_no_gain_by_hand() -> None:
    found = d.no_gain(series([2.0, math.nan, 1.0, 2.5], 0, 10))
    assert found is not None
    assert found.text == "Held-out loss no lower than after step 0"
    assert found.detail == "First 2, last 2.5."
    assert d.no_gain(series([2.0, 2.5, 1.9], 0, 10)) is None
    assert d.no_gain(series([2.0], 0, 10)) is None


def test_accuracy_near_chance_by_hand() -> None:
    """100 pairs: the standard error is 0.05, so 0.59 is chance and 0.61 is not; 2500 pairs make it 0.01."""
    found = d.accuracy_near_chance(series([0.4, 0.59], 0, 10), 100)
    assert found is not None
    assert found.text == "Held-out accuracy no better than chance at step 10"
    assert found.detail == "0.59 on 100 pairs; the standard error of a coin is 0.05."
    assert d.accuracy_near_chance(series([0.4, 0.61], 0, 10), 100) is None
    assert d.accuracy_near_chance(series([0.4, 0.59], 0, 10), 2500) is None
    assert d.accuracy_near_chance(series([0.4], 0, 10), 100) is None, "before training"
    assert d.accuracy_near_chance(series([0.4, 0.5], 0, 10), None) is None


def test_findings_of_runs(make_run: MakeRun) -> None:
    def kinds(name: str, lines: list[dict[str, Any]], stage: str = "sft", held_out: int = 100) -> list[str]:
        run = read_run(make_run(name, metrics=lines, config=stage_config(stage, held_out)))
        return [found.kind for found in d.diagnose(run)]

    assert kinds("good", stage_lines([3.0, 2.0, 1.0])) == []
    assert kinds("chance", reward_lines(0.55), "reward") == ["chance"]
    assert kinds("enough", reward_lines(0.55), "reward", 900) == []
    assert kinds("nan", stage_lines([3.0, math.nan, 2.0])) == ["nan"]
    alone = [line for line in stage_lines([3.0, 2.0]) if line["step"]]
    for line in alone:
        line.pop("eval/loss", None)
    assert kinds("alone", alone) == ["not_held_out"]
    skipped = stage_lines([3.0, 2.0, 1.0])
    skipped[2]["update/skipped"] = skipped[3]["update/skipped"] = 1.0
    run = read_run(make_run("skipped", metrics=skipped))
    (found,) = d.diagnose(run)
    assert found.text == "2 update(s) skipped since step 2"
    assert found.detail == "In 2 of 4 steps, last in 3."
