"""All trackers of a run as one, none of which can stop the training."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mindrlhf.trainer.trackers.base import Histogram, RunStart, Tracker
from mindrlhf.utils.logging import get_logger

logger = get_logger(__name__)


class Trackers:
    """Tells each tracker what comes; one that fails is dropped with a warning.

    Args:
        trackers: told in this order.

    Attributes:
        seconds: spent in trackers so far.
    """

    def __init__(self, trackers: Iterable[Tracker] = ()) -> None:
        self._trackers = list(trackers)
        self.seconds = 0.0

    @property
    def show_metrics(self) -> bool:
        """Whether a person sees the scalars as they come."""
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
                    "tracker %s fails and is left out from here on; training goes on, and metrics.jsonl has "
                    "everything (%s: %s)",
                    tracker.name, type(error).__name__, error,
                )  # fmt: skip
        self.seconds += time.perf_counter() - started
