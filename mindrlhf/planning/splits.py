"""Which (data_parallel, model_parallel) splits a job can have, and the job with another one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any

from mindrlhf.configs.keys import JobConfig, ModelConfig, ParallelConfig, RunConfig
from mindrlhf.utils.errors import ConfigError

ROLES = ("infer", "train", "reward", "critic")
ROWS = ("generation_batch_size", "score_batch_size", "micro_batch_size")
"""Settings that cut a rank's rows into parts; 0 leaves them whole."""


def runs_of(job: JobConfig) -> dict[str, RunConfig]:
    """The YAMLs of a job by role; the critic's only when the critic is a separate model."""
    runs = {"infer": job.infer, "train": job.train, "reward": job.reward, "critic": job.critic}
    if job.ppo.critic != "separate":
        del runs["critic"]
    return runs


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [size for size in range(1, isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def model_parallel_sizes(model: ModelConfig, world_size: int) -> list[int]:
    """Sizes of a model-parallel group that divide the model and the number of workers, ascending."""
    sizes = (world_size, model.num_heads, model.vocab_size, model.intermediate_size)
    return [mp for mp in divisors(model.n_kv_heads) if not any(size % mp for size in sizes)]


def allowed_splits(job: JobConfig, role: str, world_size: int) -> list[ParallelConfig]:
    """Splits over ``world_size`` workers that divide the model and the rows of rollout and minibatch."""
    splits = []
    for mp in model_parallel_sizes(runs_of(job)[role].model, world_size):
        dp = world_size // mp
        rows = [job.ppo.rollout_batch_size]
        if role in ("train", "critic"):
            rows.append(job.ppo.minibatch_size)
        if not any(count % dp for count in rows):
            splits.append(ParallelConfig(data_parallel=dp, model_parallel=mp))
    return splits


def with_splits(job: JobConfig, splits: Mapping[Path, ParallelConfig]) -> JobConfig:
    """The job with other splits, by YAML file: roles that share a file change together.

    Parts of a rank's rows that no longer divide them become the largest smaller ones that do.
    """
    runs = {
        role: replace(run, parallel=splits.get(run.path, run.parallel))
        for role in ROLES
        for run in [getattr(job, role)]
    }
    return _with_dividing_rows(replace(job, **runs))


def with_world_size(job: JobConfig, world_size: int) -> JobConfig:
    """The job over another number of workers; model_parallel is kept, or becomes the next smaller one.

    Raises:
        ConfigError: a model has no split that divides; names every file.
    """
    splits: dict[Path, ParallelConfig] = {}
    faults = []
    for role, run in runs_of(job).items():
        allowed = common_splits(job, run.path, world_size)
        smaller = [split for split in allowed if split.model_parallel <= run.parallel.model_parallel]
        if not allowed:
            faults.append(
                f"--world_size {world_size}: no data_parallel x model_parallel for {role} ({run.path}) - "
                f"model_parallel must divide {run.model.n_kv_heads} key/value heads, data_parallel a rollout "
                f"of {job.ppo.rollout_batch_size} rows and, in training, a minibatch of "
                f"{job.ppo.minibatch_size}; choose other workers, rollout_batch_size or num_minibatches"
            )
        else:
            splits[run.path] = smaller[-1] if smaller else allowed[0]
    if faults:
        raise ConfigError(faults)
    return with_splits(job, splits)


def common_splits(job: JobConfig, path: Path, world_size: int) -> list[ParallelConfig]:
    """Splits that every role of one YAML file allows, by ascending model_parallel."""
    lists = [allowed_splits(job, role, world_size) for role, run in runs_of(job).items() if run.path == path]
    return [split for split in lists[0] if all(split in others for others in lists[1:])]


def part_rows(job: JobConfig, setting: str) -> list[int]:
    """Rows of every rank and model that one of :data:`ROWS` must divide."""
    rollout, minibatch = job.ppo.rollout_batch_size, job.ppo.minibatch_size
    runs = runs_of(job)
    if setting == "generation_batch_size":
        return [rollout // runs["infer"].parallel.data_parallel]
    if setting == "score_batch_size":
        values = {"separate": ["critic"], "shared": ["train"], "none": []}[job.ppo.critic]
        scoring = ["infer", "reward", *values]
        return [rollout // runs[role].parallel.data_parallel for role in scoring]
    return [minibatch // runs[role].parallel.data_parallel for role in ("train", "critic") if role in runs]


def smaller_parts(job: JobConfig, setting: str) -> list[int]:
    """Values of one of :data:`ROWS` below the present one that divide all rows, descending."""
    rows = part_rows(job, setting)
    present = getattr(job.ppo, setting) or max(rows)
    return [
        size for size in reversed(divisors(min(rows))) if size < present and not any(r % size for r in rows)
    ]


def _with_dividing_rows(job: JobConfig) -> JobConfig:
    changes: dict[str, Any] = {}
    for setting in ROWS:
        present = getattr(job.ppo, setting)
        if present and any(rows % present for rows in part_rows(job, setting)):
            changes[setting] = smaller_parts(job, setting)[0]
    return replace(job, ppo=replace(job.ppo, **changes)) if changes else job
