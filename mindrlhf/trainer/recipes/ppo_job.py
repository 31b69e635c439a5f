"""A whole PPO job on one worker: from the flags of ``ppo_one_stage.py`` to the last checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mindrlhf.configs.flags import PPOOptions
from mindrlhf.configs.keys import JobConfig
from mindrlhf.data.tokenizer import Tokenizer
from mindrlhf.runtime.compile_cache import open_compile_cache
from mindrlhf.runtime.host_exchange import HostExchange
from mindrlhf.runtime.launching import scratch_directory
from mindrlhf.trainer.checkpoints import TrainingCheckpoints, model_identity
from mindrlhf.trainer.export import export_policy
from mindrlhf.trainer.loop import train
from mindrlhf.trainer.recipes.rl import DataPaths, PPOTrainer
from mindrlhf.trainer.recorder import check_results
from mindrlhf.trainer.reward_function import RewardFunction, load_reward_function, reward_source
from mindrlhf.trainer.run import Observers, Run, observed, open_run, start_worker
from mindrlhf.trainer.tokenizer_checks import check_one_tokenizer, load_model_tokenizer
from mindrlhf.trainer.weight_paths import WeightPaths
from mindrlhf.utils.errors import MindRLHFError
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.provenance import fingerprints, plain

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


def train_ppo(options: PPOOptions, job: JobConfig, data: Path, save: Path) -> Path:
    """Runs a whole PPO job on this worker and returns the directory of the last checkpoint.

    Args:
        options: the flags.
        job: their checked configuration.
        data: ``--mind_dataset_dir``.
        save: ``--save_ckpt_dir``.

    Raises:
        MindRLHFError: anything the user can fix; data and paths are checked before any model is built.
    """
    with observed("PPO", "iteration", options.watchdog_timeout, options.trackers) as observers:
        run, trainer = _prepare(options, job, data, save, observers)
        finished, last = train(run, trainer), run.last_checkpoint
        assert last is not None
        if finished and options.export_hf_dir is not None:
            export_policy(last / "policy", job.train.model, options, run)
    return last


def _prepare(
    options: PPOOptions, job: JobConfig, data: Path, save: Path, observers: Observers
) -> tuple[Run, PPOTrainer]:
    """Checks what the flags name, takes the device, joins the other workers, builds the models."""
    scratch = scratch_directory()
    weights = WeightPaths.of(options).checked()
    tokenizer = _tokenizer(options, job)
    check_one_tokenizer({flag: getattr(options, flag) for flag in _WITH_TOKENIZER})
    reward_function = _reward_function(options)
    if job.ppo.eval_interval and options.eval_dataset_dir is None:
        logger.warning("eval_interval is %d, but there is no --eval_dataset_dir", job.ppo.eval_interval)
    if options.ptx_dataset_dir is not None and not job.ppo.ptx_coef:
        logger.warning("--ptx_dataset_dir is not used: ptx_coef is 0")
    exchange = start_worker(job.train, scratch, save, observers)
    check_results(save, "iteration", "ppo", continues=options.continues_in(save))
    caches = []
    if options.enable_compile_cache:
        graphs = graph_configuration(job)
        caches.append(open_compile_cache(graphs, exchange.runtime, Path(scratch), last_phase="sync"))
    inputs = None
    if exchange.runtime.is_main:
        used = weights if job.ppo.critic == "separate" else replace(weights, critic=None)
        inputs = _inputs(options, used, data, reward_function)
    checkpoints = open_checkpoints(job, save, exchange, inputs)
    # The user's reward function may wait for a server.
    waiting = frozenset({"score", "evaluate"}) if reward_function is not None else frozenset()
    run = open_run(
        options,
        checkpoints,
        observers,
        computing=_COMPUTING_PHASES - waiting,
        device_target=job.train.context.device_target,
        listeners=caches,
        experience_file=options.save_data_file,
    )
    trainer = PPOTrainer(
        job,
        weights,
        DataPaths(data, options.eval_dataset_dir, options.ptx_dataset_dir),
        run,
        tokenizer=tokenizer,
        verify_sync=options.verify_sync,
        reward_function=reward_function,
        keeps_experience=options.save_data_file is not None,
    )
    return run, trainer


def fixed_settings(job: JobConfig) -> dict[str, Any]:
    """What must not change on resuming: with another value, the saved state would mean something else."""
    ppo = job.ppo
    trained = {"train": job.train} | ({"critic": job.critic} if ppo.critic == "separate" else {})
    fixed: dict[str, Any] = {"recipe": "ppo", "ppo.critic": ppo.critic}
    fixed |= {"ppo.seed": ppo.seed, "ppo.shuffle": ppo.shuffle}
    for role, config in trained.items():
        fixed |= {f"{role}.{key}": value for key, value in model_identity(config).items()}
    return fixed


def open_checkpoints(
    job: JobConfig, save: Path, exchange: HostExchange, inputs: Mapping[str, Any] | None = None
) -> TrainingCheckpoints:
    """The checkpoints of a job below ``save``; ``inputs`` as for :class:`TrainingCheckpoints`."""
    return TrainingCheckpoints(
        save,
        "iteration",
        exchange,
        keep=job.ppo.keep_checkpoints,
        configuration=job,
        fixed=fixed_settings(job),
        inputs=inputs,
    )


def _inputs(
    options: PPOOptions, weights: WeightPaths, data: Path, reward_function: RewardFunction | None
) -> dict[str, Any]:
    """The record of what the run learns from: its data, the models' weights, the source of the reward."""
    paths: dict[str, Path | None] = {
        "mind_dataset_dir": data,
        "eval_dataset_dir": options.eval_dataset_dir,
        "ptx_dataset_dir": options.ptx_dataset_dir,
    }
    if reward_function is not None:
        paths["reward_fn"] = reward_source(reward_function)
    records = fingerprints(paths, {f"weights.{role}": path for role, path in vars(weights).items()})
    if reward_function is None:
        return records
    return records | {"reward_fn": {"function": options.reward_fn, **records.get("reward_fn", {})}}


def graph_configuration(job: JobConfig) -> dict[str, Any]:
    """A configuration without the keys that certainly enter no compiled graph."""
    described: dict[str, Any] = plain(job)
    for role in ("infer", "train", "reward", "critic"):
        for key in ("path", "ignored"):
            described[role].pop(key, None)
    for key in _IN_NO_GRAPH:
        del described["ppo"][key]
    return described


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
    if options.reward_fn is None:
        return None
    if options.tokenizer_path is None:
        raise MindRLHFError("--reward_fn reads texts: pass --tokenizer_path too")
    return load_reward_function(options.reward_fn)
