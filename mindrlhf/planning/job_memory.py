"""Memory of one rank, by model and phase of a job.

What a rank stores follows from the layouts of its models, what their graphs take from
:mod:`mindrlhf.planning.graph_memory`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mindrlhf.configs.keys import JobConfig, RunConfig
from mindrlhf.models.decode_schedule import decode_schedule
from mindrlhf.models.job_layouts import job_layouts
from mindrlhf.parallel.layout import Mesh, mesh_of
from mindrlhf.parallel.reshard import BUCKET_BYTES
from mindrlhf.planning.graph_memory import (
    FLOAT32,
    HOST_PROCESS,
    STEP_ARRAYS,
    DeviceTraits,
    GraphMemory,
    ParameterCount,
    Pass,
    RankSizes,
    count_parameters,
    generation_graphs,
    kv_cache_bytes,
    rank_sizes,
    scoring_graph,
    training_graph,
    traits_of,
)

MOMENTS = 2
"""Float32 numbers AdamW keeps for each parameter."""

ROLLOUT, SCORING, TRAINING, SYNC, SAVE = "rollout", "scoring", "training", "sync", "save"
PHASES = (ROLLOUT, SCORING, TRAINING, SYNC, SAVE)


@dataclass(frozen=True, kw_only=True)
class ModelMemory:
    """One model on one rank, in bytes.

    Attributes:
        name: "policy infer", "policy train", "reference", "reward" or "critic".
        mesh: its split.
        parameters: numbers per rank.
        weights: their bytes.
        moments: of the optimizer, and its float32 copies of weights in other types.
        gradients: their sums.
        kv_cache: keys and values, while responses are generated.
        graphs: phase -> what its compiled graph takes.
        offloaded: whether the weights are in host memory while another model that is offloaded is used.
        swapped: whether the moments are in host memory, but for one tensor's during its step.
        saved: host copies of the moments while a checkpoint is written: of all replicas' parts.
    """

    name: str
    mesh: Mesh
    parameters: int
    weights: int
    moments: int = 0
    gradients: int = 0
    kv_cache: int = 0
    graphs: dict[str, GraphMemory]
    offloaded: bool = False
    swapped: bool = False
    saved: int = 0

    @property
    def activations(self) -> int:
        """What its largest graph takes from the pool."""
        return max((graph.activations for graph in self.graphs.values()), default=0)

    @property
    def kernels(self) -> int:
        """What the kernels of its graphs keep."""
        return sum(graph.kernels for graph in self.graphs.values())

    @property
    def resident(self) -> int:
        """What stays on a device between phases."""
        return (0 if self.offloaded else self.weights) + (0 if self.swapped else self.moments)

    @property
    def on_host(self) -> int:
        """What is in host memory between phases."""
        return self.weights + self.moments - self.resident

    def taken(self, phase: str, *, alone: bool) -> dict[str, int]:
        """What it takes for its part of a phase and then returns, by part.

        Args:
            phase: one in which it has a graph.
            alone: whether its weights are there for this time only, if it is offloaded.
        """
        return {
            "weights": self.weights if self.offloaded and alone else 0,
            "gradients": self.gradients if phase == TRAINING else 0,
            "activations": self.graphs[phase].activations,
            "kv_cache": self.kv_cache,
        }


def job_models(job: JobConfig, device: DeviceTraits, *, with_reward_model: bool) -> list[ModelMemory]:
    """Every model that the job builds, in the order of trainer/builder.py."""
    models = [_generator(job, device), _policy(job, device), _reference(job, device)]
    if with_reward_model:
        models.append(_reward(job, device))
    if job.ppo.critic == "separate":
        models.append(_critic(job, device))
    return models


def rollout_rows(job: JobConfig, config: RunConfig) -> int:
    """Rows of the rollout that one rank of a model has."""
    return job.ppo.rollout_batch_size // config.parallel.data_parallel


def minibatch_rows(job: JobConfig, config: RunConfig) -> int:
    """Rows of a minibatch that one rank of a trained model has."""
    return job.ppo.minibatch_size // config.parallel.data_parallel


def _sizes(config: RunConfig, *, lm_head: bool, score_head: bool) -> tuple[RankSizes, ParameterCount]:
    mp = config.parallel.model_parallel
    count = count_parameters(config.model, mp, lm_head=lm_head, score_head=score_head)
    return rank_sizes(config.model, mp, splits_rows=config.splits_rows), count


def _scoring_pass(job: JobConfig, config: RunConfig, *, logits: bool = False) -> Pass:
    rows = job.ppo.score_batch_size or rollout_rows(job, config)
    return Pass(rows=rows, columns=job.ppo.max_length, responses=job.ppo.max_response_length, logits=logits)


def _generator(job: JobConfig, device: DeviceTraits) -> ModelMemory:
    ppo = job.ppo
    infer = replace(job.infer, model=job.infer.generator_model)
    sizes, count = _sizes(infer, lm_head=True, score_head=False)
    rows = ppo.generation_batch_size or rollout_rows(job, job.infer)
    prompt = ppo.max_prompt_length
    schedule = decode_schedule(prompt, ppo.max_response_length, ppo.decode_steps_per_call)
    return ModelMemory(
        name="policy infer",
        mesh=mesh_of(job.infer),
        parameters=count.total,
        weights=count.weight_bytes(sizes.param),
        kv_cache=kv_cache_bytes(sizes, rows, schedule.columns),
        graphs={ROLLOUT: generation_graphs(sizes, rows, prompt, schedule, device)},
        offloaded=job.infer.context.memory_offload,
    )


def _policy(job: JobConfig, device: DeviceTraits) -> ModelMemory:
    shared = job.ppo.critic == "shared"
    sizes, count = _sizes(job.train, lm_head=True, score_head=shared)
    work = replace(_scoring_pass(job, job.train), recompute=job.train.recompute)
    scoring = {SCORING: scoring_graph(sizes, work, count, device)} if shared else {}
    return _trained("policy train", job, job.train, sizes, count, scoring, device, logits=True)


def _critic(job: JobConfig, device: DeviceTraits) -> ModelMemory:
    sizes, count = _sizes(job.critic, lm_head=False, score_head=True)
    work = replace(_scoring_pass(job, job.critic), recompute=job.critic.recompute)
    scoring = {SCORING: scoring_graph(sizes, work, count, device)}
    return _trained("critic", job, job.critic, sizes, count, scoring, device, logits=False)


def _trained(
    name: str,
    job: JobConfig,
    config: RunConfig,
    sizes: RankSizes,
    count: ParameterCount,
    graphs: dict[str, GraphMemory],
    device: DeviceTraits,
    *,
    logits: bool,
) -> ModelMemory:
    """A model with an optimizer; ``graphs`` are those of the phases before."""
    rows = minibatch_rows(job, config)
    micro = job.ppo.micro_batch_rows(config)
    work = Pass(
        rows=micro,
        columns=job.ppo.max_length,
        responses=job.ppo.max_response_length,
        logits=logits,
        recompute=config.recompute,
        repeated=micro < rows,
    )
    masters = 1 if sizes.param < FLOAT32 else 0
    replicas = config.parallel.data_parallel if config.shards_optimizer else 1
    swapped = bool(config.optimizer.get("swap"))
    states = MOMENTS * count.total + masters * count.body
    # The step of the largest tensor, with its states if they come for it.
    fetched = (MOMENTS + masters) / replicas if swapped else 0
    step = int((STEP_ARRAYS + fetched) * count.largest * FLOAT32)
    training = training_graph(sizes, work, count, device)
    training = replace(training, activations=max(training.activations, step))
    return ModelMemory(
        name=name,
        mesh=mesh_of(config),
        parameters=count.total,
        weights=count.weight_bytes(sizes.param),
        moments=FLOAT32 * -(-states // replicas),
        gradients=FLOAT32 * count.total,
        graphs=graphs | {TRAINING: training},
        offloaded=config.context.memory_offload,
        swapped=swapped,
        saved=0 if swapped and replicas == 1 else FLOAT32 * states,
    )


def _reference(job: JobConfig, device: DeviceTraits) -> ModelMemory:
    sizes, count = _sizes(job.infer, lm_head=True, score_head=False)
    work = _scoring_pass(job, job.infer, logits=True)
    return ModelMemory(
        name="reference",
        mesh=mesh_of(job.infer),
        parameters=count.total,
        weights=count.weight_bytes(sizes.param),
        graphs={SCORING: scoring_graph(sizes, work, count, device)},
        offloaded=job.infer.context.memory_offload,
    )


def _reward(job: JobConfig, device: DeviceTraits) -> ModelMemory:
    sizes, count = _sizes(job.reward, lm_head=False, score_head=True)
    work = _scoring_pass(job, job.reward)
    return ModelMemory(
        name="reward",
        mesh=mesh_of(job.reward),
        parameters=count.total,
        weights=count.weight_bytes(sizes.param),
        graphs={SCORING: scoring_graph(sizes, work, count, device)},
        offloaded=job.reward.context.memory_offload,
    )


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
"""The parts of a phase's memory, in the order of the tables."""


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
        models: one entry per model.
        phases: one entry per phase, in the order they run.
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
            for model in job_layouts(self.job)
            for rank in ranks
        ]


