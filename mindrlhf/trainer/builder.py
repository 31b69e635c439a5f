"""Builds the models of a job, each on its own mesh, and fills them from the checkpoints given."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from mindrlhf.checkpoint.element_types import to_mindspore
from mindrlhf.checkpoint.shards import open_model
from mindrlhf.checkpoint.sources import LocalSource
from mindrlhf.configs.keys import JobConfig, RunConfig
from mindrlhf.models.device_memory import DeviceMemory
from mindrlhf.models.generator import GenerationConfig, PPOModelInfer
from mindrlhf.models.networks import CriticModel, PolicyValues, PPOModelTrain, RewardModel, SequenceModel
from mindrlhf.models.score_head import new_score_head
from mindrlhf.parallel.groups import Groups, create_groups
from mindrlhf.parallel.layout import mesh_of
from mindrlhf.trainer.weight_paths import WeightPaths
from mindrlhf.utils.logging import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class PPOModels:
    """All models of a job on this rank.

    Attributes:
        infer: the generating policy.
        train: the trained policy, with a value head when the critic shares its backbone.
        ref: the reference policy.
        reward: ``None`` when rewards come from a function alone.
        critic: a separate critic; ``None`` when the policy's backbone is shared, or without a critic.
        device_memory: in which they all are, and of which those that are offloaded take turns.
    """

    infer: PPOModelInfer
    train: PPOModelTrain
    ref: PPOModelTrain
    reward: RewardModel | None
    critic: CriticModel | None
    device_memory: DeviceMemory = field(default_factory=DeviceMemory)

    @cached_property
    def values(self) -> CriticModel | PolicyValues | None:
        """The network that gives the values before an update, ``None`` without a critic."""
        if not self.train.value_head:
            return self.critic
        return PolicyValues(self.train)


def build_models(
    job: JobConfig, weights: WeightPaths, rank: int, *, with_reward_model: bool = True
) -> PPOModels:
    """Builds and fills every model; collective: every rank must call it.

    Args:
        job: the checked configuration.
        weights: where weights come from.
        rank: this worker.
        with_reward_model: False leaves the reward model out.

    Raises:
        CheckpointError: a checkpoint's names or shapes do not fit its model.
    """
    # One after the other, so that models that are offloaded are never on the device together.
    weights, ppo, memory = weights.checked(), job.ppo, DeviceMemory()
    infer = build_infer(job, create_groups(mesh_of(job.infer), rank))
    infer.load(load_shards(weights.infer, infer, "infer policy"))
    memory.watch("kv_cache", lambda: infer.cache_bytes)
    _place(infer, job.infer, memory)

    train = _policy(job, job.train, rank, value_head=ppo.critic == "shared")
    fill_model(train, weights.train, ppo.seed, "train policy", "critic", ppo.value_head_init_scale)
    _place(train, job.train, memory)

    ref = _policy(job, job.infer, rank, with_entropy=False)
    fill_model(ref, weights.ref, ppo.seed, "reference")
    _place(ref, job.infer, memory)

    reward = critic = None
    if with_reward_model:
        reward = RewardModel(
            job.reward.model, sequence_groups(job.reward, rank), prompt_length=ppo.max_prompt_length
        )
        fill_model(reward, weights.reward or weights.train, ppo.seed, "reward model", "reward")
        _place(reward, job.reward, memory)
    if ppo.critic == "separate":
        critic = CriticModel(
            job.critic.model,
            sequence_groups(job.critic, rank),
            prompt_length=ppo.max_prompt_length,
            recompute=job.critic.recompute,
        )
        path = weights.critic or weights.train
        fill_model(critic, path, ppo.seed, "critic", "critic", ppo.value_head_init_scale)
        _place(critic, job.critic, memory)
    return PPOModels(infer, train, ref, reward, critic, memory)


def _place(model: SequenceModel | PPOModelInfer, config: RunConfig, memory: DeviceMemory) -> None:
    """Adds a model to the device's account; one that is offloaded goes to host memory."""
    memory.add(model.store, offloaded=config.context.memory_offload)
    model.device_memory = memory


def build_infer(job: JobConfig, groups: Groups) -> PPOModelInfer:
    """The generating policy, without weights."""
    ppo = job.ppo
    generation = GenerationConfig(
        max_prompt_length=ppo.max_prompt_length,
        max_response_length=ppo.max_response_length,
        temperature=ppo.temperature,
        top_k=ppo.top_k,
        top_p=ppo.top_p,
        do_sample=ppo.do_sample,
        stop_token_ids=ppo.stop_token_ids,
        pad_token_id=ppo.pad_token_id,
        valid_vocab_size=valid_vocab_size(job),
    )
    return PPOModelInfer(
        job.infer.generator_model,
        groups,
        generation,
        batch_size=ppo.generation_batch_size or ppo.rollout_batch_size // groups.mesh.dp,
        decode_steps_per_call=ppo.decode_steps_per_call,
    )


def valid_vocab_size(job: JobConfig) -> int:
    """Ids that can be sampled; the rest of the vocabulary is padding."""
    return job.ppo.valid_vocab_size or job.infer.model.vocab_size


def sequence_groups(config: RunConfig, rank: int) -> Groups:
    """Groups of a network over whole sequences, as its YAML asks for; every rank must call it."""
    return create_groups(mesh_of(config), rank, splits_rows=config.splits_rows)


def _policy(job: JobConfig, config: RunConfig, rank: int, **settings: bool) -> PPOModelTrain:
    return PPOModelTrain(
        config.model,
        sequence_groups(config, rank),
        prompt_length=job.ppo.max_prompt_length,
        temperature=job.ppo.temperature,
        valid_vocab_size=job.ppo.valid_vocab_size or config.model.vocab_size,
        recompute=config.recompute,
        **settings,
    )


def fill_model(
    model: SequenceModel, path: Path | None, seed: int, label: str, head: str = "", head_scale: float = 1.0
) -> None:
    """Loads a model; a scalar head that the checkpoint lacks starts fresh, and that is logged.

    Args:
        model: to fill.
        path: its checkpoint.
        seed: of the job.
        label: the model's name in messages.
        head: purpose of a fresh head, so that the heads of two models differ.
        head_scale: factor of its weights.
    """
    shards = load_shards(path, model, label)
    if model.layouts.keys() - shards.keys():  # nothing but the scalar head may be missing
        logger.log(
            logging.WARNING if model.groups.rank == 0 else logging.DEBUG,  # every rank does the same
            "%s: %s has no scalar head; a new one is initialised with N(0, 1/sqrt(H+1)) (head %r, seed %d%s)",
            label, path, head, seed, "" if head_scale == 1 else f", scale {head_scale:g}",
        )  # fmt: skip
        shards |= new_score_head(model.config.hidden_size, seed, head, scale=head_scale)
    model.load(shards)


def load_shards(path: Path | None, model: SequenceModel | PPOModelInfer, label: str) -> dict[str, np.ndarray]:
    """This rank's shards of ``model``, logged as ``label``; heads that only one side has are left out."""
    assert path is not None
    with open_model(path, model.config, model.layouts) as source:
        local = LocalSource(source, model.layouts, model.groups.rank)
        shards = {name: to_mindspore(local.read(name)) for name in local.tensors}
    logger.info("%s: %d of %d tensors loaded from %s", label, len(shards), len(model.layouts), path)
    return shards
