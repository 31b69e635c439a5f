"""What is wrong with a run, in words, and since which iteration: pure functions of its metrics.

Single iterations are noisy, so every rule of :data:`RULES` looks at a running median: a rule that holds
"since iteration 12" holds for the median around every iteration from 12 to the last. Held-out results are of
the same rows each time, so a change in them is the model's. Where no source is named, a threshold is a choice
of this project.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mindrlhf.report.run_data import PPO, Run, Series, recorded
from mindrlhf.utils.errors import inline_list

MEDIAN_WINDOW = 5
"""Iterations of the running median: up to two adjacent outliers do not count."""
KL_TARGET = 6.0
"""Nats per sequence when the configuration is not recorded: the default ``kl_target``, the middle of the
targets of Ziegler et al. 2019 (arXiv 1909.08593)."""
KL_TOLERANCE = 1.2
"""Times the target: from here on the controller's error, clipped at 0.2, no longer grows with the KL
(Ziegler et al. 2019, section 2.2), so it no longer holds the KL."""
CLIP_FRACTION = 0.3
"""Of the tokens; with more than that clipped, most of a pass no longer moves the policy."""
RATIO_RANGE = (0.5, 2.0)
"""TRL's PPO trainer documentation: a mean ratio like 2.0 or 0.1 means updates that are too drastic."""
STOP_RATE_FALL = 0.2
"""Below the highest stop rate so far."""
STOP_RATE_NEVER = 0.02
"""At or below this, hardly any response stops."""
ENTROPY_LEFT = 0.2
"""Of the first iterations' entropy. Collapse of the entropy, and what follows: Cui et al. 2025 (arXiv
2505.22617), Yu et al. 2025 (DAPO, arXiv 2503.14476)."""
CRITIC_WARM_UP = 10
"""Iterations in which a fresh critic may still be worse than a constant."""
TREND_ITERATIONS = 3
"""Fewer do not make a trend."""
PROGRESS_ITERATIONS = 10
"""Fewer say nothing about progress."""
PROGRESS_ERRORS = 2.0
"""Standard errors by which the last fifth's mean score must differ from the first fifth's."""
RISE = 0.1
"""Fraction of the fall of the held-out loss; a rise by that much is overfitting, not noise."""
CHANCE = 0.5
"""Accuracy of a reward model that knows nothing."""
CHANCE_ERRORS = 2.0
"""Standard errors by which the held-out accuracy must be above it."""


class Finding(NamedTuple):
    """One warning.

    Attributes:
        kind: short name of the rule.
        level: ``error`` (results are void), ``warning`` (fix it) or ``note`` (look at it).
        text: what is wrong, with the iteration or step since which it holds.
        detail: the numbers.
        remedy: what to do.
        since: that iteration or step.
        metric: the metric that shows it.
        threshold: the limit that was passed, in the metric's unit, when it is a constant.
    """

    kind: str
    level: str
    text: str
    detail: str
    remedy: str
    since: int
    metric: str
    threshold: float | None = None


class Rule(NamedTuple):
    """A warning about one metric that holds from some iteration to the last.

    Attributes:
        kind, level, metric, remedy: as in :class:`Finding`.
        text, detail: templates with ``{since}``, ``{last}`` (value), ``{first}`` and ``{highest}`` (of the
            running median).
        holds: from the running median (n,) to where the rule holds (n,).
        threshold: from the running median to the limit.
        held: iterations for which it must hold at least.
        recorded: iterations that the metric must have at least.
    """

    kind: str
    level: str
    metric: str
    text: str
    detail: str
    remedy: str
    holds: Callable[[np.ndarray], np.ndarray]
    threshold: Callable[[np.ndarray], float | None] = lambda median: None
    held: int = 1
    recorded: int = 1

    def check(self, series: Series) -> Finding | None:
        """The finding, or ``None`` where the rule does not hold at the end."""
        if len(series.values) < self.recorded:
            return None
        median = running_median(series.values)
        since = since_iteration(series, self.holds(median))
        if since is None or int((series.iterations >= since).sum()) < self.held:
            return None
        highest = float(np.nanmax(median))
        values = {"since": since, "last": float(series.values[-1]), "first": median[0], "highest": highest}
        text, detail = self.text.format(**values), self.detail.format(**values)
        limit = self.threshold(median)
        return Finding(self.kind, self.level, text, detail, self.remedy, since, self.metric, limit)


