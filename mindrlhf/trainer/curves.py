"""The plot of a run: metrics over its steps, and the results of evaluations on held-out data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mindrlhf.utils.files import atomic_file

COLUMNS = 3

Lines = Sequence[Mapping[str, Any]]


class Curve(NamedTuple):
    """A metric that is drawn.

    Attributes:
        metric: its name in the lines of ``metrics.jsonl`` or, when it starts with ``eval/``, of
            ``evaluations.jsonl``.
        title: above the plot.
        band: name of a metric whose value is drawn as a band above and below.
    """

    metric: str
    title: str
    band: str = ""


def draw_curves(
    path: Path, unit: str, curves: Sequence[Curve], metrics: Lines, evaluations: Lines = ()
) -> None:
    """Draws the curves that have values into a PNG, three in a row.

    Args:
        path: the PNG file.
        unit: what a step is called; the key of its number in the lines.
        curves: what to draw.
        metrics: lines of ``metrics.jsonl``, at least one.
        evaluations: lines of ``evaluations.jsonl``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    drawn = []
    for curve in curves:
        lines = evaluations if curve.metric.startswith("eval/") else metrics
        if having := [line for line in lines if curve.metric in line]:
            drawn.append((curve, having))
    rows = max(1, math.ceil(len(drawn) / COLUMNS))
    figure = Figure(figsize=(12, 3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for axis, (curve, lines) in zip(axes, drawn, strict=False):
        steps = [line[unit] for line in lines]
        values = np.array([line[curve.metric] for line in lines], float)
        color = "tab:orange" if curve.metric.startswith("eval/") else "tab:blue"
        axis.plot(steps, values, "o-", ms=3, color=color)
        if curve.band:
            width = np.array([line[curve.band] for line in lines], float)
            axis.fill_between(steps, values - width, values + width, color=color, alpha=0.2)
        axis.set_title(curve.title, fontsize=10)
        axis.set_xlabel(unit)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.ticklabel_format(useOffset=False)
        axis.grid(alpha=0.3)
    for axis in list(figure.axes)[len(drawn) :]:
        axis.remove()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
