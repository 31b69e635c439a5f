"""Models of one job must have one tokenizer, wherever its files lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers.pre_tokenizers import ByteLevel

from mindrlhf.trainer.tokenizer_checks import check_one_tokenizer
from mindrlhf.utils.errors import MindRLHFError

SPECIAL = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}


def write(
    directory: Path, *, rotated: int = 0, merges: str = "", special: dict[str, int] | None = None
) -> Path:
    """Byte-level files of 256 tokens; ``rotated`` moves their ids."""
    directory.mkdir()
    alphabet = sorted(ByteLevel.alphabet())
    vocab = {text: (number + rotated) % 256 for number, text in enumerate(alphabet)}
    if merges:
        vocab |= {merges.replace(" ", ""): 256}
    (directory / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    if special is not None:
        added = {str(number): {"content": text} for text, number in special.items()}
        config = {"added_tokens_decoder": added, "eos_token": "<|im_end|>"}
        (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def test_the_same_files_agree_with_or_without_a_config(tmp_path: Path) -> None:
    a, b, c = write(tmp_path / "a"), write(tmp_path / "b", special=SPECIAL), tmp_path / "c"
    more = SPECIAL | {"<|extra|>": 259}
    write(c, special=more)
    (tmp_path / "w.ckpt").touch()
    check_one_tokenizer(
        {"x": a, "y": b, "z": c, "file": tmp_path / "w.ckpt", "none": None, "empty": tmp_path}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotated": 1}, r"a text is \[\d+\] \.\.\. instead of"),
        ({"merges": "q z"}, r"token 256 is 'qz' instead of '<\|endoftext\|>'"),
        (
            {"special": {"<|endoftext|>": 256, "<|im_end|>": 257, "<|im_start|>": 258}},
            r"token 257 is '<\|im_end\|>' instead of '<\|im_start\|>'",
        ),
    ],
)
def test_others_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    a, b = write(tmp_path / "a"), write(tmp_path / "b", **change)
    with pytest.raises(MindRLHFError, match=message) as caught:
        check_one_tokenizer({"load_sft_checkpoint_train": a, "load_rm_checkpoint": b})
    assert f"--load_rm_checkpoint {b} has another tokenizer than --load_sft_checkpoint_train {a}" in str(
        caught.value
    )
