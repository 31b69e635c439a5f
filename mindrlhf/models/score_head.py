"""The scalar head of reward models and critics: its names, the same in every family, and its first values."""

from __future__ import annotations

import numpy as np

from mindrlhf.utils.seeds import random_stream

SCORE_HEAD_WEIGHT = "score_head.weight"
SCORE_HEAD_BIAS = "score_head.bias"
SCORE_HEAD = (SCORE_HEAD_WEIGHT, SCORE_HEAD_BIAS)


def new_score_head(hidden_size: int, seed: int, purpose: str, *, scale: float = 1.0) -> dict[str, np.ndarray]:
    """A fresh scalar head: weight ``N(0, 1 / sqrt(H + 1))``, bias 0 (Ziegler et al., arXiv 1909.08593).

    Args:
        hidden_size: H.
        seed: seed of the job.
        purpose: which head it is ("reward", "critic"), so that they differ.
        scale: factor of the weights.

    Returns:
        canonical name -> float32 array; equal on every rank.
    """
    weight = scale * random_stream(seed, "score_head", purpose).normal(
        0.0, (hidden_size + 1) ** -0.5, (1, hidden_size)
    )
    return {SCORE_HEAD_WEIGHT: weight.astype(np.float32), SCORE_HEAD_BIAS: np.zeros(1, np.float32)}
