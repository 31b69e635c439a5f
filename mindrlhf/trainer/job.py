"""One PPO job from its command-line options: check, start, train, export."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindrlhf.checkpoint.conversion import check_hf_output
from mindrlhf.configs.load import load_ppo_job
from mindrlhf.configs.options import PPOOptions
from mindrlhf.configs.schema import JobConfig
from mindrlhf.data.tokenizer import Tokenizer
from mindrlhf.models.qwen2.layouts import SCORE_HEAD
from mindrlhf.runtime.launching import count_workers, scratch_directory, serve_as_scheduler
from mindrlhf.runtime.watchdog import Watchdog, supervised, suspend_watchdog
from mindrlhf.trainer.runs import check_resume_flags
from mindrlhf.trainer.tokenizer_checks import check_one_tokenizer, load_model_tokenizer
from mindrlhf.trainer.trackers.choice import check_trackers
from mindrlhf.utils.errors import MindRLHFError
from mindrlhf.utils.files import check_experience_place
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.provenance import plain
from mindrlhf.utils.ranks import env_rank, env_world_size, is_scheduler
from mindrlhf.utils.timers import Timer

if TYPE_CHECKING:
    from mindrlhf.runtime.signals import StopRequest
    from mindrlhf.trainer.builder import WeightPaths
    from mindrlhf.trainer.ppo_trainer import PPOTrainer
    from mindrlhf.trainer.reward_function import RewardFunction
    from mindrlhf.trainer.watching import Watchers

logger = get_logger(__name__)

_WITH_TOKENIZER = (
    "tokenizer_path", "load_sft_checkpoint_train", "load_sft_checkpoint_infer", "load_ref_checkpoint",
    "load_rm_checkpoint", "load_critic_checkpoint",
)  # fmt: skip

_IN_NO_GRAPH = (
    "seed", "save_interval", "keep_checkpoints", "log_samples", "eval_interval", "eval_prompts",
    "eval_samples", "shuffle",
)  # fmt: skip
_COMPUTING_PHASES = frozenset({"rollout", "score", "train", "sync", "evaluate"})


def save_strategies(options: PPOOptions, directory: Path) -> list[Path]:
    """Writes the strategy files of every model; needs no device, data, weights or other worker.

    Under msrun a worker writes its own rank's; alone, those of all ranks of ``--world_size``, or of as
    many as the YAMLs ask for.
    """
    from mindrlhf.models.job_layouts import job_layouts
    from mindrlhf.parallel.strategy import write_strategies

    under_msrun = env_world_size() > 1
    world_size = env_world_size() if under_msrun else options.world_size
    job = load_ppo_job(options, world_size)
    if is_scheduler():
        return []
    ranks = [env_rank()] if under_msrun else range(world_size or job.infer.parallel.world_size)
    files = write_strategies(directory, job_layouts(job), ranks)
    logger.info("%d strategy files for rank(s) %s in %s", len(files), list(ranks), directory.resolve())
    return files


def run_ppo(options: PPOOptions) -> Path:
    """Runs a whole PPO job on this worker and returns the directory of the last checkpoint.

    Raises:
        MindRLHFError: anything the user can mend; configuration, data and paths are checked before any
            model is built.
    """
    from mindrlhf.runtime.signals import ignore_signals, stop_on_signals
    from mindrlhf.trainer.watching import watch_ppo

    os.environ.setdefault("GLOG_v", "3")
    data, save = _required(options, "mind_dataset_dir"), _required(options, "save_ckpt_dir")
    check_resume_flags(
        options.resume_from, resume_training=options.resume_training, checkpoint="an iteration_NNNNNN"
    )
    check_trackers(options.trackers)
    job = _read_job_of_workers(options)
    if is_scheduler():
        # Checked like a worker, so that it ends with them on a fault; from here on it only serves them.
        ignore_signals()
        serve_as_scheduler()
        return save
    with (
        supervised(options.watchdog_timeout),
        stop_on_signals() as stop,
        watch_ppo(job.ppo.total_iterations, options.trackers) as watchers,
    ):
        trainer = _make_trainer(options, job, data, save, stop, watchers)
        last = trainer.train()
        suspend_watchdog("export")
        if stop.agreed:
            stop.leave(last)
        elif options.export_hf_dir is not None:
            _export(options, trainer, last)
    return last


def _read_job_of_workers(options: PPOOptions) -> JobConfig:
    """The configuration, checked against the number of workers that msrun has started."""
    return load_ppo_job(options, count_workers(use_parallel=options.use_parallel))


def _make_trainer(
    options: PPOOptions, job: JobConfig, data: Path, save: Path, stop: StopRequest, watchers: Watchers
) -> PPOTrainer:
    """Checks what the flags name, takes the device, joins the other workers, builds the models, resumes."""
    from mindrlhf.runtime.compile_cache import open_compile_cache
    from mindrlhf.runtime.device import check_device, check_matmul_dtype, start_runtime
    from mindrlhf.runtime.host_exchange import HostExchange
    from mindrlhf.trainer.ppo_trainer import PPOTrainer, TrainerPaths
    from mindrlhf.trainer.records import check_fresh
    from mindrlhf.trainer.resuming import choose_checkpoint

    scratch = scratch_directory()
    weights = _weight_paths(options)
    if options.resume_from is None and not options.resume_training:
        check_fresh(save)
    tokenizer = _tokenizer(options, job)
    check_one_tokenizer({flag: getattr(options, flag) for flag in _WITH_TOKENIZER})
    reward_function = _reward_function(options)
    if options.export_hf_dir is not None:
        check_hf_output(options.export_hf_dir, overwrite=True)
    check_experience_place(options.save_data_file)
    if job.ppo.eval_interval and options.eval_dataset_dir is None:
        logger.warning("eval_interval is %d, but there is no --eval_dataset_dir", job.ppo.eval_interval)
    if options.ptx_dataset_dir is not None and not job.ppo.ptx_coef:
        logger.warning("--ptx_dataset_dir is not used: ptx_coef is 0")
    check_device(job.train.context)
    check_matmul_dtype(job.train.model)
    runtime = start_runtime(
        job.train.context,
        use_parallel=env_world_size() > 1,
        scratch_dir=scratch,
    )
    caches = []
    if options.enable_compile_cache:
        caches.append(open_compile_cache(graph_configuration(job), runtime, Path(scratch), last_phase="sync"))
    checkpoint = choose_checkpoint(
        save,
        options.resume_from,
        resume_training=options.resume_training,
        job=job,
        exchange=HostExchange(runtime),
    )
    watchdog = Watchdog(
        options.watchdog_timeout,
        # A reward function of the user's may wait for a server.
        computing=_COMPUTING_PHASES if reward_function is None else _COMPUTING_PHASES - {"score", "evaluate"},
        device_target=job.train.context.device_target,
    )
    with Timer() as timer:
        trainer = PPOTrainer(
            job,
            weights,
            TrainerPaths(
                data, save, options.save_data_file, options.eval_dataset_dir, options.ptx_dataset_dir
            ),
            runtime,
            tokenizer=tokenizer,
            verify_sync=options.verify_sync,
            reward_function=reward_function,
            stop=stop,
            listeners=[watchers.console, watchdog, *caches],
            trackers=watchers.trackers,
        )
    logger.info("models built and loaded in %.1f s", timer.seconds)
    watchdog.follow(lambda: trainer.iteration + 1, first_phase="rollout")
    if checkpoint is not None:
        trainer.resume(checkpoint, verified=True)
    elif options.resume_training and trainer.records is not None:
        trainer.records.rewind(-1)  # lines of a run that was cut short before its first checkpoint
    return trainer


def graph_configuration(job: JobConfig) -> dict[str, Any]:
    """All of a configuration but what certainly enters no graph."""
    described: dict[str, Any] = plain(job)
    for role in ("infer", "train", "reward", "critic"):
        for key in ("path", "ignored"):
            del described[role][key]
    for key in _IN_NO_GRAPH:
        del described["ppo"][key]
    return described


def _weight_paths(options: PPOOptions) -> WeightPaths:
    from mindrlhf.trainer.builder import WeightPaths

    return WeightPaths(
        infer=options.load_sft_checkpoint_infer,
        train=options.load_sft_checkpoint_train,
        ref=options.load_ref_checkpoint,
        reward=options.load_rm_checkpoint,
        critic=options.load_critic_checkpoint,
    ).checked()


def _required(options: PPOOptions, flag: str) -> Path:
    path = getattr(options, flag)
    if path is None:
        raise MindRLHFError(f"--{flag} is missing; it is needed unless --only_save_strategy True")
    return Path(path)


def _tokenizer(options: PPOOptions, job: JobConfig) -> Tokenizer | None:
    """The tokenizer of ``--tokenizer_path``, checked against the model's vocabulary."""
    if options.tokenizer_path is None:
        return None
    tokenizer = load_model_tokenizer(options.tokenizer_path, job.infer)
    limit = job.ppo.valid_vocab_size
    if limit and limit > tokenizer.size:
        raise MindRLHFError(
            f"valid_vocab_size {limit} allows ids that the tokenizer {options.tokenizer_path} does not have "
            f"({tokenizer.size} tokens); set valid_vocab_size={tokenizer.size}"
        )
    return tokenizer


