"""From the scores of a rollout to what each response is paid: penalty, centre, scale, clip, in this order."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mindrlhf.algorithms.moments import RunningMoments
from mindrlhf.algorithms.rewards import penalize_missing_stop
from mindrlhf.configs.schema import PPOConfig

SMALLEST_STD = 1e-8
"""Scores that vary less count as equal: there is no scale to bring them to."""


class RewardShaping:
    """Turns scores into what is paid at the last token.

    1. ``missing_eos_penalty`` off the score of a response that never stopped;
    2. ``center_rewards``: less the running mean; ``scale_rewards``: over the running standard deviation. The
       moments are of all penalised scores so far, this batch included (trlX's ``scale_reward: running``;
       Engstrom et al., "Implementation Matters in Deep RL", arXiv 2005.12729, scale without centring);
    3. ``score_clip``: cut to ``-score_clip..score_clip`` (trlX's ``cliprange_reward``).

    Scores are of the global batch, so moments are equal on every rank and do not depend on the layout.

    Args:
        config: which of these are on; with none, scores pass unchanged.
    """

    def __init__(self, config: PPOConfig) -> None:
        self.config = config
        self.moments = RunningMoments()

    def __call__(self, scores: np.ndarray, stopped: np.ndarray) -> np.ndarray:
        """Takes the batch into the moments and shapes it.

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
        """Goes on from :meth:`state_dict`."""
        self.moments.load_state_dict(state)
