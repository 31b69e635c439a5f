"""Updates that are not taken because a loss, a gradient or a reward is not a finite number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mindrlhf.parallel.layout import Mesh
from mindrlhf.runtime.host_exchange import HostExchange, local_rows
from mindrlhf.utils.errors import inline_list


@dataclass(frozen=True)
class SkippedUpdate:
    """One optimizer step, or a whole iteration's, that was not taken."""

    model: str
    """``policy`` or ``critic``; ``both`` when neither can learn from a rollout."""
    cause: str
    rows: np.ndarray
    """Rows of the rollout that are at fault; the whole minibatch when they cannot be told apart."""
    minibatch: int = 0
    """Counted from 1 in an iteration; 0: all of them."""
    grad_norm: float | None = None
    is_whole_minibatch: bool = False

    def entry(self, sample_ids: np.ndarray) -> dict[str, Any]:
        """Its line in ``skipped_updates.jsonl``; ``sample_ids`` (B,) are those of the whole batch."""
        return {
            "minibatch": self.minibatch,
            "model": self.model,
            "cause": self.cause,
            "grad_norm": None if self.grad_norm is None else _json_number(self.grad_norm),
            "sample_ids": [int(number) for number in sample_ids[self.rows]],
            "whole_minibatch": self.is_whole_minibatch,
        }


class SkippedUpdates:
    """Counts skipped updates, in total and in a row; the same on every rank.

    Args:
        limit: number in a row that stops training.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_a_row = 0
        self._new: list[SkippedUpdate] = []

    @property
    def are_too_many(self) -> bool:
        """Whether training must stop."""
        return self.in_a_row >= self.limit

    def add(self, update: SkippedUpdate) -> None:
        """Notes an optimizer step that was not taken; :meth:`end_update` counts it."""
        self._new.append(update)

    def end_update(self, *, skipped: bool) -> None:
        """One update of all models, a minibatch's, is over."""
        self.in_a_row = self.in_a_row + 1 if skipped else 0

    def report(self, sample_ids: np.ndarray) -> tuple[list[dict[str, Any]], str]:
        """What was skipped since the last call, and why training must stop.

        Args:
            sample_ids: (B,) of the rollout or batch.

        Returns:
            one entry per skipped step for ``skipped_updates.jsonl``, and a sentence that is empty unless
            ``limit`` updates in a row were skipped.
        """
        new, self._new = self._new, []
        entries = [update.entry(sample_ids) for update in new]
        if not self.are_too_many:
            return entries, ""
        last = new[-1]
        return entries, (
            f"{self.in_a_row} updates in a row were skipped (max_skipped_updates), the last one for this: "
            f"{last.cause}, samples {inline_list(sample_ids[last.rows])}; skipped_updates.jsonl lists them "
            "all. Look at the samples and the rewards, lower the learning rate, and resume: training "
            "then continues with the data after these"
        )


def not_finite(
    model: str,
    rows: np.ndarray,
    losses: Sequence[float],
    norm: float,
    mesh: Mesh,
    exchange: HostExchange,
    *,
    micro_batch_size: int,
    minibatch: int = 1,
) -> SkippedUpdate:
    """A step that was not taken, and the rows that caused it; collective, equal on every rank.

    The rows are those of the micro-batches whose loss is not finite; all, when every loss is.

    Args:
        model: whose step.
        rows: (n,) of the minibatch, over all replicas.
        losses: of this rank's micro-batches.
        norm: of the gradient.
        mesh: of the model.
        exchange: between the ranks.
        micro_batch_size: rows per micro-batch; 0: all of a replica's.
        minibatch: counted from 1.
    """
    mine = local_rows(len(rows), mesh, exchange.runtime.rank)
    size = micro_batch_size or (mine.stop - mine.start)
    flags = np.zeros(len(rows), np.int32)
    for index, loss in enumerate(losses):
        first = mine.start + index * size
        flags[first : min(first + size, mine.stop)] = not np.isfinite(loss)
    faulty = exchange.every_rank(flags).any(axis=0)
    whole = not faulty.any() or bool(faulty.all())
    cause = f"{'loss' if faulty.any() else 'gradient'} not finite (gradient norm {norm})"
    return SkippedUpdate(model, cause, rows if whole else rows[faulty], minibatch, norm, whole)


def _json_number(value: float) -> float | str:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else str(value)
