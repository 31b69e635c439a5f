"""The training programs behind the commands: check flags and configuration, then train on this worker.

Everything here is light, so that a fault of the configuration is reported before MindSpore is imported.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from mindrlhf.checkpoint.shards import check_weights, find_weights
from mindrlhf.configs.flags import PPOOptions, RewardOptions, RunOptions, SFTOptions
from mindrlhf.configs.load import load_ppo_job, load_stage
from mindrlhf.models.families import check_families
from mindrlhf.models.job_layouts import job_layouts
from mindrlhf.parallel.strategy import write_strategies
from mindrlhf.runtime.launching import count_workers, serve_as_scheduler
from mindrlhf.runtime.signals import ignore_signals
from mindrlhf.trainer.output_paths import check_run_outputs, check_strategy_outputs
from mindrlhf.trainer.trackers.registry import check_trackers
from mindrlhf.trainer.weight_paths import WeightPaths
from mindrlhf.utils.errors import MindRLHFError
from mindrlhf.utils.files import check_unlocked
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.ranks import env_rank, env_world_size, is_scheduler

logger = get_logger(__name__)


def save_strategies(options: PPOOptions, directory: Path) -> list[Path]:
    """Writes the strategy files of every model; needs no device, data, weights or other worker.

    Under msrun a worker writes its own rank's; alone, those of all ranks of ``--world_size``, or of
    the number that the YAMLs ask for.
    """
    under_msrun = env_world_size() > 1
    world_size = env_world_size() if under_msrun else options.world_size
    job = load_ppo_job(options, world_size)
    check_strategy_outputs(options, directory)
    if is_scheduler():
        return []
    ranks = [env_rank()] if under_msrun else range(world_size or job.infer.parallel.world_size)
    files = write_strategies(directory, job_layouts(job), ranks)
    logger.info("%d strategy files for rank(s) %s in %s", len(files), list(ranks), directory.resolve())
    return files


def run_ppo(options: PPOOptions) -> Path:
    """Runs a PPO job on this worker and returns the directory of the last checkpoint.

    Raises:
        MindRLHFError: anything the user can fix; configuration, data and paths are checked before any
            model is built.
    """
    data, save = _required(options, "mind_dataset_dir"), _required(options, "save_ckpt_dir")
    _check_flags(options, save, unit="iteration")
    job = load_ppo_job(options, count_workers(use_parallel=options.use_parallel))
    check_families((job.infer, job.train, job.reward, job.critic))
    check_unlocked(save)
    with_reward_model = options.reward_fn is None or options.load_rm_checkpoint is not None
    WeightPaths.of(options).check_against(job, with_reward_model=with_reward_model)
    if _served_as_scheduler():
        return save
    from mindrlhf.trainer.recipes.ppo_job import train_ppo

    return train_ppo(options, job, data, save)


def run_stage(options: SFTOptions | RewardOptions) -> Path:
    """Runs supervised fine-tuning, or trains a reward model, on this worker.

    Returns:
        The directory of the last weights. When SIGTERM stopped it, that of the results, which holds the saved
        state.

    Raises:
        MindRLHFError: anything the user can fix; configuration, data and paths are checked before any
            model is built.
    """
    _check_flags(options, options.save_ckpt_dir, unit="step")
    plan = load_stage(options, count_workers(use_parallel=options.use_parallel))
    check_families([plan.config])
    check_unlocked(options.save_ckpt_dir)
    path = options.load_sft_checkpoint
    if not path.exists():
        raise MindRLHFError(f"--load_sft_checkpoint {path} does not exist; name existing weights")
    options = replace(options, load_sft_checkpoint=find_weights(path, "policy"))
    check_weights(options.load_sft_checkpoint, plan.config, score_head=isinstance(options, RewardOptions))
    if _served_as_scheduler():
        return options.save_ckpt_dir
    if isinstance(options, SFTOptions):
        from mindrlhf.trainer.recipes.sft import train_sft

        return train_sft(options, plan)
    from mindrlhf.trainer.recipes.reward_model import train_reward

    return train_reward(options, plan)


def _served_as_scheduler() -> bool:
    """In msrun's scheduler, serves the workers until they have ended.

    Flags and configuration are checked there first as in a worker, so that it ends with them on a fault.
    """
    os.environ.setdefault("GLOG_v", "3")
    if not is_scheduler():
        return False
    ignore_signals()
    serve_as_scheduler()
    return True


def _check_flags(options: RunOptions, save: Path, *, unit: str) -> None:
    """Refuses trackers that are not installed, two places to resume from, and outputs that would destroy.

    Raises:
        MindRLHFError: names the flags and the remedy.
    """
    check_trackers(options.trackers)
    resume_from = options.resume_from
    if resume_from is not None and options.resume_training:
        raise MindRLHFError(
            "--resume_training True takes the newest whole checkpoint of --save_ckpt_dir, --resume_from "
            f"takes {resume_from}: give one of the two"
        )
    if resume_from is not None and not resume_from.is_dir():
        raise MindRLHFError(
            f"--resume_from {resume_from}: there is no such directory; name an existing {unit}_NNNNNN "
            "directory"
        )
    check_run_outputs(options, save, unit)


def _required(options: PPOOptions, flag: str) -> Path:
    path = getattr(options, flag)
    if path is None:
        raise MindRLHFError(f"--{flag} is missing; it is needed unless --only_save_strategy True")
    return Path(path)
