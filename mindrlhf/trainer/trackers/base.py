"""What every tracker is told: scalars, histograms and sample texts of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BINS = 30


class Histogram(NamedTuple):
    """Counts of values in bins; bin i reaches from ``edges[i]`` to ``edges[i + 1]``."""

    edges: np.ndarray  # (bins + 1,) rising
    counts: np.ndarray  # (bins,)
    sum: float
    sum_squares: float

    @classmethod
    def of(cls, values: np.ndarray, bins: int = BINS) -> Histogram:
        """Of finite values; others are left out.

        Args:
            values: any shape, at least one finite value.
            bins: how many, equally wide from the least to the greatest value.
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
        first_step: the next that comes; what an earlier part of the run sent for it and later is void.
        is_resumed: whether there is an earlier part.
    """

    directory: Path
    configuration: Mapping[str, Any]
    first_step: int
    is_resumed: bool


class Tracker:
    """Follows a run on the main rank. Does nothing by itself; a subclass takes what it can show.

    Steps never fall between two calls of :meth:`start`. Whatever a method raises ends this tracker with
    one warning, not the training; see :class:`mindrlhf.trainer.trackers.group.Trackers`.

    Attributes:
        name: for messages.
        shows_metrics: a person sees the scalars as they come, so that no log line need say them.
    """

    name = "tracker"
    shows_metrics = False

    def start(self, run: RunStart) -> None:
        """The run begins, or goes on."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics of a step; a step may get more of them, of other names, in another call."""

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        """Distributions of a step."""

    def samples(self, step: int, name: str, samples: Sequence[Mapping[str, Any]]) -> None:
        """Some prompts with their responses; keys ``prompt``, ``response``, ``score`` and ``kl``."""

    def close(self) -> None:
        """Nothing more comes; called once, also when the run has failed."""


SAMPLE_COLUMNS = ("prompt", "response", "score", "kl")


def sample_cells(sample: Mapping[str, Any]) -> tuple[str, str, float, float]:
    """A sample in the order of SAMPLE_COLUMNS; prompts and responses without a tokenizer are lists of ids."""
    return (
        str(sample["prompt"]),
        str(sample["response"]),
        float(sample.get("score", np.nan)),
        float(sample.get("kl", np.nan)),
    )
