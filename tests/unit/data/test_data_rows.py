"""Rows by hand: padding, masks, what is cut and what is counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindrlhf.data.columns import (
    LOSS_MASK,
    PRETRAIN_IDS,
    PROMPT_IDS,
    prompt_length,
)
from mindrlhf.data.preprocess import RowBuilder, RowCounts
from mindrlhf.data.prompt_format import EncodedSample, PromptFormat
from mindrlhf.utils.errors import DataError

PAD = 9
RAW = PromptFormat(prefix=(), lead="", lead_ids=(), suffix=(), stop=7)
CHAT = PromptFormat(prefix=(1,), lead="user", lead_ids=(2,), suffix=(3, 4), stop=7)


def builder(around: PromptFormat, max_prompt_length: int, seq_length: int, **options: Any) -> RowBuilder:
    return RowBuilder(
        around, pad_id=PAD, max_prompt_length=max_prompt_length, seq_length=seq_length, **options
    )


def as_lists(batch: dict[str, np.ndarray]) -> dict[str, list[list[int]]]:
    assert all(array.dtype == np.int32 for array in batch.values())
    return {name: array.tolist() for name, array in batch.items()}


def test_by_hand() -> None:
    build = builder(RAW, 4, 8)
    samples = [
        EncodedSample([11, 12], [21, 22]),
        EncodedSample([11, 12, 13, 14], [21, 22, 23]),  # just fits, stop token included
        EncodedSample([11], None),
    ]
    assert as_lists(build.build(samples)) == {
        PROMPT_IDS: [[9, 9, 11, 12], [11, 12, 13, 14], [9, 9, 9, 11]],
        PRETRAIN_IDS: [
            [11, 12, 21, 22, 7, 9, 9, 9],
            [11, 12, 13, 14, 21, 22, 23, 7],
            [11, 9, 9, 9, 9, 9, 9, 9],
        ],
        LOSS_MASK: [[0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1], [0] * 8],
    }
    assert build.counts == RowCounts(rows=3, prompt_tokens=7, response_tokens=7)


def test_cut_response_has_no_stop_token() -> None:
    build = builder(RAW, 4, 6)
    batch = as_lists(build.build([EncodedSample([11, 12], [21, 22, 23, 24]), EncodedSample([11], [21] * 9)]))
    assert batch[PRETRAIN_IDS] == [[11, 12, 21, 22, 23, 24], [11, 21, 21, 21, 21, 21]]
    assert batch[LOSS_MASK] == [[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]]
    assert build.counts == RowCounts(rows=2, truncated_responses=2, prompt_tokens=3, response_tokens=9)


def test_overlong_prompts_are_dropped_and_counted() -> None:
    build = builder(RAW, 3, 6)
    batch = build.build([EncodedSample([1, 2, 3, 4], [5]), EncodedSample([1, 2, 3], [5])])
    assert batch[PROMPT_IDS].tolist() == [[1, 2, 3]]
    assert build.build([EncodedSample([1] * 9, [5])])[PROMPT_IDS].shape == (0, 3)
    assert build.counts == RowCounts(rows=1, dropped_prompts=2, prompt_tokens=3, response_tokens=2)


def test_overlong_prompts_are_cut_at_the_front_of_their_text() -> None:
    """The template stays whole: prefix 1, lead 2, suffix 3 4; the last two text tokens are kept."""
    build = builder(CHAT, 6, 9, overlong="truncate")
    batch = as_lists(
        build.build([EncodedSample([2, 11, 12, 13, 14], [21]), EncodedSample([2, 11, 12], [21])])
    )
    assert batch[PROMPT_IDS] == [[1, 2, 13, 14, 3, 4], [1, 2, 11, 12, 3, 4]]
    assert batch[PRETRAIN_IDS][0] == [1, 2, 13, 14, 3, 4, 21, 7, 9]
    assert build.counts == RowCounts(rows=2, truncated_prompts=1, prompt_tokens=12, response_tokens=4)


def test_lengths_without_room() -> None:
    message = r"max_prompt_length is 4, .* takes 4 tokens: raise it; seq_length is 4"
    with pytest.raises(DataError, match=message):
        builder(CHAT, 4, 4)
    builder(CHAT, 5, 6)


def test_prompt_that_starts_with_the_pad_token() -> None:
    with pytest.raises(DataError, match="starts with the pad token 9"):
        builder(RAW, 4, 8).build([EncodedSample([9, 1], [2])])


# Pads may stand inside a text (pad is the end of text for Qwen2), only not in front.
TEXT = st.lists(st.integers(5, 12), min_size=1, max_size=9).filter(lambda ids: ids[0] != PAD)
SAMPLES = st.lists(
    st.builds(EncodedSample, TEXT, st.none() | st.lists(st.integers(5, 12), max_size=9)), max_size=6
)


@settings(deadline=None)
@given(SAMPLES, st.sampled_from(["drop", "truncate"]), st.integers(5, 12), st.integers(1, 8))
def test_rows_follow_from_samples(samples: list[EncodedSample], overlong: Any, P: int, room: int) -> None:
    build = builder(CHAT, P, P + room, overlong=overlong)
    batch = build.build(samples)
    kept = [sample for sample in samples if overlong == "truncate" or len(sample.text) + 3 <= P]
    assert len(batch[PROMPT_IDS]) == len(kept) == build.counts.rows
    for row, sample in enumerate(kept):
        columns = {name: array[row] for name, array in batch.items()}
        n = prompt_length(columns, PAD)
        prompt, whole, mask = columns[PROMPT_IDS], columns[PRETRAIN_IDS], columns[LOSS_MASK]
        assert n == min(P, len(sample.text) + 3)
        # the prompt is a true prefix of the whole, left-padded here and not there
        assert whole[:n].tolist() == prompt[P - n :].tolist()
        assert (prompt[: P - n] == PAD).all()
        response = whole[mask == 1].tolist()
        full = [] if sample.response is None else [*sample.response, 7]
        assert response == full[: P + room - n]
        assert mask[n : n + len(response)].all()
        assert mask.sum() == len(response)
        assert (whole[n + len(response) :] == PAD).all()