def _reward_function(options: PPOOptions) -> RewardFunction | None:
    """The function of ``--reward_fn``, which reads texts and so needs a tokenizer."""
    from mindrlhf.trainer.reward_function import load_reward_function

    if options.reward_fn is None:
        return None
    if options.tokenizer_path is None:
        raise MindRLHFError("--reward_fn reads texts: pass --tokenizer_path too")
    return load_reward_function(options.reward_fn)


def _export(options: PPOOptions, trainer: PPOTrainer, checkpoint: Path) -> None:
    """The final policy in Hugging Face format, merged from all ranks' shards by the main rank."""
    from mindrlhf.checkpoint.conversion import export_hf
    from mindrlhf.trainer.compatibility import stored_meshes

    assert options.export_hf_dir is not None
    if trainer.runtime.is_main:
        train = trainer.job.train
        tokenizer_dir = options.tokenizer_path
        export_hf(
            checkpoint / "policy",
            options.export_hf_dir,
            train.model,
            mesh=stored_meshes(checkpoint)["policy"],
            tokenizer_dir=tokenizer_dir if tokenizer_dir and tokenizer_dir.is_dir() else None,
            leave_out=SCORE_HEAD,  # the value head of a shared critic is no part of the language model
        )
        logger.info("final policy in Hugging Face format: %s", options.export_hf_dir)
    trainer.exchange.barrier()
