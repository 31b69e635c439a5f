"""What is wrong with a run, in words, and since which iteration: pure functions of its metrics.

Single iterations are noisy, so every rule but that for NaN looks at a running median: a rule that holds
"since iteration 12" holds for the median around every iteration from 12 to the last. Where no source is
named, the threshold is a choice of this project.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mindrlhf.report.findings import Finding, not_finite, updates_skipped, worst_first
from mindrlhf.report.reading import Run, Series
from mindrlhf.report.trends import (
    PROGRESS_ITERATIONS,
    count_since,
    last_value,
    running_median,
    score_change,
    since_iteration,
    standard_error,
)

KL_TARGET = 6.0
"""Nats a sequence when the configuration is not recorded: the default ``kl_target``, the middle of the
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
"""A stop rate that is none."""
ENTROPY_LEFT = 0.2
"""Of the first iterations' entropy. Collapse of the entropy, and what follows: Cui et al. 2025 (arXiv
2505.22617), Yu et al. 2025 (DAPO, arXiv 2503.14476)."""
EXPLAINED_VARIANCE = 0.0
"""Below it the critic is worse than a constant, by the definition of the measure."""
CRITIC_WARM_UP = 10
"""Iterations in which a fresh critic may still be that bad."""
PROGRESS_ERRORS = 2.0
"""Standard errors by which the last fifth's mean score must differ from the first fifth's."""
TREND_ITERATIONS = 3
"""Fewer make no trend."""


def diagnose(run: Run) -> list[Finding]:
    """All findings about a run, the worst first."""
    settings = {name: run.setting(name) for name in ("kl_controller", "kl_target")}
    score = run.series("objective/scores")
    return worst_first(
        [
            not_finite({name: run.series(name) for name in run.metric_names() if name != "iteration"}),
            kl_above_target(run.series("objective/kl"), settings),
            kl_negative(run.series("objective/kl")),
            clip_fraction_high(run.series("policy/clipfrac")),
            ratio_far_from_one(run.series("policy/ratio")),
            entropy_collapsed(run.series("policy/entropy")),
            stop_rate_falling(run.series("response/eos_rate")),
            never_stops(run.series("response/eos_rate")),
            explained_variance_negative(run.series("value/explained_var")),
            score_falling(score) or no_progress(score),
            scores_equal(run.series("objective/scores_std")),
            updates_skipped(run.series("update/skipped")),
        ]
    )


def kl_above_target(kl: Series, settings: Mapping[str, Any]) -> Finding | None:
    """KL to the reference beyond what the controller holds; with a fixed coefficient only a note."""
    adaptive = settings.get("kl_controller") == "adaptive"
    target = _number(settings.get("kl_target")) or KL_TARGET
    limit = KL_TOLERANCE * target
    since = since_iteration(kl, running_median(kl.values) > limit)
    if since is None:
        return None
    name = "target" if adaptive else "the usual target"
    return Finding(
        "kl",
        "warning" if adaptive else "note",
        f"KL above {name} since iteration {since}",
        f"Last {last_value(kl):.3g} nats a sequence; {name} is {target:g}.",
        "Raise kl_coef or lower the learning rate; read the samples for replies that only please the reward.",
        since,
        "objective/kl",
        target,
    )


def kl_negative(kl: Series) -> Finding | None:
    """A KL estimate below 0 for long: the k1 estimate of one batch may be, its mean may not."""
    since = since_iteration(kl, running_median(kl.values) < 0)
    if since is None or count_since(kl, since) < CRITIC_WARM_UP:
        return None
    return Finding(
        "kl_negative",
        "warning",
        f"KL below 0 since iteration {since}",
        f"Last {last_value(kl):.3g} nats a sequence; a true KL is never negative.",
        "Sample from the whole distribution: temperature as in training, top_k 0, top_p 1.",
        since,
        "objective/kl",
        0.0,
    )


def clip_fraction_high(clip_fraction: Series) -> Finding | None:
    """Too many tokens clipped: the steps are too large."""
    since = since_iteration(clip_fraction, running_median(clip_fraction.values) > CLIP_FRACTION)
    if since is None:
        return None
    return Finding(
        "clip_fraction",
        "warning",
        f"Clip fraction over {CLIP_FRACTION:g} since iteration {since}: lower the learning rate",
        f"Last {last_value(clip_fraction):.2f} of the tokens clipped.",
        "Or use fewer ppo_epochs.",
        since,
        "policy/clipfrac",
        CLIP_FRACTION,
    )


def ratio_far_from_one(ratio: Series) -> Finding | None:
    """Mean ratio of new to old policy far from 1: updates too drastic, or the two policies differ."""
    median = running_median(ratio.values)
    low, high = RATIO_RANGE
    since = since_iteration(ratio, (median < low) | (median > high))
    if since is None:
        return None
    return Finding(
        "ratio",
        "warning",
        f"Ratio of new to old policy far from 1 since iteration {since}",
        f"Last {last_value(ratio):.3g}.",
        "Lower the learning rate; run once with --verify_sync True.",
        since,
        "policy/ratio",
        high if last_value(ratio) > 1 else low,
    )


