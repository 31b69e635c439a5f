"""Held-out prompts: chosen by their text, read whole, and found again in training data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mindrlhf.data.prompts as held_out_module
from mindrlhf.data.columns import PRETRAIN_IDS, prompt_schema
from mindrlhf.data.mindrecord import read_columns, write_mindrecord
from mindrlhf.data.preprocess import PreprocessOptions, PreprocessSummary, is_held_out, preprocess
from mindrlhf.data.prompts import PromptBatch, overlapping_rows, prompts_digest, read_held_out
from mindrlhf.data.tokenizer import Tokenizer
from mindrlhf.utils.errors import DataError

PAD, P, S = 0, 4, 6


def write(path: Path, prompts: list[list[int]]) -> Path:
    left, right = (np.full((len(prompts), size), PAD, np.int32) for size in (P, S))
    for row, prompt in enumerate(prompts):
        left[row, P - len(prompt) :] = prompt
        right[row, : len(prompt)] = prompt
    batch = {"prompt_ids": left, "pretrain_ids": right, "loss_mask": np.zeros_like(right)}
    write_mindrecord(path, prompt_schema(P, S), [batch])
    return path


def read(path: Path, count: int = 0) -> PromptBatch:
    return read_held_out(path, count=count, max_prompt_length=P, pad_token_id=PAD, vocab_size=20)


def test_the_choice_is_fixed_and_close_to_the_fraction() -> None:
    prompts = [f"prompt {number}" for number in range(4000)]
    chosen = {prompt for prompt in prompts if is_held_out(prompt, 0.1)}
    assert 330 < len(chosen) < 470  # 400, and 3.7 standard deviations (19)
    assert chosen <= {prompt for prompt in prompts if is_held_out(prompt, 0.2)}, (
        "a larger part keeps the smaller"
    )
    # Another hash would mix the parts of data made before.
    assert [number for number in range(60) if is_held_out(f"prompt {number}", 0.1)] == [
        10,
        12,
        15,
        20,
        26,
        28,
        36,
    ]


def test_all_rows_are_read_in_order_or_the_first_few(tmp_path: Path) -> None:
    path = write(tmp_path / "eval", [[5], [6, 7], [8, 9, 10]])
    prompts = read(path)
    np.testing.assert_array_equal(prompts.sample_ids, [0, 1, 2])
    np.testing.assert_array_equal(prompts.prompt_lengths, [1, 2, 3])
    np.testing.assert_array_equal(prompts.prompt_ids[1], [PAD, PAD, 6, 7])
    np.testing.assert_array_equal(read(path, 2).prompt_ids, prompts.prompt_ids[:2])
    np.testing.assert_array_equal(read(path, 9).prompt_ids, prompts.prompt_ids)
    assert prompts_digest(read(path)) == prompts_digest(prompts)
    assert prompts_digest(read(path, 2)) != prompts_digest(prompts)


def test_prompts_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="another tokenizer"):
        read(write(tmp_path / "eval", [[5], [21]]))


def test_prompts_that_training_has_too_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out_module, "_ROWS_AT_ONCE", 2)
    train = write(tmp_path / "train", [[1], [6, 7], [3], [2, 2], [9]])
    # Twice the same, a part of another, the same tokens in another order.
    evaluation = read(write(tmp_path / "eval", [[9], [7], [6, 7], [7, 6], [9]]))
    np.testing.assert_array_equal(overlapping_rows(evaluation, train), [0, 2, 4])
    nothing = read(write(tmp_path / "other", [[11], [12]]))
    assert overlapping_rows(nothing, train).shape == (0,)


def split(
    tokenizer: Tokenizer, directory: Path, prompts: list[str], **options: Any
) -> tuple[PreprocessSummary, list[str], list[str]]:
    """Summary, prompts that were written, prompts held out."""
    source = directory / "data.jsonl"
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    source.write_text("\n".join(lines), encoding="utf-8")
    paths = (directory / "train.mindrecord", directory / "eval.mindrecord")
    settings: dict[str, Any] = {"prompt_only": True, "chat_template": False, "eval_output_path": paths[1]}
    summary = preprocess(
        tokenizer,
        PreprocessOptions(source, paths[0], max_prompt_length=24, seq_length=30, **(settings | options)),
    )
    pad = tokenizer.special.pad
    train, held_out = (
        [
            tokenizer.decode([t for t in row.tolist() if t != pad])
            for row in read_columns(path, [PRETRAIN_IDS])[PRETRAIN_IDS]
        ]
        for path in paths
    )
    return summary, train, held_out


def test_a_file_is_split_without_overlap(demo_tokenizer: Tokenizer, tmp_path: Path) -> None:
    prompts = [f"say {number % 40}" for number in range(60)]  # a third of them twice
    summary, train, held_out = split(demo_tokenizer, tmp_path, prompts, eval_fraction=0.25)
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(prompts)
    assert held_out == [prompt for prompt in prompts if is_held_out(prompt, 0.25)]
    assert summary.eval_counts is not None
    assert (summary.counts.rows, summary.eval_counts.rows) == (len(train), len(held_out))
    assert 4 <= len(set(held_out)) <= 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_fraction": 1e-9}, "no prompt is held out at --eval_fraction 1e-09"),
        ({"eval_fraction": 1 - 1e-9}, "all prompts are held out"),
        ({"eval_fraction": 1.0}, "below 1"),
        ({"eval_output_path": "train.mindrecord"}, "give two names"),
    ],
)
def test_a_split_that_cannot_be_leaves_nothing(
    demo_tokenizer: Tokenizer, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    if "eval_output_path" in options:
        options = {"eval_output_path": tmp_path / options["eval_output_path"]}
    with pytest.raises(DataError, match=message):
        split(demo_tokenizer, tmp_path, ["a", "b", "c"], **options)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_an_existing_held_out_file_stays(
    demo_tokenizer: Tokenizer, tmp_path: Path, write_prompts: Callable[..., Path]
) -> None:
    (tmp_path / "eval.mindrecord").write_text("old")
    with pytest.raises(DataError, match="--overwrite"):
        split(demo_tokenizer, tmp_path, ["a", "b", "c"])
    assert (tmp_path / "eval.mindrecord").read_text() == "old"
    assert not (tmp_path / "train.mindrecord").exists()
