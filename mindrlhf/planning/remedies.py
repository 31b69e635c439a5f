"""What must change so that a job fits: the fewest and mildest changes of its settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

from mindrlhf.configs.keys import JobConfig, ParallelConfig
from mindrlhf.planning.job_memory import MemoryPlan, plan_memory
from mindrlhf.planning.splits import (
    ROLES,
    ROWS,
    common_splits,
    runs_of,
    smaller_parts,
    with_splits,
    with_world_size,
)
from mindrlhf.utils.errors import ConfigError

MAX_SUGGESTIONS = 3
MIN_RESPONSE = 16
"""Tokens; shorter responses are not suggested."""
GROWTH = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Multiples of the number of workers that are tried when nothing else fits."""


@dataclass(frozen=True)
class Change:
    """One setting with another value.

    Attributes:
        text: what to write where.
        apply: returns the job with the change.
    """

    text: str
    apply: Callable[[JobConfig], JobConfig]


@dataclass(frozen=True)
class Suggestion:
    """Changes that together make the job fit, and the peak they leave."""

    changes: tuple[str, ...]
    plan: MemoryPlan
    with_reward_model: bool


@dataclass(frozen=True)
class _Lever:
    """A setting that can be changed.

    Attributes:
        cost: how much changing it hurts; lowest for the mildest settings.
        ordered: whether later values always need less memory than earlier ones.
        values: from mild to strong, given the other changes.
    """

    name: str
    cost: int
    ordered: bool
    values: Callable[[JobConfig], list[Change]]


def smallest_changes(
    job: JobConfig, fits: Callable[[MemoryPlan], bool], *, with_reward_model: bool
) -> list[Suggestion]:
    """Up to three ways to fit with as few settings changed as possible, the mildest first; or none.

    Args:
        job: a job that does not fit.
        fits: tells whether a plan fits.
        with_reward_model: whether there is a reward model.
    """
    if not fits(lowest_peak(job, with_reward_model=with_reward_model)):
        return []
    levers = _levers(job, with_reward_model)
    for count in range(1, len(levers) + 1):
        found: list[tuple[int, Suggestion]] = []
        for chosen in combinations(levers, count):
            suggestion = _with_all(job, chosen, fits, with_reward_model)
            if suggestion is not None:
                found.append((sum(lever.cost for lever in chosen), suggestion))
        if found:
            found.sort(key=lambda item: item[0])
            return [suggestion for _, suggestion in found[:MAX_SUGGESTIONS]]
    return []


def lowest_peak(job: JobConfig, *, with_reward_model: bool) -> MemoryPlan:
    """The plan with the lowest peak that any of the settings can reach on the same workers."""
    levers = _levers(job, with_reward_model, keep_splits=True)
    plans = [plan for _, plan in _strongest(job, levers, with_reward_model)]
    return min(plans, key=lambda plan: plan.peak.total)


def smallest_world(
    job: JobConfig, fits: Callable[[MemoryPlan], bool], *, with_reward_model: bool
) -> tuple[int, Suggestion] | None:
    """The smallest multiple of the workers (:data:`GROWTH`) on which something fits, with all splits."""
    world_size = job.infer.parallel.world_size
    for growth in GROWTH:
        workers = world_size * growth
        try:
            larger = with_world_size(job, workers)
        except ConfigError:
            continue
        plan = plan_memory(larger, with_reward_model=with_reward_model)
        found = [Suggestion((), plan, with_reward_model)] if fits(plan) else []
        found = found or smallest_changes(larger, fits, with_reward_model=with_reward_model)
        if found:
            return workers, _with_splits_named(found[0])
    return None


def _with_splits_named(suggestion: Suggestion) -> Suggestion:
    """The same, with the split of every file in front."""
    runs = {run.path: run.parallel for run in runs_of(suggestion.plan.job).values()}
    texts = [split_text(path.name, split) for path, split in runs.items()]
    others = [change for change in suggestion.changes if change not in texts]
    return replace(suggestion, changes=(*texts, *others))


def split_text(file: str, split: ParallelConfig) -> str:
    """A split as written in a YAML."""
    return f"{file}: data_parallel {split.data_parallel}, model_parallel {split.model_parallel}"


