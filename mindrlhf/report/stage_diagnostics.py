"""What is wrong with a run of ``sft.py`` or ``reward_model.py``, in words; mostly from its held-out results.

These are of the same rows each time, so a change is the model's. The thresholds are choices of this project.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mindrlhf.report.findings import Finding, not_finite, updates_skipped, worst_first
from mindrlhf.report.reading import Run, Series

RISE = 0.1
"""Of what the held-out loss has fallen; a rise by that much is overfitting and no rounding."""
LEAST_EVALUATIONS = 3
"""Fewer make no fall and rise."""
CHANCE = 0.5
"""Accuracy of a reward model that knows nothing."""
CHANCE_ERRORS = 2.0
"""Standard errors by which the held-out accuracy must be above it."""


def diagnose_stage(run: Run) -> list[Finding]:
    """All findings about a stage before PPO, the worst first."""
    names = dict.fromkeys(name for line in run.evaluations for name in line if name != "iteration")
    metrics = {name: run.series(name) for name in run.metric_names() if name != "iteration"}
    loss = run.evaluation_series("eval/loss")
    return worst_first(
        [
            not_finite(metrics | {name: run.evaluation_series(name) for name in names}, "step"),
            updates_skipped(run.series("update/skipped"), "step"),
            no_gain(loss) or held_out_loss_rising(loss),
            accuracy_near_chance(run.evaluation_series("eval/accuracy"), _held_out_rows(run)),
            nothing_held_out(run),
        ]
    )


def held_out_loss_rising(loss: Series) -> Finding | None:
    """The held-out loss has been lower: the model learns its training rows by heart."""
    loss = _finite(loss)
    if len(loss.values) < LEAST_EVALUATIONS:
        return None
    best = int(loss.values.argmin())
    first, lowest, last = (float(loss.values[place]) for place in (0, best, -1))
    if last - lowest <= RISE * (first - lowest) or last <= lowest:
        return None
    since = int(loss.iterations[best])
    return Finding(
        "overfitting",
        "warning",
        f"Held-out loss rising since step {since}: overfitting",
        f"Lowest {lowest:.4g} after step {since}, last {last:.4g}.",
        "Train for fewer epochs, with a lower learning rate or more data; --save_interval keeps weights of "
        "steps in between.",
        since,
        "loss/train",
    )


def no_gain(loss: Series) -> Finding | None:
    """The held-out loss is no lower than before training."""
    loss = _finite(loss)
    if len(loss.values) < 2 or loss.values[-1] < loss.values[0]:
        return None
    since = int(loss.iterations[0])
    return Finding(
        "no_gain",
        "warning",
        f"Held-out loss no lower than after step {since}",
        f"First {float(loss.values[0]):.4g}, last {float(loss.values[-1]):.4g}.",
        "Set --learning_rate: the YAML's is for PPO. Where the training loss falls, give more data.",
        since,
        "loss/train",
    )


def accuracy_near_chance(accuracy: Series, rows: int | None) -> Finding | None:
    """A reward model that tells held-out pairs apart no better than a coin, by two standard errors.

    Args:
        accuracy: on the held-out pairs.
        rows: how many there are; ``None`` when it is not recorded.
    """
    accuracy = _finite(accuracy)
    if not rows or not len(accuracy.values) or accuracy.iterations[-1] == 0:
        return None
    last, error = float(accuracy.values[-1]), math.sqrt(CHANCE * (1 - CHANCE) / rows)
    if last - CHANCE >= CHANCE_ERRORS * error:
        return None
    since = int(accuracy.iterations[-1])
    return Finding(
        "chance",
        "warning",
        f"Held-out accuracy no better than chance at step {since}",
        f"{last:.2f} on {rows} pairs; the standard error of a coin is {error:.2f}.",
        "Give more pairs, a higher --learning_rate or more epochs; look whether pairs are mixed up.",
        since,
        "train/accuracy",
        CHANCE,
    )


def nothing_held_out(run: Run) -> Finding | None:
    """Nobody looks at rows that were not trained on."""
    if run.evaluations:
        return None
    since = int(run.iterations[0])
    return Finding(
        "not_held_out",
        "note",
        f"Nothing held out since step {since}",
        "There is no evaluation, so training loss is all there is to judge by.",
        "Set --eval_fraction.",
        since,
        "loss/train",
    )


def _finite(series: Series) -> Series:
    finite = np.isfinite(series.values)
    return Series(series.iterations[finite], series.values[finite])


def _held_out_rows(run: Run) -> int | None:
    """How many rows ``config.json`` says were held out."""
    found: Any = run.config
    for key in ("configuration", "rows", "held_out"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else None
