"""The models of a job on one rank: what they store, and the graphs they run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from mindrlhf.configs.schema import JobConfig, RunConfig
from mindrlhf.models.qwen2.layouts import parameter_layouts
from mindrlhf.parallel.layout import Layout, Mesh, mesh_of
from mindrlhf.planning.devices import DeviceTraits
from mindrlhf.planning.graphs import (
    GraphMemory,
    Pass,
    cached_columns,
    decode_steps,
    generation_graphs,
    kv_cache_bytes,
    scoring_graph,
    training_graph,
)
from mindrlhf.planning.sizes import (
    BYTES,
    ParameterCount,
    RankSizes,
    count_parameters,
    kinds_bytes,
    rank_sizes,
)

FLOAT32 = BYTES["float32"]
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
        parameters: numbers a rank holds.
        weights: their bytes.
        moments: of the optimizer, on the device.
        host_moments: of the optimizer, kept on the host (``optimizer.swap``).
        gradient_kinds: how often there is a gradient of each shape and number of bytes.
        step_sets: sets of gradients that the optimizer step makes: the clipped one, which the fused kernel
            makes one parameter at a time.
        kv_cache: keys and values of a generate call.
        graphs: phase -> what its compiled graph takes.
    """

    name: str
    mesh: Mesh
    parameters: int
    weights: int
    moments: int = 0
    host_moments: int = 0
    gradient_kinds: Counter[tuple[tuple[int, ...], int]] = field(default_factory=Counter)
    step_sets: int = 0
    kv_cache: int = 0
    graphs: dict[str, GraphMemory]

    @property
    def gradients(self) -> int:
        """One set."""
        return kinds_bytes(self.gradient_kinds)

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
        """What stays on the device between phases, beside the gradients."""
        return self.weights + self.moments + self.kv_cache


def job_models(job: JobConfig, device: DeviceTraits, *, with_reward_model: bool) -> list[ModelMemory]:
    """Every model that the job builds, in the order of trainer/builder.py."""
    models = [_generator(job, device), _policy(job, device), _reference(job, device)]
    if with_reward_model:
        models.append(_reward(job, device))
    if job.ppo.critic == "separate":
        models.append(_critic(job, device))
    return models


def model_layouts(job: JobConfig) -> dict[str, dict[str, Layout]]:
    """Name of each strategy file's model -> layouts; the same as trainer/layouts.py, which a test checks."""
    shared = job.ppo.critic == "shared"
    return {
        "infer_policy": parameter_layouts(job.infer.model, mesh_of(job.infer)),
        "train_policy": parameter_layouts(job.train.model, mesh_of(job.train), score_head=shared),
        "ref": parameter_layouts(job.infer.model, mesh_of(job.infer)),
        "reward": parameter_layouts(job.reward.model, mesh_of(job.reward), lm_head=False, score_head=True),
        "critic": parameter_layouts(job.critic.model, mesh_of(job.critic), lm_head=False, score_head=True),
    }


def rollout_rows(job: JobConfig, config: RunConfig) -> int:
    """Rows of the rollout that one rank of a model has."""
    return job.ppo.rollout_batch_size // config.parallel.data_parallel


def minibatch_rows(job: JobConfig, config: RunConfig) -> int:
    """Rows of a minibatch that one rank of a trained model has."""
    return job.ppo.minibatch_size // config.parallel.data_parallel


def _sizes(config: RunConfig, *, lm_head: bool, score_head: bool) -> tuple[RankSizes, ParameterCount]:
    mp = config.parallel.model_parallel
    count = count_parameters(config.model, mp, lm_head=lm_head, score_head=score_head)
    return rank_sizes(config.model, mp), count


def _scoring_pass(job: JobConfig, config: RunConfig, **what: bool) -> Pass:
    rows = job.ppo.score_batch_size or rollout_rows(job, config)
    return Pass(rows=rows, columns=job.ppo.max_length, responses=job.ppo.max_response_length, **what)


def _padded(job: JobConfig, config: RunConfig) -> bool:
    return 0 < job.ppo.valid_vocab_size < config.model.vocab_size


