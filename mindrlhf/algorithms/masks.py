"""Masks and positions, built from lengths.

Never from ``token != pad``: Qwen2's pad token is also its end-of-text token.
A mask is True where a position counts.
"""

from __future__ import annotations

import numpy as np


def _checked_lengths(lengths: np.ndarray, limit: int, name: str) -> np.ndarray:
    lengths = np.asarray(lengths)
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu":
        raise ValueError(f"{name} must be a (B,) integer array, got {lengths.dtype} of shape {lengths.shape}")
    if lengths.size and (lengths.min() < 0 or lengths.max() > limit):
        raise ValueError(f"{name} must lie in 0..{limit}, got {lengths.min()}..{lengths.max()}")
    return lengths[:, None]


def attention_mask(
    prompt_lengths: np.ndarray, response_lengths: np.ndarray, prompt_columns: int, response_columns: int
) -> np.ndarray:
    """Which columns of ``[left-padded prompt | right-padded response]`` hold real tokens.

    Args:
        prompt_lengths: (B,) real prompt tokens, at the right end of the P prompt columns.
        response_lengths: (B,) real response tokens, the stop token included.
        prompt_columns: P.
        response_columns: R; 0 gives the mask of the prompts alone (with response lengths 0).

    Returns:
        (B, T) bool, T = P + R.

    Raises:
        ValueError: a length does not fit its columns.
    """
    prompts = _checked_lengths(prompt_lengths, prompt_columns, "prompt_lengths")
    responses = _checked_lengths(response_lengths, response_columns, "response_lengths")
    column = np.arange(prompt_columns + response_columns)[None, :]
    return (column >= prompt_columns - prompts) & (column < prompt_columns + responses)


def position_ids(mask: np.ndarray) -> np.ndarray:
    """Position of every token in its own text: ``cumsum(mask) - mask``.

    Left pads get 0 and right pads the length of the text: valid indices, never attended to.

    Args:
        mask: (B, T) attention mask.

    Returns:
        (B, T) int32.
    """
    counts = np.asarray(mask).astype(np.int32)
    return (np.cumsum(counts, axis=1, dtype=np.int32) - counts).astype(np.int32)


def policy_mask(response_lengths: np.ndarray, response_columns: int) -> np.ndarray:
    """Response tokens whose log-probs and values count: ``index <= L``, L the index of the last real token.

    Column t of the values is the state *before* response token t is chosen (model columns ``[:, P-1:-1]``),
    the score is paid at L, and the episode ends with token L, so the value after it is 0 and is not learned.
    Other conventions count L + 1 as well (Huang et al., arXiv 2403.17031).

    Args:
        response_lengths: (B,) real response tokens, the stop token included; ``L = length - 1``.
        response_columns: R.

    Returns:
        (B, R) bool.

    Raises:
        ValueError: a length does not fit the columns.
    """
    lengths = _checked_lengths(response_lengths, response_columns, "response_lengths")
    return np.arange(response_columns)[None, :] < lengths
