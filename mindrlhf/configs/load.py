"""Reading configurations: strict, and all faults in one :class:`~mindrlhf.utils.errors.ConfigError`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

from mindrlhf.configs.checks import check_job, check_ppo, check_run
from mindrlhf.configs.faults import Faults, collected
from mindrlhf.configs.keys import DEVICE_TARGETS
from mindrlhf.configs.ppo_file import read_ppo
from mindrlhf.configs.run_file import RunDraft, read_run
from mindrlhf.configs.schema import JobConfig, PPOConfig, RunConfig
from mindrlhf.utils.logging import get_logger

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
        cpu_matmul_dtype: to what products round their operands on CPU.

    Raises:
        ConfigError: with every fault of the file.
    """
    with collected() as faults:
        draft = _read_checked(Path(path), faults, device_target, single_process)
        _set_matmul_dtype(draft, cpu_matmul_dtype, faults)
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


def load_job(
    *,
    sft_path_infer: AnyPath,
    sft_path_train: AnyPath,
    reward_path: AnyPath,
    critic_path: AnyPath,
    ppo_config: AnyPath,
    overrides: Sequence[str] = (),
    world_size: int | None = None,
    device_target: str | None = None,
    single_process: bool = False,
    cpu_matmul_dtype: str = "float32",
) -> JobConfig:
    """Reads the five files of a PPO job and checks them against each other.

    Args:
        sft_path_infer, sft_path_train: YAMLs of the policy as it generates and as it is trained.
        reward_path, critic_path: YAMLs of the reward model and the critic.
        ppo_config: YAML of the hyper-parameters.
        overrides: ``key=value`` in place of the hyper-parameters of the file.
        world_size: ranks there are; ``None``: the files need only agree with each other.
        device_target: replaces ``context.device_target`` of every file.
        single_process: replaces the split of every file by data_parallel 1, model_parallel 1.
        cpu_matmul_dtype: to what the products of every model round their operands on CPU.

    Raises:
        ConfigError: with every fault of all files.
    """
    paths = {"infer": sft_path_infer, "train": sft_path_train, "reward": reward_path, "critic": critic_path}
    with collected() as faults:
        by_path: dict[Path, RunDraft] = {}
        for path in map(Path, paths.values()):
            if path not in by_path:
                by_path[path] = _read_checked(path, faults, device_target, single_process)
                _set_matmul_dtype(by_path[path], cpu_matmul_dtype, faults)
        roles = {role: by_path[Path(path)] for role, path in paths.items()}
        ppo = read_ppo(Path(ppo_config), overrides, faults)
        check_ppo(ppo, faults)
        check_job(roles, ppo, world_size, faults)
    job = JobConfig(**{role: draft.build() for role, draft in roles.items()}, ppo=ppo.build())
    _warn_truncated_sampling(job.ppo)
    return replace(job, critic=_with_optimizer_of(job.critic, job.train))


def _read_checked(path: Path, faults: Faults, device_target: str | None, single_process: bool) -> RunDraft:
    if device_target is not None and device_target not in DEVICE_TARGETS:
        faults.add(
            "--device_target",
            f"not allowed ({device_target!r})",
            f"must be one of {', '.join(DEVICE_TARGETS)}",
        )
        device_target = None
    draft = read_run(path, faults, device_target=device_target, single_process=single_process)
    check_run(draft, faults)
    return draft


def _set_matmul_dtype(draft: RunDraft, dtype: str, faults: Faults) -> None:
    if dtype == "float32":
        return
    target = draft.context.get("device_target")
    if target == "CPU":
        draft.model["matmul_dtype"] = dtype
    else:
        faults.add(
            "--cpu_matmul_dtype",
            f"{dtype}, but {draft.path} runs on {target}",
            "leave it out; there compute_dtype says it",
        )


def _with_optimizer_of(critic: RunConfig, train: RunConfig) -> RunConfig:
    return replace(
        critic,
        optimizer=critic.optimizer or train.optimizer,
        lr_schedule=critic.lr_schedule or train.lr_schedule,
    )


def _warn_truncated_sampling(ppo: PPOConfig) -> None:
    if not ppo.do_sample or ppo.top_k or ppo.top_p < 1:
        get_logger(__name__).warning(
            "sampling is truncated (do_sample %s, top_k %d, top_p %g): ratio and KL are of the whole "
            "distribution and become biased",
            ppo.do_sample,
            ppo.top_k,
            ppo.top_p,
        )