def _generator(job: JobConfig, device: DeviceTraits) -> ModelMemory:
    ppo = job.ppo
    sizes, count = _sizes(job.infer, lm_head=True, score_head=False)
    rows = ppo.generation_batch_size or rollout_rows(job, job.infer)
    prompt, response = ppo.max_prompt_length, ppo.max_response_length
    steps = decode_steps(response, ppo.decode_steps_per_call)
    return ModelMemory(
        name="policy infer",
        mesh=mesh_of(job.infer),
        parameters=count.total,
        weights=count.weight_bytes(sizes.param),
        kv_cache=kv_cache_bytes(sizes, rows, cached_columns(prompt, response, steps)),
        graphs={ROLLOUT: generation_graphs(sizes, rows, prompt, response, steps, device)},
    )


def _policy(job: JobConfig, device: DeviceTraits) -> ModelMemory:
    shared = job.ppo.critic == "shared"
    sizes, count = _sizes(job.train, lm_head=True, score_head=shared)
    scoring = (
        {SCORING: scoring_graph(sizes, _scoring_pass(job, job.train, values=True), device)} if shared else {}
    )
    work = {
        "logits": True,
        "values": shared,
        "entropy": True,
        "entropy_gradient": job.ppo.entropy_coef > 0,
        "padded_vocab": _padded(job, job.train),
    }
    return _trained("policy train", job, job.train, sizes, count, work, scoring, device)


def _critic(job: JobConfig, device: DeviceTraits) -> ModelMemory:
    sizes, count = _sizes(job.critic, lm_head=False, score_head=True)
    # What is trained is kept in float32 whatever its YAML says (trainer/builder.py).
    sizes = RankSizes(**(vars(sizes) | {"param": FLOAT32}))
    scoring = {SCORING: scoring_graph(sizes, _scoring_pass(job, job.critic, values=True), device)}
    return _trained("critic", job, job.critic, sizes, count, {"values": True}, scoring, device)


def _trained(
    name: str,
    job: JobConfig,
    config: RunConfig,
    sizes: RankSizes,
    count: ParameterCount,
    what: dict[str, bool],
    graphs: dict[str, GraphMemory],
    device: DeviceTraits,
) -> ModelMemory:
    """A model with an optimizer; ``graphs`` are those of the phases before."""
    rows = minibatch_rows(job, config)
    micro = job.ppo.micro_batch_size or rows
    work = Pass(rows=micro, columns=job.ppo.max_length, responses=job.ppo.max_response_length, **what)
    moments = MOMENTS * FLOAT32 * count.total
    on_host = bool(config.optimizer.get("swap")) and not device.host_shared
    return ModelMemory(
        name=name,
        mesh=mesh_of(config),
        parameters=count.total,
        weights=count.weight_bytes(sizes.param),
        moments=0 if on_host else moments,
        host_moments=moments if on_host else 0,
        gradient_kinds=count.kinds(sizes.param),
        step_sets=int(not device.fused_optimizer),
        graphs=graphs | {TRAINING: training_graph(sizes, work, count, device)},
    )


def _reference(job: JobConfig, device: DeviceTraits) -> ModelMemory:
    sizes, count = _sizes(job.infer, lm_head=True, score_head=False)
    work = _scoring_pass(job, job.infer, logits=True, padded_vocab=_padded(job, job.infer))
    return ModelMemory(
        name="reference",
        mesh=mesh_of(job.infer),
        parameters=count.total,
        weights=count.weight_bytes(sizes.param),
        graphs={SCORING: scoring_graph(sizes, work, device)},
    )


def _reward(job: JobConfig, device: DeviceTraits) -> ModelMemory:
    sizes, count = _sizes(job.reward, lm_head=False, score_head=True)
    work = _scoring_pass(job, job.reward, values=True, last_token=True)
    return ModelMemory(
        name="reward",
        mesh=mesh_of(job.reward),
        parameters=count.total,
        weights=count.weight_bytes(sizes.param),
        graphs={SCORING: scoring_graph(sizes, work, device)},
    )
