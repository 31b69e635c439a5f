"""Rewards per token: the KL penalty everywhere, the score at the last token."""

from __future__ import annotations

import numpy as np


def penalize_missing_stop(scores: np.ndarray, stopped: np.ndarray, penalty: float) -> np.ndarray:
    """Subtracts ``penalty`` from the score of every response that never reached a stop token.

    Args:
        scores: (B,) reward model's scores.
        stopped: (B,) bool, whether the response contains a stop token.
        penalty: ``missing_eos_penalty``, >= 0; 0 changes nothing.

    Returns:
        (B,) float32.
    """
    scores = np.asarray(scores, dtype=np.float32)
    return np.where(np.asarray(stopped, dtype=bool), scores, scores - np.float32(penalty)).astype(np.float32)


def token_rewards(kl: np.ndarray, scores: np.ndarray, lengths: np.ndarray, kl_coef: float) -> np.ndarray:
    """``r_t = -kl_coef * kl_t``, plus the score at the last real token ``L = length - 1``.

    Source: Ziegler et al., arXiv 1909.08593, equation 2.

    Args:
        kl: (B, R) per-token KL; values after a response's end are not used.
        scores: (B,) score of each response.
        lengths: (B,) real response tokens, the stop token included, 1..R.
        kl_coef: KL coefficient.

    Returns:
        (B, R) float32, 0 after each response's end.

    Raises:
        ValueError: shapes disagree, or a length is outside 1..R, so that a score would have no slot.
    """
    kl, scores, lengths = np.asarray(kl), np.asarray(scores), np.asarray(lengths)
    if kl.ndim != 2 or scores.shape != kl.shape[:1] or lengths.shape != kl.shape[:1]:
        raise ValueError(
            f"expected kl (B, R), scores (B,), lengths (B,); got {kl.shape}, {scores.shape}, {lengths.shape}"
        )
    batch, columns = kl.shape
    if batch and (lengths.min() < 1 or lengths.max() > columns):
        raise ValueError(f"response lengths must lie in 1..{columns}, got {lengths.min()}..{lengths.max()}")
    inside = np.arange(columns)[None, :] < lengths[:, None]
    rewards = -float(kl_coef) * np.where(inside, kl, 0.0).astype(np.float64)
    rewards[np.arange(batch), lengths - 1] += scores
    return rewards.astype(np.float32)
