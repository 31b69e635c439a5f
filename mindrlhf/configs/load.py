"""Reading configurations: strict, and all faults in one :class:`~mindrlhf.utils.errors.ConfigError`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from mindrlhf.configs.checks import check_job, check_ppo, check_run, check_stage
from mindrlhf.configs.faults import Faults, collected
from mindrlhf.configs.fields import keys_of
from mindrlhf.configs.flags import PPOOptions, StageOptions
from mindrlhf.configs.keys import ContextConfig, JobConfig, PPOConfig, RunConfig, RunnerConfig, StagePlan
from mindrlhf.configs.parser import check_options
from mindrlhf.configs.read_ppo import read_ppo
from mindrlhf.configs.read_run import RunDraft, read_run
from mindrlhf.utils.logging import get_logger

logger = get_logger(__name__)

AnyPath = str | PathLike[str]


def load_run_config(
    path: AnyPath,
    *,
    device_target: str | None = None,
    single_process: bool = False,
    cpu_matmul_dtype: str = "float32",
) -> RunConfig:
    """Reads one MindFormers YAML.

    Args:
        path: the YAML.
        device_target: replaces ``context.device_target``.
        single_process: replaces the split by data_parallel 1, model_parallel 1.
        cpu_matmul_dtype: type to which products round their operands on CPU.

    Raises:
        ConfigError: with every fault of the file.
    """
    with collected() as faults:
        draft = _read_run(Path(path), faults, device_target, single_process, cpu_matmul_dtype)
    return draft.build()


def load_ppo_config(path: AnyPath, overrides: Sequence[str] = ()) -> PPOConfig:
    """Reads the PPO hyper-parameters; each override is ``key=value`` and wins over the file.

    Raises:
        ConfigError: with every fault of the file and the overrides.
    """
    with collected() as faults:
        draft = read_ppo(Path(path), overrides, faults)
        check_ppo(draft, faults)
    return draft.build()


def load_ppo_job(options: PPOOptions, world_size: int | None) -> JobConfig:
    """Reads the files that the options name and checks them, and the options, against each other.

    Args:
        options: the flags of ``ppo_one_stage.py``.
        world_size: number of ranks; ``None``: the files need only agree with each other.

    Raises:
        ConfigError: with every fault of all files and flags.
    """
    paths = {
        "infer": options.sft_path_infer,
        "train": options.sft_path_train,
        "reward": options.reward_path or options.sft_path_infer,
        "critic": options.critic_path or options.sft_path_infer,
    }
    with collected() as faults:
        check_options(options, faults)
        ppo_faults = Faults()
        ppo_path = options.ppo_config or _beside(options.sft_path_train, ppo_faults)
        ppo = read_ppo(ppo_path, options.overrides, ppo_faults)
        if ppo.without_critic:
            del paths["critic"]
        drafts = {
            path: _read_run(
                path, faults, options.device_target, not options.use_parallel, options.cpu_matmul_dtype
            )
            for path in dict.fromkeys(paths.values())
        }
        faults.include(ppo_faults)
        check_ppo(ppo, faults)
        check_job({role: drafts[path] for role, path in paths.items()}, ppo, world_size, faults)
        kind = ppo.get("critic")
        if kind not in (None, ("separate",)) and options.load_critic_checkpoint is not None:
            why = f"{ppo.where('critic')} is {', '.join(kind or ())}, so no separate critic is built"
            fault = f"not used ({options.load_critic_checkpoint})"
            faults.add("--load_critic_checkpoint", fault, f"{why}: remove the flag")
    runs = {role: drafts[path].build() for role, path in paths.items()}
    train, critic = runs["train"], runs.get("critic", runs["train"])
    runs["train"] = _with_rate(train, options.learning_rate)
    critic = replace(
        critic,
        optimizer=critic.optimizer or train.optimizer,
        lr_schedule=critic.lr_schedule or train.lr_schedule,
    )
    runs["critic"] = _with_rate(critic, options.learning_rate)
    settings = ppo.build()
    if train.runner.epochs != RunnerConfig.epochs:
        fault = "%s: without effect in PPO, which has total_iterations: runner_config.epochs (%d)"
        logger.warning(fault, train.path, train.runner.epochs)
    _warn_truncated_sampling(settings)
    return JobConfig(**runs, ppo=settings)


def _beside(train_config: Path, faults: Faults) -> Path | None:
    """``ppo_X.yaml`` beside ``finetune_X.yaml``, or ``finetune_X_8p.yaml``: it is for any number of workers.

    Returns:
        ``None``, and a fault, when there is none.
    """
    found = train_config.with_name("ppo_" + train_config.name.removeprefix("finetune_"))
    if not found.is_file():
        found = found.with_name(re.sub(r"_\d+p(?=\.\w+$)", "", found.name))
    if not found.is_file():
        faults.add("--ppo_config", f"not given, and there is no {found}", "pass --ppo_config")
        return None
    logger.info("PPO hyper-parameters: %s (beside --sft_path_train; --ppo_config overrides)", found)
    return found


def load_job(
    *,
    sft_path_infer: AnyPath,
    sft_path_train: AnyPath,
    reward_path: AnyPath | None = None,
    critic_path: AnyPath | None = None,
    ppo_config: AnyPath | None = None,
    overrides: Sequence[str] = (),
    learning_rate: float | None = None,
    world_size: int | None = None,
    device_target: str | None = None,
    single_process: bool = False,
    cpu_matmul_dtype: str = "float32",
) -> JobConfig:
    """Reads the five files of a PPO job and checks them against each other.

    Args:
        sft_path_infer, sft_path_train: YAMLs of the policy as it generates and as it is trained.
        reward_path, critic_path: YAMLs of the reward model and the critic, by default ``sft_path_infer``;
            with ``critic: none`` the latter is not read.
        ppo_config: YAML of the hyper-parameters; by default ``ppo_X.yaml`` beside ``finetune_X.yaml``, the
            YAML of the policy as it is trained.
        overrides: ``key=value`` in place of the hyper-parameters of the file.
        learning_rate: peak of the schedule of the policy and of a separate critic; by default the YAMLs'.
        world_size: number of ranks; ``None``: the files need only agree with each other.
        device_target: replaces ``context.device_target`` of every file.
        single_process: replaces the split of every file by data_parallel 1, model_parallel 1.
        cpu_matmul_dtype: type to which the products of every model round their operands on CPU.

    Raises:
        ConfigError: with every fault of all files.
    """
    return load_ppo_job(
        PPOOptions(
            sft_path_infer=Path(sft_path_infer),
            sft_path_train=Path(sft_path_train),
            reward_path=None if reward_path is None else Path(reward_path),
            critic_path=None if critic_path is None else Path(critic_path),
            ppo_config=None if ppo_config is None else Path(ppo_config),
            overrides=overrides,
            learning_rate=learning_rate,
            use_parallel=not single_process,
            device_target=device_target,
            cpu_matmul_dtype=cpu_matmul_dtype,  # type: ignore[arg-type]
        ),
        world_size,
    )


def load_stage(options: StageOptions, world_size: int) -> StagePlan:
    """Reads the YAML of ``sft.py`` or ``reward_model.py`` and checks the flags against it.

    Args:
        options: the flags.
        world_size: number of ranks.

    Raises:
        ConfigError: with every fault of the file and the flags.
    """
    with collected() as faults:
        valid = check_options(options, faults)
        draft = _read_run(
            options.config_path,
            faults,
            options.device_target,
            not options.use_parallel,
            options.cpu_matmul_dtype,
        )
        check_stage(draft, valid, world_size, faults)
    config = _with_rate(draft.build(), options.learning_rate)
    dp = config.parallel.data_parallel
    batch_size = options.batch_size or config.runner.batch_size * config.micro_batches * dp
    return StagePlan(
        config,
        epochs=options.epochs or config.runner.epochs,
        batch_size=batch_size,
        micro_batch_size=options.micro_batch_size or batch_size // dp // config.micro_batches,
    )


def _with_rate(config: RunConfig, learning_rate: float | None) -> RunConfig:
    if learning_rate is None:
        return config
    return replace(config, lr_schedule=with_peak(config.lr_schedule, learning_rate))


def with_peak(schedule: Mapping[str, Any], learning_rate: float) -> dict[str, Any]:
    """The schedule with another peak; its start and end scale in proportion, so its shape is kept."""
    peak = "base_lr" if "base_lr" in schedule else "learning_rate"
    factor = learning_rate / schedule[peak] if schedule[peak] else 0.0
    ends = ("warmup_lr_init", "lr_end", "lr_end1", "lr_end2", "eta_min")
    scaled = {name: schedule[name] * factor for name in ends if schedule.get(name)}
    return {**schedule, **scaled, peak: learning_rate}


def _read_run(
    path: Path, faults: Faults, device_target: str | None, single_process: bool, matmul_dtype: str
) -> RunDraft:
    """One YAML, checked by itself."""
    key = keys_of(ContextConfig)["device_target"]
    if device_target is not None and device_target not in key.choices:
        faults.add("--device_target", f"not allowed ({device_target!r})", f"must be {key.allowed}")
        device_target = None
    draft = read_run(path, faults, device_target=device_target, single_process=single_process)
    check_run(draft, faults)
    if matmul_dtype != "float32":
        target = draft.context.get("device_target")
        if target == "CPU":
            draft.model["matmul_dtype"] = matmul_dtype
        else:
            faults.add(
                "--cpu_matmul_dtype",
                f"{matmul_dtype}, but {path} runs on {target}",
                "leave it out; there compute_dtype says it",
            )
    return draft


def _warn_truncated_sampling(ppo: PPOConfig) -> None:
    if not ppo.do_sample or ppo.top_k or ppo.top_p < 1:
        logger.warning(
            "sampling is truncated (do_sample %s, top_k %d, top_p %g): ratio and KL are of the whole "
            "distribution and become biased",
            ppo.do_sample,
            ppo.top_k,
            ppo.top_p,
        )
