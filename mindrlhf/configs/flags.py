"""The command-line options of ``ppo_one_stage.py``, ``sft.py``, ``reward_model.py`` and ``chat.py``.

Each is declared once. :mod:`mindrlhf.configs.parser` makes the flags from them,
:mod:`mindrlhf.configs.load` checks them together with the YAMLs that they name.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le, Lt

from mindrlhf.configs.fields import (
    Count,
    DeviceTarget,
    Natural,
    NotNegative,
    Positive,
    Temperature,
    Words,
    key,
)
from mindrlhf.configs.keys import TrainingSettings

DEFAULT_TIMEOUT = 1800.0
"""Seconds without progress; longer than the first iteration of a large model compiles silently."""

DEFAULT_TRACKERS = ("tensorboard",)
NO_TRACKER = "none"

RUNS = Path("runs")

_RUN_NAME = re.compile(r"\w[\w.+=-]{0,99}")


def run_directory(name: str) -> Path:
    """The argparse type of ``--run_name``: NAME -> ``runs/NAME`` below the working directory.

    Raises:
        argparse.ArgumentTypeError: the name is not a plain name of a directory.
    """
    if _RUN_NAME.fullmatch(name) is None:
        raise argparse.ArgumentTypeError(
            f"{name!r} is not a name of a run: letters, digits and _ . + = - only, at most 100, "
            "the first a letter, digit or _; for a path use --save_ckpt_dir"
        )
    return RUNS / name


def tracker_names(text: str) -> tuple[str, ...]:
    """The argparse type of ``--trackers``; :mod:`mindrlhf.trainer.trackers.registry` knows which there are.

    Raises:
        argparse.ArgumentTypeError: ``none`` does not stand alone.
    """
    names = dict.fromkeys(name for part in text.split(",") if (name := part.strip().lower()))
    if NO_TRACKER in names and len(names) > 1:
        raise argparse.ArgumentTypeError(f"{NO_TRACKER} stands alone, got {text!r}")
    return tuple(name for name in names if name != NO_TRACKER)


GROUPS = (
    "model configurations (MindFormers YAML)",
    "weights (a .ckpt/.safetensors file, a Hugging Face directory, rank_0/ ... in one, a run or checkpoint)",
    "data and results",
    "training",
    "reward model",
    "run",
)
"""Headings of the flags in ``--help``, in order."""

_model, _weights, _files, _training, _reward, _run = (partial(key, group=group) for group in GROUPS)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The flags of every program that trains."""

    resume_from: Path | None = _files(
        None, "an iteration_NNNNNN (PPO) or step_NNNNNN directory to resume from"
    )
    resume_training: bool = _files(
        False,
        "True: resume from the newest whole checkpoint of --save_ckpt_dir, or start a new run without one",
    )
    overwrite: bool = _files(
        False, "True: replace other outputs than --save_ckpt_dir that exist and are of the same kind"
    )
    trackers: tuple[str, ...] = _run(
        DEFAULT_TRACKERS,
        "where metrics go besides metrics.jsonl, comma-separated: tensorboard (in tensorboard/ of the "
        "results), wandb, swanlab; none: nowhere (default: tensorboard)",
        parse=tracker_names,
    )
    learning_rate: Positive | None = _training(
        None,
        "peak of the lr_schedule, whose shape is kept; for PPO that of the policy and of a separate critic "
        "(default: the YAML's, which is for PPO)",
    )
    use_parallel: bool = _run(True, "False: one process, no msrun")
    device_target: DeviceTarget | None = _run(None, "override device_target of every YAML")
    cpu_matmul_dtype: Literal["float32", "bfloat16"] = _run(
        "float32",
        "bfloat16: on CPU, round the operands of products to it; sums and the rest stay float32; needs a "
        "processor with avx512_bf16, and g++",
    )
    watchdog_timeout: NotNegative = _run(
        DEFAULT_TIMEOUT,
        "seconds without progress on any rank after which the job is ended; the first compilation counts; "
        "0: never",
        metavar="SECONDS",
    )

    def continues_in(self, directory: Path) -> bool:
        """Whether the results in ``directory`` are those that the run continues."""
        if self.resume_from is None:
            return self.resume_training
        checkpoint, parent = self.resume_from.resolve(), self.resume_from.absolute().parent.resolve()
        return directory.resolve() in (checkpoint, checkpoint.parent, parent)  # or it is a link there


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The flags of the programs whose result is a language model."""

    export_hf_dir: Path | None = _files(None, "export the final policy in Hugging Face format")
    tokenizer_path: Path | None = _files(None, "tokenizer for sample texts, and copied into the export")


@dataclass(frozen=True, kw_only=True)
class PPOOptions(RunOptions, ExportOptions):
    """The flags of ``ppo_one_stage.py``."""

    sft_path_infer: Path = _model(..., "policy as it generates")
    sft_path_train: Path = _model(..., "policy as it is trained")
    reward_path: Path | None = _model(None, "reward model; default: --sft_path_infer")
    critic_path: Path | None = _model(None, "critic; default: --sft_path_infer; not read with critic: none")
    ppo_config: Path | None = _model(None, "PPO hyper-parameters; default: ppo_X.yaml beside finetune_X.yaml")
    overrides: Sequence[str] = _model(
        (), "override a PPO hyper-parameter; may be repeated", flag="--set", metavar="KEY=VALUE"
    )
    load_sft_checkpoint_infer: Path | None = _weights(None, "policy as it generates")
    load_sft_checkpoint_train: Path | None = _weights(None, "policy as it is trained")
    load_ref_checkpoint: Path | None = _weights(None, "reference; default: the policy")
    load_rm_checkpoint: Path | None = _weights(None, "reward model; default: the policy with a fresh head")
    load_critic_checkpoint: Path | None = _weights(None, "critic; default: the reward model, else the policy")
    reward_fn: str | None = _weights(
        None,
        "your own reward for (prompts, responses) texts; added to --load_rm_checkpoint's, or used alone",
        metavar="PACKAGE.MODULE:FUNCTION|FILE.py:FUNCTION",
    )
    mind_dataset_dir: Path | None = _files(None, "MindRecord of prompts from rlhf_data.py")
    eval_dataset_dir: Path | None = _files(
        None, "MindRecord of held-out prompts to evaluate on (eval_interval); default: no evaluation"
    )
    ptx_dataset_dir: Path | None = _files(
        None, "MindRecord of texts for the pre-training loss (ptx_coef); default: --mind_dataset_dir"
    )
    save_ckpt_dir: Path | None = _files(None, "configuration, metrics, samples, curves, checkpoints")
    save_data_file: Path | None = _files(None, "store each iteration's experience as MindRecord")
    enable_compile_cache: bool = _run(
        False,
        "True: keep compiled graphs for later runs (MS_COMPILER_CACHE_PATH or ~/.cache/mindrlhf/graphs)",
    )
    verify_sync: bool = _run(False, "checksum weights after each sync")
    only_save_strategy: bool = _run(False, "write ./strategy and exit; no device needed")
    world_size: Count | None = _run(None, "ranks to write strategies for without msrun")


@dataclass(frozen=True, kw_only=True)
class StageOptions(TrainingSettings, RunOptions):
    """The flags that ``sft.py`` and ``reward_model.py`` share."""

    config_path: Path
    load_sft_checkpoint: Path = _files(
        ...,
        "language model to start from: a full .ckpt/.safetensors file, a Hugging Face directory, or "
        "rank_0/ rank_1/ ... of any split",
    )
    mind_dataset_dir: Path
    save_ckpt_dir: Path
    save_full_ckpt: Path | None = _files(
        None, "also write the weights to this .ckpt or .safetensors file, merged; any split reads it"
    )
    epochs: Count | None = _training(None, "passes over the data (default: runner_config.epochs)")
    batch_size: Count | None = _training(
        None, "rows per optimizer step, over all ranks (default: runner_config.batch_size x data_parallel)"
    )
    eval_fraction: Annotated[NotNegative, Lt(1)] = _training(
        0.1, "prompts held out of training and evaluated on; 0: none"
    )
    max_eval_prompts: Natural = _training(512, "maximum number of prompts held out; 0: no limit")
    eval_interval: Natural = _training(50, "steps between evaluations; 0: before and after training only")


_YAML = "finetune_X.yaml: sizes, split, optimizer and schedule, runner_config"
_RESULTS = "final/rank_i: %s; configuration, metrics, checkpoints"


@dataclass(frozen=True, kw_only=True)
class SFTOptions(StageOptions, ExportOptions):
    """The flags of ``sft.py``."""

    config_path: Path = _files(..., _YAML, flag="--sft_path")
    mind_dataset_dir: Path = _files(..., "MindRecord of rlhf_data.py (with or without --pairs)")
    save_ckpt_dir: Path = _files(
        ..., _RESULTS % "a policy for --load_sft_checkpoint_train of ppo_one_stage.py"
    )


@dataclass(frozen=True, kw_only=True)
class RewardOptions(StageOptions):
    """The flags of ``reward_model.py``."""

    config_path: Path = _files(..., _YAML, flag="--reward_path")
    mind_dataset_dir: Path = _files(..., "MindRecord of rlhf_data.py --pairs")
    save_ckpt_dir: Path = _files(
        ...,
        _RESULTS % "a reward model for --load_rm_checkpoint and --load_critic_checkpoint of ppo_one_stage.py",
    )
    center_coef: NotNegative = _reward(
        0.0, "coefficient of the mean (chosen + rejected score)^2 in the loss; 0: off"
    )
    calibrate: Literal["sft", "data", "off"] = _reward(
        "sft",
        "which scores are scaled to mean 0 and std 1: those of responses that --load_sft_checkpoint samples "
        "for training prompts, those of the data's preferred responses, or none",
    )
    calibration_samples: Annotated[Natural, Ge(2)] = _reward(256, "number of responses for the calibration")
    max_response_length: Natural = _reward(0, "maximum tokens of a sampled response; 0: the data's longest")


CHAT_GROUPS = ("model", "conversation", "file of prompts", "sampling")
"""Headings of the flags in the ``--help`` of ``chat.py``, in order."""

_chat_model, _chat_conversation, _chat_prompts, _chat_sampling = (
    partial(key, group=group) for group in CHAT_GROUPS
)


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """The flags of ``chat.py``; see its ``--help``."""

    checkpoint: Path = _chat_model(
        ...,
        "Hugging Face directory; full .ckpt/.safetensors file; directory with rank_0/ rank_1/ ...; "
        "iteration_NNNNNN of PPO or step_NNNNNN of SFT, or the run itself (its last weights)",
    )
    compare: Path | None = _chat_model(
        None, "a second one: both get the same messages and are shown side by side"
    )
    config: Path | None = _chat_model(
        None,
        "generate_X.yaml or finetune_X.yaml: sizes, types and device; or a config.json, for weights that do "
        "not say their sizes",
    )
    tokenizer_path: Path | None = _chat_model(None, "tokenizer for weights without one: directory or file")
    device_target: DeviceTarget | None = _chat_model(
        None, "overrides the YAML's device_target (default: the YAML's, else CPU)"
    )
    system_prompt: str | None = _chat_conversation(
        None, "text of the system turn (default: the model's own; '' leaves the turn out)"
    )
    no_chat_template: bool = _chat_conversation(
        False, "take each message as it is, without the chat template around it and without history"
    )
    max_context: Natural = _chat_conversation(
        0, "maximum tokens of prompt and reply together; older turns are forgotten; 0: the model's maximum"
    )
    prompt_file: Path | None = _chat_prompts(
        None, "answer these: jsonl with the string prompt, or one text per line"
    )
    output_file: Path | None = _chat_prompts(
        None, "jsonl with prompt, response, tokens, stopped (default: the screen)"
    )
    overwrite: bool = _chat_prompts(False, "replace an --output_file that exists")
    batch_size: Count = _chat_prompts(8, "prompts per batch")
    skip_bad_lines: bool = _chat_prompts(False, "skip bad lines of the file instead of stopping")
    max_tokens: Count = _chat_sampling(256, "maximum tokens of a reply")
    temperature: Annotated[Temperature, Words("a number >= 1e-06; --greedy takes the likeliest token")] = (
        _chat_sampling(0.7, "divides the logits: below 1 likelier tokens, above 1 more surprising ones")
    )
    top_p: Annotated[Positive, Le(1)] = _chat_sampling(
        0.9, "draw from the likeliest tokens that together have this probability; 1: from all"
    )
    top_k: Natural = _chat_sampling(0, "draw from this number of likeliest tokens; 0: from all")
    greedy: bool = _chat_sampling(False, "take the likeliest token, do not draw")
    seed: int = _chat_sampling(1, "of the draws: same seed, same replies")
