"""Per-iteration metrics under the field's names (TRL's and lm-human-preference-details')."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mindrlhf.algorithms.kl import sequence_kl
from mindrlhf.algorithms.metrics import explained_variance
from mindrlhf.configs.schema import PPOConfig
from mindrlhf.trainer.experience import Experience, Rollout, Scores
from mindrlhf.trainer.losses import POLICY_STATISTICS, POLICY_SUMS, RATIO_EDGES, VALUE_STATISTICS
from mindrlhf.trainer.trackers.base import Histogram
from mindrlhf.trainer.update import UpdateResult


def iteration_metrics(
    rollout: Rollout,
    scores: Scores,
    experience: Experience,
    result: UpdateResult,
    kl_coef: float,
    config: PPOConfig,
) -> dict[str, float]:
    """What an iteration made, before and in the update; see the two functions that it joins."""
    return rollout_metrics(rollout, scores, experience, kl_coef) | update_metrics(result, config)


def rollout_metrics(
    rollout: Rollout, scores: Scores, experience: Experience, kl_coef: float
) -> dict[str, float]:
    """What is known before the update.

    ``objective/kl``: per-sequence sum of the KL estimate, batch mean, in nats. ``objective/entropy``:
    per-sequence sum of ``-logp`` of the sampled tokens, batch mean. ``objective/scores``: as the reward model
    or function gave them. ``objective/rlhf_reward``: sum of the token rewards, so
    ``objective/non_score_reward`` plus the score after penalty, centring, scaling and clipping.
    ``value/explained_var``: of the returns, by the values before the update.
    """
    non_score = -kl_coef * experience.kl.sum(axis=1, dtype=np.float64)
    return {
        "objective/kl": sequence_kl(experience.kl),
        "objective/kl_coef": kl_coef,
        "objective/entropy": float(-rollout.logprobs.sum(axis=1, dtype=np.float64).mean()),
        "objective/non_score_reward": float(non_score.mean()),
        "objective/scores": float(scores.scores.mean(dtype=np.float64)),
        "objective/scores_std": float(scores.scores.std(dtype=np.float64)),
        "objective/rlhf_reward": float(experience.rewards.sum(axis=1, dtype=np.float64).mean()),
        "value/explained_var": explained_variance(experience.old_values, experience.returns, experience.mask),
        "response/length": float(rollout.response_lengths.mean()),
        "response/eos_rate": float(rollout.stopped.mean()),
    }


def update_metrics(result: UpdateResult, config: PPOConfig) -> dict[str, float]:
    """What the minibatches report: token means over all minibatches of the iteration.

    ``policy/ratio_var`` is the variance of the ratio over tokens. ``loss/*`` are means over minibatches, each
    a mean over its tokens; ``loss/pretrain`` is the cross-entropy before ``ptx_coef``, 0 without it.
    ``policy/steps``: optimizer steps of the policy, fewer than minibatches when ``target_kl`` ended them, 0
    while the critic warms up; ``lr`` and ``grad_norm`` are then 0 too. ``update/skipped``: minibatches whose
    step was skipped because something was not finite; those do not count here, and all is 0 without others.
    """
    policy = _named(POLICY_SUMS, result.policy)
    value = _named(VALUE_STATISTICS, result.value)
    tokens = max(result.tokens.sum(), 1.0)
    # A separate critic does not see the minibatch that ended the iteration.
    value_counts = result.tokens[: len(result.value)]
    value_tokens = max(value_counts.sum(), 1.0)
    ratio = policy["ratio"].sum() / tokens
    policy_loss = _mean(policy["policy_loss"] / result.tokens)
    value_loss = _mean(value["value_loss"] / value_counts)
    pretrain_loss = _mean(result.pretrain_loss)
    total = policy_loss + config.vf_coef * value_loss + config.ptx_coef * pretrain_loss
    if config.entropy_coef:
        total -= config.entropy_coef * _mean(policy["entropy"] / result.tokens)
    return {
        "policy/approxkl": policy["approxkl"].sum() / tokens,
        "policy/clipfrac": policy["clipfrac"].sum() / tokens,
        "policy/entropy": policy["entropy"].sum() / tokens,
        "policy/ratio": ratio,
        "policy/ratio_var": max(policy["ratio_squared"].sum() / tokens - ratio**2, 0.0),
        "policy/steps": len(result.grad_norm),
        "update/skipped": result.skipped,
        "loss/policy": policy_loss,
        "loss/value": value_loss,
        "loss/pretrain": pretrain_loss,
        "loss/total": total,
        "value/clipfrac": value["clipfrac"].sum() / value_tokens,
        "value/error": value["error"].sum() / value_tokens,
        "value/mean": value["value"].sum() / value_tokens,
        "lr": result.learning_rate,
        "grad_norm": _mean(result.grad_norm),
        "grad_norm/critic": _mean(result.critic_grad_norm),
    }


def ratio_histogram(result: UpdateResult) -> Histogram:
    """Ratios of all response tokens in all minibatches of an iteration, which each measured before its step.

    The bins are those of RATIO_EDGES; the last, which has no upper end, is drawn up to twice the last edge.
    """
    policy = _named(POLICY_STATISTICS, result.policy)
    above = [policy[name].sum() for name in POLICY_STATISTICS[len(POLICY_SUMS) :]]
    at_least = np.array([result.tokens.sum(), *above, 0.0])
    edges = np.array([0.0, *RATIO_EDGES, 2 * RATIO_EDGES[-1]])
    return Histogram(
        edges, at_least[:-1] - at_least[1:], policy["ratio"].sum(), policy["ratio_squared"].sum()
    )


def time_metrics(
    seconds: Mapping[str, float], response_tokens: int, total_seconds: float
) -> dict[str, float]:
    """Seconds of each phase, and response tokens per second of the rollout and of the whole iteration."""
    metrics = {f"time/{phase}": spent for phase, spent in seconds.items()}
    metrics["time/iteration"] = total_seconds
    metrics["tokens_per_second"] = response_tokens / total_seconds
    metrics["tokens_per_second/rollout"] = response_tokens / seconds["rollout"]
    return metrics


def _named(names: tuple[str, ...], sums: np.ndarray) -> dict[str, np.ndarray]:
    """Columns of (steps, len(names)) by name, in float64."""
    return {name: sums[:, index].astype(np.float64) for index, name in enumerate(names)}


def _mean(values: np.ndarray) -> float:
    """Mean, 0 of nothing."""
    return float(values.mean()) if len(values) else 0.0
