#!/usr/bin/env python
"""Writes the reference of every flag and YAML key, and the comments of ppo_X.yaml, from their declarations.

    python scripts/make_reference.py

A test compares the files with the output of this script, so neither can change alone.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from mindrlhf.configs.fields import Key, keys_of
from mindrlhf.configs.keys import (
    PPO_GROUPS,
    ContextConfig,
    ModelConfig,
    ParallelConfig,
    PPOConfig,
    RunnerConfig,
)
from mindrlhf.utils.command_line import run_main, shows_default
from mindrlhf.utils.files import atomic_file

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "examples" / "qwen_ppo_tutorial" / "REFERENCE.md"
SETTINGS = sorted((ROOT / "model_configs" / "qwen_ppo").glob("ppo_*.yaml"))

SCRIPTS = {
    "convert_weight.py": ("mindrlhf.cli.convert", "mindrlhf-convert"),
    "rlhf_data.py": ("mindrlhf.cli.data", "mindrlhf-data"),
    "sft.py": ("mindrlhf.cli.sft", "mindrlhf-sft"),
    "reward_model.py": ("mindrlhf.cli.reward_model", "mindrlhf-reward"),
    "ppo_one_stage.py": ("mindrlhf.cli.ppo", "mindrlhf-ppo"),
    "chat.py": ("mindrlhf.cli.chat", "mindrlhf-chat"),
    "python -m mindrlhf.report": ("mindrlhf.report.__main__", "mindrlhf-report"),
}
"""How a script is called in the text: the module of its parser, and its console command."""


_SETTING = re.compile(r"^(\w+): ([^#\n]*[^#\s])", re.M)


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


def _ppo_groups() -> dict[str, dict[str, Key]]:
    """Heading -> its keys."""
    keys = keys_of(PPOConfig).items()
    return {group: {name: key for name, key in keys if key.group == group} for group in PPO_GROUPS}


def _ppo_keys() -> Iterator[str]:
    yield from ("", "## ppo_X.yaml", "", "Each may be replaced on the command line: `--set key=value`.", "")
    yield from _table({name: key for keys in _ppo_groups().values() for name, key in keys.items()})


def settings_file(text: str) -> str:
    """A ``ppo_X.yaml`` with ``text``'s values and first comment, and all keys in order, explained."""
    values = dict(_SETTING.findall(text))
    lines = [text.partition("\n\n")[0]]
    for group, keys in _ppo_groups().items():
        lines += ["", f"# {group}"]
        lines += [f"{name}: {values.get(name, key.default)}  # {_comment(key)}" for name, key in keys.items()]
    return "\n".join(lines) + "\n"


def _comment(key: Key) -> str:
    return f"{' | '.join(map(str, key.choices))}: {key.help}" if key.choices else key.help


def _model_keys() -> Iterator[str]:
    yield from ("", "## generate_X.yaml and finetune_X.yaml", "")
    yield "Keys of MindFormers that are used. `lr_schedule` goes to MindFormers unchanged. Its"
    yield "other keys may appear as long as they ask for nothing; a value that asks for something is refused"
    yield "or, where it is harmless, named in a warning."
    sections = {
        "model.model_config": ModelConfig,
        "parallel_config": ParallelConfig,
        "context": ContextConfig,
        "runner_config": RunnerConfig,
    }
    for name, declaration in sections.items():
        yield from ("", f"### {name}", "")
        yield from _table(keys_of(declaration))
    yield from ("", "### Switches of memory", "", *_HEAD)
    yield (
        "| `recompute_config.recompute` | `False` | True, False, or a list with one number | which layers, "
        "from the first on, compute their results anew in the backward pass; less memory, more time |"
    )
    yield (
        "| `parallel.enable_parallel_optimizer` | `False` | True or False | whether replicas share "
        "out moments and float32 masters (ZeRO stage 1) |"
    )
    yield (
        "| `parallel_config.use_seq_parallel` | `False` | True or False | whether ranks of model_parallel "
        "split activations between the products by tokens (sequence parallelism), in training and scoring |"
    )


_HEAD = ("| key | default | allowed | what it is |", "| --- | --- | --- | --- |")


def _table(keys: Mapping[str, Key]) -> Iterator[str]:
    yield from _HEAD
    for name, key in keys.items():
        default = "required" if key.required else "" if key.default is ... else f"`{key.default}`"
        yield f"| `{name}` | {default} | {_cell(key.allowed)} | {_cell(key.help)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "\\<")


def main() -> None:
    with atomic_file(REFERENCE) as temporary:
        temporary.write_text(reference(), encoding="utf-8")
    for path in SETTINGS:
        path.write_text(settings_file(path.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"{REFERENCE.relative_to(ROOT)} written\n")


if __name__ == "__main__":
    run_main(main)