def _with_all(
    job: JobConfig, levers: Sequence[_Lever], fits: Callable[[MemoryPlan], bool], with_reward_model: bool
) -> Suggestion | None:
    """The mildest values of exactly these settings that fit, if there are any."""
    best: tuple[list[Change], MemoryPlan] | None = None
    for changes, plan in _strongest(job, levers, with_reward_model):
        if fits(plan) and (best is None or plan.peak.total < best[1].peak.total):
            best = changes, plan
    if best is None:
        return None
    changes, plan = best
    for index, lever in enumerate(levers):
        if not lever.ordered:
            continue
        before = _applied(job, changes[:index])
        for milder in lever.values(before):
            attempt = [*changes[:index], milder, *changes[index + 1 :]]
            attempt_plan = _plan(job, attempt, with_reward_model)
            if fits(attempt_plan):
                changes, plan = attempt, attempt_plan
                break
    kept = with_reward_model and not any(change.text == NO_REWARD_MODEL for change in changes)
    return Suggestion((*(change.text for change in changes), *_forced(job, plan.job, levers)), plan, kept)


def _forced(job: JobConfig, changed: JobConfig, levers: Sequence[_Lever]) -> list[str]:
    """Rows per pass that had to follow another split, as settings."""
    free = {lever.name for lever in levers}
    settings = ((setting, getattr(changed.ppo, setting)) for setting in ROWS if setting not in free)
    return [f"--set {name}={value}" for name, value in settings if value != getattr(job.ppo, name)]


def _strongest(
    job: JobConfig, levers: Sequence[_Lever], with_reward_model: bool
) -> Iterator[tuple[list[Change], MemoryPlan]]:
    """Every combination of splits, with the strongest value of all other settings."""
    split_levers = [lever for lever in levers if not lever.ordered]
    others = [lever for lever in levers if lever.ordered]
    for splits in product(*(lever.values(job) for lever in split_levers)):
        changes = list(splits)
        changed = _applied(job, changes)
        for lever in others:
            values = lever.values(changed)
            if not values:
                break
            changes.append(values[-1])
            changed = values[-1].apply(changed)
        else:
            yield changes, _plan(job, changes, with_reward_model)


def _applied(job: JobConfig, changes: Sequence[Change]) -> JobConfig:
    for change in changes:
        job = change.apply(job)
    return job


def _plan(job: JobConfig, changes: Sequence[Change], with_reward_model: bool) -> MemoryPlan:
    kept = with_reward_model and not any(change.text == NO_REWARD_MODEL for change in changes)
    return plan_memory(_applied(job, changes), with_reward_model=kept)


NO_REWARD_MODEL = "no reward model: score with --reward_fn"


def _levers(job: JobConfig, with_reward_model: bool, *, keep_splits: bool = False) -> list[_Lever]:
    """Settings that can be changed, splits first; ``keep_splits``: the present split is one of the values."""
    levers = [_rows_lever(setting) for setting in ROWS if smaller_parts(job, setting)]
    for path in dict.fromkeys(run.path for run in runs_of(job).values()):
        levers.append(_split_lever(job, path, keep_splits))
    on_device = job.train.context.device_target != "CPU"
    if on_device and job.infer.model.param_init_type == "float32":
        levers.append(
            _single("infer type", 3, f"{job.infer.path.name}: param_init_type bfloat16", _infer_bfloat16)
        )
    if job.ppo.critic == "separate":
        levers.append(_single("critic", 4, "--set critic=shared", _shared_critic))
    trained = [job.train, *([job.critic] if job.ppo.critic == "separate" else [])]
    names = " and ".join(dict.fromkeys(run.path.name for run in trained))
    if any(run.parallel.data_parallel > 1 and not run.shards_optimizer for run in trained):
        text = f"{names}: parallel.enable_parallel_optimizer True"
        levers.append(_single("optimizer", 2, text, partial(_trained_with, shards_optimizer=True)))
    if any(run.parallel.model_parallel > 1 and not run.splits_rows for run in trained):
        text = f"{names}: parallel_config.use_seq_parallel True"
        levers.append(_single("rows", 2, text, partial(_trained_with, splits_rows=True)))
    if any(run.recompute < run.model.num_layers for run in trained):
        text = f"{names}: recompute_config.recompute True (a third more time in the update)"
        recomputed = partial(_trained_with, recompute=job.train.model.num_layers)
        levers.append(_single("recompute", 3, text, recomputed))
    runs = runs_of(job)
    if on_device and not all(run.context.memory_offload for run in runs.values()):
        files = " and ".join(dict.fromkeys(run.path.name for run in runs.values()))
        text = f'{files}: context.memory_offload "ON" (more time for moving weights)'
        levers.append(_single("offload", 3, text, _offloaded))
    if on_device and not all(run.optimizer.get("swap") for run in trained):
        text = f"{names}: optimizer.swap True (the update fetches the optimizer's states from host memory)"
        levers.append(_single("swap", 4, text, _swapped))
    if len(_shorter_responses(job)) > 0:
        levers.append(_Lever("responses", 6, True, _shorter_responses))
    if with_reward_model:
        levers.append(_single("reward model", 7, NO_REWARD_MODEL, lambda job: job))
    if on_device and job.train.model.param_init_type == "float32":
        text = f"{job.train.path.name}: param_init_type bfloat16 (with float32 masters)"
        levers.append(_single("train type", 9, text, _train_bfloat16))
    # Splits first: what the rows must divide by follows from them.
    return sorted(levers, key=lambda lever: lever.ordered)


