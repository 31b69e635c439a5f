"""The jsonl reader: good lines come through, bad ones are named by file and line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindrlhf.data.jsonl import CValuesReader, Sample, count_lines
from mindrlhf.utils.errors import DataError

GOOD = '{"prompt": "p", "pos_resp": "yes", "neg_resp": "no"}'

BAD_LINES: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"{", "not JSON"),
    "two objects": (GOOD.encode() * 2, "not JSON"),
    "array": (b'["p"]', "JSON list"),
    "array file": (b"[", "not JSON .*one object per line"),
    "number": (b"3", "JSON int"),
    "null": (b"null", "JSON NoneType"),
    "missing prompt": (b'{"pos_resp": "y", "neg_resp": "n"}', "'prompt' is missing .*'pos_resp', 'neg_resp'"),
    "missing pos_resp": (b'{"prompt": "p", "neg_resp": "n"}', "'pos_resp' is missing"),
    "prompt a number": (b'{"prompt": 1, "pos_resp": "y", "neg_resp": "n"}', "'prompt' is int"),
    "response null": (b'{"prompt": "p", "pos_resp": null, "neg_resp": "n"}', "'pos_resp' is NoneType"),
    "response a list": (b'{"prompt": "p", "pos_resp": ["n"]}', "'pos_resp' is list"),
    "empty prompt": (b'{"prompt": "", "pos_resp": "y", "neg_resp": "n"}', "'prompt' is empty"),
    "blank prompt": (rb'{"prompt": " \n\u3000", "pos_resp": "y", "neg_resp": "n"}', "'prompt' is empty"),
    "empty response": (b'{"prompt": "p", "pos_resp": "", "neg_resp": "n"}', "'pos_resp' is empty"),
    "bad UTF-8": (b'{"prompt": "\xff", "pos_resp": "y", "neg_resp": "n"}', "not UTF-8 .byte 12"),
    "half a surrogate": (rb'{"prompt": "a\ud800", "pos_resp": "y", "neg_resp": "n"}', "half a surrogate"),
    "mark inside": ("\ufeff" + GOOD, "not JSON"),
    "deep nesting": (b"[" * 100_000, "not JSON"),
}  # fmt: skip


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines) + b"\n")
    return path


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line(tmp_path: Path, name: str) -> None:
    line, message = BAD_LINES[name]
    path = write(tmp_path / "data.jsonl", GOOD, line, GOOD)
    with pytest.raises(DataError, match=rf"data\.jsonl:2: .*{message}"):
        list(CValuesReader(path))
    reader = CValuesReader(path, skip_bad_lines=True)
    assert [sample.line for sample in reader] == [1, 3]
    assert reader.bad_lines == 1


def test_all_bad_lines_are_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", GOOD, "{", GOOD, "3", *["{"] * 20)
    with pytest.raises(DataError) as caught:
        list(CValuesReader(path))
    message = str(caught.value)
    assert message.startswith("22 bad lines:")
    assert [number for number in range(1, 25) if f":{number}: " in message] == [2, *range(4, 13)]
    assert "and 12 more" in message
    assert "--skip_bad_lines" in message


def test_good_lines(tmp_path: Path) -> None:
    text = "如何\u2028分行\n?"
    row = json.dumps({"prompt": text, "pos_resp": " 好 ", "neg_resp": "", "pos_type": 1}, ensure_ascii=False)
    path = write(tmp_path / "data.jsonl", "\ufeff" + row, "", "  \r", GOOD + "\r")
    assert list(CValuesReader(path)) == [Sample(text, " 好 ", 1), Sample("p", "yes", 4)]


def test_prompt_only(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", '{"prompt": "p"}', '{"prompt": "q", "pos_resp": 3}')
    assert list(CValuesReader(path, prompt_only=True)) == [Sample("p", None, 1), Sample("q", None, 2)]


def test_the_rejected_response_is_asked_for_with_pairs_alone(tmp_path: Path) -> None:
    without = '{"prompt": "p", "pos_resp": "yes"}'
    path = write(tmp_path / "pairs.jsonl", GOOD, without, without[:-1] + ', "neg_resp": " "}')
    assert [sample.rejected for sample in CValuesReader(path)] == [None, None, None]
    with pytest.raises(
        DataError, match=r"(?s)pairs\.jsonl:2: key 'neg_resp' is missing.*:3: 'neg_resp' is empty"
    ):
        list(CValuesReader(path, pairs=True))
    assert list(CValuesReader(path, pairs=True, skip_bad_lines=True)) == [Sample("p", "yes", 1, "no")]


@pytest.mark.parametrize(("lines", "fault"), [
    (("{", "3"), r"2 bad lines:\n.*data\.jsonl:1: not JSON.*\n.*data\.jsonl:2: a JSON int.*\n.*no good line"),
    (("", " "), r"data\.jsonl: is empty; give"),
])  # fmt: skip
def test_a_file_without_a_good_line_is_refused(tmp_path: Path, lines: tuple[str, ...], fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        list(CValuesReader(write(tmp_path / "data.jsonl", *lines), skip_bad_lines=True))


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for use in (lambda path: list(CValuesReader(path)), count_lines):
        with pytest.raises(DataError, match=r"pipe: is a pipe or a device.*give a regular file"):
            use(tmp_path / "pipe")


def test_real_files(shared_data: Path) -> None:
    folder = shared_data / "cvalues"
    assert len(list(CValuesReader(folder / "cvalues_comparison_excerpt.jsonl"))) == 3
    assert len(list(CValuesReader(folder / "one.jsonl"))) == 8
    prompts = folder / "cvalues_responsibility_prompts.jsonl"
    assert len(list(CValuesReader(prompts, prompt_only=True))) == count_lines(prompts) == 664
    with pytest.raises(DataError, match="664 bad lines"):
        list(CValuesReader(prompts))


def test_missing_file(tmp_path: Path) -> None:
    for use in (lambda path: list(CValuesReader(path)), count_lines):
        with pytest.raises(DataError, match=r"nowhere\.jsonl: cannot be read"):
            use(tmp_path / "nowhere.jsonl")


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")))))
def test_any_text_comes_through(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    path = tmp_path_factory.mktemp("any") / "data.jsonl"
    keys = ("prompt", "pos_resp", "neg_resp")
    lines = [
        json.dumps(dict(zip(keys, (*row, "n"), strict=True)), ensure_ascii=i % 2 == 0)
        for i, row in enumerate(rows)
    ]
    write(path, *lines, GOOD)
    reader = CValuesReader(path, skip_bad_lines=True)
    wanted = [*(row for row in rows if row[0].strip() and row[1].strip()), ("p", "yes")]
    assert [(sample.prompt, sample.response) for sample in reader] == wanted
    assert reader.bad_lines == len(rows) + 1 - len(wanted)


@pytest.mark.parametrize(("content", "lines"), [(b"", 0), (b"a", 1), (b"a\n", 1), (b"a\nb", 2), (b"\n\n", 2)])
def test_count_lines(tmp_path: Path, content: bytes, lines: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert count_lines(path) == lines