def entropy_collapsed(entropy: Series) -> Finding | None:
    """Entropy of the policy down to a small part of what it began with."""
    if len(entropy.values) < TREND_ITERATIONS:
        return None
    median = running_median(entropy.values)
    start = float(median[0])
    if not start > 0:
        return None
    since = since_iteration(entropy, median < ENTROPY_LEFT * start)
    if since is None:
        return None
    return Finding(
        "entropy",
        "warning",
        f"Entropy collapsed since iteration {since}",
        f"Last {last_value(entropy):.3g} nats a token, at the start {start:.3g}.",
        "Raise kl_coef or lower the learning rate; the policy says the same whatever the draw.",
        since,
        "policy/entropy",
        ENTROPY_LEFT * start,
    )


def stop_rate_falling(stop_rate: Series) -> Finding | None:
    """Ever fewer replies end by themselves."""
    if len(stop_rate.values) < TREND_ITERATIONS:
        return None
    median = running_median(stop_rate.values)
    highest = np.fmax.accumulate(median)
    since = since_iteration(stop_rate, median <= highest - STOP_RATE_FALL)
    if since is None:
        return None
    return Finding(
        "stop_rate",
        "warning",
        f"Stop rate falling since iteration {since}",
        f"Last {last_value(stop_rate):.0%} of the replies stopped, before up to {np.nanmax(median):.0%}.",
        "Set missing_eos_penalty; look for a reward that grows with length.",
        since,
        "response/eos_rate",
    )


def never_stops(stop_rate: Series) -> Finding | None:
    """No reply ends by itself: the policy does not know the stop token, or has no room for it."""
    since = since_iteration(stop_rate, running_median(stop_rate.values) <= STOP_RATE_NEVER)
    if since is None or count_since(stop_rate, since) < TREND_ITERATIONS:
        return None
    return Finding(
        "never_stops",
        "note",
        f"Hardly any reply stops by itself since iteration {since}",
        f"Last {last_value(stop_rate):.0%} of the replies stopped.",
        "Check stop_token_ids, raise max_response_length or set missing_eos_penalty.",
        since,
        "response/eos_rate",
    )


def explained_variance_negative(explained: Series) -> Finding | None:
    """A critic that is worse than a constant, after the iterations it needs to learn."""
    since = since_iteration(explained, running_median(explained.values) < EXPLAINED_VARIANCE)
    if since is None or len(explained.values) <= CRITIC_WARM_UP:
        return None
    return Finding(
        "explained_variance",
        "warning",
        f"Explained variance below 0 since iteration {since}",
        f"Last {last_value(explained):.3g}: worse than a constant, so advantages are mostly noise.",
        "Raise the critic's learning rate or vf_coef; start the critic from the reward model.",
        since,
        "value/explained_var",
        EXPLAINED_VARIANCE,
    )


def no_progress(score: Series) -> Finding | None:
    """The last fifth's scores are no better than the first fifth's, by two standard errors."""
    change = score_change(score)
    if change is None or change[2] >= PROGRESS_ERRORS:
        return None
    first, last, _ = change
    since = int(score.iterations[0])
    return Finding(
        "no_progress",
        "warning",
        f"No progress in score since iteration {since}",
        f"Mean of the first fifth {first:.3g}, of the last {last:.3g}: no more than chance.",
        "Check that the reward tells good from bad replies; raise the learning rate; lower kl_coef.",
        since,
        "objective/scores",
    )


def score_falling(score: Series) -> Finding | None:
    """The last fifth's scores are below those around the best iteration, by two standard errors."""
    values = score.values[np.isfinite(score.values)]
    iterations = score.iterations[np.isfinite(score.values)]
    part = len(values) // 5
    if len(values) < PROGRESS_ITERATIONS:
        return None
    means = np.convolve(values, np.full(part, 1 / part), mode="valid")
    best = int(means.argmax())
    if best + part > len(values) - part:
        return None
    top, last = values[best : best + part], values[-part:]
    # The best stretch is chosen for being high, so it must stand out by more than a fixed one.
    if float(top.mean() - last.mean()) < 2 * PROGRESS_ERRORS * standard_error(top, last):
        return None
    since = int(iterations[best + part - 1])
    return Finding(
        "score_falling",
        "warning",
        f"Score falling since iteration {since}",
        f"Mean {top.mean():.3g} up to there, {last.mean():.3g} in the last fifth.",
        "Go back to a checkpoint from before; lower the learning rate or raise kl_coef.",
        since,
        "objective/scores",
    )


def scores_equal(spread: Series) -> Finding | None:
    """All replies of an iteration get one score, so there is nothing to learn from."""
    since = since_iteration(spread, running_median(spread.values) == 0)
    if since is None or count_since(spread, since) < TREND_ITERATIONS:
        return None
    return Finding(
        "scores_equal",
        "warning",
        f"All scores of an iteration equal since iteration {since}",
        "Standard deviation of the scores is 0.",
        "The reward does not tell replies apart: check the reward model or --reward_fn.",
        since,
        "objective/scores_std",
    )


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) and value > 0 else None
