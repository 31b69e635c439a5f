"""The command-line options of ``chat.py``, each declared once."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Le

from mindrlhf.configs.faults import collected, shown
from mindrlhf.configs.fields import Count, DeviceTarget, Natural, Positive, Temperature, Words, key, keys_of

GROUPS = ("model", "conversation", "file of prompts", "sampling")
"""Headings of the flags in ``--help``, in order."""

_model, _conversation, _prompts, _sampling = (partial(key, group=group) for group in GROUPS)


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """The flags of ``chat.py``; see its ``--help``."""

    checkpoint: Path = _model(
        ...,
        "Hugging Face directory; full .ckpt/.safetensors file; directory with rank_0/ rank_1/ ...; "
        "iteration_NNNNNN of a PPO run (stands for its policy), or the run itself (its last weights)",
    )
    compare: Path | None = _model(None, "a second one: both get the same messages and are shown side by side")
    config: Path | None = _model(
        None,
        "generate_X.yaml or finetune_X.yaml (for rank directories: the one that split them), or a "
        "config.json, for weights without sizes",
    )
    tokenizer_path: Path | None = _model(None, "tokenizer for weights without one: directory or file")
    device_target: DeviceTarget | None = _model(
        None, "overrides the YAML's device_target (default: the YAML's, else CPU)"
    )
    system_prompt: str | None = _conversation(
        None, "text of the system turn (default: the model's own; '' leaves the turn out)"
    )
    no_chat_template: bool = _conversation(
        False, "take each message as it is, without ChatML around it and without history"
    )
    max_context: Natural = _conversation(
        0, "maximum tokens of prompt and reply together; older turns are forgotten; 0: the model's maximum"
    )
    prompt_file: Path | None = _prompts(
        None, "answer these: jsonl with the string prompt, or one text per line"
    )
    output_file: Path | None = _prompts(
        None, "jsonl with prompt, response, tokens, stopped (default: the screen)"
    )
    batch_size: Count = _prompts(8, "prompts per batch")
    skip_bad_lines: bool = _prompts(False, "skip bad lines of the file instead of stopping")
    max_tokens: Count = _sampling(256, "maximum tokens of a reply")
    temperature: Annotated[Temperature, Words("a number >= 1e-06; --greedy takes the likeliest token")] = (
        _sampling(0.7, "divides the logits: below 1 likelier tokens, above 1 more surprising ones")
    )
    top_p: Annotated[Positive, Le(1)] = _sampling(
        0.9, "draw from the likeliest tokens that together have this probability; 1: from all"
    )
    top_k: Natural = _sampling(0, "draw from this number of likeliest tokens; 0: from all")
    greedy: bool = _sampling(False, "take the likeliest token, do not draw")
    seed: int = _sampling(1, "of the draws: same seed, same replies")

    def checked(self) -> ChatOptions:
        """These options.

        Raises:
            ConfigError: names every flag that is out of its range or lacks another that it needs.
        """
        with collected() as faults:
            for name, one in keys_of(ChatOptions).items():
                value = getattr(self, name)
                try:
                    one.convert(value)
                except ValueError as error:
                    faults.add(f"--{name}", f"{error} ({shown(value)})", f"must be {one.allowed}")
            if self.output_file is not None and self.prompt_file is None:
                faults.add("--output_file", "there is no --prompt_file", "give both, or neither")
            if self.no_chat_template and self.system_prompt:
                faults.add("--system_prompt", "needs the chat template", "leave --no_chat_template out")
        return self


def add_chat_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flag of each option, under the heading of its group; a bool is a bare switch."""
    for title in GROUPS:
        group = parser.add_argument_group(title)
        for name, one in keys_of(ChatOptions).items():
            if one.group == title:
                kind: dict[str, Any] = {"action": "store_true"} if one.base is bool else {"type": one.base}
                if one.choices:
                    kind["choices"] = one.choices
                if not one.required:
                    kind["default"] = one.default
                group.add_argument(f"--{name}", required=one.required, help=one.help, **kind)
