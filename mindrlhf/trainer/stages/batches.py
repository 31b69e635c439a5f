"""The order in which a stage goes through its training rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mindrlhf.utils.seeds import random_stream


class RowStream:
    """Batches of row numbers: a fresh permutation each epoch, fixed by the seed; the same on every rank.

    Rows that do not fill a batch at the end of an epoch are left out of it.

    Args:
        rows: (n,) to train on, at least a batch of them.
        batch_size: rows a batch.
        seed: of the job.
    """

    def __init__(self, rows: np.ndarray, batch_size: int, seed: int) -> None:
        self._rows, self._batch_size, self._seed = rows, batch_size, seed
        self._start(0, 0)

    def next_batch(self) -> np.ndarray:
        """(batch_size,) row numbers."""
        if self._cursor + self._batch_size > len(self._order):
            self._start(self._epoch + 1, 0)
        first = self._cursor
        self._cursor += self._batch_size
        return self._order[first : self._cursor]

    def state_dict(self) -> dict[str, int]:
        """The place in the data; the order follows from seed and epoch."""
        return {"epoch": self._epoch, "cursor": self._cursor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from :meth:`state_dict` of a stream over the same rows, batch size and seed."""
        self._start(int(state["epoch"]), int(state["cursor"]))

    def _start(self, epoch: int, cursor: int) -> None:
        self._epoch, self._cursor = epoch, cursor
        self._order = random_stream("stage", self._seed, epoch).permutation(self._rows)