RULES = (
    Rule(
        "kl_negative", "warning", "objective/kl",
        "KL below 0 since iteration {since}",
        "Last {last:.3g} nats per sequence; a true KL is never negative.",
        "Sample from the whole distribution: temperature as in training, top_k 0, top_p 1.",
        lambda median: median < 0, lambda median: 0.0,
        held=CRITIC_WARM_UP,  # the k1 estimate of one batch may be negative, its mean may not
    ),
    Rule(
        "clip_fraction", "warning", "policy/clipfrac",
        f"Clip fraction over {CLIP_FRACTION:g} since iteration {{since}}: lower the learning rate",
        "Last {last:.2f} of the tokens clipped.",
        "Or use fewer ppo_epochs.",
        lambda median: median > CLIP_FRACTION, lambda median: CLIP_FRACTION,
    ),
    Rule(
        "ratio", "warning", "policy/ratio",
        "Ratio of new to old policy far from 1 since iteration {since}",
        "Last {last:.3g}.",
        "Lower the learning rate; run once with --verify_sync True.",
        lambda median: (median < RATIO_RANGE[0]) | (median > RATIO_RANGE[1]),
        lambda median: RATIO_RANGE[int(median[-1] > 1)],
    ),
    Rule(
        "entropy", "warning", "policy/entropy",
        "Entropy collapsed since iteration {since}",
        "Last {last:.3g} nats per token, at the start {first:.3g}.",
        "Raise kl_coef or lower the learning rate; the policy says the same whatever the draw.",
        lambda median: (median < ENTROPY_LEFT * median[0]) & (median[0] > 0),
        lambda median: ENTROPY_LEFT * float(median[0]),
        recorded=TREND_ITERATIONS,
    ),
    Rule(
        "stop_rate", "warning", "response/eos_rate",
        "Stop rate falling since iteration {since}",
        "Last {last:.0%} of the responses stopped, before up to {highest:.0%}.",
        "Set missing_eos_penalty; look for a reward that grows with length.",
        lambda median: median <= np.fmax.accumulate(median) - STOP_RATE_FALL,
        recorded=TREND_ITERATIONS,
    ),
    Rule(
        "never_stops", "note", "response/eos_rate",
        "Hardly any response stops by itself since iteration {since}",
        "Last {last:.0%} of the responses stopped.",
        "Check stop_token_ids, raise max_response_length or set missing_eos_penalty.",
        lambda median: median <= STOP_RATE_NEVER,
        held=TREND_ITERATIONS,
    ),
    Rule(
        "explained_variance", "warning", "value/explained_var",
        "Explained variance below 0 since iteration {since}",
        "Last {last:.3g}: worse than a constant, so advantages are mostly noise.",
        "Raise the critic's learning rate or vf_coef; start the critic from the reward model.",
        lambda median: median < 0, lambda median: 0.0,
        recorded=CRITIC_WARM_UP + 1,
    ),
    Rule(
        "scores_equal", "warning", "objective/scores_std",
        "All scores of an iteration equal since iteration {since}",
        "The standard deviation of the scores is 0.",
        "The reward does not tell responses apart: check the reward model or --reward_fn.",
        lambda median: median == 0,
        held=TREND_ITERATIONS,
    ),
)  # fmt: skip


def diagnose(run: Run) -> list[Finding]:
    """All findings about a run, the worst first."""
    loss, score = run.evaluation_series("eval/loss"), run.series("objective/scores")
    evaluations = {name: run.evaluation_series(name) for name in run.evaluation_names()}
    metrics = {name: run.series(name) for name in run.metric_names() if name != "iteration"}
    found = [
        mixed_jobs(run),
        not_finite(metrics if run.kind == PPO else metrics | evaluations, run.unit),
        kl_above_target(run.series("objective/kl"), run.setting("kl_controller"), run.setting("kl_target")),
        *(rule.check(run.series(rule.metric)) for rule in RULES),
        score_falling(score) or no_progress(score),
        updates_skipped(run.series("update/skipped"), run.unit),
        no_gain(loss) or held_out_loss_rising(loss),
        accuracy_near_chance(
            run.evaluation_series("eval/accuracy"), recorded(run.config, "configuration", "rows", "held_out")
        ),
        None if run.kind == PPO else nothing_held_out(run),
    ]
    order = ("error", "warning", "note")
    return sorted((finding for finding in found if finding), key=lambda finding: order.index(finding.level))


