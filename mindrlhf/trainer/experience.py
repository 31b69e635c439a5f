"""What a rollout produces and what an update learns from, as arrays with a shape per field.

All arrays are GLOBAL and live on the host: every rank holds the whole batch, bit for bit the same, and
each model takes its own data-parallel rows. Layouts can therefore not change rewards, advantages or
whitening. B rows, P prompt columns, R response columns, T = P + R.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mindrlhf.algorithms.advantages import ADVANTAGES, whiten
from mindrlhf.algorithms.masks import attention_mask, policy_mask, position_ids
from mindrlhf.configs.keys import PPOConfig
from mindrlhf.trainer.skipped_updates import SkippedUpdate


class SequenceInputs(NamedTuple):
    """What every network over whole sequences takes."""

    tokens: np.ndarray  # (B, T) int32
    valid: np.ndarray  # (B, T) int32, 1 on real tokens
    position_ids: np.ndarray  # (B, T) int32

    def rows(self, rows: slice | np.ndarray) -> SequenceInputs:
        """The given rows of every field."""
        return SequenceInputs(*(field[rows] for field in self))


def sequence_inputs(
    tokens: np.ndarray, prompt_lengths: np.ndarray, response_lengths: np.ndarray, prompt_columns: int
) -> SequenceInputs:
    """Masks and positions of sequences, from their lengths alone: pad and stop token may be one id.

    Args:
        tokens: (B, T) int32, prompts left-padded, responses right-padded.
        prompt_lengths, response_lengths: (B,) real tokens.
        prompt_columns: P.
    """
    valid = attention_mask(prompt_lengths, response_lengths, prompt_columns, tokens.shape[1] - prompt_columns)
    # Pads after a text that fills all positions of the model would get a position beyond the last.
    positions = np.where(valid, position_ids(valid), 0).astype(np.int32)
    return SequenceInputs(tokens, valid.astype(np.int32), positions)


class Rollout(NamedTuple):
    """Prompts with sampled responses; masks and positions are computed once, by :meth:`of`."""

    tokens: np.ndarray  # (B, T) int32, prompt left-padded, response padded after its stop token
    valid: np.ndarray  # (B, T) int32, 1 on real tokens
    position_ids: np.ndarray  # (B, T) int32
    mask: np.ndarray  # (B, R) bool, True on real response tokens; the mask of policy and value alike
    prompt_lengths: np.ndarray  # (B,) int32
    response_lengths: np.ndarray  # (B,) int32, stop token included, at least 1
    logprobs: np.ndarray  # (B, R) float32 of the sampled tokens, 0 after the end
    stopped: np.ndarray  # (B,) int32, 1 where a stop token ended the response
    sample_ids: np.ndarray  # (B,) int64, row in the data set

    @classmethod
    def of(
        cls,
        tokens: np.ndarray,
        prompt_lengths: np.ndarray,
        response_lengths: np.ndarray,
        logprobs: np.ndarray,
        stopped: np.ndarray,
        sample_ids: np.ndarray,
    ) -> Rollout:
        """A rollout with the masks and positions that follow from its lengths."""
        columns = logprobs.shape[1]
        inputs = sequence_inputs(tokens, prompt_lengths, response_lengths, tokens.shape[1] - columns)
        mask = policy_mask(response_lengths, columns)
        return cls(*inputs, mask, prompt_lengths, response_lengths, logprobs, stopped, sample_ids)

    @property
    def inputs(self) -> SequenceInputs:
        """What the networks take."""
        return SequenceInputs(self.tokens, self.valid, self.position_ids)

    @property
    def prompt_columns(self) -> int:
        """P."""
        return self.tokens.shape[1] - self.logprobs.shape[1]


class ScoredRollout(NamedTuple):
    """A rollout with the outputs of the scoring models."""

    rollout: Rollout
    ref_logprobs: np.ndarray  # (B, R) float32
    values: np.ndarray | None  # (B, R) float32, critic before the update; None without a critic
    scores: np.ndarray  # (B,) float32, reward model and reward function
    fault: SkippedUpdate | None = None  # why nothing can be learned from it


class TokenRewards(NamedTuple):
    """The reward of each token."""

    kl: np.ndarray  # (B, R) float32, the estimator that the reward uses, 0 outside the mask
    kl_coef: float  # the coefficient in force for this rollout
    rewards: np.ndarray  # (B, R) float32, -kl_coef * kl plus the shaped score at the last token


class Experience(NamedTuple):
    """Everything an update needs, one row per sequence."""

    rollout: Rollout
    old_values: np.ndarray | None  # (B, R) float32, 0 outside the mask; None without a critic
    advantages: np.ndarray  # (B, R) float32, 0 outside the mask
    returns: np.ndarray  # (B, R) float32, taken before whitening
    fault: SkippedUpdate | None = None


def make_experience(scored: ScoredRollout, rewards: TokenRewards, config: PPOConfig) -> Experience:
    """Advantages and returns of a scored rollout.

    Args:
        scored: the global batch.
        rewards: of its tokens.
        config: estimator, discount, lambda, and what to whiten.
    """
    mask = scored.rollout.mask
    values = None if scored.values is None else np.where(mask, scored.values, 0.0).astype(np.float32)
    paid = whiten(rewards.rewards, mask, shift_mean=False) if config.whiten_rewards else rewards.rewards
    advantages, returns = ADVANTAGES[config.advantage].compute(paid, values, mask, config.gamma, config.lam)
    if config.whiten_advantages:
        advantages = whiten(advantages, mask)
    return Experience(scored.rollout, values, advantages, returns, scored.fault)


def experience_columns(
    scored: ScoredRollout, rewards: TokenRewards, experience: Experience
) -> Iterator[tuple[str, np.ndarray]]:
    """Columns of ``--save_data_file``.

    ``tokens`` and ``valid`` (T,), ``prompt_length``, ``response_length``, ``sample_id`` and ``score`` (1,),
    and (R,) ``mask``, ``logprobs``, ``ref_logprobs``, ``values`` (with a critic), ``rewards``,
    ``advantages``, ``returns``.
    """
    rollout = scored.rollout
    yield "tokens", rollout.tokens
    yield "valid", rollout.valid
    yield "prompt_length", rollout.prompt_lengths[:, None].astype(np.int32)
    yield "response_length", rollout.response_lengths[:, None].astype(np.int32)
    yield "sample_id", rollout.sample_ids[:, None].astype(np.int64)
    yield "score", scored.scores[:, None]
    yield "mask", rollout.mask.astype(np.float32)
    yield "logprobs", rollout.logprobs
    yield "ref_logprobs", scored.ref_logprobs
    if experience.old_values is not None:
        yield "values", experience.old_values
    yield "rewards", rewards.rewards
    yield "advantages", experience.advantages
    yield "returns", experience.returns
