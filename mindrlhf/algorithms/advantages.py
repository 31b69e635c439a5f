"""Generalised advantage estimation and whitening, on the global batch."""

from __future__ import annotations

import numpy as np

WHITEN_EPSILON = 1e-8


def gae(
    rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """``delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lam A_{t+1}; returns = A + V``.

    The value behind the last unmasked column is 0: the episode has ended.
    Source: Schulman et al., arXiv 1506.02438, equations 11 and 16.

    Args:
        rewards: (B, R) per-token rewards.
        values: (B, R) values of the state before each token.
        mask: (B, R) value mask, a prefix of True in each row; nothing outside it is used.
        gamma: discount.
        lam: lambda of GAE.

    Returns:
        advantages (B, R), not whitened, and returns (B, R); float32, 0 outside the mask.
    """
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
