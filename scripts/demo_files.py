"""What the scripts that make demo models share: the files of a Qwen2 directory beside the weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mindrlhf.data.tokenizer import END_OF_TEXT, IM_END
from mindrlhf.utils.files import atomic_file


def write_json(path: Path, content: Mapping[str, Any], *, indent: int | None = 2) -> None:
    """A JSON file with a line end."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")


def write_merges(path: Path, merges: Iterable[str]) -> None:
    """``merges.txt``, one "left right" per line."""
    with atomic_file(path) as temporary:
        temporary.write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def tokenizer_config(
    control: Mapping[str, int], chat_template: str, *, max_length: int, **more: Any
) -> dict[str, Any]:
    """Content of ``tokenizer_config.json`` in Qwen2's form.

    Args:
        control: text and id of the control tokens.
        chat_template: Jinja template of a conversation.
        max_length: maximum length of a text, in tokens.
        more: further keys.
    """
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(number): {"content": text, **flags} for text, number in control.items()},
        "bos_token": None,
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "errors": "replace",
        "model_max_length": max_length,
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
        **more,
    }
    return dict(sorted(config.items()))
