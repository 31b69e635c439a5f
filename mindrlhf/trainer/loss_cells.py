"""PPO's losses of a network's outputs, scaled by global token counts.

Each returns ``(loss, statistics)`` for :class:`mindrlhf.trainer.train_step.Objective`. Losses are divided
by the token count of the whole minibatch over all ranks and micro-batches, so that gradients add up.
"""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn, ops

from mindrlhf.algorithms.losses import (
    POLICY_TERMS,
    VALUE_TERMS,
    entropy_sum,
    policy_loss_terms,
    value_loss_terms,
)
from mindrlhf.configs.keys import PPOConfig
from mindrlhf.trainer.experience import Experience
from mindrlhf.trainer.train_step import MicroBatch

RATIO_EDGES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.01, 1.02, 1.05, 1.1, 1.2, 1.4, 2.0)
"""Inner edges of the bins in which ratios are counted. None at 1: rounding would choose the bin there."""
RATIOS_ABOVE = tuple(f"ratio above {edge}" for edge in RATIO_EDGES)

POLICY_STATISTICS = (*POLICY_TERMS, "entropy", *RATIOS_ABOVE)
"""What a policy loss sums over its tokens, in the order of its statistics."""
VALUE_STATISTICS = (*VALUE_TERMS, "value")
"""What a value loss sums over its tokens."""


class PolicyLoss(nn.Cell):
    """Clipped policy loss, minus ``entropy_coef`` times the entropy when that is not 0.

    Adds the value loss when the backbone is shared with the critic.

    Args:
        config: of PPO.
    """

    def __init__(self, config: PPOConfig) -> None:
        super().__init__(auto_prefix=False)
        self.cliprange = config.cliprange
        self.cliprange_value = config.cliprange_value
        self.log_ratio_clamp = config.log_ratio_clamp
        self.entropy_coef = config.entropy_coef
        self.vf_coef = config.vf_coef
        self.shared = config.critic == "shared"
        self.statistics = (*POLICY_STATISTICS, *(VALUE_STATISTICS if self.shared else ()))
        self.log_edges = Tensor(np.log(RATIO_EDGES).astype(np.float32))

    def construct(self, logprobs: Tensor, entropy: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        """One micro-batch.

        Args:
            logprobs, entropy: (B, R) of the policy.
            rest: its values (B, R) when it is also the critic; then the fields of :class:`Experience` as in
                :func:`policy_batch`.

        Returns:
            the loss, and the sums named in ``statistics``.
        """
        first = 1 if self.shared else 0
        mask, old_logprobs, advantages = rest[first], rest[first + 1], rest[first + 2]
        inverse_count = rest[first + 3]
        policy_sum, *sums = policy_loss_terms(
            logprobs, old_logprobs, advantages, mask, self.cliprange, self.log_ratio_clamp
        )
        total = policy_sum
        if self.entropy_coef > 0:
            total = total - self.entropy_coef * entropy_sum(entropy, mask)
        of_policy = ops.stack((policy_sum, *sums, (ops.stop_gradient(entropy) * mask).sum()))
        statistics = ops.concat((of_policy, self._ratios_above(logprobs, old_logprobs, mask)))
        if self.shared:
            values, old_values, returns = rest[0], rest[5], rest[6]
            value_sum, *value_sums = value_loss_terms(values, old_values, returns, mask, self.cliprange_value)
            total = total + self.vf_coef * value_sum
            of_value = ops.stack((value_sum, *value_sums, (ops.stop_gradient(values) * mask).sum()))
            statistics = ops.concat((statistics, of_value))
        return (total * inverse_count).sum(), ops.stop_gradient(statistics)

    def _ratios_above(self, logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
        """Tokens whose ratio is above each of RATIO_EDGES, (edges,) float32."""
        log_ratio = ops.stop_gradient(logprobs - old_logprobs).reshape((-1, 1))
        above = ops.cast(log_ratio > self.log_edges, logprobs.dtype) * mask.reshape((-1, 1))
        return above.sum(axis=0)


class ValueLoss(nn.Cell):
    """Clipped value loss of a separate critic, times ``vf_coef``."""

    def __init__(self, config: PPOConfig) -> None:
        super().__init__(auto_prefix=False)
        self.statistics = VALUE_STATISTICS
        self.cliprange_value = config.cliprange_value
        self.vf_coef = config.vf_coef

    def construct(
        self, values: Tensor, mask: Tensor, inverse_count: Tensor, old_values: Tensor, returns: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One micro-batch, (B, R) each but the count; returns loss and the sums named in ``statistics``."""
        value_sum, *sums = value_loss_terms(values, old_values, returns, mask, self.cliprange_value)
        statistics = (value_sum, *sums, (ops.stop_gradient(values) * mask).sum())
        return (self.vf_coef * value_sum * inverse_count).sum(), ops.stop_gradient(ops.stack(statistics))


def policy_batch(
    experience: Experience, rows: np.ndarray, inverse_count: np.ndarray, *, shared_critic: bool
) -> MicroBatch:
    """Some global rows for :class:`PolicyLoss`; ``inverse_count`` (1,) is 1 / global tokens."""
    rollout = experience.rollout
    targets = (
        rollout.mask[rows].astype(np.float32),
        rollout.logprobs[rows],
        experience.advantages[rows],
        inverse_count,
        *(_value_targets(experience, rows) if shared_critic else ()),
    )
    return MicroBatch(rollout.inputs.rows(rows), targets)


def value_batch(experience: Experience, rows: np.ndarray, inverse_count: np.ndarray) -> MicroBatch:
    """Some global rows for :class:`ValueLoss`."""
    rollout = experience.rollout
    mask = rollout.mask[rows].astype(np.float32)
    return MicroBatch(rollout.inputs.rows(rows), (mask, inverse_count, *_value_targets(experience, rows)))


def _value_targets(experience: Experience, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Old values and returns."""
    assert experience.old_values is not None
    return experience.old_values[rows], experience.returns[rows]


def inverse_token_count(mask: np.ndarray) -> np.ndarray:
    """``1 / number of real response tokens`` of a global minibatch, (1,) float32."""
    return np.array([1.0 / mask.sum(dtype=np.float64)], np.float32)
