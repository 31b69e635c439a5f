"""The recorder owns every file of results that a run writes, and passes the same to the trackers.

======================================  ==========================================================
``config.json``                         resolved configuration, versions, machine
``metrics.jsonl``                       one line per step
``samples.jsonl``                       prompts and responses of each step
``evaluations.jsonl``                   one line per evaluation on held-out data
``eval_samples.jsonl``                  responses to held-out prompts
``skipped_updates.jsonl``               one line per optimizer step that was skipped
``curves.png``                          drawn from the metrics so far
``evaluation_summary.json``,            the first evaluation against the last
``before_after.md``
``--save_data_file``                    experience of each step as MindRecord
======================================  ==========================================================
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.data.mindrecord import Column as RecordColumn
from mindrlhf.data.mindrecord import step_path, write_mindrecord
from mindrlhf.trainer.before_after import summarize, summary_sentence, write_before_after
from mindrlhf.trainer.curves import draw_curves
from mindrlhf.trainer.recipe import EvaluationResult, HeldOut, Schedule, StepResult
from mindrlhf.trainer.shown_metrics import ShownMetrics
from mindrlhf.trainer.trackers.tracker import RunStart, Trackers
from mindrlhf.utils.errors import MindRLHFError, inline_list
from mindrlhf.utils.files import atomic_file
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.provenance import read_provenance, recipe_of, write_provenance
from mindrlhf.utils.result_files import (
    CONFIG_FILE,
    CURVES_FILE,
    EVAL_SAMPLES_FILE,
    EVALUATIONS_FILE,
    METRICS_FILE,
    SAMPLES_FILE,
    SKIPPED_FILE,
    SUMMARY_FILE,
    TABLE_FILE,
    checkpoint_directory,
    checkpoint_numbers,
    set_aside,
)

logger = get_logger(__name__)

_FILES = (METRICS_FILE, SAMPLES_FILE, EVALUATIONS_FILE, EVAL_SAMPLES_FILE, SKIPPED_FILE, CURVES_FILE,
          SUMMARY_FILE, TABLE_FILE)  # fmt: skip


class Recorder:
    """Appends to the files of one directory; only the main rank has one.

    Args:
        directory: made by :meth:`begin` when missing.
        unit: what a step is called; the key of its number in every line.
        trackers: receive everything that is added.
        experience_file: where the experience of each step goes; the step's number is added to its name.

    Attributes:
        metrics, evaluations, eval_samples: the lines of ``metrics.jsonl``, ``evaluations.jsonl`` and
            ``eval_samples.jsonl``; those of the other files are not kept in memory.
    """

    def __init__(
        self,
        directory: Path,
        unit: str,
        trackers: Trackers | None = None,
        experience_file: Path | None = None,
    ) -> None:
        self.directory, self.unit = directory, unit
        self.trackers = Trackers() if trackers is None else trackers
        self._experience_file = experience_file
        self._shown = ShownMetrics()
        self._redraw_timer = RedrawTimer()
        self.metrics: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.eval_samples: list[dict[str, Any]] = []

    def rewind(self, step: int) -> None:
        """Keeps the lines up to a step, and drops later ones, which the run writes again."""
        self._rewind(SAMPLES_FILE, step)
        self._rewind(SKIPPED_FILE, step)
        self.metrics = self._rewind(METRICS_FILE, step)
        self.evaluations = self._rewind(EVALUATIONS_FILE, step)
        # Samples without an evaluation line belong to an evaluation that was cut short and will be repeated.
        evaluated = {line[self.unit] for line in self.evaluations}
        self.eval_samples = self._rewind(EVAL_SAMPLES_FILE, step, evaluated)

    def set_aside(self) -> None:
        """Renames the files of an earlier run that has left no checkpoint to continue from."""
        for path in (self.directory / name for name in _FILES):
            if path.is_file():
                logger.warning("%s has no checkpoint to it: it is now %s", path, set_aside(path).name)

    def begin(self, record: Mapping[str, Any], step: int, shown: ShownMetrics) -> None:
        """Writes ``config.json`` and opens the trackers of a run that starts or is resumed.

        Args:
            record: the content of ``config.json``.
            step: steps that are done.
            shown: which metrics are shown.
        """
        self._shown = shown
        self.directory.mkdir(parents=True, exist_ok=True)
        write_provenance(self.directory, record)
        is_resumed = bool(self.metrics or self.evaluations)
        self.trackers.start(RunStart(self.directory, record, step + 1 if is_resumed else 0, is_resumed))

    def add_step(self, step: int, result: StepResult, times: Mapping[str, float], schedule: Schedule) -> None:
        """Records the results of a step, and logs one line unless a console shows it.

        Args:
            step: its number, counted from 1.
            result: of the step.
            times: seconds and speeds.
            schedule: of the run.
        """
        self.add_metrics({self.unit: step, **result.metrics, **times})
        self.add_samples([{self.unit: step, **sample} for sample in result.samples])
        for skipped in result.skipped:
            self._append(SKIPPED_FILE, {self.unit: step, **skipped})
            where = f"minibatch {skipped['minibatch']}" if skipped["minibatch"] else "the whole rollout"
            logger.warning(
                "update skipped: %s %d, %s, %s: %s; samples %s",
                *(self.unit, step, where, skipped["model"], skipped["cause"]),
                inline_list(skipped["sample_ids"]),
            )
        if result.histograms:
            self.trackers.histograms(step, result.histograms)
        if self._experience_file is not None and result.experience is not None:
            write_experience(self._experience_file, self.unit, step, result.experience)
        if not self.trackers.show_metrics and (step % schedule.log_interval == 0 or step == schedule.total):
            summary = summary_line(self.metrics[-1], self._shown.summary)
            logger.info("%s %d/%d  %s", self.unit, step, schedule.total, summary)
        self._redraw()

    def add_metrics(self, metrics: Mapping[str, Any]) -> None:
        """One line of ``metrics.jsonl``."""
        line = self._append(METRICS_FILE, metrics)
        self.metrics.append(line)
        self.trackers.scalars(line[self.unit], self._scalars(line))

    def add_samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Lines of ``samples.jsonl``, all of one step."""
        lines = [self._append(SAMPLES_FILE, sample) for sample in samples]
        if lines:
            self.trackers.samples(lines[0][self.unit], "samples", lines)

    def add_evaluation(self, step: int, result: EvaluationResult, held_out: HeldOut, seconds: float) -> None:
        """The samples' lines of ``eval_samples.jsonl``, then the line of ``evaluations.jsonl``.

        Args:
            step: steps that were done.
            result: of the evaluation.
            held_out: what was evaluated on.
            seconds: its duration.
        """
        lines = [self._append(EVAL_SAMPLES_FILE, {self.unit: step, **sample}) for sample in result.samples]
        self.eval_samples += lines
        line = self._append(
            EVALUATIONS_FILE,
            {
                self.unit: step,
                **result.metrics,
                held_out.unit: held_out.size,
                "held_out_digest": held_out.digest,
                "seconds": seconds,
            },
        )
        self.evaluations.append(line)
        self.trackers.scalars(step, self._scalars(line))
        self.trackers.samples(step, "held-out samples", lines)
        summary = summary_line(line, self._shown.evaluation)
        logger.info("held-out after %s %d: %s  %.1f s", self.unit, step, summary, seconds)

    def has_other_evaluations(self, held_out: HeldOut, step: int) -> bool:
        """Whether ``evaluations.jsonl`` has an evaluation of other held-out data, up to a step."""
        lines = [json.loads(line) for at, line in self._lines(EVALUATIONS_FILE) if at <= step]
        return any(line.get("held_out_digest") != held_out.digest for line in lines)

    def lacks_evaluation(self, step: int, *, is_time: bool) -> bool:
        """Whether the evaluation after ``step`` is due: at its interval, or because it is the first."""
        is_new = all(line[self.unit] != step for line in self.evaluations)
        return is_new and (is_time or not self.evaluations)

    def finish(self) -> None:
        """Draws the curves for the last time; writes and logs the first evaluation against the last."""
        try:
            if self._shown.before_after and self.evaluations:
                table = write_before_after(self.directory, self.evaluations, self.eval_samples)
                if table:
                    logger.info("held-out samples, scores in brackets:\n%s", table)
                logger.info("%s", summary_sentence(summarize(self.evaluations)))
            if picture := self.plot():
                logger.info("curves: %s", picture)
        except Exception as error:  # the weights are still to be written: a picture must not cost them
            logger.warning("the last summary could not be written: %s: %s", type(error).__name__, error)

    def plot(self) -> Path | None:
        """Draws ``curves.png`` from all metrics so far; ``None`` when there are none."""
        if not self.metrics:
            return None
        path = self.directory / CURVES_FILE
        draw_curves(path, self.unit, self._shown.curves, self.metrics, self.evaluations)
        return path

    def _redraw(self) -> None:
        """Draws ``curves.png`` when that takes little compared with the time since the last drawing.

        A plot that cannot be drawn causes a warning and does not stop training.
        """
        if not self._redraw_timer.is_due():
            return
        try:
            with self._redraw_timer:
                self.plot()
        except Exception as error:  # matplotlib's, or of a full disk
            logger.warning("%s could not be drawn: %s: %s", CURVES_FILE, type(error).__name__, error)

    def _scalars(self, line: Mapping[str, Any]) -> dict[str, float]:
        """The numbers of a line other than its step."""
        return {
            name: float(value)
            for name, value in line.items()
            if name != self.unit and isinstance(value, (int, float))
        }

    def _append(self, name: str, line: Mapping[str, Any]) -> dict[str, Any]:
        plain = {key: _plain(value) for key, value in line.items()}
        path = self.directory / name
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(plain, ensure_ascii=False) + "\n")
        except OSError as error:
            raise MindRLHFError(
                f"cannot write {path}: {error.strerror}; make it writable, or free space, and "
                "resume from the last checkpoint with --resume_training True"
            ) from error
        return plain

    def _rewind(self, name: str, step: int, only: Container[float] | None = None) -> list[dict[str, Any]]:
        """Removes the lines after a step, or of steps not in ``only``, from one file; returns the rest."""
        path = self.directory / name
        if not path.is_file():
            return []
        steps = self._lines(name)
        if damaged := sum(math.isinf(at) for at, _ in steps):
            logger.warning("%s: %d damaged line(s) are left out from here on", path, damaged)
        kept = [line for at, line in steps if at <= step and (only is None or at in only)]
        if dropped := len(steps) - damaged - len(kept):
            logger.info("%s: %d line(s) after %s %d dropped", path, dropped, self.unit, step)
        with atomic_file(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        return [json.loads(line) for line in kept]

    def _lines(self, name: str) -> list[tuple[float, str]]:
        """The whole lines of a file with their steps; none when it does not exist."""
        path = self.directory / name
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        lines = text.split("\n")[:-1]  # not splitlines: a sample may hold U+2028
        return [(self._step_of(line), line) for line in lines]

    def _step_of(self, line: str) -> float:
        """Step of a JSON line; infinite for one that is damaged."""
        try:
            content = json.loads(line)
            if "held_out_digest" in content and not any(name.startswith("eval/") for name in content):
                return math.inf  # an evaluation without a result
            return float(content[self.unit])
        except (ValueError, KeyError, TypeError):
            return math.inf


def summary_line(metrics: Mapping[str, float], shown: Sequence[tuple[str, str]]) -> str:
    """The metrics of ``shown`` in one line; see :class:`ShownMetrics`."""
    return "  ".join(template.format(metrics[name]) for name, template in shown if name in metrics)


def write_experience(path: Path, unit: str, step: int, columns: Mapping[str, np.ndarray]) -> Path:
    """Writes the experience of a step as MindRecord, one file per step; returns the file.

    Args:
        path: as given; unit and step go into the name before the suffix.
        unit: what a step is called.
        step: counted from 1.
        columns: name -> (B, n) of the global batch.
    """
    schema = {name: RecordColumn(str(array.dtype), array.shape[1]) for name, array in columns.items()}
    file = step_path(path, unit, f"{step:06d}")
    write_mindrecord(file, schema, [dict(columns)], overwrite=True)  # as was checked when the run began
    return file


def check_results(directory: Path, unit: str, recipe: str, *also: str, continues: bool) -> None:
    """Refuses a results directory of another run, so that two runs cannot mix.

    Args:
        directory: ``--save_ckpt_dir``.
        unit: what a step is called.
        recipe: of the job, as its ``config.json`` has it.
        also: further names that an earlier run writes.
        continues: whether the flags ask to go on with what is there.

    Raises:
        MindRLHFError: it holds results that this run does not continue.
    """
    checkpoints = [checkpoint_directory(directory, n, unit).name for n in checkpoint_numbers(directory, unit)]
    found = [name for name in (*_FILES, *also, *checkpoints) if (directory / name).exists()]
    path = directory / CONFIG_FILE  # that of a run which ended before its first step is replaced
    record = read_provenance(path)
    if path.exists() and not record:
        raise MindRLHFError(
            f"--save_ckpt_dir {directory} holds a {CONFIG_FILE} that is not of a run; give another directory"
        )
    if found and not continues:
        raise MindRLHFError(
            f"--save_ckpt_dir {directory} holds the results of an earlier run ({found[0]}); give another "
            "directory, or continue with --resume_training True or --resume_from one of its own "
            f"{unit}_NNNNNN"
        )
    other = recipe_of(record) if record else "" if checkpoints else "a run without its config.json"
    if found and other not in ("", recipe):
        raise MindRLHFError(
            f"--save_ckpt_dir {directory} holds the results of {other} ({found[0]}), which {recipe} cannot "
            "continue; give another directory"
        )


class RedrawTimer:
    """When to draw again: drawing curves takes at most about 2 % of a run."""

    least_seconds = 30.0
    share = 0.02

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._cost = 0.0
        self._entered = 0.0

    def is_due(self) -> bool:
        """Whether the time since the last drawing is long compared with its duration."""
        return time.monotonic() - self._last >= max(self.least_seconds, self._cost / self.share)

    def __enter__(self) -> None:
        self._entered = time.monotonic()

    def __exit__(self, *exc_info: object) -> None:
        self._last = time.monotonic()
        self._cost = self._last - self._entered


def _plain(value: Any) -> Any:
    """NumPy scalars as Python's, so that JSON takes them."""
    return value.item() if isinstance(value, np.generic) else value
