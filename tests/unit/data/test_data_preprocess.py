"""jsonl to MindRecord, the whole way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindrlhf.data.columns import LOSS_MASK, PRETRAIN_IDS, PROMPT_IDS
from mindrlhf.data.mindrecord import read_columns
from mindrlhf.data.preprocess import PreprocessOptions, PreprocessSummary, RowCounts, preprocess
from mindrlhf.data.prompts import PromptStream
from mindrlhf.data.tokenizer import Tokenizer
from mindrlhf.utils.errors import DataError

COLUMNS = (PROMPT_IDS, PRETRAIN_IDS, LOSS_MASK)


def write_pairs(path: Path, pairs: list[tuple[str, str]], *extra: str) -> Path:
    keys = ("prompt", "pos_resp", "neg_resp")
    lines = [json.dumps(dict(zip(keys, (*pair, "n"), strict=True)), ensure_ascii=False) for pair in pairs]
    path.write_text("\n".join([*lines, *extra]) + "\n", encoding="utf-8")
    return path


def run(
    tokenizer: Tokenizer, source: Path, **options: Any
) -> tuple[PreprocessSummary, dict[str, np.ndarray]]:
    output = source.with_suffix(".mindrecord")
    settings: dict[str, Any] = {"max_prompt_length": 40, "seq_length": 64, "overwrite": True}
    summary = preprocess(tokenizer, PreprocessOptions(source, output, **(settings | options)))
    return summary, read_columns(output, COLUMNS)


def test_rows_decode_to_the_rendered_conversation(demo_tokenizer: Tokenizer, tmp_path: Path) -> None:
    pairs = [("怎样跑步？", "慢慢来。"), ("How do I <|im_end|>?", "Do not.")]
    source = write_pairs(tmp_path / "data.jsonl", pairs)
    summary, columns = run(demo_tokenizer, source)
    for row, (prompt, response) in enumerate(pairs):
        whole, mask = columns[PRETRAIN_IDS][row], columns[LOSS_MASK][row]
        n = int(mask.argmax())
        assert demo_tokenizer.decode(whole[:n]) == (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            f"{prompt}<|im_end|>\n<|im_start|>assistant\n"
        )
        assert demo_tokenizer.decode(whole[mask == 1]) == f"{response}<|im_end|>"
        assert whole[n - 5] == 1023
        assert (whole[:n] == 1023).sum() == 2  # the written one is ordinary text
        assert columns[PROMPT_IDS][row, 40 - n :].tolist() == whole[:n].tolist()
        assert (columns[PROMPT_IDS][row, : 40 - n] == 1021).all()
    assert summary.bad_lines == 0
    assert summary.counts.rows == 2
    assert summary.counts.response_tokens == columns[LOSS_MASK].sum()


def test_raw_prompts_end_with_the_end_of_text(demo_tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "data.jsonl", [("a", "b")])
    _, columns = run(demo_tokenizer, source, chat_template=False, max_prompt_length=2, seq_length=4)
    a, b = demo_tokenizer.encode_batch(["a", "b"])
    assert columns[PROMPT_IDS].tolist() == [[1021, *a]]
    assert columns[PRETRAIN_IDS].tolist() == [[*a, *b, 1021, 1021]]
    assert columns[LOSS_MASK].tolist() == [[0, 1, 1, 0]]


def test_batch_size_changes_nothing_but_the_counts_add_up(demo_tokenizer: Tokenizer, tmp_path: Path) -> None:
    pairs = [("word " * (1 + i % 7), "x" * (1 + i % 5)) for i in range(50)]
    source = write_pairs(tmp_path / "data.jsonl", pairs, "{", '{"prompt": ""}')
    lengths = {"max_prompt_length": 26, "seq_length": 30, "skip_bad_lines": True}
    runs = [run(demo_tokenizer, source, batch=batch, **lengths) for batch in (1, 7, 256)]
    for summary, columns in runs:
        assert summary.counts == runs[0][0].counts
        assert summary.bad_lines == 2
        for name in COLUMNS:
            np.testing.assert_array_equal(columns[name], runs[0][1][name])
    counts = runs[0][0].counts
    assert counts.dropped_prompts > 0
    assert counts.truncated_responses > 0
    assert counts.rows + counts.dropped_prompts == 50
    cut, columns = run(demo_tokenizer, source, overlong="truncate", **lengths)
    assert (cut.counts.rows, cut.counts.truncated_prompts) == (50, counts.dropped_prompts)
    assert (columns[PROMPT_IDS][-1] != 1021).sum() <= 26


def test_prompt_only_rows_reach_the_stream(demo_tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = tmp_path / "data.jsonl"
    source.write_text('{"prompt": "学"}\n{"prompt": "hello there"}\n', encoding="utf-8")
    summary, columns = run(demo_tokenizer, source, prompt_only=True)
    assert summary.counts.response_tokens == 0
    assert not columns[LOSS_MASK].any()
    output = source.with_suffix(".mindrecord")
    stream = PromptStream(
        output, batch_size=2, max_prompt_length=40, pad_token_id=1021, seed=0, shuffle=False
    )
    batch = stream.next_batch()
    for row, text in enumerate(("学", "hello there")):
        prompt = batch.prompt_ids[row, 40 - batch.prompt_lengths[row] :]
        assert demo_tokenizer.decode(prompt).count(text) == 1
        assert prompt[0] == 1022


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda path: write_pairs(path, [("a", "b")] * 600, "{"), {}, r"data\.jsonl:601: not JSON"),
        (lambda path: path.write_text(""), {}, "is empty"),
        (lambda path: path.write_text("\n\n"), {}, "no row is left"),
        (
            lambda path: write_pairs(path, [("word " * 90, "b")] * 3),
            {},
            "no row is left to write .3 prompts longer",
        ),
        (lambda path: path.write_text("{\n"), {"skip_bad_lines": True}, "no row is left .*1 bad lines"),
        (lambda path: write_pairs(path, [("a", "b")]), {"max_prompt_length": 19}, "takes 19 tokens"),
        (lambda path: write_pairs(path, [("a", "b")]), {"seq_length": 40}, "seq_length is 40"),
        (lambda path: write_pairs(path, [("a", "b")]), {"batch": 0}, "batch is 0"),
        (lambda path: None, {}, "cannot be read"),
    ],
)
def test_failure_leaves_no_output(
    demo_tokenizer: Tokenizer,
    tmp_path: Path,
    make: Callable[[Path], Any],
    options: dict[str, Any],
    message: str,
) -> None:
    source = tmp_path / "data.jsonl"
    make(source)
    before = set(tmp_path.iterdir())
    with pytest.raises(DataError, match=message):
        run(demo_tokenizer, source, batch=options.pop("batch", 64), **options)
    assert set(tmp_path.iterdir()) == before


def test_real_text_with_the_real_tokenizer(
    shared_data: Path, load_qwen2: Callable[[str | None], Tokenizer], tmp_path: Path
) -> None:
    tokenizer = load_qwen2(None)
    source = tmp_path / "one.jsonl"
    source.write_bytes((shared_data / "cvalues" / "one.jsonl").read_bytes())
    summary, columns = run(tokenizer, source, max_prompt_length=512, seq_length=1024)
    record = json.loads(source.read_text(encoding="utf-8").splitlines()[0])
    prompt, response = columns[PRETRAIN_IDS][0], columns[LOSS_MASK][0] == 1
    assert tokenizer.decode(prompt[response]) == record["pos_resp"] + "<|im_end|>"
    n = int(response.argmax())
    assert summary.counts == RowCounts(rows=8, prompt_tokens=8 * n, response_tokens=8 * int(response.sum()))
    assert record["prompt"] in tokenizer.decode(prompt[:n])
    assert columns[LOSS_MASK].max() == 1  # padding with the pad token's id was a defect of old
