"""Advantages on the global batch: the table of estimators, and whitening.

An algorithm is one function and one entry of :data:`ADVANTAGES`; its name is the value of the key
``advantage``, and nothing else in the library asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

WHITEN_EPSILON = 1e-8

AdvantageFunction = Callable[
    [np.ndarray, "np.ndarray | None", np.ndarray, float, float], tuple[np.ndarray, np.ndarray]
]
"""``(rewards, values, mask, gamma, lam) -> (advantages, returns)``; see :func:`gae` for the shapes.

``values`` is ``None`` without a critic.
"""


class Advantage(NamedTuple):
    """An entry of :data:`ADVANTAGES`."""

    compute: AdvantageFunction
    needs_critic: bool
    """Whether it reads ``values``; if not, no critic may be configured, since nothing would use it."""


def gae(
    rewards: np.ndarray, values: np.ndarray | None, mask: np.ndarray, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """``delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lam A_{t+1}; returns = A + V``.

    The value after the last unmasked column is 0: the episode has ended.
    Source: Schulman et al., arXiv 1506.02438, equations 11 and 16.

    Args:
        rewards: (B, R) per-token rewards.
        values: (B, R) values of the state before each token.
        mask: (B, R) value mask, a prefix of True in each row; nothing outside it is used.
        gamma: discount.
        lam: lambda of GAE.

    Returns:
        advantages (B, R), not whitened, and returns (B, R); float32, 0 outside the mask.

    Raises:
        ValueError: ``values`` is ``None``.
    """
    if values is None:
        raise ValueError("GAE needs the values of a critic")
    keep = np.asarray(mask, dtype=bool)
    reward = np.where(keep, rewards, 0.0).astype(np.float64)
    value = np.where(keep, values, 0.0).astype(np.float64)
    advantage = np.zeros_like(reward)
    next_value = np.zeros(reward.shape[0])
    running = np.zeros(reward.shape[0])
    for t in reversed(range(reward.shape[1])):
        delta = reward[:, t] + gamma * next_value - value[:, t]
        running = delta + gamma * lam * running
        advantage[:, t] = running
        next_value = value[:, t]
    returns = np.where(keep, advantage + value, 0.0)
    return np.where(keep, advantage, 0.0).astype(np.float32), returns.astype(np.float32)


def reinforce(
    rewards: np.ndarray, values: np.ndarray | None, mask: np.ndarray, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """``G_t = r_t + gamma G_{t+1}; A_t = G_t - mean(G)``, the mean over all unmasked tokens of the batch.

    For example, one response with rewards ``(1, 0, 2)`` and gamma 1 has returns ``(3, 2, 2)`` and advantages
    ``(2/3, -1/3, -1/3)``. Source: Williams, 1992, "Simple statistical gradient-following algorithms", with
    the batch mean as the baseline.

    Args:
        rewards: (B, R) per-token rewards.
        values: not used: this estimator needs no critic.
        mask: (B, R) real response tokens, a prefix of True in each row; nothing outside it is used.
        gamma: discount.
        lam: not used.

    Returns:
        advantages (B, R), not whitened, and returns (B, R); float32, 0 outside the mask.
    """
    keep = np.asarray(mask, dtype=bool)
    discounted = np.where(keep, rewards, 0.0).astype(np.float64)
    for t in reversed(range(discounted.shape[1] - 1)):
        discounted[:, t] += gamma * discounted[:, t + 1]
    baseline = discounted[keep].mean() if keep.any() else 0.0
    advantage = np.where(keep, discounted - baseline, 0.0)
    returns = np.where(keep, discounted, 0.0)
    return advantage.astype(np.float32), returns.astype(np.float32)


ADVANTAGES: dict[str, Advantage] = {
    "gae": Advantage(gae, needs_critic=True),
    "reinforce": Advantage(reinforce, needs_critic=False),
}


def whiten(x: np.ndarray, mask: np.ndarray, shift_mean: bool = True) -> np.ndarray:
    """``(x - mean) * rsqrt(var + 1e-8)``, with the moments of the unmasked entries (population variance).

    Source: lm-human-preference-details, ``whiten``.

    Args:
        x: (B, R), the whole global batch, so that the result does not depend on the layout.
        mask: (B, R), True where an entry counts.
        shift_mean: False adds the mean back, so that only the scale changes.

    Returns:
        (B, R) float32, 0 outside the mask.
    """
    keep = np.asarray(mask, dtype=bool)
    if not keep.any():
        return np.zeros(keep.shape, dtype=np.float32)
    entries = np.asarray(x)[keep].astype(np.float64)
    mean, variance = entries.mean(), entries.var()
    entries = (entries - mean) / np.sqrt(variance + WHITEN_EPSILON)
    if not shift_mean:
        entries += mean
    whitened = np.zeros(keep.shape, dtype=np.float32)
    whitened[keep] = entries
    return whitened
