"""The order in which rows of a data set are drawn: reshuffled each epoch, resumable to the row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from mindrlhf.utils.errors import DataError
from mindrlhf.utils.seeds import random_stream

Purpose = Literal["prompts", "pretraining", "stage"]
"""Key of the permutations: streams of different purposes are independent, even over the same rows."""


class RowStream:
    """Draws batches of row numbers without end; the same on every rank.

    Each epoch is a fresh permutation of the rows that follows from ``purpose``, ``seed`` and the epoch's
    number alone, so the state is two integers and the batch size may change on resume. With seed 3, 5 rows
    and batches of 2, epoch 0 in some order (r0 .. r4) and epoch 1 (s0 .. s4), the batches are::

        drop_last=False   r0 r1 | r2 r3 | r4 s0 | s1 s2 | ...   (PPO's prompts, pre-training texts)
        drop_last=True    r0 r1 | r2 r3 | s0 s1 | s2 s3 | ...   (supervised stages)

    Args:
        rows: number of rows (0 .. rows - 1 are drawn), or (n,) the row numbers to draw from.
        purpose: what the rows are drawn for.
        seed: of the permutations.
        source: the data set, for messages.
        shuffle: ``False`` keeps the order of ``rows`` in every epoch.
        drop_last: whether the end of an epoch that does not fill a batch is left out; otherwise the batch is
            completed from the next epoch.

    Attributes:
        epoch: number of the epoch that the last drawn row belongs to, counted from 0.

    Raises:
        DataError: the data set is empty.
    """

    def __init__(
        self,
        rows: int | np.ndarray,
        *,
        purpose: Purpose,
        seed: int,
        source: str | Path,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        self._rows = np.asarray(np.arange(rows) if isinstance(rows, int) else rows, np.int64)
        if not len(self._rows):
            raise DataError(f"{source}: no row to draw; give more data")
        self._purpose = purpose
        self._seed = seed
        self._source = source
        self._shuffle = shuffle
        self._drop_last = drop_last
        self._seek(0, 0)

    def __len__(self) -> int:
        """Rows of an epoch."""
        return len(self._rows)

    @property
    def drawn(self) -> int:
        """Rows drawn so far, over all epochs and resumptions; with ``drop_last``, and those left out."""
        return self.epoch * len(self._rows) + self._cursor

    def draw(self, count: int) -> np.ndarray:
        """The next ``count`` row numbers; (count,) int64.

        Raises:
            DataError: ``drop_last`` is on and an epoch has fewer rows than that.
        """
        if self._drop_last:
            if count > len(self._rows):
                raise DataError(
                    f"{self._source}: {len(self._rows)} rows are fewer than one batch of {count}; give more "
                    "data or a smaller batch"
                )
            if self._cursor + count > len(self._rows):
                self._seek(self.epoch + 1, 0)
        drawn = self._take(count)
        while len(drawn) < count:
            self._seek(self.epoch + 1, 0)
            drawn = np.concatenate([drawn, self._take(count - len(drawn))])
        return drawn

    def state_dict(self) -> dict[str, int | bool]:
        """The position of the stream, as plain numbers that JSON can hold."""
        return {
            "epoch": self.epoch,
            "cursor": self._cursor,
            "rows": len(self._rows),
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def load_state_dict(self, state: Mapping[str, int | bool]) -> None:
        """Continues exactly where :meth:`state_dict` was taken.

        Raises:
            DataError: the state belongs to another data set, seed or order, which would repeat or skip rows.
        """
        mine = self.state_dict()
        if state.keys() != mine.keys():
            raise DataError(
                f"{self._source}: cannot resume the {self._purpose} stream: its state has {sorted(state)}, "
                f"expected {sorted(mine)}; resume from another checkpoint"
            )
        other = [
            f"{key} was {state[key]}, is {mine[key]}"
            for key in ("rows", "seed", "shuffle")
            if state[key] != mine[key]
        ]
        if other:
            raise DataError(
                f"{self._source}: cannot resume the {self._purpose} stream: {'; '.join(other)}; use the data "
                "set and seed of the run that was saved"
            )
        epoch, cursor = int(state["epoch"]), int(state["cursor"])
        if epoch < 0 or not 0 <= cursor <= len(self._rows):
            raise DataError(
                f"{self._source}: cannot resume the {self._purpose} stream: epoch {epoch}, cursor {cursor} "
                "is not a place in it; resume from another checkpoint"
            )
        self._seek(epoch, cursor)

    def _take(self, count: int) -> np.ndarray:
        drawn = self._order[self._cursor : self._cursor + count]
        self._cursor += len(drawn)
        return drawn

    def _seek(self, epoch: int, cursor: int) -> None:
        self.epoch, self._cursor = epoch, cursor
        self._order = (
            random_stream(self._purpose, self._seed, epoch).permutation(self._rows)
            if self._shuffle
            else self._rows
        )
