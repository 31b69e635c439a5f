"""A plan as tables and sentences for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from mindrlhf.planning.memory import PARTS, MemoryPlan
from mindrlhf.planning.models import PHASES, ModelMemory
from mindrlhf.planning.report import PlanReport
from mindrlhf.planning.search import Suggestion

_PART_TITLES = {"kv_cache": "KV cache", "graphs": "compiled graphs"}
_SHOWN_FILES = 4


def gigabytes(size: float) -> str:
    """Bytes as GB of 10^9, or MB below a tenth of one."""
    if size == 0:
        return "-"
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def print_report(report: PlanReport, console: Console) -> None:
    """Prints the whole report."""
    for part in _parts(report):
        console.print(part)


def _parts(report: PlanReport) -> Iterator[RenderableType]:
    plan = report.plan
    yield Text(_headline(report), style="bold")
    yield Text(_basis(plan))
    yield _models_table(plan)
    yield _phases_table(report)
    yield from map(Text, _verdict(report))
    yield _splits_table(report)
    yield from map(Text, _sync_lines(report))
    yield Text(_strategy_line(plan))


def _headline(report: PlanReport) -> str:
    job = report.plan.job
    workers = job.infer.parallel.world_size
    text = f"{workers} worker(s) on {job.train.context.device_target}"
    if report.asked_world_size is not None:
        text += f"; the YAMLs are for {report.yaml_world_size}, so their splits were changed as listed below"
    return text


def _basis(plan: MemoryPlan) -> str:
    if plan.device.measured:
        return (
            "Computed from sizes and layouts; what the process and MindSpore's CPU kernels add was measured "
            "with MindSpore 2.9.0 (scripts/benchmark/memory.py compares both)."
        )
    return (
        "Computed from sizes, types and layouts, not measured: no such device was at hand. "
        f"{gigabytes(plan.device.process)} a rank are assumed for runtime and communication; "
        "that a backward pass holds no second set of gradients was measured on CPU."
    )


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _models_table(plan: MemoryPlan) -> Table:
    columns = ["model", "split", "parameters", "weights", "moments", "gradients", "activations", "KV cache"]
    if plan.device.host_shared:
        columns.append("kernels")
    table = _table("A rank's memory by model", columns)
    for model in plan.models:
        table.add_row(*_model_row(model, plan.device.host_shared))
    return table


def _model_row(model: ModelMemory, with_kernels: bool) -> list[str]:
    moments = gigabytes(model.moments)
    if model.host_moments:
        moments = f"{gigabytes(model.host_moments)} (host)"
    row = [
        model.name,
        str(model.mesh),
        f"{model.parameters / 1e6:,.1f} M",
        gigabytes(model.weights),
        moments,
        gigabytes(model.gradients),
        gigabytes(model.activations),
        gigabytes(model.kv_cache),
    ]
    return [*row, gigabytes(model.kernels)] if with_kernels else row


def _phases_table(report: PlanReport) -> Table:
    plan = report.plan
    parts = [part for part in PARTS if any(phase.parts[part] for phase in plan.phases)]
    titles = [_PART_TITLES.get(part, part) for part in parts]
    table = _table("A rank's memory at the fullest moment of each phase", ["phase", *titles, "total", "fits"])
    for phase in plan.phases:
        name = f"{phase.name} (peak)" if phase is plan.peak else phase.name
        fits = None if report.limit is None else phase.total <= report.limit
        cells = [gigabytes(phase.parts[part]) for part in parts]
        style = "bold" if phase is plan.peak else ""
        table.add_row(name, *cells, gigabytes(phase.total), _yes_no(fits), style=style)
    return table


def _yes_no(answer: bool | None) -> str:
    return "" if answer is None else "yes" if answer else "NO"


def _verdict(report: PlanReport) -> Iterator[str]:
    plan, peak = report.plan, report.plan.peak
    if plan.host:
        yield f"Host memory a worker: about {gigabytes(plan.host)}, the largest passing copy included."
    if report.limit is None:
        yield f"Peak: {gigabytes(peak.total)} in {peak.name}. Pass --device_memory to see whether it fits."
        return
    if report.fits:
        spare = gigabytes(report.limit - peak.total)
        yield f"Fits: {gigabytes(peak.total)} in {peak.name}, {spare} below {gigabytes(report.limit)}."
        return
    over = gigabytes(peak.total - report.limit)
    yield f"DOES NOT FIT: {gigabytes(peak.total)} in {peak.name}, {over} above {gigabytes(report.limit)}."
    if report.suggestions:
        yield "What must change, with as few changes as possible:"
        for number, suggestion in enumerate(report.suggestions, start=1):
            yield f" {number}. {_suggestion_text(suggestion)}"
    elif report.lowest is not None:
        yield (
            f"Nothing fits on these workers: with every setting at its smallest the peak is still "
            f"{gigabytes(report.lowest.peak.total)} in {report.lowest.peak.name}."
        )
        if report.larger is None:
            yield (
                "More workers do not help either: model_parallel must divide the key/value heads. "
                "Take a smaller model or shorter sequences."
            )
        else:
            workers, suggestion = report.larger
            yield f"It fits on {workers} workers, {_suggestion_text(suggestion)}"


def _suggestion_text(suggestion: Suggestion) -> str:
    peak = suggestion.plan.peak
    changes = "".join(f"\n    - {change}" for change in suggestion.changes)
    return f"{gigabytes(peak.total)} in {peak.name}:{changes}"


def _splits_table(report: PlanReport) -> Table:
    columns = ["file", "for", "dp", "mp", "weights, moments, cache", "peak of the job", "fits", ""]
    table = _table("Splits (dp: data_parallel, mp: model_parallel) that divide, all else unchanged", columns)
    table.columns[0].no_wrap = True
    for cost in report.splits:
        table.add_row(
            cost.file,
            ", ".join(cost.roles),
            str(cost.data_parallel),
            str(cost.model_parallel),
            gigabytes(cost.resident),
            gigabytes(cost.peak),
            _yes_no(cost.fits),
            "this plan" if cost.present else "",
            style="bold" if cost.present else "",
        )
    return table


def _sync_lines(report: PlanReport) -> Iterator[str]:
    traffic = report.traffic
    if not traffic.total:
        yield "A weight sync moves nothing between ranks."
        return
    yield (
        f"A weight sync brings {_range(traffic.received)} to a rank, {gigabytes(traffic.total)} in total, in "
        f"{traffic.buckets} messages between {traffic.pairs} pairs; a rank sends {_range(traffic.sent)}."
    )
    yield f"The least that any way of moving the weights could bring: {gigabytes(traffic.least)} in total."


def _range(sizes: Sequence[int]) -> str:
    least, most = gigabytes(min(sizes)), gigabytes(max(sizes))
    return most if least == most else f"{'0' if least == '-' else least} to {most}"


def _strategy_line(plan: MemoryPlan) -> str:
    files = plan.strategy_files
    shown = ", ".join(files[:_SHOWN_FILES])
    return f"--only_save_strategy True writes {len(files)} strategy files: {shown}, ... (all in --json)"


__all__ = ["PHASES", "gigabytes", "print_report"]
