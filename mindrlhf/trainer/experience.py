"""What a rollout gives and what an update learns from, as arrays with a shape per field.

All arrays are GLOBAL and live on the host: every rank holds the whole batch, bit for bit the same, and
each model takes its own data-parallel rows. Layouts can therefore not change rewards, advantages or
whitening.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mindrlhf.algorithms.advantages import gae, whiten
from mindrlhf.algorithms.kl import token_kl
from mindrlhf.algorithms.masks import attention_mask, policy_mask, position_ids, value_mask
from mindrlhf.algorithms.rewards import token_rewards
from mindrlhf.configs.schema import PPOConfig
from mindrlhf.trainer.reward_scale import RewardShaping


class Rollout(NamedTuple):
    """Prompts with sampled responses."""

    tokens: np.ndarray  # (B, T) int32, prompt left-padded, response padded after its stop token
    prompt_lengths: np.ndarray  # (B,) int32
    response_lengths: np.ndarray  # (B,) int32, stop token included, at least 1
    logprobs: np.ndarray  # (B, R) float32 of the sampled tokens, 0 after the end
    stopped: np.ndarray  # (B,) int32, 1 where a stop token ended the response
    sample_ids: np.ndarray  # (B,) int64, row in the data set


class SequenceInputs(NamedTuple):
    """What every network over whole sequences takes."""

    tokens: np.ndarray  # (B, T) int32
    valid: np.ndarray  # (B, T) int32, 1 on real tokens
    position_ids: np.ndarray  # (B, T) int32

    def rows(self, rows: slice | np.ndarray) -> SequenceInputs:
        """The given rows of every field."""
        return SequenceInputs(*(field[rows] for field in self))


class Scores(NamedTuple):
    """What the scoring models say of a rollout."""

    ref_logprobs: np.ndarray  # (B, R) float32
    values: np.ndarray  # (B, R) float32, critic before the update
    scores: np.ndarray  # (B,) float32, reward model


class Experience(NamedTuple):
    """Everything an update needs, one row a sequence."""

    inputs: SequenceInputs
    mask: np.ndarray  # (B, R) float32, 1 on real response tokens (policy and value mask alike)
    old_logprobs: np.ndarray  # (B, R) float32
    old_values: np.ndarray  # (B, R) float32, 0 outside the mask
    advantages: np.ndarray  # (B, R) float32, whitened, 0 outside the mask
    returns: np.ndarray  # (B, R) float32, taken before whitening
    kl: np.ndarray  # (B, R) float32, the estimator that the reward uses, 0 outside the mask
    rewards: np.ndarray  # (B, R) float32, -kl_coef * kl plus the shaped score at the last token


def sequence_inputs(rollout: Rollout) -> SequenceInputs:
    """Masks and positions of a rollout, from its lengths alone (checklist 3)."""
    columns = rollout.tokens.shape[1]
    response_columns = rollout.logprobs.shape[1]
    valid = attention_mask(
        rollout.prompt_lengths, rollout.response_lengths, columns - response_columns, response_columns
    )
    return SequenceInputs(rollout.tokens, valid.astype(np.int32), position_ids(valid))


def sequence_mask(rollout: Rollout) -> np.ndarray:
    """(B, R) bool: the real response tokens of a rollout."""
    mask: np.ndarray = np.arange(rollout.logprobs.shape[1]) < rollout.response_lengths[:, None]
    return mask


def make_experience(
    rollout: Rollout,
    scores: Scores,
    kl_coef: float,
    config: PPOConfig,
    shaping: RewardShaping | None = None,
) -> Experience:
    """Rewards, advantages and returns of a scored rollout.

    Args:
        rollout: sampled sequences.
        scores: reference log-probs, values and reward-model scores of the same rows.
        kl_coef: coefficient in force for this rollout.
        config: discount, lambda, estimator and what to whiten.
        shaping: keeps the running moments of the scores; ``None``: those of this batch alone.
    """
    columns = rollout.logprobs.shape[1]
    mask = policy_mask(rollout.response_lengths, columns)
    values_count = value_mask(rollout.response_lengths, columns)
    old_values = np.where(values_count, scores.values, 0.0).astype(np.float32)
    kl = token_kl(rollout.logprobs, scores.ref_logprobs, mask, config.kl_estimator)
    paid = (shaping or RewardShaping(config))(scores.scores, rollout.stopped)
    rewards = token_rewards(kl, paid, rollout.response_lengths, kl_coef)
    learnt_from = whiten(rewards, mask, shift_mean=False) if config.whiten_rewards else rewards
    advantages, returns = gae(learnt_from, old_values, values_count, config.gamma, config.lam)
    if config.whiten_advantages:
        advantages = whiten(advantages, mask)
    return Experience(
        inputs=sequence_inputs(rollout),
        mask=mask.astype(np.float32),
        old_logprobs=rollout.logprobs,
        old_values=old_values,
        advantages=advantages,
        returns=returns,
        kl=kl,
        rewards=rewards,
    )
