"""Per-iteration metrics under the field's names (TRL's and lm-human-preference-details')."""

from __future__ import annotations

import numpy as np

from mindrlhf.algorithms.kl import sequence_kl
from mindrlhf.algorithms.statistics import explained_variance
from mindrlhf.configs.keys import PPOConfig
from mindrlhf.trainer.experience import Experience, ScoredRollout, TokenRewards
from mindrlhf.trainer.loss_cells import RATIO_EDGES, RATIOS_ABOVE
from mindrlhf.trainer.trackers.tracker import Histogram
from mindrlhf.trainer.update import UpdateResult


def rollout_metrics(scored: ScoredRollout, rewards: TokenRewards, experience: Experience) -> dict[str, float]:
    """Metrics that are known before the update.

    ``objective/kl``: per-sequence sum of the KL estimate, batch mean, in nats. ``objective/entropy``:
    per-sequence sum of ``-logp`` of the sampled tokens, batch mean. ``objective/scores``: as returned by the
    reward model or function. ``objective/rlhf_reward``: sum of the token rewards, so
    ``objective/non_score_reward`` plus the score after penalty, centring, scaling and clipping.
    ``value/explained_var``: of the returns, by the values before the update; only with a critic.
    """
    rollout = scored.rollout
    non_score = -rewards.kl_coef * rewards.kl.sum(axis=1, dtype=np.float64)
    metrics = {
        "objective/kl": sequence_kl(rewards.kl),
        "objective/kl_coef": rewards.kl_coef,
        "objective/entropy": float(-rollout.logprobs.sum(axis=1, dtype=np.float64).mean()),
        "objective/non_score_reward": float(non_score.mean()),
        "objective/scores": float(scored.scores.mean(dtype=np.float64)),
        "objective/scores_std": float(scored.scores.std(dtype=np.float64)),
        "objective/rlhf_reward": float(rewards.rewards.sum(axis=1, dtype=np.float64).mean()),
    }
    if experience.old_values is not None:
        explained = explained_variance(experience.old_values, experience.returns, rollout.mask)
        metrics["value/explained_var"] = explained
    metrics["response/length"] = float(rollout.response_lengths.mean())
    metrics["response/eos_rate"] = float(rollout.stopped.mean())
    return metrics


def update_metrics(result: UpdateResult, config: PPOConfig) -> dict[str, float]:
    """Metrics of the minibatches: token means over all minibatches of the iteration.

    ``policy/ratio_var`` is the variance of the ratio over tokens. ``loss/*`` are means over minibatches, each
    a mean over its tokens; ``loss/pretrain`` is the cross-entropy before ``ptx_coef``, 0 without it.
    ``policy/steps``: optimizer steps of the policy, fewer than minibatches when ``target_kl`` ended them, 0
    while the critic warms up; ``lr`` and ``grad_norm`` are then 0 too. ``update/skipped``: minibatches whose
    step was skipped because something was not finite; these are excluded, and all is 0 without others.
    Without a critic there are no ``loss/value``, ``value/*`` and ``grad_norm/critic``.
    """
    policy, value = result.policy, result.value
    tokens = max(result.tokens.sum(), 1.0)
    ratio = policy["ratio"].sum() / tokens
    policy_loss = _mean(policy["policy_loss"] / result.tokens)
    pretrain_loss = _mean(result.pretrain_loss)
    metrics = {
        "policy/approxkl": policy["approxkl"].sum() / tokens,
        "policy/clipfrac": policy["clipfrac"].sum() / tokens,
        "policy/entropy": policy["entropy"].sum() / tokens,
        "policy/ratio": ratio,
        "policy/ratio_var": max(policy["ratio_squared"].sum() / tokens - ratio**2, 0.0),
        "policy/steps": len(result.grad_norm),
        "update/skipped": result.skipped,
        "loss/policy": policy_loss,
    }
    total = policy_loss
    if value:
        # A separate critic does not see the minibatch that ended the iteration.
        value_counts = result.tokens[: len(value["value"])]
        value_tokens = max(value_counts.sum(), 1.0)
        metrics["loss/value"] = _mean(value["value_loss"] / value_counts)
        total += config.vf_coef * metrics["loss/value"]
        metrics["value/clipfrac"] = value["value_clipfrac"].sum() / value_tokens
        metrics["value/error"] = value["value_error"].sum() / value_tokens
        metrics["value/mean"] = value["value"].sum() / value_tokens
        metrics["grad_norm/critic"] = _mean(result.critic_grad_norm)
    total += config.ptx_coef * pretrain_loss
    if config.entropy_coef:
        total -= config.entropy_coef * _mean(policy["entropy"] / result.tokens)
    return metrics | {
        "loss/pretrain": pretrain_loss,
        "loss/total": total,
        "lr": result.learning_rate,
        "grad_norm": _mean(result.grad_norm),
    }


def ratio_histogram(result: UpdateResult) -> Histogram:
    """Ratios of all response tokens in all minibatches of an iteration, each measured before its step.

    The bins are those of RATIO_EDGES; the last, which has no upper end, is drawn up to twice the last edge.
    """
    policy = result.policy
    at_least = np.array([result.tokens.sum(), *(policy[name].sum() for name in RATIOS_ABOVE), 0.0])
    edges = np.array([0.0, *RATIO_EDGES, 2 * RATIO_EDGES[-1]])
    return Histogram(
        edges, at_least[:-1] - at_least[1:], policy["ratio"].sum(), policy["ratio_squared"].sum()
    )


def histograms(scored: ScoredRollout, rewards: TokenRewards, result: UpdateResult) -> dict[str, Histogram]:
    """Scores, KL (nats per response) and lengths over the responses; ratios over the tokens of the update."""
    return {
        "distribution/scores": Histogram.of(scored.scores),
        "distribution/kl": Histogram.of(rewards.kl.sum(axis=1)),
        "distribution/length": Histogram.of(scored.rollout.response_lengths),
        "distribution/ratio": ratio_histogram(result),
    }


def _mean(values: np.ndarray) -> float:
    """Mean, 0 for no values."""
    return float(values.mean()) if len(values) else 0.0
