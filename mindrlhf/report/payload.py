"""The data that the page's scripts draw from, as plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mindrlhf.report.catalogue import TOTAL_TIME, groups_of, is_phase
from mindrlhf.report.findings import Finding
from mindrlhf.report.markup import plain_number
from mindrlhf.report.reading import Line, Run, Series
from mindrlhf.report.stages import unit_of
from mindrlhf.report.thinning import Stretches, fit_samples, stretches_of, text_of

SAMPLE_BYTES = 8_000_000
"""Budget of all training samples of the page."""
EVAL_SAMPLE_BYTES = 3_000_000
"""Budget of all evaluation samples of the page."""
REST = "time/other"
"""What an iteration takes beside its phases."""


def make_payload(runs: Sequence[Run], findings: Sequence[Sequence[Finding]]) -> dict[str, Any]:
    """Everything the scripts need.

    Args:
        runs: one or several.
        findings: those of each run.
    """
    names = dict.fromkeys(name for run in runs for name in drawn_metrics(run))
    prompts: dict[str, int] = {}
    kind = runs[0].kind
    evaluated = {name for run in runs for line in run.evaluations for name in line}
    return {
        "unit": unit_of(kind),
        "runs": [_run(run, found) for run, found in zip(runs, findings, strict=True)],
        "groups": [
            {"title": title, "charts": [chart._asdict() for chart in charts]}
            for title, charts in groups_of(names, kind, evaluated)
        ],
        "samples": _samples([run.samples for run in runs], prompts, SAMPLE_BYTES),
        "evalSamples": _samples([run.eval_samples for run in runs], prompts, EVAL_SAMPLE_BYTES),
        "prompts": list(prompts),
    }


def drawn_metrics(run: Run) -> list[str]:
    """Metrics of a run but for those that are 0 from end to end, such as a loss that is off."""
    return [name for name in run.metric_names() if name == "iteration" or run.series(name).values.any()]


def phases(run: Run) -> dict[str, Series]:
    """Seconds of each phase of an iteration, and of what is left of it, by metric name."""
    found = {name: run.series(name) for name in drawn_metrics(run) if is_phase(name)}
    total = run.series(TOTAL_TIME)
    if not found or not len(total.values):
        return found
    spent = [sum(line.get(name) or 0.0 for name in found) for line in run.metrics if line.get(TOTAL_TIME)]
    all_of_it = [line[TOTAL_TIME] for line in run.metrics if line.get(TOTAL_TIME)]
    iterations = np.array([line["iteration"] for line in run.metrics if line.get(TOTAL_TIME)], dtype=np.int64)
    found[REST] = Series(iterations, np.maximum(np.array(all_of_it) - np.array(spent), 0.0))
    return found


def _run(run: Run, findings: Sequence[Finding]) -> dict[str, Any]:
    stretches: Stretches = stretches_of(run.iterations)
    times = phases(run)
    series = {name: run.series(name) for name in drawn_metrics(run) if name != "iteration"} | times
    evaluated = dict.fromkeys(name for line in run.evaluations for name in line if name.startswith("eval/"))
    return {
        "name": run.name,
        "iterations": len(run.metrics),
        "first": stretches.first.tolist(),
        "last": stretches.last.tolist(),
        "curves": {name: stretches.curve(values) for name, values in series.items()},
        "phases": list(times),
        "evaluations": {name: _points(run.evaluation_series(name)) for name in evaluated},
        "marks": [
            {"metric": found.metric, "since": found.since, "threshold": found.threshold, "level": found.level}
            for found in findings
        ],
        "sampleCount": len(run.samples),
        "evalSampleCount": len(run.eval_samples),
    }


def _points(series: Series) -> dict[str, Any]:
    """Evaluations are few, so all are kept but for those that are no number."""
    finite = np.isfinite(series.values)
    return {
        "x": series.iterations[finite].tolist(),
        "y": [plain_number(value) for value in series.values[finite].tolist()],
    }


def _samples(by_run: Sequence[Sequence[Line]], prompts: dict[str, int], budget: int) -> dict[str, Any]:
    """Rows ``[run, iteration, prompt number, reply, score, KL]`` of all runs, in their order."""
    rows: list[list[Any]] = []
    most = 0
    for run, samples in enumerate(by_run):
        kept, length = fit_samples(samples, budget // len(by_run))
        most = max(most, length)
        rows += [_row(run, sample, prompts) for sample in kept]
    return {"rows": rows, "longest": most}


def _row(run: int, sample: Mapping[str, Any], prompts: dict[str, int]) -> list[Any]:
    prompt = text_of(sample.get("prompt"))
    return [
        run,
        int(sample["iteration"]),
        prompts.setdefault(prompt, len(prompts)),
        text_of(sample.get("response")),
        plain_number(sample.get("score")),
        plain_number(sample.get("kl")),
    ]
