"""From jsonl to MindRecord: rows by hand, the whole way, pairs, and held-out prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindrlhf.data.columns import (
    LOSS_MASK,
    PRETRAIN_IDS,
    PROMPT_IDS,
    REJECTED_IDS,
    REJECTED_MASK,
    prompt_length,
)
from mindrlhf.data.mindrecord import read_schema
from mindrlhf.data.preprocess import (
    PreprocessOptions,
    PreprocessSummary,
    RowBuilder,
    RowCounts,
    is_held_out,
    preprocess,
)
from mindrlhf.data.prompt_format import EncodedSample
from mindrlhf.data.prompts import PromptStream
from mindrlhf.data.tokenizer import Tokenizer
from mindrlhf.utils.errors import DataError, MindRLHFError
from tests.probes import read_columns

COLUMNS = (PROMPT_IDS, PRETRAIN_IDS, LOSS_MASK)
Around = tuple[tuple[int, ...], tuple[int, ...]]
PAD = 9
STOP = 7
RAW: Around = ((), ())
CHAT: Around = ((1, 2), (3, 4))

# --- rows ---


def builder(around: Around, max_prompt_length: int, seq_length: int, **options: Any) -> RowBuilder:
    return RowBuilder(
        *around, pad_id=PAD, max_prompt_length=max_prompt_length, seq_length=seq_length, **options
    )


def sample(prompt: list[int], *answers: list[int] | None) -> EncodedSample:
    return EncodedSample(prompt, *(answer if answer is None else [*answer, STOP] for answer in answers))


def as_lists(batch: dict[str, np.ndarray]) -> dict[str, list[list[int]]]:
    assert all(array.dtype == np.int32 for array in batch.values())
    return {name: array.tolist() for name, array in batch.items()}


def test_rows_by_hand() -> None:
    build = builder(RAW, 4, 8)
    samples = [
        sample([11, 12], [21, 22]),
        sample([11, 12, 13, 14], [21, 22, 23]),  # just fits, stop token included
        sample([11], None),
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
    batch = as_lists(build.build([sample([11, 12], [21, 22, 23, 24]), sample([11], [21] * 9)]))
    assert batch[PRETRAIN_IDS] == [[11, 12, 21, 22, 23, 24], [11, 21, 21, 21, 21, 21]]
    assert batch[LOSS_MASK] == [[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]]
    assert build.counts == RowCounts(rows=2, truncated_responses=2, prompt_tokens=3, response_tokens=9)


def test_overlong_prompts_are_dropped_and_counted() -> None:
    build = builder(RAW, 3, 6)
    batch = build.build([sample([1, 2, 3, 4], [5]), sample([1, 2, 3], [5])])
    assert batch[PROMPT_IDS].tolist() == [[1, 2, 3]]
    assert build.build([sample([1] * 9, [5])])[PROMPT_IDS].shape == (0, 3)
    assert build.counts == RowCounts(rows=1, dropped_prompts=2, prompt_tokens=3, response_tokens=2)


def test_overlong_prompts_are_cut_at_the_front_of_their_text() -> None:
    """The template stays whole: 1 2 in front, 3 4 behind; the last two text tokens are kept."""
    build = builder(CHAT, 6, 9, overlong="truncate")
    batch = as_lists(
        build.build([sample([1, 2, 11, 12, 13, 14, 3, 4], [21]), sample([1, 2, 11, 12, 3, 4], [21])])
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
        builder(RAW, 4, 8).build([sample([9, 1], [2])])


# Pads may stand inside a text (pad is the end of text for Qwen2), only not in front.
TEXT = st.lists(st.integers(5, 12), min_size=1, max_size=9).filter(lambda ids: ids[0] != PAD)
SAMPLES = st.lists(
    st.builds(
        lambda text, answer: sample([1, 2, *text, 3, 4], answer),
        TEXT,
        st.none() | st.lists(st.integers(5, 12), max_size=9),
    ),
    max_size=6,
)


@settings(deadline=None)
@given(SAMPLES, st.sampled_from(["drop", "truncate"]), st.integers(5, 12), st.integers(1, 8))
def test_rows_follow_from_samples(samples: list[EncodedSample], overlong: Any, P: int, room: int) -> None:
    build = builder(CHAT, P, P + room, overlong=overlong)
    batch = build.build(samples)
    kept = [one for one in samples if overlong == "truncate" or len(one.prompt) <= P]
    assert len(batch[PROMPT_IDS]) == len(kept) == build.counts.rows
    for row, one in enumerate(kept):
        columns = {name: array[row] for name, array in batch.items()}
        n = prompt_length(columns, PAD)
        prompt, whole, mask = columns[PROMPT_IDS], columns[PRETRAIN_IDS], columns[LOSS_MASK]
        assert n == min(P, len(one.prompt))
        # the prompt is a true prefix of the whole, left-padded here and not there
        assert whole[:n].tolist() == prompt[P - n :].tolist()
        assert (prompt[: P - n] == PAD).all()
        response = whole[mask == 1].tolist()
        assert response == (one.response or [])[: P + room - n]
        assert mask[n : n + len(response)].all()
        assert mask.sum() == len(response)
        assert (whole[n + len(response) :] == PAD).all()


def test_pairs_by_hand() -> None:
    build = builder(RAW, 3, 6, pairs=True)
    batch = build.build([sample([11, 12], [21], [31, 32, 33]), sample([11], [21, 22], [])])
    assert as_lists(batch) == {
        PROMPT_IDS: [[9, 11, 12], [9, 9, 11]],
        PRETRAIN_IDS: [[11, 12, 21, 7, 9, 9], [11, 21, 22, 7, 9, 9]],
        LOSS_MASK: [[0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0]],
        REJECTED_IDS: [[11, 12, 31, 32, 33, 7], [11, 7, 9, 9, 9, 9]],
        REJECTED_MASK: [[0, 0, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0]],
    }
    assert build.counts == RowCounts(rows=2, prompt_tokens=3, response_tokens=5, rejected_tokens=5)


@pytest.mark.parametrize("long_side", [0, 1])
def test_a_pair_with_one_response_too_long_is_dropped_or_cut(long_side: int) -> None:
    """Room is 4: three tokens and a stop token fit, four do not."""
    answers = ([1, 2, 3], [1, 2, 3, 4]) if long_side else ([1, 2, 3, 4], [1, 2, 3])
    fits, long = sample([11, 12], [1, 2, 3], [2, 2, 2]), sample([11, 12], *answers)
    dropping = builder(RAW, 3, 6, pairs=True)
    assert dropping.build([long, fits])[PRETRAIN_IDS].tolist() == [[11, 12, 1, 2, 3, 7]]
    assert (dropping.counts.rows, dropping.counts.dropped_pairs) == (1, 1)
    cutting = builder(RAW, 3, 6, pairs=True, overlong="truncate")
    batch = cutting.build([long, fits])
    assert batch[(PRETRAIN_IDS, REJECTED_IDS)[long_side]][0].tolist() == [11, 12, 1, 2, 3, 4]
    assert batch[(REJECTED_IDS, PRETRAIN_IDS)[long_side]][0].tolist() == [11, 12, 1, 2, 3, 7]
    assert (cutting.counts.rows, cutting.counts.dropped_pairs, cutting.counts.truncated_responses) == (
        2,
        0,
        1,
    )


def test_equal_responses_say_nothing() -> None:
    build = builder(RAW, 3, 6, pairs=True)
    assert len(build.build([sample([11], [1, 2], [1, 2])])[PROMPT_IDS]) == 0
    assert build.counts == RowCounts(equal_pairs=1)


# --- whole files (bad input: tests/bad_input/rows_data.py) ---


def write_pairs(path: Path, rows: list[tuple[str, ...]], *extra: str) -> Path:
    """Lines of (prompt, response) or (prompt, response, rejected response)."""
    keys = ("prompt", "pos_resp", "neg_resp")
    lines = [json.dumps(dict(zip(keys, (*row, "n"), strict=False)), ensure_ascii=False) for row in rows]
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
        (lambda path: path.write_text("{\n"), {"skip_bad_lines": True}, "no good line"),
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


def test_file_of_pairs_is_a_file_of_prompts_too(demo_tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [("How do I walk?", "Step by step.", "No."), ("怎样跑步？", "慢慢来。", "不知道。")]
    source = write_pairs(tmp_path / "pairs.jsonl", rows)
    lengths = {"max_prompt_length": 40, "seq_length": 64}
    outputs = {}
    for pairs in (False, True):
        outputs[pairs] = tmp_path / f"{pairs}.mindrecord"
        preprocess(demo_tokenizer, PreprocessOptions(source, outputs[pairs], pairs=pairs, **lengths))
    plain, paired = (set(read_schema(outputs[pairs])[0]) for pairs in (False, True))
    assert paired - plain == {REJECTED_IDS, REJECTED_MASK}
    both = [read_columns(outputs[pairs], COLUMNS) for pairs in (False, True)]
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


def test_dropped_pairs_are_named_when_nothing_is_left(demo_tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = tmp_path / "pairs.jsonl"
    source.write_text('{"prompt": "p", "pos_resp": "same", "neg_resp": "same"}\n')
    options = PreprocessOptions(source, tmp_path / "o", 40, 64, pairs=True)
    with pytest.raises(DataError, match=r"0 pairs longer than seq_length and 1 with equal responses dropped"):
        preprocess(demo_tokenizer, options)


# --- held-out prompts ---


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


def test_a_split_that_leaves_no_training_data_leaves_nothing(
    demo_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="all prompts are held out"):
        split(demo_tokenizer, tmp_path, ["a", "b", "c"], eval_fraction=1 - 1e-9)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_two_outputs_are_replaced_together_or_not_at_all(
    demo_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = [tmp_path / f"{part}.mindrecord{end}" for part in ("eval", "train") for end in ("", ".db")]
    others = [f"name {number}" for number in range(60)]
    split(demo_tokenizer, tmp_path, [f"say {number}" for number in range(60)])
    before = [path.read_bytes() for path in outputs]
    with pytest.raises(MindRLHFError, match=r"eval\.mindrecord: exists; .*--overwrite"):
        split(demo_tokenizer, tmp_path, others)
    with pytest.raises(DataError, match="all prompts are held out"):  # the second pass finds none
        split(demo_tokenizer, tmp_path, others, overwrite=True, eval_fraction=1 - 1e-9)
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if target == outputs[3] and ".tmp-" in str(self):  # the last of all
            raise OSError("disk full")
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(DataError, match="disk full"):
            split(demo_tokenizer, tmp_path, others, overwrite=True)
    assert [path.read_bytes() for path in outputs] == before
    assert sorted(tmp_path.iterdir()) == sorted([*outputs, tmp_path / "data.jsonl"])
    split(demo_tokenizer, tmp_path, others, overwrite=True)
    assert all(path.read_bytes() != old for path, old in zip(outputs, before, strict=True))


def test_outputs_are_no_inputs(demo_tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name, flag in (("data.jsonl", "--file_path"), ("train.mindrecord.db", "--output_path")):
        with pytest.raises(MindRLHFError, match=rf"--eval_output_path .*: is {flag} "):
            split(demo_tokenizer, tmp_path, ["a"], eval_output_path=tmp_path / "x" / ".." / name)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]
