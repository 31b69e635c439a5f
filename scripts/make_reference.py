#!/usr/bin/env python
"""Writes the reference of every command-line flag and YAML key, from the code that reads them.

    python scripts/make_reference.py

A test compares the file with what this script would write, so neither can change alone.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from mindrlhf.configs.keys import CONTEXT_RULES, MODEL_RULES, PARALLEL_RULES, RUNNER_RULES
from mindrlhf.configs.ppo_file import PPO_RULES
from mindrlhf.configs.rules import Rule
from mindrlhf.configs.schema import ContextConfig, ModelConfig, ParallelConfig, PPOConfig, RunnerConfig
from mindrlhf.utils.command_line import run_main, shows_default
from mindrlhf.utils.files import atomic_file

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "examples" / "qwen_ppo_tutorial" / "REFERENCE.md"
COMMENTED = ROOT / "model_configs" / "qwen_ppo" / "ppo_qwen2_tiny.yaml"

SCRIPTS = {
    "convert_weight.py": ("mindrlhf.cli.convert", "mindrlhf-convert"),
    "rlhf_data.py": ("mindrlhf.cli.data", "mindrlhf-data"),
    "sft.py": ("mindrlhf.cli.sft", "mindrlhf-sft"),
    "reward_model.py": ("mindrlhf.cli.reward", "mindrlhf-reward"),
    "ppo_one_stage.py": ("mindrlhf.cli.ppo", "mindrlhf-ppo"),
    "chat.py": ("mindrlhf.cli.chat", "mindrlhf-chat"),
    "python -m mindrlhf.report": ("mindrlhf.report.__main__", "mindrlhf-report"),
}
"""How a script is called in the text: the module of its parser, and its console command."""

PPO_WORDS = {
    "seed": "of rollouts, minibatches, prompts and new heads",
    "total_iterations": "rollouts of the whole job",
    "keep_checkpoints": "newest checkpoints that stay",
    "max_prompt_length": "columns of a left-padded prompt; longer prompts are refused",
    "max_response_length": "most tokens of a response",
    "do_sample": "False: take the most likely token",
    "temperature": "divides the logits, in sampling and in all log-probs",
    "gamma": "discount",
    "lam": "lambda of GAE (arXiv 1506.02438)",
    "whiten_advantages": "mean 0 and variance 1 over the tokens of a rollout",
    "whiten_rewards": "variance 1, the mean stays",
    "cliprange": "of the ratio, epsilon of PPO (arXiv 1707.06347)",
    "cliprange_value": "of the values around the old ones",
    "vf_coef": "factor of the value loss",
    "max_grad_norm": "bound of the global gradient norm",
    "log_ratio_clamp": "bound of the absolute log-ratio before it is exponentiated",
}
"""What the YAML's comments do not say."""

MODEL_WORDS = {
    "vocab_size": "rows of the embedding, padding rows included",
    "hidden_size": "features of a token",
    "num_layers": "decoder layers",
    "num_heads": "query heads",
    "n_kv_heads": "key/value heads; null: as many as num_heads",
    "intermediate_size": "inner features of the feed-forward",
    "seq_length": "most positions; at least max_prompt_length + max_response_length",
    "rms_norm_eps": "epsilon of RMSNorm",
    "theta": "base of the rotary frequencies",
    "initializer_range": "standard deviation of random weights",
    "qkv_has_bias": "whether query, key and value have a bias (Qwen2: True)",
    "tie_word_embeddings": "whether the output head is the embedding",
    "use_flash_attention": "Ascend's fused attention; off elsewhere, with a log line",
    "compute_dtype": "of products and activations; float32 on CPU, with a log line",
    "param_init_type": "of stored weights",
    "layernorm_compute_type": "inside RMSNorm",
    "softmax_compute_type": "inside the attention's softmax",
    "rotary_dtype": "of the rotation",
    "batch_size": "not used by PPO",
    "pad_token_id": "fills empty columns",
    "bos_token_id": "not used by PPO; null: none",
    "eos_token_id": "not used by PPO, which has stop_token_ids; one id or a list",
}
OTHER_WORDS = {
    "device_target": "what the job runs on; --device_target overrides it",
    "max_device_memory": "bound for MindSpore's memory pool, such as 58GB; not used on CPU",
    "max_call_depth": "MindSpore's recursion limit when compiling",
    "data_parallel": "replicas of the model",
    "model_parallel": "ranks that one replica is split over; must divide the key/value heads",
    "epochs": "sft.py and reward_model.py: passes over the data",
    "batch_size": "sft.py and reward_model.py: rows of one replica an optimizer step",
    "sink_mode": "not used",
    "sink_size": "not used",
    "gradient_accumulation_steps": "must be 1: micro_batch_size does this",
}

