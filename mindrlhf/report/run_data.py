"""Reads what a run wrote to its ``--save_ckpt_dir``: tolerant of absent files, strict about broken lines.

Runs of ``sft.py`` and ``reward_model.py`` count optimizer steps in place of iterations; they are converted to
the form of a PPO run here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mindrlhf.utils.errors import MindRLHFError
from mindrlhf.utils.files import read_json_object
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.result_files import (
    CONFIG_FILE,
    EVAL_SAMPLES_FILE,
    EVALUATIONS_FILE,
    METRICS_FILE,
    SAMPLES_FILE,
    STATE_FILE,
    checkpoint_directory,
    checkpoint_numbers,
)

FILES = (METRICS_FILE, SAMPLES_FILE, EVALUATIONS_FILE, EVAL_SAMPLES_FILE, CONFIG_FILE)
"""What is read from the directory of a run; the state is read from its newest checkpoint."""

PPO, SFT, REWARD = "ppo", "sft", "reward"
TITLES = {PPO: "PPO", SFT: "SFT", REWARD: "Reward model"}
"""Kinds of runs, for people."""

Line = dict[str, Any]

_SAMPLE_METRICS = ("score", "kl")

logger = get_logger(__name__)


class ReportError(MindRLHFError):
    """A run's files cannot be read, or the page cannot be written."""


class Series(NamedTuple):
    """One metric over a run.

    Attributes:
        iterations: (n,) int64, ascending.
        values: (n,) float64; may hold NaN and infinities, as the run wrote them.
    """

    iterations: np.ndarray
    values: np.ndarray

    @property
    def finite(self) -> Series:
        """The entries that are neither NaN nor infinite."""
        keep = np.isfinite(self.values)
        return Series(self.iterations[keep], self.values[keep])


@dataclass(frozen=True)
class Run:
    """Everything that one run wrote.

    Attributes:
        name: short name, different from those of the other runs on the page.
        directory: as given.
        metrics: one mapping per iteration, iterations ascending.
        samples: sampled responses to the training prompts.
        evaluations: like ``metrics``, of the iterations that were evaluated.
        eval_samples: responses to the evaluation prompts.
        config: content of ``config.json``; empty without one.
        state: content of the newest checkpoint's ``state.json``; empty when there is none.
        checkpoint: name of that checkpoint.
        kind: a key of :data:`TITLES`. For SFT and reward models, an iteration is an optimizer step.
        mixed_since: the first iteration that a second job has written here as well; ``None``: none has.
        left_out: lines of metrics that another job has written before the newest of the same iteration.
    """

    name: str
    directory: Path
    metrics: list[Line]
    samples: list[Line] = field(default_factory=list)
    evaluations: list[Line] = field(default_factory=list)
    eval_samples: list[Line] = field(default_factory=list)
    config: Mapping[str, Any] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    kind: str = PPO
    mixed_since: int | None = None
    left_out: int = 0

    @property
    def unit(self) -> str:
        """What the run counts."""
        return unit_of(self.kind)

    @property
    def iterations(self) -> np.ndarray:
        """(n,) int64, those of ``metrics``."""
        return np.array([line["iteration"] for line in self.metrics], dtype=np.int64)

    def series(self, name: str) -> Series:
        """A metric, of the iterations that have it."""
        return self._series.get(name) or _series([], name)

    @cached_property
    def _series(self) -> dict[str, Series]:
        return {name: _series(self.metrics, name) for name in self.metric_names()}

    def evaluation_series(self, name: str) -> Series:
        """A metric of the evaluations, of those that have it."""
        return _series(self.evaluations, name)

    def metric_names(self) -> list[str]:
        """Names of all metrics in the order in which they appear."""
        return list(dict.fromkeys(name for line in self.metrics for name in line))

    def evaluation_names(self) -> list[str]:
        """Names of all metrics of the evaluations."""
        return list(dict.fromkeys(name for line in self.evaluations for name in line if "/" in name))

    def setting(self, name: str) -> Any:
        """A PPO hyper-parameter from ``config.json``: from its ``configuration.ppo`` or, in other forms of
        the file, from the first place that has it; ``None`` when it is not recorded."""
        for section in (("configuration", "ppo"), ("ppo",), ()):
            if (value := recorded(self.config, *section, name)) is not None:
                return value
        return None


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """Reads every run.

    Raises:
        ReportError: no run is given, one is given twice, or one cannot be read.
    """
    if not directories:
        raise ReportError("no run directory given; give the --save_ckpt_dir of at least one run")
    seen: dict[Path, Path] = {}
    for directory in directories:
        if directory.resolve() in seen:
            raise ReportError(f"{directory} is given twice; give each run once")
        seen[directory.resolve()] = directory
    names = short_names(list(seen))
    runs = [read_run(path, name) for path, name in zip(directories, names, strict=True)]
    for run in runs[1:]:
        if run.kind != runs[0].kind:
            raise ReportError(
                f"{runs[0].directory} is a run of {TITLES[runs[0].kind]}, {run.directory} one of "
                f"{TITLES[run.kind]}; give runs of one kind"
            )
    return runs


