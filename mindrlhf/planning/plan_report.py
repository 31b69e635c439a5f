"""A plan and its report: as data, and as tables and sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from mindrlhf.configs.faults import shown
from mindrlhf.configs.keys import JobConfig
from mindrlhf.planning.job_memory import PARTS, MemoryPlan, ModelMemory, plan_memory
from mindrlhf.planning.remedies import Suggestion, lowest_peak, smallest_changes, smallest_world
from mindrlhf.planning.splits import common_splits, runs_of, with_splits
from mindrlhf.planning.traffic import SyncTraffic, plan_sync
from mindrlhf.utils.errors import ConfigError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class SplitCost:
    """One split of one YAML file, with everything else unchanged.

    Attributes:
        file: its name.
        roles: the models that it splits.
        data_parallel, model_parallel: the split.
        present: whether it is the split of the plan.
        resident: bytes per rank of its models' weights, moments and caches.
        peak: bytes per rank of the whole job.
        fits: whether that fits; ``None`` without a limit.
    """

    file: str
    roles: tuple[str, ...]
    data_parallel: int
    model_parallel: int
    present: bool
    resident: int
    peak: int
    fits: bool | None


@dataclass(frozen=True)
class PlanReport:
    """What scripts/plan.py reports.

    Attributes:
        plan: memory of the job as it is planned.
        traffic: of a weight sync.
        limit: bytes per rank may take; ``None`` when none is given.
        asked_world_size: number of workers requested when it differs from the YAMLs'.
        yaml_world_size: workers of the YAMLs.
        splits: every split that divides, with its cost.
        suggestions: ways to fit when the plan does not.
        lowest: the lowest peak any of the settings can reach, when that does not fit either.
        larger: a larger number of workers on which the job fits, and how.
    """

    plan: MemoryPlan
    traffic: SyncTraffic
    limit: int | None
    asked_world_size: int | None
    yaml_world_size: int
    splits: tuple[SplitCost, ...]
    suggestions: tuple[Suggestion, ...] = ()
    lowest: MemoryPlan | None = None
    larger: tuple[int, Suggestion] | None = None

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the limit; ``None`` without one."""
        return None if self.limit is None else self.plan.peak.total <= self.limit


