"""Metrics of a stage as JSON lines, and the picture of its curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mindrlhf.trainer.records import RunRecords
from mindrlhf.trainer.trackers.group import Trackers
from mindrlhf.utils.files import atomic_file

Curves = Sequence[tuple[str, str]]


class StageRecords(RunRecords):
    """Appends to ``metrics.jsonl``, one line an optimizer step; only the main rank makes one.

    Args:
        directory: made when missing.
        curves: six pairs of metric and title, drawn over the steps whose lines have that metric.
        trackers: told of all that is added.
    """

    def __init__(self, directory: Path, curves: Curves, trackers: Trackers | None = None) -> None:
        super().__init__(directory, trackers)
        self._curves = curves

    def plot(self) -> Path | None:
        """Draws ``curves.png`` from all metrics so far; ``None`` when there are none."""
        if not self.metrics:
            return None
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(12, 6), layout="constrained")
        FigureCanvasAgg(figure)
        for axis, (name, title) in zip(figure.subplots(2, 3).flat, self._curves, strict=True):
            points = [(line["step"], line[name]) for line in self.metrics if name in line]
            axis.plot(*zip(*points, strict=True) if points else ((), ()), "o-", markersize=3)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("optimizer step")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.ticklabel_format(useOffset=False)
            axis.grid(alpha=0.3)
        path = self.directory / "curves.png"
        with atomic_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110)
        return path