def read_run(directory: Path, name: str | None = None) -> Run:
    """Reads one run; where two jobs have written, the newest line of each iteration.

    Raises:
        ReportError: the directory holds no metrics, or a file of it is broken; names file and line.
    """
    metrics_file = directory / METRICS_FILE
    config = _read_object(directory / CONFIG_FILE)
    if not metrics_file.is_file() and not config:
        raise ReportError(
            f"{directory}: no {METRICS_FILE}, so no results of a run.{_did_you_mean(directory)}"
        )
    lines = read_lines(metrics_file, lambda name: True)
    mixed_since, metrics = _newest(metrics_file, lines)
    _, evaluations = _newest(
        directory / EVALUATIONS_FILE, read_lines(directory / EVALUATIONS_FILE, lambda name: "/" in name)
    )
    kind = kind_of([*metrics, *evaluations], config)
    if kind != PPO:
        metrics, evaluations = _with_iterations(metrics), _with_iterations(evaluations)
    if not metrics:
        raise ReportError(
            f"{metrics_file} has no line: the run has finished no {unit_of(kind)} here yet; try again later, "
            "or give the directory that it was resumed from"
        )
    unit = unit_of(kind)
    named = (checkpoint_directory(directory, number, unit) for number in checkpoint_numbers(directory, unit))
    checkpoint = next((path for path in named if (path / STATE_FILE).is_file()), None)
    return Run(
        name=name or directory.resolve().name,
        directory=directory,
        metrics=metrics,
        samples=read_lines(directory / SAMPLES_FILE, _SAMPLE_METRICS.__contains__),
        evaluations=evaluations,
        eval_samples=read_lines(directory / EVAL_SAMPLES_FILE, _SAMPLE_METRICS.__contains__),
        config=config,
        state=_read_object(checkpoint / STATE_FILE) if checkpoint else {},
        checkpoint=checkpoint.name if checkpoint else None,
        kind=kind,
        mixed_since=mixed_since,
        left_out=len(lines) - len(metrics),
    )


