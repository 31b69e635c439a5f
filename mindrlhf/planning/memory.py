"""Memory of one rank, phase by phase, from the models of a job."""

from __future__ import annotations

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
from mindrlhf.planning.sizes import BYTES
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
        gradients, activations = _pool(models, name, adds_up=False)
        copies = _buckets(job) if name == SYNC else 0
        phases.append(_phase(name, models, gradients, activations, 0, 0, copies, device.process))
    return tuple(phases)


def _cumulative(
    job: JobConfig, models: tuple[ModelMemory, ...], device: DeviceTraits
) -> tuple[PhaseMemory, ...]:
    """On CPU: what a phase takes from the system is not given back, so later phases have it too.

    Rollout and scoring are those of the first iteration; moments are zeros that nobody has touched until the
    first optimizer step. From the second iteration on, all phases stand at the peak.
    """
    phases = []
    pool = gradients = kernels = graphs = 0
    for name in PHASES:
        new_gradients, activations = _pool(models, name, adds_up=True)
        pool = max(pool, new_gradients + activations)
        gradients = max(gradients, new_gradients)
        kernels += sum(model.graphs[name].kernels for model in models if name in model.graphs)
        graphs += sum(model.graphs[name].compiled for model in models if name in model.graphs)
        # Loading leaves a copy of one model's weights behind (measured on three models).
        copies = max(model.weights for model in models)
        copies += _buckets(job) if name in (SYNC, SAVE) else 0
        process = device.process + device.training_imports
        phase = _phase(name, models, gradients, pool - gradients, kernels, graphs, copies, process)
        if name in (ROLLOUT, SCORING):
            phase.parts["moments"] = 0
        phases.append(phase)
    return tuple(phases)


def _phase(
    name: str,
    models: tuple[ModelMemory, ...],
    gradients: int,
    activations: int,
    kernels: int,
    graphs: int,
    copies: int,
    process: int,
) -> PhaseMemory:
    parts = {
        "weights": sum(model.weights for model in models),
        "moments": sum(model.moments for model in models),
        "gradients": gradients,
        "activations": activations,
        "kv_cache": sum(model.kv_cache for model in models),
        "kernels": kernels,
        "graphs": graphs,
        "copies": copies,
        "process": process,
    }
    return PhaseMemory(name, parts)


def _pool(models: tuple[ModelMemory, ...], phase: str, *, adds_up: bool) -> tuple[int, int]:
    """Gradients and activations at the fullest moment of a phase; models run one after another.

    The graph of an optimizer step holds the gradients it was given until it gets the next ones (measured on
    CPU), so each trained model has a set that waits. A backward pass makes its own set while it frees the
    activations: at best the larger of both counts; ``adds_up``: their sum, which is what was measured on CPU.
    """
    if phase != TRAINING:
        activations = [model.graphs[phase].activations for model in models if phase in model.graphs]
        return 0, max(activations, default=0)
    held = sum(model.gradients for model in models)
    moments = [(held, 0)]
    for model in models:
        if phase in model.graphs:
            before = held + model.waiting_sets * model.gradients
            moments.append((before + adds_up * model.gradients, model.graphs[phase].activations))
            moments.append((before + model.gradients, 0))
            moments.append((held + model.step_sets * model.gradients, 0))
    return max(moments, key=sum)


def _buckets(job: JobConfig) -> int:
    """What a rank holds of the buckets of a sync."""
    same = job.train.parallel == job.infer.parallel
    return 0 if same or job.train.parallel.model_parallel == 1 else BUCKET_BYTES


def _host_bytes(models: tuple[ModelMemory, ...]) -> int:
    """The process, moments kept there, and the largest copy: a model loaded or synced, or moments saved."""
    moments = sum(model.host_moments for model in models)
    copies = [model.weights for model in models] + [model.moments for model in models]
    return HOST_PROCESS + moments + max(copies)
