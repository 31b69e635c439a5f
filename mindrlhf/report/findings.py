"""What a warning is, and those that runs of every kind can have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mindrlhf.report.reading import Series


class Finding(NamedTuple):
    """One warning.

    Attributes:
        kind: short name of the rule.
        level: ``error`` (results are void), ``warning`` (mend it) or ``note`` (look at it).
        text: what is wrong, with the iteration or step since which it holds.
        detail: the numbers.
        remedy: what to do.
        since: that iteration or step.
        metric: the metric it shows in.
        threshold: the limit that was passed, in the metric's unit, when it is a constant.
    """

    kind: str
    level: str
    text: str
    detail: str
    remedy: str
    since: int
    metric: str
    threshold: float | None = None


def worst_first(findings: Sequence[Finding | None]) -> list[Finding]:
    """Those that are there, ordered by level."""
    order = ("error", "warning", "note")
    return sorted(
        (finding for finding in findings if finding), key=lambda finding: order.index(finding.level)
    )


def not_finite(metrics: Mapping[str, Series], unit: str = "iteration") -> Finding | None:
    """NaN or infinity in any metric, since the first one."""
    bad = {
        name: int(series.iterations[~np.isfinite(series.values)][0])
        for name, series in metrics.items()
        if not np.isfinite(series.values).all()
    }
    if not bad:
        return None
    since = min(bad.values())
    first = [name for name, iteration in bad.items() if iteration == since]
    return Finding(
        "nan",
        "error",
        f"NaN or infinity in {_listed(first)} since {unit} {since}",
        f"{len(bad)} metric(s) hold such values: {_listed(list(bad), 6)}.",
        "Go on from a checkpoint before it with a lower learning rate; check "
        + ("the rewards for NaN." if unit == "iteration" else "the weights it started from."),
        since,
        first[0],
    )


def updates_skipped(skipped: Series, unit: str = "iteration") -> Finding | None:
    """Updates that were not taken because a loss, a gradient or a reward was not finite."""
    iterations = skipped.iterations[skipped.values > 0]
    if not len(iterations):
        return None
    count, since = int(skipped.values[skipped.values > 0].sum()), int(iterations[0])
    return Finding(
        "skipped",
        "warning",
        f"{count} update(s) skipped since {unit} {since}",
        f"In {len(iterations)} of {len(skipped.values)} {unit}s, last in {int(iterations[-1])}.",
        "Look at the samples that skipped_updates.jsonl names; lower the learning rate.",
        since,
        "update/skipped",
    )


def _listed(names: list[str], most: int = 3) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
