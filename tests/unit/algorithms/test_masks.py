"""masks.py against hand-worked values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindrlhf.algorithms.masks import (
    attention_mask,
    cut_after_stop,
    policy_mask,
    position_ids,
    value_mask,
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


def test_policy_and_value_mask_by_hand() -> None:
    expected = np.array([[1, 0, 0], [1, 1, 1], [0, 0, 0]], dtype=bool)
    for mask in (policy_mask, value_mask):
        np.testing.assert_array_equal(mask(np.array([1, 3, 0], dtype=np.int32), 3), expected)


@pytest.mark.parametrize("lengths", [np.array([4]), np.array([-1]), np.array([1.0]), np.array([[1]])])
def test_lengths_that_cannot_be(lengths: np.ndarray) -> None:
    with pytest.raises(ValueError, match="response_lengths"):
        policy_mask(lengths, 3)
    with pytest.raises(ValueError, match="prompt_lengths"):
        attention_mask(lengths, np.array([0]), 3, 3)


def test_cut_after_first_stop_token() -> None:
    ids = np.array([[5, IM_END, 7, IM_END], [5, 6, 7, 8], [PAD_AND_EOS, 1, 2, 3]], dtype=np.int32)
    cut, lengths, stopped = cut_after_stop(ids, (IM_END, PAD_AND_EOS), pad_token_id=0)
    np.testing.assert_array_equal(cut, [[5, IM_END, 0, 0], [5, 6, 7, 8], [PAD_AND_EOS, 0, 0, 0]])
    assert lengths.tolist() == [2, 4, 1]
    assert stopped.tolist() == [True, False, True]
    assert (cut.dtype, lengths.dtype, stopped.dtype) == (np.int32, np.int32, np.bool_)


def test_stop_token_is_counted_when_pad_is_eos() -> None:
    """Masks come from lengths: comparing with the pad token would drop the end-of-text token."""
    ids = np.array([[5, PAD_AND_EOS, PAD_AND_EOS]], dtype=np.int32)
    cut, lengths, stopped = cut_after_stop(ids, (IM_END, PAD_AND_EOS), PAD_AND_EOS)
    np.testing.assert_array_equal(cut, ids)
    np.testing.assert_array_equal(policy_mask(lengths, 3), [[True, True, False]])
    assert stopped.all()


def test_no_stop_tokens_at_all() -> None:
    ids = np.array([[1, 2]], dtype=np.int64)
    cut, lengths, stopped = cut_after_stop(ids, (), 0)
    assert (cut.tolist(), lengths.tolist(), stopped.tolist()) == ([[1, 2]], [2], [False])


@given(st.lists(st.lists(st.integers(0, 4), min_size=5, max_size=5), min_size=1, max_size=4))
def test_cut_against_a_plain_loop(rows: list[list[int]]) -> None:
    cut, lengths, stopped = cut_after_stop(np.array(rows), (2, 4), 9)
    for row, ids, length, end in zip(rows, cut.tolist(), lengths.tolist(), stopped.tolist(), strict=True):
        kept = []
        for token in row:
            kept.append(token)
            if token in (2, 4):
                break
        assert ids == kept + [9] * (5 - len(kept))
        assert length == len(kept)
        assert end == (kept[-1] in (2, 4))
