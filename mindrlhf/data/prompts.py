"""The stream of prompts a PPO run draws from: shuffled anew each epoch, resumable to the row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mindrlhf.data.mindrecord import read_rows, read_schema
from mindrlhf.data.schema import LOSS_MASK, PRETRAIN_IDS, PROMPT_IDS, prompt_length, prompt_schema
from mindrlhf.utils.errors import DataError
from mindrlhf.utils.seeds import random_stream


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
        path: MindRecord file with the columns of :mod:`mindrlhf.data.schema`.
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
        self._seed = seed
        self._shuffle = shuffle
        self._vocab_size = vocab_size
        self._rows = self._check_file()
        self._epoch = 0
        self._cursor = 0
        self._order = self._permutation(0)

    def __len__(self) -> int:
        """Rows of the data set."""
        return self._rows

    @property
    def epoch(self) -> int:
        """Number of times all rows have been drawn."""
        return self._epoch

    def next_batch(self) -> PromptBatch:
        """The next B prompts.

        Raises:
            DataError: a row does not hold what it should; the message names the row.
        """
        sample_ids = self._draw(self._batch_size)
        rows = read_rows(self._path, sample_ids, (PROMPT_IDS, PRETRAIN_IDS, LOSS_MASK))
        lengths = [self._check_row(int(i), row) for i, row in zip(sample_ids, rows, strict=True)]
        return PromptBatch(
            prompt_ids=np.stack([row[PROMPT_IDS] for row in rows]).astype(np.int32, copy=False),
            prompt_lengths=np.array(lengths, np.int32),
            sample_ids=sample_ids,
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as plain numbers (JSON can hold it)."""
        return {
            "epoch": self._epoch,
            "cursor": self._cursor,
            "rows": self._rows,
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on exactly where :meth:`state_dict` was taken; the batch size may differ.

        Raises:
            DataError: the state is of another data set, seed or order, which would repeat or skip prompts.
        """
        mine = self.state_dict()
        if state.keys() != mine.keys():
            raise DataError(f"{self._path}: prompt stream state has {sorted(state)}, wanted {sorted(mine)}")
        other = [
            f"{key} was {state[key]}, is {mine[key]}"
            for key in ("rows", "seed", "shuffle")
            if state[key] != mine[key]
        ]
        if other:
            raise DataError(
                f"{self._path}: cannot resume the prompt stream: {'; '.join(other)}; "
                "use the data set and seed of the run that was saved"
            )
        epoch, cursor = int(state["epoch"]), int(state["cursor"])
        if epoch < 0 or not 0 <= cursor <= self._rows:
            raise DataError(
                f"{self._path}: prompt stream state: epoch {epoch}, cursor {cursor} is no place in it"
            )
        self._epoch, self._cursor = epoch, cursor
        self._order = self._permutation(epoch)

    def _permutation(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(self._rows)
        return random_stream("prompts", self._seed, epoch).permutation(self._rows)

    def _draw(self, count: int) -> np.ndarray:
        """The next ``count`` row numbers, over the end of an epoch if need be; (count,) int64."""
        drawn = self._order[self._cursor : self._cursor + count]
        self._cursor += len(drawn)
        while len(drawn) < count:
            self._epoch += 1
            self._order = self._permutation(self._epoch)
            self._cursor = min(count - len(drawn), self._rows)
            drawn = np.concatenate([drawn, self._order[: self._cursor]])
        return drawn.astype(np.int64)

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
