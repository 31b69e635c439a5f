"""What a tracker is, and all trackers of a run as one, none of which can stop the training."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mindrlhf.utils.files import atomic_file
from mindrlhf.utils.logging import get_logger

BINS = 30

logger = get_logger(__name__)


class Histogram(NamedTuple):
    """Counts of values in bins; bin i extends from ``edges[i]`` to ``edges[i + 1]``."""

    edges: np.ndarray  # (bins + 1,) rising
    counts: np.ndarray  # (bins,)
    sum: float
    sum_squares: float

    @classmethod
    def of(cls, values: np.ndarray, bins: int = BINS) -> Histogram:
        """The histogram of the finite values; others are left out.

        Args:
            values: any shape, at least one finite value.
            bins: number of bins, equally wide from the lowest to the highest value.
        """
        finite = values[np.isfinite(values)].astype(np.float64)
        counts, edges = np.histogram(finite, bins)
        return cls(edges, counts, float(finite.sum()), float((finite**2).sum()))


@dataclass(frozen=True)
class RunStart:
    """What a tracker may know of the run it follows.

    Attributes:
        directory: results of the run.
        configuration: content of ``config.json``, secrets hidden.
        first_step: the next step; what an earlier part of the run sent for it and later steps is void.
        is_resumed: whether there is an earlier part.
    """

    directory: Path
    configuration: Mapping[str, Any]
    first_step: int
    is_resumed: bool


class Tracker:
    """Follows a run on the main rank. Does nothing by itself; a subclass overrides what it can show.

    Steps never fall between two calls of :meth:`start`. Whatever a method raises ends this tracker with
    one warning, not the training; see :class:`Trackers`.

    Attributes:
        name: for messages.
        shows_metrics: whether it displays the scalars live, so that no log line has to.
    """

    name = "tracker"
    shows_metrics = False

    def start(self, run: RunStart) -> None:
        """The run begins, or is resumed."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics of a step; a step may get more of them, of other names, in another call."""

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        """Distributions of a step."""

    def samples(self, step: int, name: str, samples: Sequence[Mapping[str, Any]]) -> None:
        """Some prompts with their responses; keys ``prompt``, ``response``, ``score`` and ``kl``."""

    def close(self) -> None:
        """The run is over; called once, also when it has failed."""


class Trackers:
    """Passes every call to each tracker; one that fails is dropped with a warning.

    Args:
        trackers: called in this order.

    Attributes:
        seconds: spent in trackers so far.
    """

    def __init__(self, trackers: Iterable[Tracker] = ()) -> None:
        self._trackers = list(trackers)
        self.seconds = 0.0

    @property
    def show_metrics(self) -> bool:
        """Whether a tracker displays the scalars live."""
        return any(tracker.shows_metrics for tracker in self._trackers)

    @property
    def names(self) -> list[str]:
        """Of the trackers that have not failed."""
        return [tracker.name for tracker in self._trackers]

    def start(self, run: RunStart) -> None:
        """See :meth:`Tracker.start`."""
        self._tell(lambda tracker: tracker.start(run))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See :meth:`Tracker.scalars`."""
        self._tell(lambda tracker: tracker.scalars(step, values))

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        """See :meth:`Tracker.histograms`."""
        self._tell(lambda tracker: tracker.histograms(step, values))

    def samples(self, step: int, name: str, samples: Sequence[Mapping[str, Any]]) -> None:
        """See :meth:`Tracker.samples`."""
        if samples:
            self._tell(lambda tracker: tracker.samples(step, name, samples))

    def close(self) -> None:
        """See :meth:`Tracker.close`; a second call does nothing."""
        self._tell(lambda tracker: tracker.close())
        self._trackers = []

    def _tell(self, call: Callable[[Tracker], None]) -> None:
        started = time.perf_counter()
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except Exception as error:  # whatever a service or a full disk raises
                self._trackers.remove(tracker)
                logger.warning(
                    "tracker %s fails and is dropped; training continues, and metrics.jsonl has "
                    "everything (%s: %s)",
                    tracker.name, type(error).__name__, error,
                )  # fmt: skip
        self.seconds += time.perf_counter() - started


SAMPLE_COLUMNS = ("prompt", "response", "score", "kl")


def sample_cells(sample: Mapping[str, Any]) -> tuple[str, str, float, float]:
    """A sample in the order of SAMPLE_COLUMNS; prompts and responses without a tokenizer are lists of ids."""
    return (
        str(sample["prompt"]),
        str(sample["response"]),
        float(sample.get("score", np.nan)),
        float(sample.get("kl", np.nan)),
    )


def run_id(run: RunStart, service: str) -> str:
    """The id under which a service knows a run, so that a resumed run continues there.

    It comes from ``{service}_run_id.txt`` of a resumed run; a new one is written there.
    """
    path = run.directory / f"{service}_run_id.txt"
    if run.is_resumed and path.is_file() and (known := path.read_text(encoding="utf-8").strip()):
        return known
    new = secrets.token_hex(8)
    with atomic_file(path) as temporary:
        temporary.write_text(new + "\n", encoding="utf-8")
    return new
