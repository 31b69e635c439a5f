"""Pairs: both responses reach the file, what does not fit is counted, and others read the file as any."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mindrlhf.data.columns import (
    LOSS_MASK,
    PRETRAIN_IDS,
    PROMPT_IDS,
    REJECTED_IDS,
    REJECTED_MASK,
)
from mindrlhf.data.jsonl import CValuesReader
from mindrlhf.data.mindrecord import read_columns, read_schema
from mindrlhf.data.preprocess import PreprocessOptions, RowBuilder, RowCounts, preprocess
from mindrlhf.data.prompt_format import EncodedSample, PromptFormat
from mindrlhf.data.prompts import PromptStream
from mindrlhf.data.tokenizer import Tokenizer
from mindrlhf.utils.errors import DataError

RAW = PromptFormat(prefix=(), lead="", lead_ids=(), suffix=(), stop=7)


def builder(**options: object) -> RowBuilder:
    return RowBuilder(RAW, pad_id=9, max_prompt_length=3, seq_length=6, pairs=True, **options)  # type: ignore[arg-type]


def test_by_hand() -> None:
    build = builder()
    batch = build.build([EncodedSample([11, 12], [21], [31, 32, 33]), EncodedSample([11], [21, 22], [])])
    assert {name: array.tolist() for name, array in batch.items()} == {
        PROMPT_IDS: [[9, 11, 12], [9, 9, 11]],
        PRETRAIN_IDS: [[11, 12, 21, 7, 9, 9], [11, 21, 22, 7, 9, 9]],
        LOSS_MASK: [[0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0]],
        REJECTED_IDS: [[11, 12, 31, 32, 33, 7], [11, 7, 9, 9, 9, 9]],
        REJECTED_MASK: [[0, 0, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0]],
    }
    assert all(array.dtype == np.int32 for array in batch.values())
    assert build.counts == RowCounts(rows=2, prompt_tokens=3, response_tokens=5, rejected_tokens=5)


@pytest.mark.parametrize("long_side", [0, 1])
def test_a_pair_with_one_response_too_long_is_dropped_or_cut(long_side: int) -> None:
    """Room is 4: three tokens and a stop token fit, four do not."""
    answers = ([1, 2, 3], [1, 2, 3, 4]) if long_side else ([1, 2, 3, 4], [1, 2, 3])
    fits, long = EncodedSample([11, 12], [1, 2, 3], [2, 2, 2]), EncodedSample([11, 12], *answers)
    dropping = builder()
    assert dropping.build([long, fits])[PRETRAIN_IDS].tolist() == [[11, 12, 1, 2, 3, 7]]
    assert (dropping.counts.rows, dropping.counts.dropped_pairs) == (1, 1)
    cutting = builder(overlong="truncate")
    batch = cutting.build([long, fits])
    assert batch[(PRETRAIN_IDS, REJECTED_IDS)[long_side]][0].tolist() == [11, 12, 1, 2, 3, 4]
    assert batch[(REJECTED_IDS, PRETRAIN_IDS)[long_side]][0].tolist() == [11, 12, 1, 2, 3, 7]
    assert (cutting.counts.rows, cutting.counts.dropped_pairs, cutting.counts.truncated_responses) == (
        2,
        0,
        1,
    )


def test_equal_responses_say_nothing() -> None:
    build = builder()
    assert len(build.build([EncodedSample([11], [1, 2], [1, 2])])[PROMPT_IDS]) == 0
    assert build.counts == RowCounts(equal_pairs=1)


def test_reader_gives_and_checks_the_rejected_response(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    lines = [
        {"prompt": "p", "pos_resp": "yes", "neg_resp": "no"},
        {"prompt": "p", "pos_resp": "yes", "neg_resp": " "},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [sample.rejected for sample in CValuesReader(path)] == [None, None]
    with pytest.raises(DataError, match=r"pairs\.jsonl:2: 'neg_resp' is empty"):
        list(CValuesReader(path, pairs=True))
    (sample,) = CValuesReader(path, pairs=True, skip_bad_lines=True)
    assert (sample.prompt, sample.response, sample.rejected, sample.line) == ("p", "yes", "no", 1)


def test_file_of_pairs_is_a_file_of_prompts_too(demo_tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = tmp_path / "pairs.jsonl"
    rows = [("How do I walk?", "Step by step.", "No."), ("怎样跑步？", "慢慢来。", "不知道。")]
    keys = ("prompt", "pos_resp", "neg_resp")
    source.write_text(
        "".join(json.dumps(dict(zip(keys, row, strict=True)), ensure_ascii=False) + "\n" for row in rows)
    )
    lengths = {"max_prompt_length": 40, "seq_length": 64}
    outputs = {}
    for pairs in (False, True):
        outputs[pairs] = tmp_path / f"{pairs}.mindrecord"
        preprocess(demo_tokenizer, PreprocessOptions(source, outputs[pairs], pairs=pairs, **lengths))
    plain, paired = (set(read_schema(outputs[pairs])[0]) for pairs in (False, True))
    assert paired - plain == {REJECTED_IDS, REJECTED_MASK}
    both = [read_columns(outputs[pairs], (PROMPT_IDS, PRETRAIN_IDS, LOSS_MASK)) for pairs in (False, True)]
    for name, array in both[0].items():
        np.testing.assert_array_equal(both[1][name], array)
    rejected = read_columns(outputs[True], (REJECTED_IDS, REJECTED_MASK))
    for row, (_, _, answer) in enumerate(rows):
        ids, mask = rejected[REJECTED_IDS][row], rejected[REJECTED_MASK][row]
        assert demo_tokenizer.decode(ids[mask == 1]) == f"{answer}<|im_end|>"
        n = int(mask.argmax())
        np.testing.assert_array_equal(ids[:n], both[0][PRETRAIN_IDS][row, :n])
    stream = PromptStream(outputs[True], batch_size=2, max_prompt_length=40, pad_token_id=1021, seed=0)
    assert len(stream.next_batch().prompt_lengths) == 2


def test_pairs_and_prompts_alone_exclude_each_other(demo_tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--pairs asks for two responses and --prompt_only for none"):
        preprocess(demo_tokenizer, PreprocessOptions(tmp_path, tmp_path / "o", pairs=True, prompt_only=True))


def test_dropped_pairs_are_named_when_nothing_is_left(demo_tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = tmp_path / "pairs.jsonl"
    source.write_text('{"prompt": "p", "pos_resp": "same", "neg_resp": "same"}\n')
    options = PreprocessOptions(source, tmp_path / "o", 40, 64, pairs=True)
    with pytest.raises(DataError, match=r"0 pairs longer than seq_length and 1 with equal responses dropped"):
        preprocess(demo_tokenizer, options)
