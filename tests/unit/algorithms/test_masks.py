"""masks.py against hand-worked values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindrlhf.algorithms.masks import (
    attention_mask,
    policy_mask,
    position_ids,
)

IM_END, PAD_AND_EOS = 151645, 151643


def test_attention_mask_by_hand() -> None:
    mask = attention_mask(np.array([3, 1, 2]), np.array([2, 1, 0]), 3, 2)
    expected = [
        [1, 1, 1, 1, 1],
        [0, 0, 1, 1, 0],
        [0, 1, 1, 0, 0],
    ]
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, np.array(expected, dtype=bool))


def test_position_ids_by_hand() -> None:
    mask = attention_mask(np.array([3, 1, 2]), np.array([2, 1, 0]), 3, 2)
    positions = position_ids(mask)
    expected = [
        [0, 1, 2, 3, 4],
        [0, 0, 0, 1, 2],
        [0, 0, 1, 2, 2],
    ]
    assert positions.dtype == np.int32
    np.testing.assert_array_equal(positions, expected)


@given(st.integers(1, 6), st.integers(0, 6), st.integers(0, 6), st.integers(0, 6))
def test_positions_count_the_real_tokens(prompt: int, response: int, left: int, right: int) -> None:
    mask = attention_mask(np.array([prompt]), np.array([response]), prompt + left, response + right)
    positions = position_ids(mask)
    assert positions[mask].tolist() == list(range(prompt + response))
    assert positions.min() >= 0
    assert positions.max() <= prompt + response


def test_policy_mask_by_hand() -> None:
    expected = np.array([[1, 0, 0], [1, 1, 1], [0, 0, 0]], dtype=bool)
    np.testing.assert_array_equal(policy_mask(np.array([1, 3, 0], dtype=np.int32), 3), expected)


@pytest.mark.parametrize("lengths", [np.array([4]), np.array([-1]), np.array([1.0]), np.array([[1]])])
def test_lengths_that_cannot_be(lengths: np.ndarray) -> None:
    with pytest.raises(ValueError, match="response_lengths"):
        policy_mask(lengths, 3)
    with pytest.raises(ValueError, match="prompt_lengths"):
        attention_mask(lengths, np.array([0]), 3, 3)