def mixed_jobs(run: Run) -> Finding | None:
    """Two jobs have written to the directory of a run."""
    if run.mixed_since is None:
        return None
    text = f"Two jobs have written to this directory since {run.unit} {run.mixed_since}"
    detail = (
        f"The newest line of each {run.unit} is shown; {run.left_out} older one(s) are left out. Samples and "
        "checkpoints may be of either job."
    )
    remedy = "Give each job its own --save_ckpt_dir, and start this one again."
    return Finding("mixed", "error", text, detail, remedy, run.mixed_since, "iteration")


def kl_above_target(kl: Series, controller: Any, target: Any) -> Finding | None:
    """KL to the reference beyond what the controller holds; with a fixed coefficient only a note.

    Args:
        kl: nats per sequence.
        controller, target: the run's ``kl_controller`` and ``kl_target`` as recorded.
    """
    adaptive = controller == "adaptive"
    is_number = isinstance(target, (int, float)) and not isinstance(target, bool)
    limit = float(target) if is_number and math.isfinite(target) and target > 0 else KL_TARGET
    name = "target" if adaptive else "the usual target"
    return Rule(
        "kl", "warning" if adaptive else "note", "objective/kl",
        f"KL above {name} since iteration {{since}}",
        f"Last {{last:.3g}} nats per sequence; {name} is {limit:g}.",
        "Raise kl_coef or lower the learning rate; look for samples that only please the reward.",
        lambda median: median > KL_TOLERANCE * limit, lambda median: limit,
    ).check(kl)  # fmt: skip


def not_finite(metrics: Mapping[str, Series], unit: str = "iteration") -> Finding | None:
    """NaN or infinity in any metric, since the first one."""
    bad = {
        name: int(series.iterations[~np.isfinite(series.values)][0])
        for name, series in metrics.items()
        if not np.isfinite(series.values).all()
    }
    if not bad:
        return None
    since = min(bad.values())
    first = [name for name, iteration in bad.items() if iteration == since]
    text = f"NaN or infinity in {inline_list(first, 3)} since {unit} {since}"
    detail = f"{len(bad)} metric(s) hold such values: {inline_list(bad, 6)}."
    check = "the rewards for NaN." if unit == "iteration" else "the weights it started from."
    remedy = f"Resume from an earlier checkpoint with a lower learning rate; check {check}"
    return Finding("nan", "error", text, detail, remedy, since, first[0])


def updates_skipped(skipped: Series, unit: str = "iteration") -> Finding | None:
    """Updates that were not taken because a loss, a gradient or a reward was not finite."""
    steps, counts = skipped.finite
    iterations = steps[counts > 0]
    if not len(iterations):
        return None
    since = int(iterations[0])
    text = f"{counts[counts > 0].sum():.0f} update(s) skipped since {unit} {since}"
    detail = f"In {len(iterations)} of {len(skipped.values)} {unit}s, last in {int(iterations[-1])}."
    remedy = "Look at the samples that skipped_updates.jsonl names; lower the learning rate."
    return Finding("skipped", "warning", text, detail, remedy, since, "update/skipped")


def no_progress(score: Series) -> Finding | None:
    """The last fifth's scores are no better than the first fifth's, by two standard errors."""
    change = score_change(score)
    if change is None or change[2] >= PROGRESS_ERRORS:
        return None
    since = int(score.iterations[0])
    detail = f"Mean of the first fifth {change[0]:.3g}, of the last {change[1]:.3g}: no more than chance."
    remedy = "Check that the reward tells good from bad responses; raise the learning rate; lower kl_coef."
    text = f"No progress in score since iteration {since}"
    return Finding("no_progress", "warning", text, detail, remedy, since, "objective/scores")


def score_falling(score: Series) -> Finding | None:
    """The last fifth's scores are below those around the best iteration, by two standard errors."""
    iterations, values = score.finite
    part = len(values) // 5
    if len(values) < PROGRESS_ITERATIONS:
        return None
    best = int(np.convolve(values, np.full(part, 1 / part), mode="valid").argmax())
    if best + part > len(values) - part:
        return None
    top, last = values[best : best + part], values[-part:]
    # The best stretch is chosen for being high, so it must stand out by more than a fixed one.
    if float(top.mean() - last.mean()) < 2 * PROGRESS_ERRORS * standard_error(top, last):
        return None
    since = int(iterations[best + part - 1])
    detail = f"Mean {top.mean():.3g} up to there, {last.mean():.3g} in the last fifth."
    remedy = "Resume from a checkpoint before that; lower the learning rate or raise kl_coef."
    text = f"Score falling since iteration {since}"
    return Finding("score_falling", "warning", text, detail, remedy, since, "objective/scores")


