"""Builds the models of a job, each on its own mesh, and fills them from the checkpoints given."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from mindrlhf.checkpoint.shards import load_shard
from mindrlhf.configs.schema import JobConfig, PPOConfig, RunConfig
from mindrlhf.models.job_layouts import job_layouts
from mindrlhf.models.qwen2.generator import GenerationConfig, PPOModelInfer
from mindrlhf.models.qwen2.heads import new_score_head
from mindrlhf.models.qwen2.layouts import LM_HEAD, SCORE_HEAD
from mindrlhf.models.qwen2.networks import (
    CriticModel,
    PolicyValues,
    PPOModelTrain,
    RewardModel,
    SequenceModel,
)
from mindrlhf.parallel.groups import Groups, create_groups
from mindrlhf.parallel.layout import Layout, mesh_of
from mindrlhf.utils.errors import MindRLHFError
from mindrlhf.utils.logging import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class WeightPaths:
    """Where the weights of each model come from, as given on the command line.

    Each is a full ``.ckpt`` / ``.safetensors`` file, a Hugging Face directory or a directory with
    ``rank_0/ rank_1/ ...``.
    """

    infer: Path | None = None
    train: Path | None = None
    ref: Path | None = None
    reward: Path | None = None
    critic: Path | None = None

    def checked(self) -> WeightPaths:
        """The paths with what is not given filled in; refuses paths that are not there.

        The policy's two models stand in for each other, and the policy for the reference. A critic
        starts from the reward model (checklist 15). Reward model and critic stay ``None`` when neither
        is given: they then start from the policy with a fresh head.

        Raises:
            MindRLHFError: no policy weights at all, or a path does not exist.
        """
        missing = [
            f"{field.name}: {path}"
            for field in fields(self)
            if (path := getattr(self, field.name)) and not path.exists()
        ]
        if missing:
            raise MindRLHFError(
                "these checkpoints do not exist, give paths that are there:\n  " + "\n  ".join(missing)
            )
        policy = self.train or self.infer
        if policy is None:
            raise MindRLHFError(
                "no policy weights: pass --load_sft_checkpoint_train and/or --load_sft_checkpoint_infer"
            )
        infer = self.infer or policy
        return WeightPaths(infer, policy, self.ref or infer, self.reward, self.critic or self.reward)


@dataclass(frozen=True)
class PPOModels:
    """All models of a job on this rank."""

    infer: PPOModelInfer
    train: PPOModelTrain
    ref: PPOModelTrain
    reward: RewardModel | None  # None: rewards come from a function alone
    critic: CriticModel | None  # None: the train policy's backbone is shared

    @cached_property
    def values(self) -> CriticModel | PolicyValues:
        """The network that gives the values before an update; one object, so that it compiles once."""
        return PolicyValues(self.train) if self.critic is None else self.critic


def build_models(
    job: JobConfig, weights: WeightPaths, rank: int, *, with_reward_model: bool = True
) -> PPOModels:
    """Builds and fills every model; every rank must call it, in step.

    Args:
        job: the checked configuration.
        weights: where weights come from.
        rank: this worker.
        with_reward_model: False leaves the reward model out.

    Raises:
        CheckpointError: a checkpoint's names or shapes do not fit its model.
    """
    weights = weights.checked()
    ppo = job.ppo
    shared = ppo.critic == "shared"
    groups = {name: create_groups(mesh_of(config), rank) for name, config in job_runs(job).items()}
    infer = build_infer(job, groups["infer"])
    train = _policy(job.train, groups["train"], ppo, value_head=shared)
    ref = _policy(job.infer, groups["infer"], ppo, with_entropy=False)
    reward = critic = None
    if with_reward_model:
        reward = RewardModel(job.reward.model, groups["reward"], prompt_length=ppo.max_prompt_length)
    if not shared:
        # Its YAML may be one for inference, with bfloat16 weights; steps of a small learning rate would be
        # lost in their rounding, so what is trained is kept in float32.
        trained = replace(job.critic.model, param_init_type="float32")
        critic = CriticModel(trained, groups["critic"], prompt_length=ppo.max_prompt_length)

    infer.load(load_shards(weights.infer, job_layouts(job)["infer_policy"], rank, "infer policy"))
    scale = ppo.value_head_init_scale
    fill_model(train, weights.train, ppo.seed, rank, "train policy", "critic", scale)
    fill_model(ref, weights.ref, ppo.seed, rank, "reference")
    if reward is not None:
        fill_model(
            reward,
            weights.reward or policy_weights_for(job.reward, job, weights),
            ppo.seed,
            rank,
            "reward model",
            "reward",
        )
    if critic is not None:
        fill_model(
            critic,
            weights.critic or policy_weights_for(job.critic, job, weights),
            ppo.seed,
            rank,
            "critic",
            "critic",
            scale,
        )
    return PPOModels(infer, train, ref, reward, critic)


def policy_weights_for(config: RunConfig, job: JobConfig, weights: WeightPaths) -> Path | None:
    """Which of the policy's two checkpoints a reward model or critic without its own starts from.

    Both are the same model, but rank directories fit one layout only: the train one when ``config`` splits
    as the trained policy does, else the infer one.
    """
    return weights.train if mesh_of(config) == mesh_of(job.train) else weights.infer


def job_runs(job: JobConfig) -> dict[str, RunConfig]:
    """The YAMLs of a job by role."""
    return {"infer": job.infer, "train": job.train, "reward": job.reward, "critic": job.critic}


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
    rows = ppo.rollout_batch_size // groups.mesh.dp
    return PPOModelInfer(
        job.infer.model,
        groups,
        generation,
        batch_size=ppo.generation_batch_size or rows,
        decode_steps_per_call=ppo.decode_steps_per_call,
    )


def valid_vocab_size(job: JobConfig) -> int:
    """Ids that can be sampled; the rest of the vocabulary is padding."""
    return job.ppo.valid_vocab_size or job.infer.model.vocab_size


def _policy(
    config: RunConfig,
    groups: Groups,
    ppo: PPOConfig,
    *,
    value_head: bool = False,
    with_entropy: bool = True,
) -> PPOModelTrain:
    return PPOModelTrain(
        config.model,
        groups,
        prompt_length=ppo.max_prompt_length,
        temperature=ppo.temperature,
        valid_vocab_size=ppo.valid_vocab_size or config.model.vocab_size,
        value_head=value_head,
        with_entropy=with_entropy,
    )


def fill_model(
    model: SequenceModel,
    path: Path | None,
    seed: int,
    rank: int,
    what: str,
    head: str = "",
    head_scale: float = 1.0,
) -> None:
    """Loads a model; a scalar head that the checkpoint lacks starts fresh, and that is said.

    Args:
        model: to fill.
        path: its checkpoint.
        seed, rank: of the job.
        what: the model's name in messages.
        head: purpose of a fresh head, so that those of two models differ.
        head_scale: factor of its weights.
    """
    assert path is not None
    shards = load_shards(path, model.layouts, rank, what)
    if SCORE_HEAD[0] in model.layouts and not set(SCORE_HEAD) <= shards.keys():
        logger.log(
            logging.WARNING if rank == 0 else logging.DEBUG,  # every rank does the same; once is enough
            "%s: %s has no scalar head; a new one is initialised with N(0, 1/sqrt(H+1)) (head %r, seed %d%s)",
            what, path, head, seed, "" if head_scale == 1 else f", scale {head_scale:g}",
        )  # fmt: skip
        shards |= new_score_head(model.config.hidden_size, seed, head, scale=head_scale)
    model.load(shards)


def load_shards(path: Path | None, layouts: dict[str, Layout], rank: int, what: str) -> dict[str, np.ndarray]:
    """This rank's shards of ``layouts``, logged as ``what``; heads that only one side has are left out."""
    assert path is not None
    ignore = {LM_HEAD} if LM_HEAD not in layouts and SCORE_HEAD[0] in layouts else set()
    ignore |= set() if SCORE_HEAD[0] in layouts else set(SCORE_HEAD)
    shards = load_shard(path, layouts, rank, new=SCORE_HEAD, ignore=ignore)
    logger.info("%s: %d of %d tensors loaded from %s", what, len(shards), len(layouts), path)
    return shards