_PPO_LINE = re.compile(r"^(\w+): [^#\n]*(?:# (.*))?$", re.M)


def reference() -> str:
    """The whole document."""
    return "\n".join([*_opening(), *_flags(), *_ppo_keys(), *_model_keys()]) + "\n"


def _opening() -> Iterator[str]:
    yield "# Reference: flags and YAML keys"
    yield ""
    yield "Written by `scripts/make_reference.py` from the code; do not edit by hand. [Tutorial](README.md)"


def _flags() -> Iterator[str]:
    for script, (module, command) in SCRIPTS.items():
        parser: argparse.ArgumentParser = importlib.import_module(module).build_parser()
        yield from ("", f"## {script}", "", f"Also `{command}` after `pip install .`", "")
        yield from ("| flag | default | what it is |", "| --- | --- | --- |")
        for group in parser._action_groups:
            for action in group._group_actions:
                if not isinstance(action, argparse._HelpAction):
                    yield _flag_row(action)


def _flag_row(action: argparse.Action) -> str:
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
    without = "required" if action.required else ""
    default = f"`{action.default}`" if shows_default(action) else without
    text = (action.help or "") % {"default": action.default}
    if action.choices is not None:
        text += f" ({', '.join(map(str, action.choices))})"
    return f"| {names} | {default} | {_cell(text)} |"


def _ppo_keys() -> Iterator[str]:
    yield from ("", "## ppo_X.yaml", "", "Each may be replaced on the command line: `--set key=value`.", "")
    comments = dict(_PPO_LINE.findall(COMMENTED.read_text(encoding="utf-8")))
    words = {key: "; ".join(filter(None, (PPO_WORDS.get(key), comments.get(key)))) for key in PPO_RULES}
    yield from _table(PPO_RULES, _defaults(PPOConfig), words)


def _model_keys() -> Iterator[str]:
    yield from ("", "## generate_X.yaml and finetune_X.yaml", "")
    yield "MindFormers' sections that are read. `optimizer` and `lr_schedule` go to MindFormers unchanged."
    sections = (
        ("model.model_config", MODEL_RULES, ModelConfig, MODEL_WORDS),
        ("parallel_config", PARALLEL_RULES, ParallelConfig, OTHER_WORDS),
        ("context", CONTEXT_RULES, ContextConfig, OTHER_WORDS),
        ("runner_config", RUNNER_RULES, RunnerConfig, OTHER_WORDS),
    )
    for name, rules, config, words in sections:
        yield from ("", f"### {name}", "")
        yield from _table(rules, _defaults(config), words)


def _table(rules: Mapping[str, Rule], defaults: Mapping[str, Any], words: Mapping[str, str]) -> Iterator[str]:
    yield from ("| key | default | allowed | what it is |", "| --- | --- | --- | --- |")
    for key, rule in rules.items():
        default = "required" if rule.required or key not in defaults else f"`{defaults[key]}`"
        yield f"| `{key}` | {default} | {_cell(rule.text)} | {_cell(words[key])} |"


def _defaults(config: type) -> dict[str, Any]:
    return {one.name: one.default for one in fields(config) if one.default is not MISSING}


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "\\<")


def main() -> None:
    with atomic_file(REFERENCE) as temporary:
        temporary.write_text(reference(), encoding="utf-8")
    sys.stdout.write(f"{REFERENCE.relative_to(ROOT)} written\n")


if __name__ == "__main__":
    run_main(main)
