"""What the diagnostics measure a run by: running medians, stretches that reach the end, changes of a mean."""

from __future__ import annotations

import math

import numpy as np

from mindrlhf.report.reading import Series

PROGRESS_ITERATIONS = 10
"""Fewer say nothing about progress."""
MEDIAN_WINDOW = 5
"""Iterations of the running median: up to two outliers side by side do not count."""


def score_change(score: Series) -> tuple[float, float, float] | None:
    """Mean of the first fifth, of the last, and their difference in standard errors; ``None`` for few."""
    values = score.values[np.isfinite(score.values)]
    if len(values) < PROGRESS_ITERATIONS:
        return None
    first, last = values[: len(values) // 5], values[-(len(values) // 5) :]
    difference, error = float(last.mean() - first.mean()), standard_error(first, last)
    ratio = difference / error if error else math.copysign(math.inf, difference) if difference else 0.0
    return float(first.mean()), float(last.mean()), ratio


def running_median(values: np.ndarray, window: int = MEDIAN_WINDOW) -> np.ndarray:
    """Median of the ``window`` values around each, fewer at the ends; NaN and infinities are left out.

    Args:
        values: (n,).
        window: odd.

    Returns:
        (n,) float64, NaN where nothing finite is around.
    """
    medians = np.full(len(values), np.nan)
    if not len(values):
        return medians
    finite = np.where(np.isfinite(values), values, np.nan)
    padded = np.pad(finite, window // 2, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, window)
    known = ~np.isnan(windows).all(axis=1)
    medians[known] = np.nanmedian(windows[known], axis=1)
    return medians


def since_iteration(series: Series, holds: np.ndarray) -> int | None:
    """The iteration since which ``holds`` (n,) is true up to the last; ``None`` when not at the last."""
    if not len(holds) or not holds[-1]:
        return None
    false = np.flatnonzero(~holds)
    return int(series.iterations[false[-1] + 1 if len(false) else 0])


def standard_error(first: np.ndarray, last: np.ndarray) -> float:
    """Standard error of the difference of the means of two samples of at least two values each."""

    def squared(values: np.ndarray) -> float:
        return float(values.var(ddof=1)) / len(values)

    return math.sqrt(squared(first) + squared(last))


def count_since(series: Series, since: int) -> int:
    """Iterations recorded from ``since`` on."""
    return int((series.iterations >= since).sum())


def last_value(series: Series) -> float:
    """The last value, finite or not."""
    return float(series.values[-1])
