"""The picture of a run: metrics over iterations, and what evaluations on held-out prompts gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.utils.files import atomic_file

CURVES = (
    ("objective/scores", "score"),
    ("objective/kl", "KL to the reference (nats per sequence)"),
    ("response/length", "response length (tokens)"),
    ("loss/policy", "policy loss"),
    ("loss/value", "value loss"),
    ("policy/entropy", "entropy (nats per token)"),
)
EVALUATION_CURVES = (
    ("eval/scores", "held-out score (band: \N{PLUS-MINUS SIGN}1 std)"),
    ("eval/kl", "held-out KL (nats per sequence)"),
    ("eval/length", "held-out length (tokens)"),
    ("eval/eos_rate", "held-out stop rate"),
)

Lines = Sequence[Mapping[str, float]]


def draw_curves(path: Path, metrics: Lines, evaluations: Lines = ()) -> None:
    """Draws all curves into a PNG; a row for the evaluations is added when there are any.

    Args:
        path: the picture.
        metrics: lines of ``metrics.jsonl``, at least one.
        evaluations: lines of ``evaluations.jsonl``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9 if evaluations else 6), layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(2, 1, height_ratios=(2, 1)) if evaluations else [figure]
    for axis, (name, title) in zip(parts[0].subplots(2, 3).flat, CURVES, strict=True):
        _draw(axis, metrics, name, title)
    if evaluations:
        axes = parts[1].subplots(1, len(EVALUATION_CURVES))
        for axis, (name, title) in zip(axes, EVALUATION_CURVES, strict=True):
            _draw(axis, evaluations, name, title, color="tab:orange")
        mean, std = (
            np.array([line[f"eval/{name}"] for line in evaluations]) for name in ("scores", "scores_std")
        )
        iterations = [line["iteration"] for line in evaluations]
        axes[0].fill_between(iterations, mean - std, mean + std, color="tab:orange", alpha=0.2)
        axes[-1].set_ylim(-0.05, 1.05)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _draw(axis: Any, lines: Lines, name: str, title: str, **style: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.plot([line["iteration"] for line in lines], [line[name] for line in lines], "o-", ms=3, **style)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("iteration")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.ticklabel_format(useOffset=False)
    axis.grid(alpha=0.3)
