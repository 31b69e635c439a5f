"""PPO's clipped losses, and the two that may be mixed in, for compiled graphs.

They return SUMS over the masked tokens: the caller divides by the token count of the GLOBAL batch, so
that micro-batches and data-parallel ranks add up exactly to the loss of the whole batch.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, ops

POLICY_TERMS = ("policy_loss", "approxkl", "clipfrac", "ratio", "ratio_squared")
"""Names of what :func:`policy_loss_terms` returns."""
VALUE_TERMS = ("value_loss", "value_clipfrac", "value_error")
"""Names of what :func:`value_loss_terms` returns."""


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` in float32 with zeros outside the mask.

    Selected, not multiplied: 0 * inf is NaN, in the value and in the gradient.
    """
    x = ops.cast(x, ms.float32)
    return ops.select(mask, x, ops.zeros_like(x))


def _sum(x: Tensor) -> Tensor:
    return ops.reduce_sum(x)


def _count(condition: Tensor) -> Tensor:
    return ops.reduce_sum(ops.cast(condition, ms.float32))


def _greater_of(first: Tensor, second: Tensor) -> Tensor:
    """Maximum whose gradient goes to ``first`` on ties: they are the rule here, not the exception."""
    return ops.select(second > first, second, first)


def policy_loss_terms(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cliprange: float,
    log_ratio_clamp: float = 20.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sum over the mask of ``max(-A ratio, -A clip(ratio, 1 - cliprange, 1 + cliprange))``.

    ``ratio = exp(clip(logprobs - old_logprobs, -log_ratio_clamp, log_ratio_clamp))``.
    Source: Schulman et al., arXiv 1707.06347, equation 7; statistics as TRL's ``PPOTrainer`` defines them.

    Args:
        logprobs: (B, R) log-probs under the policy being trained; the only input with a gradient.
        old_logprobs: (B, R) log-probs under the policy that sampled.
        advantages: (B, R).
        mask: (B, R) policy mask; inputs outside it may be anything, their gradient is 0.
        cliprange: epsilon.
        log_ratio_clamp: guards exp against overflow.

    Returns:
        the sums named in :data:`POLICY_TERMS`: the loss, then, without gradient, ``0.5 (logprobs - old)^2``,
        tokens where the clipped term is the greater one, ratio, ratio squared. Scalars, float32.
    """
    mask = ops.cast(mask, ms.bool_)
    advantages = ops.stop_gradient(_masked(advantages, mask))
    log_ratio = _masked(logprobs, mask) - ops.stop_gradient(_masked(old_logprobs, mask))
    ratio = ops.exp(ops.clip_by_value(log_ratio, -log_ratio_clamp, log_ratio_clamp))
    unclipped = -advantages * ratio
    clipped = -advantages * ops.clip_by_value(ratio, 1.0 - cliprange, 1.0 + cliprange)
    # Outside the mask the advantage is 0, so the loss there is 0; the ratio is 1 and must be left out.
    counted = _masked(ratio, mask)
    return (
        _sum(_greater_of(unclipped, clipped)),
        ops.stop_gradient(0.5 * _sum(ops.square(log_ratio))),
        ops.stop_gradient(_count(clipped > unclipped)),
        ops.stop_gradient(_sum(counted)),
        ops.stop_gradient(_sum(ops.square(counted))),
    )


def value_loss_terms(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange_value: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over the mask of ``0.5 max((V - R)^2, (V_clip - R)^2)``, ``V_clip = V_old + clip(V - V_old, +-c)``.

    Source: the PPO of OpenAI baselines, as in lm-human-preference-details; TRL's ``PPOTrainer``.

    Args:
        values: (B, R) values under the critic being trained; the only input with a gradient.
        old_values: (B, R) values at rollout.
        returns: (B, R).
        mask: (B, R) value mask; inputs outside it may be anything, their gradient is 0.
        cliprange_value: c.

    Returns:
        the sums named in :data:`VALUE_TERMS`: the loss (with the 0.5, without vf_coef), then, without
        gradient, tokens where the clipped term is the greater one, ``(V - R)^2``. Scalars, float32.
    """
    mask = ops.cast(mask, ms.bool_)
    values = _masked(values, mask)
    old_values = ops.stop_gradient(_masked(old_values, mask))
    returns = ops.stop_gradient(_masked(returns, mask))
    # Not old + clip(V - old): that is V only up to rounding, and values inside would count as clipped.
    clipped_values = ops.clip_by_value(values, old_values - cliprange_value, old_values + cliprange_value)
    unclipped = ops.square(values - returns)
    clipped = ops.square(clipped_values - returns)
    return (
        0.5 * _sum(_greater_of(unclipped, clipped)),
        ops.stop_gradient(_count(clipped > unclipped)),
        ops.stop_gradient(_sum(unclipped)),
    )


def entropy_sum(entropy: Tensor, mask: Tensor) -> Tensor:
    """Sum over the mask of the policy's entropy, to be subtracted from the loss, times ``entropy_coef``.

    Source: Schulman et al., arXiv 1707.06347, equation 9; Mnih et al., arXiv 1602.01783.

    Args:
        entropy: (B, R) of the distribution each token was drawn from.
        mask: (B, R) policy mask; entropies outside it may be anything, their gradient is 0.

    Returns:
        scalar float32.
    """
    return _sum(_masked(entropy, ops.cast(mask, ms.bool_)))


def cross_entropy_sum(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Sum over the mask of ``-logprobs``: the language-model loss that PPO-ptx mixes in.

    Source: InstructGPT, arXiv 2203.02155, equation 2.

    Args:
        logprobs: (B, S) log-prob of each token of a text that was not sampled.
        mask: (B, S), where a token is to be learned.

    Returns:
        scalar float32.
    """
    return -_sum(_masked(logprobs, ops.cast(mask, ms.bool_)))