def _rows_lever(setting: str) -> _Lever:
    def values(job: JobConfig) -> list[Change]:
        return [
            Change(f"--set {setting}={size}", _with_ppo(setting, size))
            for size in smaller_parts(job, setting)
        ]

    return _Lever(setting, 1, True, values)


def _with_ppo(setting: str, value: Any) -> Callable[[JobConfig], JobConfig]:
    changed: dict[str, Any] = {setting: value}
    return lambda job: replace(job, ppo=replace(job.ppo, **changed))


def _shorter_responses(job: JobConfig) -> list[Change]:
    """A half, a quarter and an eighth of the response."""
    lengths = [job.ppo.max_response_length // part for part in (2, 4, 8)]
    return [
        Change(f"--set max_response_length={length}", _with_ppo("max_response_length", length))
        for length in lengths
        if length >= MIN_RESPONSE
    ]


def _split_lever(job: JobConfig, path: Path, keep: bool) -> _Lever:
    (file, present), *_ = ((run.path, run.parallel) for run in runs_of(job).values() if run.path == path)

    def values(job: JobConfig) -> list[Change]:
        splits = common_splits(job, file, present.world_size)
        return [
            Change(split_text(file.name, split), partial(with_splits, splits={file: split}))
            for split in splits
            if keep or split != present
        ]

    return _Lever(str(file), 2, False, values)


def _single(name: str, cost: int, text: str, apply: Callable[[JobConfig], JobConfig]) -> _Lever:
    return _Lever(name, cost, True, lambda job: [Change(text, apply)])


def _infer_bfloat16(job: JobConfig) -> JobConfig:
    changed: dict[str, Any] = {
        role: replace(run, model=replace(run.model, param_init_type="bfloat16"))
        for role, run in runs_of(job).items()
        if run.path == job.infer.path
    }
    return replace(job, **changed)


def _shared_critic(job: JobConfig) -> JobConfig:
    return replace(job, ppo=replace(job.ppo, critic="shared", critic_warmup_iterations=0))


def _offloaded(job: JobConfig) -> JobConfig:
    runs = {role: getattr(job, role) for role in ROLES}
    changed: dict[str, Any] = {
        role: replace(run, context=replace(run.context, memory_offload=True)) for role, run in runs.items()
    }
    return replace(job, **changed)


def _swapped(job: JobConfig) -> JobConfig:
    changed: dict[str, Any] = {
        role: replace(run, optimizer={**run.optimizer, "swap": True})
        for role, run in (("train", job.train), ("critic", job.critic))
    }
    return replace(job, **changed)


def _trained_with(job: JobConfig, **settings: Any) -> JobConfig:
    roles = ("train", "critic")
    return replace(job, **{role: replace(getattr(job, role), **settings) for role in roles})


def _train_bfloat16(job: JobConfig) -> JobConfig:
    return replace(job, train=replace(job.train, model=replace(job.train.model, param_init_type="bfloat16")))
