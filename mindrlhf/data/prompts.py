"""Prompts for PPO: the stream a run draws from, and the held-out ones it is evaluated on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mindrlhf.data.columns import (
    LOSS_MASK,
    PRETRAIN_IDS,
    PROMPT_IDS,
    REMEDY,
    check_columns,
    check_prompt,
    check_tokens,
    prompt_length,
)
from mindrlhf.data.mindrecord import read_rows, read_schema
from mindrlhf.data.stream import RowStream
from mindrlhf.utils.errors import DataError
from mindrlhf.utils.progress import track

_COLUMNS = (PROMPT_IDS, PRETRAIN_IDS, LOSS_MASK)
_ROWS_AT_ONCE = 4096


class PromptBatch(NamedTuple):
    """The prompts of one rollout.

    Attributes:
        prompt_ids: (B, P) int32, left-padded.
        prompt_lengths: (B,) int32.
        sample_ids: (B,) int64, row numbers in the data set.
    """

    prompt_ids: np.ndarray
    prompt_lengths: np.ndarray
    sample_ids: np.ndarray


class PromptData:
    """The prompts of a data set, read by row number; memory does not grow with the data set.

    Args:
        path: MindRecord file with the columns of :mod:`mindrlhf.data.columns`.
        max_prompt_length: P; must be the one the file was made with.
        pad_token_id: what the file is padded with.
        vocab_size: when given, every token must be below it.

    Raises:
        DataError: the file is missing or damaged, or has other columns or another length.
    """

    def __init__(
        self, path: str | Path, *, max_prompt_length: int, pad_token_id: int, vocab_size: int | None = None
    ) -> None:
        self.path = Path(path)
        self._max_prompt_length = max_prompt_length
        self._pad_token_id = pad_token_id
        self._vocab_size = vocab_size
        lengths, self._rows = check_columns(self.path, _COLUMNS)
        if lengths[PROMPT_IDS] not in (-1, max_prompt_length):
            raise DataError(f"{self.path}: {self._length_fault(lengths[PROMPT_IDS])}")

    def __len__(self) -> int:
        """Rows of the data set."""
        return self._rows

    def read(self, rows: np.ndarray) -> PromptBatch:
        """The given rows; (B,) row numbers.

        Raises:
            DataError: a row contradicts itself, is padded with another token, or was made by another
                tokenizer; the message names the row.
        """
        read = read_rows(self.path, rows, _COLUMNS)
        return PromptBatch(
            prompt_lengths=np.array(
                [self._check(int(i), row) for i, row in zip(rows, read, strict=True)], np.int32
            ),
            prompt_ids=np.stack([row[PROMPT_IDS] for row in read]).astype(np.int32, copy=False),
            sample_ids=rows,
        )

    def _check(self, number: int, row: Mapping[str, np.ndarray]) -> int:
        """Length of a row's prompt, after checking that its columns agree."""
        try:
            return self._checked_length(row)
        except ValueError as fault:
            raise DataError(f"{self.path}: row {number}: {fault}") from fault

    def _checked_length(self, row: Mapping[str, np.ndarray]) -> int:
        prompt, whole, mask = (row[name] for name in _COLUMNS)
        if len(prompt) != self._max_prompt_length:
            raise ValueError(self._length_fault(len(prompt)))
        if mask.shape != whole.shape or not np.isin(mask, (0, 1)).all():
            raise ValueError(f"loss_mask must be 0 or 1 for each of the {len(whole)} tokens; {REMEDY}")
        length = prompt_length(row, self._pad_token_id)
        check_prompt(prompt, length, whole, PRETRAIN_IDS)
        padding, real = np.split(prompt, [len(prompt) - length])
        check_tokens(real, padding, self._pad_token_id, self._vocab_size)
        return length

    def _length_fault(self, made_with: int) -> str:
        mine = self._max_prompt_length
        return (
            f"made with max_prompt_length {made_with}, but the job's is {mine}; make the data again with "
            f"--max_prompt_length {mine}, or change the job's"
        )


class PromptStream:
    """Draws batches of prompts without end, in the order of a :class:`~mindrlhf.data.stream.RowStream`.

    A batch that an epoch cannot fill is completed from the next one. Every rank reads the same global batch.

    Args:
        path, max_prompt_length, pad_token_id, vocab_size: see :class:`PromptData`.
        batch_size: B, prompts of a global batch.
        seed: of the permutations.
        shuffle: False reads in file order in every epoch.

    Raises:
        DataError: as :class:`PromptData`, or the file has fewer than B rows.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        batch_size: int,
        max_prompt_length: int,
        pad_token_id: int,
        seed: int,
        shuffle: bool = True,
        vocab_size: int | None = None,
    ) -> None:
        self._data = PromptData(
            path, max_prompt_length=max_prompt_length, pad_token_id=pad_token_id, vocab_size=vocab_size
        )
        self._batch_size = batch_size
        if len(self._data) < batch_size:
            raise DataError(
                f"{path}: {len(self._data)} rows are fewer than one batch of {batch_size} prompts; "
                "give more data or a smaller batch"
            )
        self._rows = RowStream(len(self._data), purpose="prompts", seed=seed, source=path, shuffle=shuffle)

    def __len__(self) -> int:
        """Rows of the data set."""
        return len(self._data)

    @property
    def epoch(self) -> int:
        """Number of the epoch that the last drawn prompt belongs to, counted from 0."""
        return self._rows.epoch

    @property
    def drawn(self) -> int:
        """Prompts drawn since the run began, whatever the sizes of its batches were."""
        return self._rows.drawn

    def next_batch(self) -> PromptBatch:
        """The next B prompts.

        Raises:
            DataError: see :meth:`PromptData.read`.
        """
        return self._data.read(self._rows.draw(self._batch_size))

    def state_dict(self) -> dict[str, Any]:
        """The position of the stream, as plain numbers that JSON can hold."""
        return self._rows.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues exactly where :meth:`state_dict` was taken; the batch size may differ.

        Raises:
            DataError: the state belongs to another data set, seed or order.
        """
        self._rows.load_state_dict(state)


def read_held_out(
    path: Path, *, count: int, max_prompt_length: int, pad_token_id: int, vocab_size: int
) -> PromptBatch:
    """The first ``count`` prompts of a data set (0: all), in file order.

    Args:
        path: MindRecord file as for training.
        count: how many at most.
        max_prompt_length, pad_token_id, vocab_size: see :class:`PromptData`.

    Raises:
        DataError: the file is missing or damaged, or has other columns, another length or another
            tokenizer's tokens.
    """
    data = PromptData(
        path, max_prompt_length=max_prompt_length, pad_token_id=pad_token_id, vocab_size=vocab_size
    )
    return data.read(np.arange(min(count or len(data), len(data))))


def overlapping_rows(prompts: PromptBatch, train_path: Path) -> np.ndarray:
    """Row numbers of held-out prompts that a training data set has too; (n,) int64.

    Reads the training data once, a few thousand rows at a time, and keeps only hashes.

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
    """A short digest of exactly these prompts in this order."""
    return hashlib.sha256(b"".join(_digests(prompts.prompt_ids))).hexdigest()[:16]


def _digests(rows: Iterable[np.ndarray]) -> Iterator[bytes]:
    for row in rows:
        yield hashlib.blake2b(np.ascontiguousarray(row, "<i4").tobytes(), digest_size=16).digest()
