"""First, last and best values of a run, for the tiles and the table at the top."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mindrlhf.report.reading import Run, Series
from mindrlhf.report.stages import REWARD, SFT


class Row(NamedTuple):
    """A metric that the summary shows.

    Attributes:
        metric: its name.
        title: for people.
        better: 1 when high values are good, -1 when low ones are, 0 when neither.
        held_out: whether it is of the evaluations.
        share: whether it is a part of 1, read as per cent.
    """

    metric: str
    title: str
    better: int = 0
    held_out: bool = False
    share: bool = False


class Summary(NamedTuple):
    """A metric of one run in a few numbers, of its finite values.

    Attributes:
        first, last: values of the first and last iteration that have one.
        best: the best value, ``None`` when neither direction is good.
        best_iteration: the first iteration that has it.
        low, high: extremes.
    """

    first: float
    last: float
    best: float | None
    best_iteration: int | None
    low: float
    high: float


ROWS = (
    Row("eval/scores", "Held-out score", 1, held_out=True),
    Row("objective/scores", "Score", 1),
    Row("objective/kl", "KL (nats per reply)"),
    Row("policy/entropy", "Entropy (nats per token)"),
    Row("response/length", "Reply length (tokens)"),
    Row("response/eos_rate", "Stop rate", share=True),
    Row("policy/clipfrac", "Clip fraction", share=True),
    Row("value/explained_var", "Explained variance", 1),
    Row("tokens_per_second", "Reply tokens per second", 1),
)


STAGE_ROWS = {
    SFT: (
        Row("eval/loss", "Held-out loss (nats per token)", -1, held_out=True),
        Row("eval/perplexity", "Held-out perplexity", -1, held_out=True),
        Row("loss/train", "Loss (nats per token)", -1),
        Row("grad_norm", "Gradient norm"),
        Row("tokens_per_second", "Tokens per second", 1),
    ),
    REWARD: (
        Row("eval/accuracy", "Held-out accuracy", 1, held_out=True, share=True),
        Row("eval/loss", "Held-out loss", -1, held_out=True),
        Row("eval/margin", "Held-out margin", held_out=True),
        Row("train/accuracy", "Accuracy", 1, share=True),
        Row("loss/train", "Loss", -1),
        Row("grad_norm", "Gradient norm"),
        Row("tokens_per_second", "Tokens per second", 1),
    ),
}


def rows_of(kind: str) -> tuple[Row, ...]:
    """What the summary of runs of a kind shows."""
    return STAGE_ROWS.get(kind, ROWS)


def summarize(series: Series, better: int = 0) -> Summary | None:
    """A metric in a few numbers; ``None`` when it has no finite value."""
    finite = np.isfinite(series.values)
    values, iterations = series.values[finite], series.iterations[finite]
    if not len(values):
        return None
    best = int((values * better).argmax()) if better else None
    return Summary(
        first=float(values[0]),
        last=float(values[-1]),
        best=None if best is None else float(values[best]),
        best_iteration=None if best is None else int(iterations[best]),
        low=float(values.min()),
        high=float(values.max()),
    )


def summary_of(run: Run, row: Row) -> Summary | None:
    """A row of the summary for one run."""
    series = run.evaluation_series(row.metric) if row.held_out else run.series(row.metric)
    return summarize(series, row.better)


def total_seconds(run: Run) -> float:
    """Seconds of all iterations, as far as they are recorded."""
    values = run.series("time/iteration").values
    return float(values[np.isfinite(values)].sum())