def plan_memory(job: JobConfig, *, with_reward_model: bool = True) -> MemoryPlan:
    """Computes the memory of every model and phase; needs neither device nor MindSpore."""
    device = traits_of(job.train.context.device_target)
    models = tuple(job_models(job, device, with_reward_model=with_reward_model))
    phases = _cumulative(job, models, device) if device.host_shared else _pooled(job, models, device)
    return MemoryPlan(job, device, models, phases, 0 if device.host_shared else _host_bytes(models))


def _pooled(job: JobConfig, models: tuple[ModelMemory, ...], device: DeviceTraits) -> tuple[PhaseMemory, ...]:
    """On a device: what stays, and what the phase takes from the pool and returns; models take turns."""
    stays = {
        "weights": sum(model.weights for model in models if not model.offloaded),
        "moments": sum(model.moments for model in models if not model.swapped),
        "process": device.process,
    }
    # The last to be trained stays until the next rollout.
    last = max((model.weights for model in models if model.offloaded and model.gradients), default=0)
    phases = []
    for name in PHASES:
        taken = _fullest(models, name, alone=True) or {"weights": last}
        copies = {"copies": _buckets(job) if name == SYNC else 0}
        phases.append(_phase(name, stays, taken, copies))
    return tuple(phases)


def _cumulative(
    job: JobConfig, models: tuple[ModelMemory, ...], device: DeviceTraits
) -> tuple[PhaseMemory, ...]:
    """On CPU: what a phase takes from the system is not returned, so later phases have it too.

    Rollout and scoring are those of the first iteration, when the moments, which are zeros, take no more
    memory than loading a model has left free. From the second iteration on, all phases are at the peak.
    Nothing is saved by moving models to the host, which is the device.
    """
    stays = {
        "weights": sum(model.weights for model in models),
        "moments": sum(model.moments for model in models),
        "process": device.process + device.training_imports,
    }
    phases = []
    pool: dict[str, int] = {}
    compiled = {"kernels": 0, "graphs": 0}
    for name in PHASES:
        pool = max(pool, _fullest(models, name, alone=False), key=lambda taken: sum(taken.values()))
        of_phase = [model.graphs[name] for model in models if name in model.graphs]
        # Models share their graphs, unless they differ in sizes.
        compiled["kernels"] += max((graph.kernels for graph in of_phase), default=0)
        compiled["graphs"] += max((graph.compiled for graph in of_phase), default=0)
        copies = {"copies": _buckets(job) if name in (SYNC, SAVE) else 0}
        phase = _phase(name, stays, pool, compiled, copies)
        if name in (ROLLOUT, SCORING):
            phase.parts["moments"] = min(phase.parts["moments"], max(model.weights for model in models))
        phases.append(phase)
    return tuple(phases)


def _phase(name: str, *contributions: Mapping[str, int]) -> PhaseMemory:
    return PhaseMemory(name, {part: sum(one.get(part, 0) for one in contributions) for part in PARTS})


def _fullest(models: tuple[ModelMemory, ...], phase: str, *, alone: bool) -> dict[str, int]:
    """What the model that takes most in a phase takes (:meth:`ModelMemory.taken`); empty if none does."""
    taken = [model.taken(phase, alone=alone) for model in models if phase in model.graphs]
    return max(taken, key=lambda one: sum(one.values()), default={})


def _buckets(job: JobConfig) -> int:
    """What a rank holds of the buckets of a sync."""
    same = job.train.parallel == job.infer.parallel
    return 0 if same or job.train.parallel.model_parallel == 1 else BUCKET_BYTES


def _host_bytes(models: tuple[ModelMemory, ...]) -> int:
    """The process, what is offloaded, and the largest copy: a model in loading or sync, moments in saving."""
    resting = sum(model.on_host for model in models)
    return HOST_PROCESS + resting + max(max(model.weights, model.saved) for model in models)
