"""Makes large runs small enough for one page: curves by stretches, samples by iterations."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mindrlhf.report.reading import Line, Series

MAX_POINTS = 600
"""Points of a curve: more than a curve has pixels on most screens."""
EXTREME_SAMPLES = 50
"""Samples of the highest and of the lowest scores that are kept whatever else goes."""

TEXTS = ("prompt", "response")

_SIGNIFICANT = 6
_ESCAPED = re.compile(r'[<>&"\\\x00-\x1f]')


@dataclass(frozen=True)
class Stretches:
    """Iterations put together in as few stretches as a curve has points.

    Attributes:
        first, last: (m,) iterations at the ends of each stretch; equal where nothing was put together.
    """

    first: np.ndarray
    last: np.ndarray

    def curve(self, series: Series) -> dict[str, Any]:
        """Mean of each stretch, and lowest and highest where it is longer than one iteration.

        Values that are not finite count for nothing; their iterations are named in ``broken``.

        Returns:
            JSON values: ``mean``, ``low`` and ``high`` (m,), ``None`` where there is no value, ``low`` and
            ``high`` only when some stretch holds more than one value; ``broken``, at most 200 iterations.
        """
        finite = np.isfinite(series.values)
        count = len(self.first)
        place = np.searchsorted(self.first, series.iterations[finite], side="right") - 1
        values = series.values[finite]
        members = np.bincount(place, minlength=count)
        low, high = np.full(count, np.inf), np.full(count, -np.inf)
        np.minimum.at(low, place, values)
        np.maximum.at(high, place, values)
        # Divided first: a sum of huge values would overflow.
        share = values / members[place]
        curve: dict[str, Any] = {"mean": _numbers(np.bincount(place, share, minlength=count), members)}
        if (members > 1).any():
            curve |= {"low": _numbers(low, members), "high": _numbers(high, members)}
        broken = series.iterations[~finite]
        if len(broken):
            curve["broken"] = broken[:200].tolist()
        return curve


def stretches_of(iterations: np.ndarray, most: int = MAX_POINTS) -> Stretches:
    """At most ``most`` stretches of equal length over rising ``iterations`` (n,)."""
    length = -(-len(iterations) // most)
    first = iterations[::length]
    last = np.append(iterations[length - 1 :: length], iterations[-1:])[: len(first)]
    return Stretches(first, last)


def text_of(value: Any) -> str:
    """Text of a prompt or reply; token ids, which runs without a tokenizer keep, as a list."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def cut_text(text: str, most: int) -> str:
    """``text`` when it has at most ``most`` characters, else its front and how much is gone."""
    return text if len(text) <= most else f"{text[:most]} … [{len(text) - most} more characters]"


def fit_samples(samples: Sequence[Line], budget: int) -> tuple[list[Line], int]:
    """As many samples as fit into ``budget`` bytes of JSON.

    Long texts are cut first; then samples go, evenly over the run, but never the best, the worst, the
    first or the last.

    Returns:
        the samples in their order, and how many characters of a text were kept at most.
    """
    kept = list(samples)
    longest = max((len(text_of(s.get(name))) for s in kept for name in TEXTS), default=0)
    for most in (8000, 4000, 2000, 1000):
        if most == 8000 or most < longest:
            sizes = np.array([_size(sample, most) for sample in kept], dtype=np.int64)
        if sizes.sum() <= budget:
            break
    else:
        kept = [kept[index] for index in _spread(kept, sizes, budget)]
    return [
        {**sample, **{name: cut_text(text_of(sample.get(name)), most) for name in TEXTS}} for sample in kept
    ], most


def _spread(samples: Sequence[Line], sizes: np.ndarray, budget: int) -> list[int]:
    """Places of the samples that stay: the musts, then every n-th of the rest as far as they fit."""
    count = len(samples)
    scored = [index for index in range(count) if samples[index].get("score") is not None]
    by_score = sorted(scored, key=lambda index: samples[index]["score"])
    must = {*by_score[:EXTREME_SAMPLES], *by_score[-EXTREME_SAMPLES:], 0, count - 1}
    left = budget - sum(int(sizes[index]) for index in must)
    share = max(left, 0) / max(int(sizes.sum()), 1)
    chosen = set(must)
    for index in map(int, np.linspace(0, count - 1, int(count * share)).round()):
        if index not in chosen and left >= sizes[index]:
            chosen.add(index)
            left -= int(sizes[index])
    return sorted(chosen)


def _size(sample: Mapping[str, Any], most: int) -> int:
    """Bytes of a sample in the page, near enough: UTF-8, and six bytes for each escaped character."""
    total = 80
    for name in TEXTS:
        text = text_of(sample.get(name))[:most]
        total += len(text.encode("utf-8", "replace")) + 5 * len(_ESCAPED.findall(text))
    return total


def _numbers(values: np.ndarray, members: np.ndarray) -> list[float | None]:
    return [
        rounded(value) if member else None for value, member in zip(values.tolist(), members, strict=True)
    ]


def rounded(value: float) -> float:
    """To six significant digits, which halves the size of the page."""
    return float(f"{value:.{_SIGNIFICANT}g}")
