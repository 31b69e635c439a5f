"""Memory of one rank, phase by phase, from the models of a job."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from mindrlhf.configs.schema import JobConfig
from mindrlhf.parallel.reshard import BUCKET_BYTES
from mindrlhf.planning.devices import HOST_PROCESS, DeviceTraits, traits_of
from mindrlhf.planning.models import (
    PHASES,
    ROLLOUT,
    SAVE,
    SCORING,
    SYNC,
    TRAINING,
    ModelMemory,
    job_models,
    model_layouts,
)
from mindrlhf.planning.sizes import BYTES, kinds_bytes
from mindrlhf.planning.sync import SyncTraffic, sync_traffic

PARTS = (
    "weights",
    "moments",
    "gradients",
    "activations",
    "kv_cache",
    "kernels",
    "graphs",
    "copies",
    "process",
)
"""What the memory of a phase is made of, in the order of the tables."""


@dataclass(frozen=True)
class PhaseMemory:
    """One rank's memory at the fullest moment of a phase, in bytes by part (:data:`PARTS`)."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class MemoryPlan:
    """What a job takes on one rank.

    Attributes:
        job: the configuration.
        device: constants of its device.
        models: by model.
        phases: by phase, in the order they run.
        host: bytes of the worker's host memory when the models live on a device; 0 when they live there.
    """

    job: JobConfig
    device: DeviceTraits
    models: tuple[ModelMemory, ...]
    phases: tuple[PhaseMemory, ...]
    host: int

    @property
    def peak(self) -> PhaseMemory:
        """The fullest phase."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def strategy_files(self) -> list[str]:
        """What ``--only_save_strategy True`` writes."""
        ranks = range(self.job.infer.parallel.world_size)
        return [
            f"strategy/{model}_strategy/strategy_{rank}.ckpt"
            for model in ("infer_policy", "train_policy", "ref", "reward", "critic")
            for rank in ranks
        ]


def plan_memory(job: JobConfig, *, with_reward_model: bool = True) -> MemoryPlan:
    """Works out the memory of every model and phase; needs neither device nor MindSpore."""
    device = traits_of(job.train.context.device_target)
    models = tuple(job_models(job, device, with_reward_model=with_reward_model))
    phases = _cumulative(job, models, device) if device.host_shared else _pooled(job, models, device)
    return MemoryPlan(job, device, models, phases, 0 if device.host_shared else _host_bytes(models))


def plan_sync(job: JobConfig) -> SyncTraffic:
    """What one weight sync of the job moves."""
    layouts = model_layouts(job)
    return sync_traffic(
        layouts["train_policy"],
        layouts["infer_policy"],
        number_bytes=BYTES[job.infer.model.param_init_type],
    )


def _pooled(job: JobConfig, models: tuple[ModelMemory, ...], device: DeviceTraits) -> tuple[PhaseMemory, ...]:
    """On a device: what stays, and what the phase takes from the pool, which it gives back."""
    phases = []
    for name in PHASES:
        copies = _buckets(job) if name == SYNC else 0
        phases.append(_phase(name, models, _pool(models, name), 0, 0, copies, device.process))
    return tuple(phases)


def _cumulative(
    job: JobConfig, models: tuple[ModelMemory, ...], device: DeviceTraits
) -> tuple[PhaseMemory, ...]:
    """On CPU: what a phase takes from the system is not given back, so later phases have it too.

    Rollout and scoring are those of the first iteration, when of the moments, which are zeros, nobody has
    touched more than what loading a model has left. From the second iteration on, all phases stand at the
    peak.
    """
    phases = []
    pool = kernels = graphs = 0
    for name in PHASES:
        pool = max(pool, _pool(models, name))
        kernels += sum(model.graphs[name].kernels for model in models if name in model.graphs)
        graphs += sum(model.graphs[name].compiled for model in models if name in model.graphs)
        copies = _buckets(job) if name in (SYNC, SAVE) else 0
        process = device.process + device.training_imports
        phase = _phase(name, models, pool, kernels, graphs, copies, process)
        if name in (ROLLOUT, SCORING):
            phase.parts["moments"] = min(phase.parts["moments"], max(model.weights for model in models))
        phases.append(phase)
    return tuple(phases)


def _phase(
    name: str,
    models: tuple[ModelMemory, ...],
    activations: int,
    kernels: int,
    graphs: int,
    copies: int,
    process: int,
) -> PhaseMemory:
    parts = {
        "weights": sum(model.weights for model in models),
        "moments": sum(model.moments for model in models),
        "gradients": _gradient_buffers(models),
        "activations": activations,
        "kv_cache": sum(model.kv_cache for model in models),
        "kernels": kernels,
        "graphs": graphs,
        "copies": copies,
        "process": process,
    }
    return PhaseMemory(name, parts)


def _gradient_buffers(models: tuple[ModelMemory, ...]) -> int:
    """Gradients add up in buffers that all trained models share where shapes are equal."""
    shared: Counter[tuple[tuple[int, ...], int]] = Counter()
    for model in models:
        shared |= model.gradient_kinds
    return kinds_bytes(shared)


def _pool(models: tuple[ModelMemory, ...], phase: str) -> int:
    """What the pool holds at the fullest moment of a phase; models run one after another.

    A backward pass adds each gradient to its buffer as soon as it is there, so no set of them is in the pool.
    """
    found = [model.graphs[phase].activations for model in models if phase in model.graphs]
    if phase == TRAINING:
        found += [model.step_sets * model.gradients for model in models]
    return max(found, default=0)


def _buckets(job: JobConfig) -> int:
    """What a rank holds of the buckets of a sync."""
    same = job.train.parallel == job.infer.parallel
    return 0 if same or job.train.parallel.model_parallel == 1 else BUCKET_BYTES


def _host_bytes(models: tuple[ModelMemory, ...]) -> int:
    """The process, moments kept there, and the largest copy: a model loaded or synced, or moments saved."""
    moments = sum(model.host_moments for model in models)
    copies = [model.weights for model in models] + [model.moments for model in models]
    return HOST_PROCESS + moments + max(copies)