def parse_bytes(text: str, where: str = "--device_memory") -> int:
    """``64GB`` (10^9), ``64GiB`` (2^30) and the like as bytes.

    Raises:
        ConfigError: anything else, or nothing at all.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)\s*", text, re.IGNORECASE)
    if match is None or (size := int(float(match[1]) * _UNITS[match[2].upper()])) <= 0:
        remedy = "write a number and a unit, such as 64GB or 60GiB"
        raise ConfigError([f"{where}: not a size ({shown(text)}) - {remedy}"])
    return size


def memory_limit(job: JobConfig, device_memory: int | None) -> int | None:
    """Bytes that a rank may take: ``device_memory``, and on a device what ``max_device_memory`` allows.

    MindSpore counts its GB as 2^30, and keeps weights and pool within them but not the runtime.
    """
    context = job.train.context
    limits = [] if device_memory is None else [device_memory]
    if context.device_target != "CPU" and context.max_device_memory:
        where = f"{job.train.path}: context.max_device_memory"
        pool = parse_bytes(re.sub(r"(?i)gb\s*$", "GiB", context.max_device_memory), where)
        limits.append(pool + plan_memory(job).device.process)
    return min(limits, default=None)


def make_report(
    job: JobConfig, *, limit: int | None, with_reward_model: bool = True, yaml_job: JobConfig | None = None
) -> PlanReport:
    """Plans a job and, when it does not fit, looks for what must change.

    Args:
        job: as it is to run.
        limit: bytes per rank may take.
        with_reward_model: False when rewards come from a function alone.
        yaml_job: as the YAMLs have it, when ``job`` is over another number of workers.
    """
    plan = plan_memory(job, with_reward_model=with_reward_model)
    world_size = job.infer.parallel.world_size
    yaml_world_size = (yaml_job or job).infer.parallel.world_size
    asked = world_size if world_size != yaml_world_size else None
    splits = tuple(_split_costs(job, limit, with_reward_model))
    report = PlanReport(plan, plan_sync(job), limit, asked, yaml_world_size, splits)
    if limit is None or report.fits:
        return report

    def fits(other: MemoryPlan) -> bool:
        return other.peak.total <= limit

    suggestions = smallest_changes(job, fits, with_reward_model=with_reward_model)
    if suggestions:
        return PlanReport(plan, report.traffic, limit, asked, yaml_world_size, splits, tuple(suggestions))
    lowest = lowest_peak(job, with_reward_model=with_reward_model)
    larger = smallest_world(job, fits, with_reward_model=with_reward_model)
    return PlanReport(plan, report.traffic, limit, asked, yaml_world_size, splits, (), lowest, larger)


def _split_costs(job: JobConfig, limit: int | None, with_reward_model: bool) -> list[SplitCost]:
    costs = []
    runs = runs_of(job)
    for path in dict.fromkeys(run.path for run in runs.values()):
        roles = tuple(role for role, run in runs.items() if run.path == path)
        present = runs[roles[0]].parallel
        for split in common_splits(job, path, present.world_size):
            plan = plan_memory(with_splits(job, {path: split}), with_reward_model=with_reward_model)
            names = {_MODEL_OF_ROLE[role] for role in roles}
            if "infer" in roles:
                names.add("reference")
            resident = sum(model.resident for model in plan.models if model.name in names)
            costs.append(
                SplitCost(
                    path.name,
                    roles,
                    split.data_parallel,
                    split.model_parallel,
                    split == present,
                    resident,
                    plan.peak.total,
                    None if limit is None else plan.peak.total <= limit,
                )
            )
    return costs


_MODEL_OF_ROLE = {"infer": "policy infer", "train": "policy train", "reward": "reward", "critic": "critic"}


def report_dict(report: PlanReport) -> dict[str, Any]:
    """The report as plain numbers and texts for ``--json``; bytes, of one rank unless it says total."""
    plan, traffic = report.plan, report.traffic
    context = plan.job.train.context
    return {
        "device_target": context.device_target,
        "constants_measured": plan.device.measured,
        "world_size": plan.job.infer.parallel.world_size,
        "yaml_world_size": report.yaml_world_size,
        "limit": report.limit,
        "fits": report.fits,
        "peak_phase": plan.peak.name,
        "peak": plan.peak.total,
        "host": plan.host,
        "models": [_model_dict(model) for model in plan.models],
        "phases": [{"name": phase.name, "total": phase.total, **phase.parts} for phase in plan.phases],
        "splits": [vars(cost) for cost in report.splits],
        "suggestions": [_suggestion_dict(suggestion) for suggestion in report.suggestions],
        "lowest_peak": None if report.lowest is None else report.lowest.peak.total,
        "fits_with_workers": None
        if report.larger is None
        else {"world_size": report.larger[0], **_suggestion_dict(report.larger[1])},
        "sync": {
            "received_by_rank": list(traffic.received),
            "received_total": traffic.total,
            "needed_by_rank": list(traffic.needed),
            "needed_total": traffic.least,
            "sent_by_rank": list(traffic.sent),
            "pairs": traffic.pairs,
            "buckets": traffic.buckets,
        },
        "strategy_files": plan.strategy_files,
    }


def _model_dict(model: ModelMemory) -> dict[str, Any]:
    return {
        "name": model.name,
        "data_parallel": model.mesh.dp,
        "model_parallel": model.mesh.mp,
        "parameters": model.parameters,
        "weights": model.weights,
        "moments": model.moments,
        "gradients": model.gradients,
        "activations": model.activations,
        "kernels": model.kernels,
        "kv_cache": model.kv_cache,
        "offloaded": model.offloaded,
        "swapped": model.swapped,
    }


def _suggestion_dict(suggestion: Suggestion) -> dict[str, Any]:
    peak = suggestion.plan.peak
    return {"changes": list(suggestion.changes), "peak": peak.total, "peak_phase": peak.name}


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
        "Computed from sizes, types and layouts, not measured: no such device was available. "
        f"{gigabytes(plan.device.process)} per rank are assumed for runtime and communication; "
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
    title = "A rank's memory by model"
    if any(model.on_host for model in plan.models) and not plan.device.host_shared:
        title += " (* in host memory while not in use)"
    table = _table(title, columns)
    for model in plan.models:
        table.add_row(*_model_row(model, plan.device.host_shared))
    return table


def _model_row(model: ModelMemory, with_kernels: bool) -> list[str]:
    row = [
        model.name,
        str(model.mesh),
        f"{model.parameters / 1e6:,.1f} M",
        gigabytes(model.weights) + ("*" if model.offloaded and not with_kernels else ""),
        gigabytes(model.moments) + ("*" if model.swapped and not with_kernels else ""),
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
        yield f"Host memory per worker: about {gigabytes(plan.host)}, the largest passing copy included."
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
    yield f"The minimum for any scheme of moving the weights: {gigabytes(traffic.least)} in total."


def _range(sizes: Sequence[int]) -> str:
    least, most = gigabytes(min(sizes)), gigabytes(max(sizes))
    return most if least == most else f"{'0' if least == '-' else least} to {most}"


def _strategy_line(plan: MemoryPlan) -> str:
    files = plan.strategy_files
    shown = ", ".join(files[:_SHOWN_FILES])
    return f"--only_save_strategy True writes {len(files)} strategy files: {shown}, ... (all in --json)"
