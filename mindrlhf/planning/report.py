"""A plan and everything said about it, as data."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from mindrlhf.configs.faults import shown
from mindrlhf.configs.schema import JobConfig
from mindrlhf.planning.memory import MemoryPlan, plan_memory, plan_sync
from mindrlhf.planning.models import ModelMemory
from mindrlhf.planning.search import Suggestion, lowest_peak, smallest_changes, smallest_world
from mindrlhf.planning.splits import common_splits, runs_of, with_splits
from mindrlhf.planning.sync import SyncTraffic
from mindrlhf.utils.errors import ConfigError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class SplitCost:
    """One split of one YAML file, everything else as it is.

    Attributes:
        file: its name.
        roles: the models that it splits.
        data_parallel, model_parallel: the split.
        present: whether it is the plan's.
        resident: bytes a rank of its models' weights, moments and caches.
        peak: bytes a rank of the whole job.
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
    """What scripts/plan.py says.

    Attributes:
        plan: memory of the job as it is planned.
        traffic: of a weight sync.
        limit: bytes a rank may take; ``None`` when nobody said.
        asked_world_size: workers that were asked for when they are not the YAMLs'.
        yaml_world_size: workers of the YAMLs.
        splits: every split that divides, with its cost.
        suggestions: ways to fit when the plan does not.
        lowest: the lowest peak any of the settings can reach, when that does not fit either.
        larger: workers on which something fits then, and what.
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
    """Bytes a rank may take: ``device_memory``, and on a device what ``max_device_memory`` allows.

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
        job: as it shall run.
        limit: bytes a rank may take.
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
    """The report as plain numbers and texts for ``--json``; bytes, of a rank unless it says total."""
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
        "host_moments": model.host_moments,
        "gradients": model.gradients,
        "activations": model.activations,
        "kernels": model.kernels,
        "kv_cache": model.kv_cache,
    }


def _suggestion_dict(suggestion: Suggestion) -> dict[str, Any]:
    peak = suggestion.plan.peak
    return {"changes": list(suggestion.changes), "peak": peak.total, "peak_phase": peak.name}
