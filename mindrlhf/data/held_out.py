"""Held-out prompts: which ones they are, reading them, and whether training data has them too."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from mindrlhf.data.mindrecord import read_rows, read_schema
from mindrlhf.data.prompts import PromptBatch, PromptStream
from mindrlhf.data.schema import PROMPT_IDS
from mindrlhf.utils.progress import track

_ROWS_AT_ONCE = 4096


def is_held_out(prompt: str, fraction: float) -> bool:
    """Whether a prompt belongs to the held-out part, by a hash of its text.

    The choice depends on nothing else, so it is the same in every run, growing data moves no prompt from
    one part to the other, and a prompt that stands twice is twice in the same part.

    Args:
        prompt: the user's text.
        fraction: 0 .. 1, of all different prompts.
    """
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:8], "little") < fraction * 2**64


def read_held_out(
    path: Path, *, count: int, max_prompt_length: int, pad_token_id: int, vocab_size: int
) -> PromptBatch:
    """The first ``count`` prompts of a data set (0: all), in file order.

    Args:
        path: MindRecord file as for training.
        count: how many at most.
        max_prompt_length, pad_token_id, vocab_size: see :class:`mindrlhf.data.prompts.PromptStream`.

    Raises:
        DataError: the file is missing, damaged, or of another schema, length or tokenizer.
    """

    def stream(rows: int) -> PromptStream:
        return PromptStream(
            path,
            batch_size=rows,
            max_prompt_length=max_prompt_length,
            pad_token_id=pad_token_id,
            seed=0,
            shuffle=False,
            vocab_size=vocab_size,
        )

    rows = len(stream(1))
    return stream(min(count or rows, rows)).next_batch()


def overlapping_rows(prompts: PromptBatch, train_path: Path) -> np.ndarray:
    """Row numbers of held-out prompts that a training data set has too; (n,) int64.

    Goes through the training data once, a few thousand rows at a time, and keeps only hashes.

    Args:
        prompts: the held-out prompts.
        train_path: MindRecord file made with the same ``max_prompt_length``.

    Raises:
        DataError: the training data cannot be read.
    """
    numbers: dict[bytes, list[int]] = {}
    for digest, number in zip(_digests(prompts.prompt_ids), prompts.sample_ids, strict=True):
        numbers.setdefault(digest, []).append(int(number))
    found: set[int] = set()
    _, rows = read_schema(train_path)
    starts = range(0, rows, _ROWS_AT_ONCE)
    for start in track(starts, description="looking for held-out prompts in the training data"):
        some = np.arange(start, min(start + _ROWS_AT_ONCE, rows))
        for digest in _digests(row[PROMPT_IDS] for row in read_rows(train_path, some, [PROMPT_IDS])):
            found.update(numbers.get(digest, ()))
    return np.array(sorted(found), np.int64)


def prompts_digest(prompts: PromptBatch) -> str:
    """A short name of these very prompts in this order."""
    return hashlib.sha256(b"".join(_digests(prompts.prompt_ids))).hexdigest()[:16]


def _digests(rows: Iterable[np.ndarray]) -> Iterator[bytes]:
    for row in rows:
        yield hashlib.blake2b(np.ascontiguousarray(row, "<i4").tobytes(), digest_size=16).digest()
