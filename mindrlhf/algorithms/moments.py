"""Mean and variance of a stream of numbers, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np


class RunningMoments:
    """Count, mean and ``M2`` (sum of squared distances from the mean) of all numbers given so far.

    Batches are merged pairwise: with ``d = mean_b - mean_a`` and ``n = n_a + n_b``,
    ``mean = mean_a + d n_b / n; M2 = M2_a + M2_b + d^2 n_a n_b / n``. No sum of squares is kept, so nothing
    cancels when the mean is large. Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise
    Algorithm for Computing Sample Variances", 1979.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.m2 = 0.0

    @property
    def std(self) -> float:
        """Sample standard deviation, ``sqrt(M2 / (count - 1))``; 0 for fewer than two numbers."""
        return math.sqrt(self.m2 / (self.count - 1)) if self.count > 1 else 0.0

    def update(self, batch: np.ndarray) -> None:
        """Adds a batch of any shape.

        Raises:
            ValueError: a number is not finite; it would corrupt the moments permanently.
        """
        numbers = np.asarray(batch, dtype=np.float64).ravel()
        if not numbers.size:
            return
        if not np.isfinite(numbers).all():
            raise ValueError("running moments take finite numbers only")
        mean = float(numbers.mean())
        count = self.count + numbers.size
        distance = mean - self.mean
        self.m2 += float(np.square(numbers - mean).sum()) + distance**2 * self.count * numbers.size / count
        self.mean += distance * numbers.size / count
        self.count = count

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint must keep."""
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self.count, self.mean, self.m2 = int(state["count"]), float(state["mean"]), float(state["m2"])