def held_out_loss_rising(loss: Series) -> Finding | None:
    """The held-out loss has been lower: the model memorises its training rows."""
    steps, values = loss.finite
    if len(values) < TREND_ITERATIONS:
        return None
    best = int(values.argmin())
    first, lowest, last = (float(values[place]) for place in (0, best, -1))
    if last - lowest <= RISE * (first - lowest) or last <= lowest:
        return None
    since = int(steps[best])
    text = f"Held-out loss rising since step {since}: overfitting"
    detail = f"Lowest {lowest:.4g} after step {since}, last {last:.4g}."
    remedy = (
        "Train for fewer epochs, with a lower learning rate or more data; "
        "--save_interval keeps the weights of steps in between."
    )
    return Finding("overfitting", "warning", text, detail, remedy, since, "loss/train")


def no_gain(loss: Series) -> Finding | None:
    """The held-out loss is no lower than before training."""
    steps, values = loss.finite
    if len(values) < 2 or values[-1] < values[0]:
        return None
    since = int(steps[0])
    text = f"Held-out loss no lower than after step {since}"
    detail = f"First {float(values[0]):.4g}, last {float(values[-1]):.4g}."
    remedy = "Set --learning_rate: the YAML's is for PPO. Where the training loss falls, give more data."
    return Finding("no_gain", "warning", text, detail, remedy, since, "loss/train")


def accuracy_near_chance(accuracy: Series, rows: Any) -> Finding | None:
    """A reward model that tells held-out pairs apart no better than a coin, by two standard errors.

    Args:
        accuracy: on the held-out pairs.
        rows: their number, as recorded.
    """
    steps, values = accuracy.finite
    if not isinstance(rows, int) or rows < 1 or not len(values) or steps[-1] == 0:
        return None
    since, last, error = int(steps[-1]), float(values[-1]), math.sqrt(CHANCE * (1 - CHANCE) / rows)
    if last - CHANCE >= CHANCE_ERRORS * error:
        return None
    text = f"Held-out accuracy no better than chance at step {since}"
    detail = f"{last:.2f} on {rows} pairs; the standard error of a coin is {error:.2f}."
    remedy = "Give more pairs, a higher --learning_rate or more epochs; check whether pairs are mixed up."
    return Finding("chance", "warning", text, detail, remedy, since, "train/accuracy", CHANCE)


def nothing_held_out(run: Run) -> Finding | None:
    """No rows are evaluated that were not trained on."""
    if run.evaluations:
        return None
    since = int(run.iterations[0])
    text = f"Nothing held out since step {since}"
    detail = "There is no evaluation, so the run can only be judged by its training loss."
    return Finding("not_held_out", "note", text, detail, "Set --eval_fraction.", since, "loss/train")


def running_median(values: np.ndarray, window: int = MEDIAN_WINDOW) -> np.ndarray:
    """Median of the ``window`` values around each, fewer at the ends; NaN and infinities are left out.

    Args:
        values: (n,).
        window: odd.

    Returns:
        (n,) float64, NaN where the window has no finite value.
    """
    medians = np.full(len(values), np.nan)
    if not len(values):
        return medians
    finite = np.where(np.isfinite(values), values, np.nan)
    padded = np.pad(finite, window // 2, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, window)
    known = ~np.isnan(windows).all(axis=1)
    medians[known] = np.nanmedian(windows[known], axis=1)
    return medians


def since_iteration(series: Series, holds: np.ndarray) -> int | None:
    """The iteration since which ``holds`` (n,) is true up to the last; ``None`` when not at the last."""
    if not len(holds) or not holds[-1]:
        return None
    false = np.flatnonzero(~holds)
    return int(series.iterations[false[-1] + 1 if len(false) else 0])


def score_change(score: Series) -> tuple[float, float, float] | None:
    """Mean of the first fifth, of the last, and their difference in standard errors; ``None`` for few."""
    values = score.finite.values
    if len(values) < PROGRESS_ITERATIONS:
        return None
    first, last = values[: len(values) // 5], values[-(len(values) // 5) :]
    difference, error = float(last.mean() - first.mean()), standard_error(first, last)
    ratio = difference / error if error else math.copysign(math.inf, difference) if difference else 0.0
    return float(first.mean()), float(last.mean()), ratio


def standard_error(first: np.ndarray, last: np.ndarray) -> float:
    """Standard error of the difference of the means of two samples of at least two values each."""
    return math.sqrt(sum(float(values.var(ddof=1)) / len(values) for values in (first, last)))
