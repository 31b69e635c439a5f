"""Parts of a PPO job: its stream of prompts, its KL controller, what of it is trained."""

from __future__ import annotations

from pathlib import Path

from mindrlhf.algorithms.kl import AdaptiveKLController, FixedKLController, KLController
from mindrlhf.configs.schema import JobConfig, PPOConfig
from mindrlhf.data.prompts import PromptStream
from mindrlhf.trainer.builder import PPOModels, valid_vocab_size
from mindrlhf.trainer.checkpointing import Trained
from mindrlhf.trainer.update import PPOUpdate


def open_prompts(path: Path, job: JobConfig) -> PromptStream:
    """The prompts of ``--mind_dataset_dir``, drawn as the job's configuration says.

    Raises:
        DataError: the file does not fit the job.
    """
    config = job.ppo
    return PromptStream(
        path,
        batch_size=config.rollout_batch_size,
        max_prompt_length=config.max_prompt_length,
        pad_token_id=config.pad_token_id,
        seed=config.seed,
        shuffle=config.shuffle,
        vocab_size=valid_vocab_size(job),
    )


def make_kl_controller(config: PPOConfig) -> KLController:
    """The controller that ``kl_controller`` names."""
    if config.kl_controller == "fixed":
        return FixedKLController(config.kl_coef)
    return AdaptiveKLController(config.kl_coef, config.kl_target, config.kl_horizon)


def trained_models(models: PPOModels, update: PPOUpdate) -> list[Trained]:
    """The policy and a separate critic, with their optimizers; a shared critic is in the policy."""
    trained = [Trained("policy", models.train, update.policy_step.optimizer)]
    if models.critic is not None and update.critic_step is not None:
        trained.append(Trained("critic", models.critic, update.critic_step.optimizer))
    return trained
