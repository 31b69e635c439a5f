"""Flags and YAML of a stage before PPO, checked together before anything is built."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mindrlhf.checkpoint.weight_files import check_output_file
from mindrlhf.configs.load import load_run_config
from mindrlhf.configs.schema import RunConfig
from mindrlhf.runtime.watchdog import DEFAULT_TIMEOUT
from mindrlhf.trainer.records import METRICS_FILE
from mindrlhf.trainer.runs import check_resume_flags
from mindrlhf.trainer.trackers.choice import DEFAULT_TRACKERS, check_trackers
from mindrlhf.utils.errors import ConfigError, MindRLHFError

FINAL = "final"
"""Directory of the last weights in the directory of results."""

CALIBRATIONS = ("sft", "data", "off")


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """The flags that ``sft.py`` and ``reward_model.py`` share; see their ``--help``."""

    config_path: Path
    load_sft_checkpoint: Path
    mind_dataset_dir: Path
    save_ckpt_dir: Path
    save_full_ckpt: Path | None = None
    epochs: int | None = None
    batch_size: int | None = None
    micro_batch_size: int = 0
    learning_rate: float | None = None
    max_grad_norm: float = 1.0
    valid_vocab_size: int = 0
    eval_fraction: float = 0.1
    max_eval_prompts: int = 512
    eval_interval: int = 50
    save_interval: int = 0
    keep_checkpoints: int = 2
    max_skipped_updates: int = 3
    resume_from: Path | None = None
    resume_training: bool = False
    seed: int = 1
    trackers: tuple[str, ...] = DEFAULT_TRACKERS
    use_parallel: bool = True
    device_target: str | None = None
    cpu_matmul_dtype: str = "float32"
    watchdog_timeout: float = DEFAULT_TIMEOUT

    @property
    def goes_on(self) -> bool:
        """Whether the run may find results of its own."""
        return self.resume_training or self.resume_from is not None


@dataclass(frozen=True, kw_only=True)
class SFTOptions(StageOptions):
    """The flags of ``sft.py``."""

    export_hf_dir: Path | None = None
    tokenizer_path: Path | None = None


@dataclass(frozen=True, kw_only=True)
class RewardOptions(StageOptions):
    """The flags of ``reward_model.py``."""

    center_coef: float = 0.0
    calibrate: str = "sft"
    calibration_samples: int = 256
    max_response_length: int = 0


@dataclass(frozen=True)
class StagePlan:
    """What is trained and in which portions.

    Attributes:
        config: the YAML, with the peak learning rate of the flags.
        epochs: passes over the training rows.
        batch_size: rows an optimizer step, over all ranks.
        micro_batch_size: rows a forward/backward on one rank.
    """

    config: RunConfig
    epochs: int
    batch_size: int
    micro_batch_size: int

    def total_steps(self, rows: int) -> int:
        """Optimizer steps over ``rows`` training rows; what does not fill a batch waits for the next epoch.

        Raises:
            ConfigError: less rows than a batch, or a warm-up that never ends.
        """
        steps = self.epochs * (rows // self.batch_size)
        if steps == 0:
            raise ConfigError(
                [
                    f"--batch_size: {self.batch_size} rows, but there are only {rows} to train on - make it "
                    "smaller"
                ]
            )
        schedule = self.config.lr_schedule
        warm_up = schedule.get("warmup_steps") or 0
        if warm_up > steps and schedule.get("warmup_ratio") is None:
            raise ConfigError(
                [
                    f"{self.config.path}: lr_schedule.warmup_steps: warm-up never ends ({warm_up} steps of "
                    f"warm-up, {steps} optimizer steps in the job) - lower it or use warmup_ratio"
                ]
            )
        return steps


def read_plan(options: StageOptions, world_size: int) -> StagePlan:
    """Reads the YAML and checks the flags against it.

    Args:
        options: the flags.
        world_size: workers there are.

    Raises:
        ConfigError: with every fault.
    """
    config = load_run_config(
        options.config_path,
        device_target=options.device_target,
        single_process=not options.use_parallel,
        cpu_matmul_dtype=options.cpu_matmul_dtype,
    )
    dp = config.parallel.data_parallel
    batch_size = config.runner.batch_size * dp if options.batch_size is None else options.batch_size
    faults = [
        *_range_faults(options),
        *_config_faults(config, world_size),
        *_batch_faults(config, batch_size, options.micro_batch_size),
    ]
    if options.valid_vocab_size > config.model.vocab_size:
        faults.append(
            f"--valid_vocab_size: {options.valid_vocab_size} is above the vocabulary - must be at most "
            f"{config.model.vocab_size}"
        )
    if faults:
        raise ConfigError(faults)
    if options.learning_rate is not None:
        config = replace(config, lr_schedule=with_peak(dict(config.lr_schedule), options.learning_rate))
    return StagePlan(
        config,
        epochs=config.runner.epochs if options.epochs is None else options.epochs,
        batch_size=batch_size,
        micro_batch_size=options.micro_batch_size or batch_size // dp,
    )


def with_peak(schedule: dict[str, Any], learning_rate: float) -> dict[str, Any]:
    """The schedule with another peak; where it starts and ends moves in proportion, so its shape stays."""
    key = "base_lr" if "base_lr" in schedule else "learning_rate"
    factor = learning_rate / schedule[key]
    for other in ("warmup_lr_init", "lr_end", "lr_end1", "lr_end2", "eta_min"):
        if schedule.get(other):
            schedule[other] *= factor
    return schedule | {key: learning_rate}


def check_paths(options: StageOptions) -> None:
    """Refuses weights that are not there, a directory of results that is used, trackers not installed.

    Raises:
        MindRLHFError: names the flag and the path.
    """
    check_trackers(options.trackers)
    if not options.load_sft_checkpoint.exists():
        raise MindRLHFError(
            f"--load_sft_checkpoint {options.load_sft_checkpoint} does not exist; name weights that are there"
        )
    check_resume_flags(
        options.resume_from, resume_training=options.resume_training, checkpoint="a step_NNNNNN"
    )
    _check_results(options)
    full = options.save_full_ckpt
    if full is not None:
        if full.suffix not in (".ckpt", ".safetensors"):
            raise MindRLHFError(f"--save_full_ckpt {full}: name a .ckpt or .safetensors file")
        if full.exists() and not options.goes_on:
            raise MindRLHFError(f"--save_full_ckpt {full} exists: give another name")
        check_output_file(full, overwrite=options.goes_on)


def _check_results(options: StageOptions) -> None:
    """Refuses a directory of results whose run is not to go on, or cannot."""
    save = options.save_ckpt_dir
    for name in () if options.goes_on else (METRICS_FILE, FINAL):
        if (save / name).exists():
            raise MindRLHFError(
                f"--save_ckpt_dir {save} holds the results of an earlier run ({name}); give another "
                "directory, or go on with --resume_training True or --resume_from one of its step_NNNNNN"
            )
    if options.resume_training and (save / FINAL).exists() and not any(save.glob("step_*")):
        raise MindRLHFError(
            f"--save_ckpt_dir {save} holds the weights of a run that has finished ({FINAL}) and no "
            "checkpoint to go on from: there is nothing left to do; to train anew, give another directory"
        )


def _range_faults(options: StageOptions) -> Iterator[str]:
    lowest: dict[str, float] = {
        "epochs": 1, "batch_size": 1, "micro_batch_size": 0, "valid_vocab_size": 0, "max_eval_prompts": 0,
        "eval_interval": 0, "save_interval": 0, "keep_checkpoints": 0, "max_skipped_updates": 1,
        "seed": 0, "max_grad_norm": 0, "center_coef": 0,
        "calibration_samples": 2, "max_response_length": 0,
    }  # fmt: skip
    for name, least in lowest.items():
        value = getattr(options, name, None)
        if value is not None and not value >= least:
            yield f"--{name}: not allowed ({value}) - must be at least {least}"
    if options.learning_rate is not None and not options.learning_rate > 0:
        yield f"--learning_rate: not allowed ({options.learning_rate}) - must be above 0"
    if not 0 <= options.eval_fraction < 1:
        yield f"--eval_fraction: not allowed ({options.eval_fraction}) - must be at least 0 and below 1"
    calibrate = getattr(options, "calibrate", "off")
    if calibrate not in CALIBRATIONS:
        yield f"--calibrate: not allowed ({calibrate}) - must be one of {', '.join(CALIBRATIONS)}"


def _config_faults(config: RunConfig, world_size: int) -> Iterator[str]:
    for section in ("optimizer", "lr_schedule"):
        if not getattr(config, section):
            yield f"{config.path}: {section}: missing - give a finetune_*.yaml, which has this section"
    parallel = config.parallel
    if parallel.world_size != world_size:
        yield (
            f"{config.path}: parallel_config: data_parallel {parallel.data_parallel} x model_parallel "
            f"{parallel.model_parallel} = {parallel.world_size} ranks, but there are {world_size} - start "
            "that many workers, change the split, or pass --use_parallel False for one process"
        )


def _batch_faults(config: RunConfig, batch_size: int, micro_batch_size: int) -> Iterator[str]:
    dp = config.parallel.data_parallel
    if batch_size % dp:
        yield (
            f"--batch_size: {batch_size} is not divisible by data_parallel ({dp}) of {config.path} - "
            "choose a multiple"
        )
    elif micro_batch_size > 0 and (batch_size // dp) % micro_batch_size:
        yield (
            f"--micro_batch_size: {micro_batch_size} does not divide the {batch_size // dp} rows of a step "
            "on one rank - choose a divisor, or 0 for all"
        )
