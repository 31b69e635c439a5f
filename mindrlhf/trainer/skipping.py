"""Updates that are not taken because a loss, a gradient or a reward is not a finite number."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.parallel.layout import Mesh
from mindrlhf.runtime.host_exchange import HostExchange, local_rows
from mindrlhf.trainer.experience import Rollout, Scores, sequence_mask
from mindrlhf.utils.errors import MindRLHFError
from mindrlhf.utils.logging import get_logger

logger = get_logger(__name__)

SKIPPED_FILE = "skipped_updates.jsonl"
_SHOWN_IDS = 8


@dataclass(frozen=True)
class SkippedUpdate:
    """One optimizer step, or a whole iteration's, that was not taken."""

    model: str
    """``policy`` or ``critic``; ``both`` when a rollout cannot be learnt from."""
    cause: str
    rows: np.ndarray
    """Rows of the rollout that are at fault; the whole minibatch where it cannot be told."""
    minibatch: int = 0
    """Counted from 1 in an iteration; 0: all of them."""
    grad_norm: float | None = None
    is_whole_minibatch: bool = False


class SkippedUpdates:
    """Counts updates that were skipped, in all and in a row; the same on every rank.

    Args:
        limit: how many in a row are too many.
        unit: what the job counts, ``iteration``, or ``step`` where each has one update.
    """

    def __init__(self, limit: int, unit: str = "iteration") -> None:
        self.limit = limit
        self.unit = unit
        self.in_a_row = 0
        self._new: list[SkippedUpdate] = []

    @property
    def are_too_many(self) -> bool:
        """Whether training must stop."""
        return self.in_a_row >= self.limit

    def add(self, update: SkippedUpdate) -> None:
        """An optimizer step was not taken; :meth:`end_update` counts it."""
        self._new.append(update)

    def end_update(self, *, skipped: bool) -> None:
        """One update of all models, a minibatch's, is over."""
        self.in_a_row = self.in_a_row + 1 if skipped else 0

    def drain(self) -> list[SkippedUpdate]:
        """What was added since the last call."""
        new, self._new = self._new, []
        return new

    def settle(
        self, number: int, sample_ids: np.ndarray, directory: Path | None, save: Callable[[], Path]
    ) -> None:
        """Records what was skipped in an iteration or step, stops the job when it was too much; collective.

        Args:
            number: of the iteration or step, counted from 1.
            sample_ids: (B,) of the rollout or batch.
            directory: where :data:`SKIPPED_FILE` is; ``None`` on all ranks but the main one.
            save: writes a checkpoint of the state as it is, which is that from before the skipped updates.

        Raises:
            MindRLHFError: ``limit`` updates in a row were skipped.
        """
        new = self.drain()
        if directory is not None:
            for update in new:
                self._record(directory, update, number, sample_ids[update.rows])
        if not self.are_too_many:
            return
        last, checkpoint = new[-1], save()
        raise MindRLHFError(
            f"training fails: {self.in_a_row} updates in a row were skipped (max_skipped_updates), last in "
            f"{self.unit} {number}: {last.cause}, samples {_shown(sample_ids[last.rows])}; {SKIPPED_FILE} "
            f"has them all. The state of before is saved in {checkpoint}: look at the samples"
            f"{' and the reward' if self.unit == 'iteration' else ''}, lower the learning rate, and resume "
            "from it, which goes on with the prompts after these"
        )

    def _record(self, directory: Path, update: SkippedUpdate, number: int, sample_ids: np.ndarray) -> None:
        of = f"minibatch {update.minibatch}" if update.minibatch else "the whole rollout"
        logger.warning(
            "update skipped: %s %d, %s, %s: %s; samples %s",
            *(self.unit, number, of, update.model, update.cause, _shown(sample_ids)),
        )
        line: dict[str, Any] = {
            self.unit: number,
            "minibatch": update.minibatch,
            "model": update.model,
            "cause": update.cause,
            "grad_norm": None if update.grad_norm is None else _plain(update.grad_norm),
            "sample_ids": [int(number) for number in sample_ids],
            "whole_minibatch": update.is_whole_minibatch,
        }
        with (directory / SKIPPED_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


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
    """A step that was not taken, and the rows to blame for it; collective, equal on every rank.

    The rows are those of the micro-batches whose loss is not finite; all, when every loss is.

    Args:
        model: whose step.
        rows: (n,) of the minibatch, over all replicas.
        losses: of this rank's micro-batches.
        norm: of the gradient.
        mesh: of the model.
        exchange: between the ranks.
        micro_batch_size: rows a micro-batch; 0: all of a replica's.
        minibatch: counted from 1.
    """
    mine = local_rows(len(rows), mesh, exchange.runtime.rank)
    size = micro_batch_size or (mine.stop - mine.start)
    flags = np.zeros(len(rows), np.int32)
    for index, loss in enumerate(losses):
        first = mine.start + index * size
        flags[first : min(first + size, mine.stop)] = not np.isfinite(loss)
    blamed = exchange.every_rank(flags).any(axis=0)
    whole = not blamed.any() or bool(blamed.all())
    cause = f"{'loss' if blamed.any() else 'gradient'} not finite (gradient norm {norm})"
    return SkippedUpdate(model, cause, rows if whole else rows[blamed], minibatch, norm, whole)


def usable(rollout: Rollout, scores: Scores) -> tuple[Rollout, Scores, SkippedUpdate | None]:
    """Whether a scored rollout can be learnt from: a single NaN would reach every sample by whitening.

    Args:
        rollout, scores: the global batch, equal on every rank.

    Returns:
        both as they are, and ``None``; or both with neutral numbers, for metrics alone (0, and the mean of
        the other scores), and what is wrong.
    """
    mask = sequence_mask(rollout)
    columns = {
        "reward": ~np.isfinite(scores.scores),
        "value": _any_not_finite(scores.values, mask),
        "reference log-prob": _any_not_finite(scores.ref_logprobs, mask),
        "log-prob": _any_not_finite(rollout.logprobs, mask),
    }
    bad = np.any(list(columns.values()), axis=0)
    if not bad.any():
        return rollout, scores, None
    names = [f"{name} of {int(rows.sum())} sample(s)" for name, rows in columns.items() if rows.any()]
    finite = scores.scores[np.isfinite(scores.scores)]
    neutral = float(finite.mean(dtype=np.float64)) if len(finite) else 0.0
    lost = bad[:, None]
    cleaned = Scores(
        ref_logprobs=np.where(lost, np.float32(0), scores.ref_logprobs),
        values=np.where(lost, np.float32(0), scores.values),
        scores=np.where(columns["reward"], np.float32(neutral), scores.scores),
    )
    fault = SkippedUpdate("both", f"not a finite number: {', '.join(names)}", np.flatnonzero(bad))
    return rollout._replace(logprobs=np.where(lost, np.float32(0), rollout.logprobs)), cleaned, fault


def _any_not_finite(array: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Rows of (B, R) with NaN or infinity inside the mask."""
    found: np.ndarray = (~np.isfinite(array) & mask).any(axis=1)
    return found


def _shown(sample_ids: np.ndarray) -> str:
    more = f" and {len(sample_ids) - _SHOWN_IDS} more" if len(sample_ids) > _SHOWN_IDS else ""
    return ", ".join(str(number) for number in sample_ids[:_SHOWN_IDS]) + more


def _plain(value: float) -> float | str:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else str(value)
