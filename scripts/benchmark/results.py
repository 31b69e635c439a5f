"""What describes a timed PPO iteration, on both sides: sizes, columns, medians, JSON lines, tables.

Only the standard library: ``trl_baseline.py`` imports it in another environment.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

MODELS: dict[str, dict[str, Any]] = {
    "small": dict(  # noqa: C408
        hidden_size=256, num_layers=4, num_heads=4, n_kv_heads=2, intermediate_size=704, vocab_size=4096
    ),
    "default": dict(  # noqa: C408
        hidden_size=512, num_layers=8, num_heads=8, n_kv_heads=2, intermediate_size=1408, vocab_size=8192
    ),
    "large": dict(  # noqa: C408
        hidden_size=896, num_layers=6, num_heads=14, n_kv_heads=2, intermediate_size=4864, vocab_size=8192
    ),
    "smollm2": dict(  # noqa: C408
        hidden_size=576,
        num_layers=30,
        num_heads=9,
        n_kv_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
        qkv_has_bias=False,
        tie_word_embeddings=True,
    ),
}
"""Sizes by name; ``smollm2`` is SmolLM2-135M's."""

BATCH = {"small": 16, "default": 16, "large": 8, "smollm2": 16}
"""Sequences per iteration of each model."""

LEARNING_RATE, CLIP_RANGE, VALUE_CLIP_RANGE, VALUE_COEF, KL_COEF = 3e-6, 0.2, 0.2, 0.1, 0.05
GAMMA, LAMBDA, MAX_GRAD_NORM, TEMPERATURE = 1.0, 0.95, 1.0, 1.0
"""Settings of both sides."""

PHASES = ("rollout", "scoring", "training", "sync")


@dataclass
class Steps:
    """Seconds of the steps of one run, and what it was a run of.

    ``seconds`` has one row per step, the warm-up included: ``iteration`` and the PHASES.
    """

    system: str
    model: str
    dtype: str
    batch: int
    prompt: int
    response: int
    layers: int
    warm_up: int
    peak_gib: float = 0.0
    seconds: list[dict[str, float]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def clean(self) -> list[dict[str, float]]:
        """The steps after the warm-up."""
        return self.seconds[self.warm_up :]

    def median(self, name: str) -> float:
        """Median seconds of the clean steps; 0 for an absent phase."""
        return statistics.median(step.get(name, 0.0) for step in self.clean())

    def tokens_per_second(self) -> float:
        """Response tokens over the median iteration."""
        return self.batch * self.response / self.median("iteration")


COLUMNS = ("system", "model", "dtype", "iteration s", *PHASES, "tok/s", "peak GiB", "steps")


def row(steps: Steps) -> tuple[str, ...]:
    """The cells of COLUMNS."""
    times = [f"{steps.median(name):.2f}" for name in ("iteration", *PHASES[:3])]
    return (
        steps.system,
        steps.model,
        steps.dtype,
        *times,
        f"{steps.median('sync'):.3f}",
        f"{steps.tokens_per_second():.0f}",
        f"{steps.peak_gib:.2f}",
        str(len(steps.clean())),
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its columns of equal width."""
    lines = [list(columns), *map(list, rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def progress(steps: Steps) -> None:
    """One line about the last step."""
    last, number = steps.seconds[-1], len(steps.seconds)
    kind = "warm-up" if number <= steps.warm_up else "step"
    parts = "  ".join(f"{name} {last.get(name, 0.0):.3f}" for name in ("iteration", *PHASES))
    print(f"{kind} {number}: {parts}", flush=True)


def append_json(path: Path, steps: Steps) -> None:
    """Adds one line to a file of runs."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(steps)) + "\n")


def read_json(path: Path) -> list[Steps]:
    """All runs of a file."""
    names = {item.name for item in fields(Steps)}
    with path.open(encoding="utf-8") as file:
        return [
            Steps(**{name: value for name, value in json.loads(line).items() if name in names})
            for line in file
        ]


def pooled(runs: Sequence[Steps]) -> Steps:
    """Runs of one kind as one: all clean steps together, the highest peak."""
    first = runs[0]
    return Steps(
        **{
            item.name: getattr(first, item.name)
            for item in fields(Steps)
            if item.name not in ("warm_up", "seconds", "peak_gib", "notes")
        },
        warm_up=0,
        peak_gib=max(run.peak_gib for run in runs),
        seconds=[step for run in runs for step in run.clean()],
        notes=first.notes,
    )


def memory_gib(what: str = "VmHWM") -> float:
    """Resident memory of this process: ``VmHWM`` the peak, ``VmRSS`` now (``ru_maxrss`` keeps a parent's)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) / 2**20
    raise ValueError(f"no {what} in /proc/self/status")
