"""What a run leaves for people: metrics and samples as JSON lines, and a picture of the curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.data.mindrecord import write_mindrecord
from mindrlhf.data.schema import Column
from mindrlhf.trainer.experience import Experience, Rollout, Scores
from mindrlhf.utils.errors import MindRLHFError
from mindrlhf.utils.files import atomic_file

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"

CURVES = (
    ("objective/scores", "score"),
    ("objective/kl", "KL to the reference (nats per sequence)"),
    ("response/length", "response length (tokens)"),
    ("loss/policy", "policy loss"),
    ("loss/value", "value loss"),
    ("policy/entropy", "entropy (nats per token)"),
)


class RunRecords:
    """Appends to ``metrics.jsonl`` and ``samples.jsonl`` in one folder; only the main rank makes one."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.metrics: list[dict[str, float]] = []

    def rewind(self, iteration: int) -> None:
        """Goes on after ``iteration``: keeps the lines up to it, drops those of a run that was cut short."""
        for name in (METRICS_FILE, SAMPLES_FILE):
            path = self.directory / name
            text = path.read_text(encoding="utf-8") if path.is_file() else ""
            lines = text.split("\n")[:-1]  # not splitlines: a sample may hold other line ends, U+2028
            kept = [line for line in lines if _iteration_of(line) <= iteration]
            with atomic_file(path) as temporary:
                temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            if name == METRICS_FILE:
                self.metrics = [json.loads(line) for line in kept]

    def add_metrics(self, metrics: Mapping[str, float]) -> None:
        """One line of ``metrics.jsonl``."""
        plain = {name: _plain(value) for name, value in metrics.items()}
        self.metrics.append(plain)
        self._append(METRICS_FILE, plain)

    def add_sample(self, sample: Mapping[str, Any]) -> None:
        """One line of ``samples.jsonl``."""
        self._append(SAMPLES_FILE, {name: _plain(value) for name, value in sample.items()})

    def plot(self) -> Path | None:
        """Draws ``curves.png`` from all metrics so far; ``None`` when there are none."""
        if not self.metrics:
            return None
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(12, 6), layout="constrained")
        FigureCanvasAgg(figure)
        iterations = [line["iteration"] for line in self.metrics]
        for index, (name, title) in enumerate(CURVES, start=1):
            axis = figure.add_subplot(2, 3, index)
            axis.plot(iterations, [line[name] for line in self.metrics], marker="o", markersize=3)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("iteration")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.ticklabel_format(useOffset=False)
            axis.grid(alpha=0.3)
        path = self.directory / "curves.png"
        with atomic_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110)
        return path

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        with (self.directory / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def summary_line(metrics: Mapping[str, float], iterations: int) -> str:
    """The few numbers a person watches, in one line."""
    return (
        f"iteration {int(metrics['iteration'])}/{iterations}  score {metrics['objective/scores']:+.4f}  "
        f"kl {metrics['objective/kl']:+.4f}  length {metrics['response/length']:.1f}  "
        f"stop rate {metrics['response/eos_rate']:.2f}  policy loss {metrics['loss/policy']:+.5f}  "
        f"value loss {metrics['loss/value']:.5f}  ratio {metrics['policy/ratio']:.4f}  "
        f"{metrics['tokens_per_second']:.0f} tok/s  {metrics['time/iteration']:.1f} s"
    )


def save_experience(
    path: Path, iteration: int, rollout: Rollout, scores: Scores, experience: Experience
) -> Path:
    """Writes a global batch of experience as MindRecord, one file an iteration.

    Args:
        path: as given; the iteration goes into the name before the suffix.
        iteration: counted from 1.
        rollout, scores, experience: of that iteration.

    Returns:
        the file; its columns are ``tokens`` and ``valid`` (T,), ``prompt_length``, ``response_length``,
        ``sample_id`` and ``score`` (1,), and (R,) ``mask``, ``logprobs``, ``ref_logprobs``, ``values``,
        ``rewards``, ``advantages``, ``returns``.
    """
    columns: dict[str, np.ndarray] = {
        "tokens": rollout.tokens,
        "valid": experience.inputs.valid,
        "prompt_length": rollout.prompt_lengths[:, None].astype(np.int32),
        "response_length": rollout.response_lengths[:, None].astype(np.int32),
        "sample_id": rollout.sample_ids[:, None].astype(np.int64),
        "score": scores.scores[:, None],
        "mask": experience.mask,
        "logprobs": rollout.logprobs,
        "ref_logprobs": scores.ref_logprobs,
        "values": experience.old_values,
        "rewards": experience.rewards,
        "advantages": experience.advantages,
        "returns": experience.returns,
    }
    schema = {name: Column(str(array.dtype), array.shape[1]) for name, array in columns.items()}
    file = path.with_name(f"{path.stem}_iteration_{iteration:06d}{path.suffix or '.mindrecord'}")
    write_mindrecord(file, schema, [columns], overwrite=True)
    return file


def choose_rows(count: int, wanted: int) -> Sequence[int]:
    """Evenly spread row numbers to show."""
    return [int(row) for row in np.linspace(0, count - 1, min(wanted, count)).round()] if wanted else []


def check_fresh(directory: Path) -> None:
    """Refuses a results directory that an earlier run has used, so that two runs cannot mix.

    Raises:
        MindRLHFError: it holds metrics.
    """
    if (directory / METRICS_FILE).exists():
        raise MindRLHFError(
            f"--save_ckpt_dir {directory} holds the results of an earlier run ({METRICS_FILE}); give another "
            "directory, or go on with --resume_from one of its iteration_NNNNNN directories"
        )


def _iteration_of(line: str) -> float:
    """Iteration of a JSON line; infinite for one that a killed run left half-written."""
    try:
        return float(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _plain(value: Any) -> Any:
    """NumPy scalars as Python's, so that JSON takes them."""
    return value.item() if isinstance(value, np.generic) else value