def read_lines(path: Path, is_metric: Callable[[str], bool]) -> list[Line]:
    """The JSON objects of a JSON-lines file; none when there is no such file.

    A last line that has no line end and is not JSON is being written just now, or its run was killed: it is
    left out with a log line. Everything else that is broken is an error.

    Args:
        path: the file.
        is_metric: whether the value of a name must be a number or null.

    Raises:
        ReportError: names the file and the number of the first broken line.
    """
    text = _read_text(path)
    if text is None:
        return []
    found: list[Line] = []
    *whole, rest = text.split("\n")  # not splitlines: a sample may hold other line ends, U+2028
    for number, line in enumerate([*whole, rest] if rest else whole, start=1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number > len(whole):
                logger.warning("%s:%d is half written and left out", path, number)
                break
            raise ReportError(
                f"{path}:{number}: not JSON ({error}); remove the line, or give another run"
            ) from None
        fault = _fault(value, is_metric)
        if fault is not None:
            raise ReportError(f"{path}:{number}: {fault}")
        found.append(value)
    return found


def unit_of(kind: str) -> str:
    """What a run of a kind counts."""
    return "iteration" if kind == PPO else "step"


def kind_of(lines: Sequence[Line], config: Mapping[str, Any]) -> str:
    """The kind of a run, from ``config.json`` if recorded there, else from its metrics."""
    if not any(_unit(line) == "step" for line in lines):
        return PPO
    stage = recorded(config, "configuration", "stage")
    if stage in (SFT, REWARD):
        return str(stage)
    return REWARD if any("train/accuracy" in line for line in lines) else SFT


def _with_iterations(lines: Sequence[Line]) -> list[Line]:
    """Lines of SFT or reward modelling with their steps as iterations."""
    renamed = {"step": "iteration", "time/step": "time/iteration"}
    return [{renamed.get(name, name): value for name, value in line.items()} for line in lines]


def recorded(config: Mapping[str, Any], *keys: str) -> Any:
    """The value below nested keys of ``config.json``, ``None`` when absent."""
    found: Any = config
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def short_names(directories: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell them apart, ``a/ppo`` and ``b/ppo``; the last part for one."""
    for length in range(1, max(len(path.parts) for path in directories) + 1):
        names = [str(Path(*path.parts[-length:])) for path in directories]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in directories]


def _series(lines: Sequence[Line], name: str) -> Series:
    pairs = [(line["iteration"], line[name]) for line in lines if line.get(name) is not None]
    return Series(
        np.array([iteration for iteration, _ in pairs], dtype=np.int64),
        np.array([value for _, value in pairs], dtype=np.float64),
    )


def _fault(line: Any, is_metric: Callable[[str], bool]) -> str | None:
    """What is wrong with a line."""
    if not isinstance(line, dict):
        return f"expected a JSON object, found {_short(line)}"
    unit = _unit(line)
    if unit not in line:
        return "no iteration"
    count = line[unit]
    if not _is_number(count) or not (0 <= count < 2**53) or int(count) != count:
        return f"{unit} is {_short(count)}, not a whole number"
    wrong = (n for n in line if is_metric(n) and line[n] is not None and not _is_number(line[n]))
    return next((f"{name} is {_short(line[name])}, not a number" for name in wrong), None)


def _unit(line: Mapping[str, Any]) -> str:
    """The name of what a line counts."""
    return "step" if "step" in line and "iteration" not in line else "iteration"


def _newest(path: Path, lines: Sequence[Line]) -> tuple[int | None, list[Line]]:
    """The last line of each iteration, ascending, and the first iteration that is out of order."""
    late = []
    for number, (before, after) in enumerate(pairwise(lines), start=2):
        old, new = _unit(before), _unit(after)
        if old != new:
            raise ReportError(
                f"{path}:{number}: {new} {after[new]} after {old} {before[old]}; "
                "runs of two kinds have written here: give each run its own --save_ckpt_dir"
            )
        if after[new] <= before[old]:
            late.append(after[new])
    newest = {line[_unit(line)]: line for line in lines}
    return min(late, default=None), [newest[count] for count in sorted(newest)]


def _is_number(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**1023  # as a float does
    return isinstance(value, float)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:40] + "..."


def _read_object(path: Path) -> Line:
    return read_json_object(path, ReportError, "fix or remove the file") if path.exists() else {}


def _read_text(path: Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ReportError(f"{path}:{line}: not UTF-8 ({error.reason}); fix or remove the line") from None
    except OSError as error:
        raise ReportError(f"{path}: cannot be read ({error.strerror})") from None


def _did_you_mean(directory: Path) -> str:
    if not directory.is_dir():
        return " There is no such directory; give the --save_ckpt_dir of a run"
    inside = sorted(path.parent for path in directory.glob(f"*/{METRICS_FILE}"))
    if inside:
        return f" Did you mean {' or '.join(str(path) for path in inside[:3])}?"
    return " Give the --save_ckpt_dir of a run"
