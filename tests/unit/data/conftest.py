"""Small prompt data sets for the data tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindrlhf.data.columns import LOSS_MASK, PRETRAIN_IDS, PROMPT_IDS, prompt_schema
from mindrlhf.data.mindrecord import write_mindrecord
from mindrlhf.data.tokenizer import Tokenizer
from mindrlhf.data.tokenizer_loading import load_tokenizer

PAD = 99


@pytest.fixture(scope="session")
def load_qwen2(shared_data: Path) -> Callable[[str | None], Tokenizer]:
    """The published Qwen2 tokenizer, with one of the configs or none; each is made once (0.6 s)."""

    @cache
    def load(config: str | None) -> Tokenizer:
        directory = shared_data / "qwen2_tokenizer"
        return load_tokenizer(
            vocab_path=directory / "vocab.json",
            merges_path=directory / "merges.txt",
            config_path=config and directory / config,
        )

    return load


@pytest.fixture(scope="session")
def write_prompts() -> Callable[..., Path]:
    """Writes a prompt data set: row i has the prompt [i + 1] * (i % P + 1) and the response [7, 8]."""

    def write(
        path: Path, rows: int, *, max_prompt_length: int = 4, seq_length: int = 8, **change: Any
    ) -> Path:
        prompt_ids = np.full((rows, max_prompt_length), PAD, np.int32)
        pretrain_ids = np.full((rows, seq_length), PAD, np.int32)
        loss_mask = np.zeros((rows, seq_length), np.int32)
        for i in range(rows):
            n = i % max_prompt_length + 1
            prompt_ids[i, max_prompt_length - n :] = i + 1
            pretrain_ids[i, :n] = i + 1
            pretrain_ids[i, n : n + 2] = [7, 8]
            loss_mask[i, n : n + 2] = 1
        batch = {PROMPT_IDS: prompt_ids, PRETRAIN_IDS: pretrain_ids, LOSS_MASK: loss_mask}
        for name, edit in change.items():
            edit(batch[name])
        write_mindrecord(path, prompt_schema(max_prompt_length, seq_length), [batch])
        return path

    return write
