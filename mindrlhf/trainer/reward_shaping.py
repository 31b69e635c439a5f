"""From the scores of a rollout to the rewards of its tokens: shaped scores, and the KL penalty."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mindrlhf.algorithms.kl import (
    AdaptiveKLController,
    FixedKLController,
    KLController,
    sequence_kl,
    token_kl,
)
from mindrlhf.algorithms.moments import RunningMoments
from mindrlhf.algorithms.token_rewards import penalize_missing_stop, token_rewards
from mindrlhf.configs.keys import PPOConfig
from mindrlhf.trainer.experience import ScoredRollout, TokenRewards

SMALLEST_STD = 1e-8
"""Scores that vary less count as equal and are not scaled."""


class ScoreShaping:
    """Turns scores into the reward at the last token.

    1. ``missing_eos_penalty``: subtracted from the score of a response that never stopped;
    2. ``center_rewards``: minus the running mean; ``scale_rewards``: over the running standard deviation. The
       moments are of all penalised scores so far, this batch included (trlX's ``scale_reward: running``;
       Engstrom et al., "Implementation Matters in Deep RL", arXiv 2005.12729, scale without centring);
    3. ``score_clip``: cut to ``-score_clip..score_clip`` (trlX's ``cliprange_reward``).

    Scores are of the global batch, so moments are equal on every rank and do not depend on the layout.

    Args:
        config: which of these apply; with none, scores pass unchanged.
    """

    def __init__(self, config: PPOConfig) -> None:
        self.config = config
        self.moments = RunningMoments()

    def __call__(self, scores: np.ndarray, stopped: np.ndarray) -> np.ndarray:
        """Adds the batch to the moments and shapes it.

        Args:
            scores: (B,) scores of the whole global batch.
            stopped: (B,) whether the response holds a stop token.

        Returns:
            (B,) float32.
        """
        config = self.config
        paid = penalize_missing_stop(scores, stopped, config.missing_eos_penalty)
        if config.center_rewards or config.scale_rewards:
            self.moments.update(paid)
        if config.center_rewards:
            paid = paid - self.moments.mean
        if config.scale_rewards and self.moments.std > SMALLEST_STD:
            paid = paid / self.moments.std
        if config.score_clip:
            paid = np.clip(paid, -config.score_clip, config.score_clip)
        return paid.astype(np.float32)

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint must keep."""
        return self.moments.state_dict()

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self.moments.load_state_dict(state)


class RewardShaper:
    """Gives every token its reward, and adapts the KL coefficient once per rollout.

    Args:
        config: how scores are shaped, the KL estimator and the KL controller.
    """

    def __init__(self, config: PPOConfig) -> None:
        self.config = config
        self.shaping = ScoreShaping(config)
        self.kl_controller: KLController = (
            FixedKLController(config.kl_coef)
            if config.kl_controller == "fixed"
            else AdaptiveKLController(config.kl_coef, config.kl_target, config.kl_horizon)
        )

    def __call__(self, scored: ScoredRollout) -> TokenRewards:
        """The rewards of a scored global batch; one with a fault changes neither moments nor coefficient."""
        rollout, kl_coef = scored.rollout, self.kl_controller.value
        kl = token_kl(rollout.logprobs, scored.ref_logprobs, rollout.mask, self.config.kl_estimator)
        shaping = self.shaping if scored.fault is None else ScoreShaping(self.config)
        paid = shaping(scored.scores, rollout.stopped)
        if scored.fault is None:
            self.kl_controller.update(sequence_kl(kl), len(rollout.tokens))
        return TokenRewards(kl, kl_coef, token_rewards(kl, paid, rollout.response_lengths, kl_coef))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep."""
        return {"kl_controller": self.kl_controller.state_dict(), "scores": self.shaping.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self.kl_controller.load_state_dict(state["kl_controller"])
        self.shaping.load_state_dict(state["scores"])
