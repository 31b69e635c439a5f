"""What a run leaves for people: metrics and samples as JSON lines, and a picture of the curves."""

from __future__ import annotations

import json
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.data.mindrecord import Column, write_mindrecord
from mindrlhf.data.tokenizer import Tokenizer
from mindrlhf.trainer.curves import draw_curves
from mindrlhf.trainer.experience import Experience, Rollout, Scores
from mindrlhf.trainer.trackers.group import Trackers
from mindrlhf.utils.errors import MindRLHFError
from mindrlhf.utils.files import atomic_file
from mindrlhf.utils.logging import get_logger

logger = get_logger(__name__)

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
EVAL_SAMPLES_FILE = "eval_samples.jsonl"


class RunRecords:
    """Appends to the JSON lines of one folder; only the main rank makes one.

    Args:
        directory: made when missing.
        trackers: told of all that is added.

    Attributes:
        metrics, evaluations, eval_samples: the lines of ``metrics.jsonl``, ``evaluations.jsonl`` and
            ``eval_samples.jsonl``; those of ``samples.jsonl`` are not kept.
    """

    def __init__(self, directory: Path, trackers: Trackers | None = None) -> None:
        self.directory = directory
        self.trackers = Trackers() if trackers is None else trackers
        self._curves_timer = RedrawTimer()
        directory.mkdir(parents=True, exist_ok=True)
        self.metrics: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.eval_samples: list[dict[str, Any]] = []

    def rewind(self, iteration: int) -> None:
        """Goes on after an iteration or step: keeps lines up to it, drops those of a run cut short."""
        done = partial(operator.ge, iteration)
        self._rewind(SAMPLES_FILE, done)
        self.metrics = self._rewind(METRICS_FILE, done)
        self.evaluations = self._rewind(EVALUATIONS_FILE, done)
        # Samples without their evaluation's line are of one that was cut short, and comes again.
        evaluated = {line["iteration"] for line in self.evaluations}
        self.eval_samples = self._rewind(EVAL_SAMPLES_FILE, evaluated.__contains__)

    def add_metrics(self, metrics: Mapping[str, float]) -> None:
        """One line of ``metrics.jsonl``."""
        line = self._append(METRICS_FILE, metrics)
        self.metrics.append(line)
        self.trackers.scalars(_step_of(line), _scalars(line))

    def add_samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Lines of ``samples.jsonl``, all of one iteration."""
        lines = [self._append(SAMPLES_FILE, sample) for sample in samples]
        if lines:
            self.trackers.samples(_step_of(lines[0]), "samples", lines)

    def add_evaluation(self, evaluation: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
        """The samples' lines of ``eval_samples.jsonl``, then the line of ``evaluations.jsonl``."""
        lines = [self._append(EVAL_SAMPLES_FILE, sample) for sample in samples]
        self.eval_samples += lines
        line = self._append(EVALUATIONS_FILE, evaluation)
        self.evaluations.append(line)
        self.trackers.scalars(_step_of(line), _scalars(line))
        self.trackers.samples(_step_of(line), "held-out samples", lines)

    def redraw(self) -> None:
        """Draws ``curves.png`` anew when that costs next to nothing of the time since the last drawing.

        A picture that cannot be drawn is worth a warning, not the training.
        """
        if not self._curves_timer.is_due():
            return
        try:
            with self._curves_timer:
                self.plot()
        except Exception as error:  # matplotlib's, or of a full disk
            logger.warning("curves.png could not be drawn: %s: %s", type(error).__name__, error)

    def plot(self) -> Path | None:
        """Draws ``curves.png`` from all metrics so far; ``None`` when there are none."""
        if not self.metrics:
            return None
        path = self.directory / "curves.png"
        draw_curves(path, self.metrics, self.evaluations)
        return path

    def _append(self, name: str, line: Mapping[str, Any]) -> dict[str, Any]:
        plain = {key: _plain(value) for key, value in line.items()}
        with (self.directory / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain, ensure_ascii=False) + "\n")
        return plain

    def _rewind(self, name: str, stays: Callable[[float], bool]) -> list[dict[str, Any]]:
        """Takes the lines of other iterations out of one file and returns those that stay."""
        path = self.directory / name
        if not path.is_file():
            return []
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # not splitlines: a sample may hold U+2028
        kept = [line for line in lines if stays(_iteration_of(line))]
        with atomic_file(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        return [json.loads(line) for line in kept]


def summary_line(metrics: Mapping[str, float], iterations: int) -> str:
    """The few numbers a person watches, in one line."""
    return (
        f"iteration {int(metrics['iteration'])}/{iterations}  score {metrics['objective/scores']:+.4f}  "
        f"kl {metrics['objective/kl']:+.4f}  length {metrics['response/length']:.1f}  "
        f"stop rate {metrics['response/eos_rate']:.2f}  policy loss {metrics['loss/policy']:+.5f}  "
        f"value loss {metrics['loss/value']:.5f}  ratio {metrics['policy/ratio']:.4f}  "
        f"{metrics['tokens_per_second']:.0f} tok/s  {metrics['time/iteration']:.1f} s"
    )


def sample_texts(
    rollout: Rollout, row: int, tokenizer: Tokenizer | None, *, skip_special: bool = False
) -> dict[str, Any]:
    """``sample_id``, ``prompt`` and ``response`` of one row, as text when there is a tokenizer, else ids.

    Args:
        rollout: has the row.
        row: which.
        tokenizer: decodes.
        skip_special: leave control tokens out of the response; the prompt keeps its markup.
    """
    columns = rollout.tokens.shape[1] - rollout.logprobs.shape[1]
    tokens = rollout.tokens[row].tolist()
    prompt: Any = tokens[columns - rollout.prompt_lengths[row] : columns]
    response: Any = tokens[columns : columns + rollout.response_lengths[row]]
    if tokenizer is not None:
        prompt = tokenizer.decode(prompt)
        response = tokenizer.decode(response, skip_special=skip_special)
    return {"sample_id": rollout.sample_ids[row], "prompt": prompt, "response": response}


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
        MindRLHFError: it holds metrics or evaluations.
    """
    for name in (METRICS_FILE, EVALUATIONS_FILE, EVAL_SAMPLES_FILE):
        if (directory / name).exists():
            raise MindRLHFError(
                f"--save_ckpt_dir {directory} holds the results of an earlier run ({name}); give another "
                "directory, or go on with --resume_training True or --resume_from one of its iteration_NNNNNN"
            )


class RedrawTimer:
    """When it is time to draw again: at most about 2 % of a run goes into pictures of its curves."""

    least_seconds = 30.0
    share = 0.02

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._cost = 0.0
        self._entered = 0.0

    def is_due(self) -> bool:
        """Whether the time since the last drawing is long against what it took."""
        return time.monotonic() - self._last >= max(self.least_seconds, self._cost / self.share)

    def __enter__(self) -> None:
        self._entered = time.monotonic()

    def __exit__(self, *exc_info: object) -> None:
        self._last = time.monotonic()
        self._cost = self._last - self._entered


def _step_of(line: Mapping[str, Any]) -> int:
    """An iteration of PPO, an optimizer step of a stage before it."""
    return int(line["iteration"] if "iteration" in line else line["step"])


def _scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line other than its step."""
    return {
        name: float(value)
        for name, value in line.items()
        if name not in ("iteration", "step") and isinstance(value, (int, float))
    }


def _iteration_of(line: str) -> float:
    """Iteration or step of a JSON line; infinite for one that a killed run left half-written."""
    try:
        return float(_step_of(json.loads(line)))
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _plain(value: Any) -> Any:
    """NumPy scalars as Python's, so that JSON takes them."""
    return value.item() if isinstance(value, np.generic) else value
