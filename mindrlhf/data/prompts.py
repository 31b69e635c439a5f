"""The stream of prompts a PPO run draws from: shuffled anew each epoch, resumable to the row."""

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
    prompt_length,
    prompt_schema,
)
from mindrlhf.data.mindrecord import read_rows, read_schema
from mindrlhf.data.stream import RowStream
from mindrlhf.utils.errors import DataError
from mindrlhf.utils.progress import track


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


class PromptStream:
    """Draws batches of prompts without end.

    Each epoch is a fresh permutation of the rows, fixed by ``seed`` and the epoch's number; a batch that
    an epoch cannot fill is completed from the next one. Rows are read when they are drawn, so memory does
    not grow with the data set. Every rank reads the same global batch.

    Args:
        path: MindRecord file with the columns of :mod:`mindrlhf.data.columns`.
        batch_size: B, prompts of a global batch.
        max_prompt_length: P; must be the one the file was made with.
        pad_token_id: what the file is padded with.
        seed: of the permutations.
        shuffle: False reads in file order in every epoch.
        vocab_size: when given, every token must be below it.

    Raises:
        DataError: the file is missing, damaged, of another schema or length, or has less than B rows; when
            drawing: a row contradicts itself, is padded with another token, or was made by another tokenizer.
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
        self._path = Path(path)
        self._batch_size = batch_size
        self._max_prompt_length = max_prompt_length
        self._pad_token_id = pad_token_id
        self._vocab_size = vocab_size
        self._rows = RowStream(
            self._check_file(), purpose="prompts", seed=seed, source=self._path, shuffle=shuffle
        )

    def __len__(self) -> int:
        """Rows of the data set."""
        return len(self._rows)

    @property
    def epoch(self) -> int:
        """Number of the epoch that the last drawn prompt belongs to, counted from 0."""
        return self._rows.epoch

    def next_batch(self) -> PromptBatch:
        """The next B prompts.

        Raises:
            DataError: a row does not hold what it should; the message names the row.
        """
        sample_ids = self._rows.draw(self._batch_size)
        rows = read_rows(self._path, sample_ids, (PROMPT_IDS, PRETRAIN_IDS, LOSS_MASK))
        lengths = [self._check_row(int(i), row) for i, row in zip(sample_ids, rows, strict=True)]
        return PromptBatch(
            prompt_ids=np.stack([row[PROMPT_IDS] for row in rows]).astype(np.int32, copy=False),
            prompt_lengths=np.array(lengths, np.int32),
            sample_ids=sample_ids,
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as plain numbers (JSON can hold it)."""
        return self._rows.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on exactly where :meth:`state_dict` was taken; the batch size may differ.

        Raises:
            DataError: the state is of another data set, seed or order, which would repeat or skip prompts.
        """
        self._rows.load_state_dict(state)

    def _check_file(self) -> int:
        """Columns and number of rows; the latter is returned."""
        columns, rows = read_schema(self._path)
        wanted = prompt_schema(self._max_prompt_length, 1)
        faults = [f"no column {name}" for name in wanted if name not in columns]
        faults += [
            f"column {name} is {columns[name][0]} {columns[name][1]}, one row of int32 is wanted"
            for name in wanted
            if name in columns and (columns[name][0] != "int32" or len(columns[name][1]) != 1)
        ]
        if faults:
            raise DataError(
                f"{self._path}: not a prompt data set: {'; '.join(faults)}; make it with rlhf_data.py"
            )
        made_with = columns[PROMPT_IDS][1][0]
        if made_with not in (-1, self._max_prompt_length):
            raise DataError(self._length_fault(made_with))
        if rows < self._batch_size:
            raise DataError(
                f"{self._path}: {rows} rows are fewer than one batch of {self._batch_size} prompts; "
                "give more data or a smaller batch"
            )
        return rows

    def _length_fault(self, made_with: int) -> str:
        return (
            f"{self._path}: made with max_prompt_length {made_with}, "
            f"but the job's is {self._max_prompt_length}; "
            f"make the data again with --max_prompt_length {self._max_prompt_length}, or change the job's"
        )

    def _check_row(self, number: int, row: Mapping[str, np.ndarray]) -> int:
        """Length of a row's prompt, after checking that its columns agree."""
        prompt, whole, mask = row[PROMPT_IDS], row[PRETRAIN_IDS], row[LOSS_MASK]
        if len(prompt) != self._max_prompt_length:
            raise DataError(self._length_fault(len(prompt)))
        if mask.shape != whole.shape or not np.isin(mask, (0, 1)).all():
            raise DataError(
                f"{self._path}: row {number}: loss_mask must be 0 or 1 for each of the {len(whole)} tokens; "
                "make the data again with rlhf_data.py"
            )
        length = prompt_length(row, self._pad_token_id)
        padding, real = prompt[: len(prompt) - length], prompt[len(prompt) - length :]
        if not 0 < length <= len(prompt) or not np.array_equal(real, whole[:length]):
            raise DataError(
                f"{self._path}: row {number}: prompt_ids does not end with the {length} tokens before "
                "the response of pretrain_ids; make the data again with rlhf_data.py"
            )
        if (padding != self._pad_token_id).any():
            raise DataError(
                f"{self._path}: row {number}: padded with token {int(padding[0])}, but the job's "
                f"pad_token_id is {self._pad_token_id}; the data was made with another tokenizer"
            )
        if self._vocab_size is not None and not 0 <= int(real.min()) <= int(real.max()) < self._vocab_size:
            raise DataError(
                f"{self._path}: row {number}: token {int(real.max())} is not below the model's vocab_size "
                f"{self._vocab_size}; the data was made with another tokenizer"
            )
        return length


_ROWS_AT_ONCE = 4096


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
