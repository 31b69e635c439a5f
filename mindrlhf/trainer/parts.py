"""What a PPO job has besides models and optimizers: its stream of prompts and its KL controller."""

from __future__ import annotations

from pathlib import Path

from mindrlhf.algorithms.kl import AdaptiveKLController, FixedKLController, KLController
from mindrlhf.configs.schema import JobConfig, PPOConfig
from mindrlhf.data.prompts import PromptStream
from mindrlhf.trainer.builder import valid_vocab_size


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
