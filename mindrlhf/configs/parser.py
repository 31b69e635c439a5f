"""Command-line flags from the option dataclasses that declare them, and back."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_origin

from mindrlhf.configs.faults import Faults, shown
from mindrlhf.configs.fields import Key, keys_of
from mindrlhf.configs.flags import GROUPS, ChatOptions, RunOptions, run_directory
from mindrlhf.configs.keys import TrainingSettings
from mindrlhf.utils.command_line import str_to_bool


def add_flags(parser: argparse.ArgumentParser, options: type, groups: Sequence[str] = GROUPS) -> None:
    """Adds a flag for each key of ``options``, under the heading of its group.

    A boolean ``--flag`` may stand alone, which means True.
    """
    keys = keys_of(options)
    # Groups of these are those of ppo_X.yaml.
    shared = keys_of(TrainingSettings) if issubclass(options, TrainingSettings) else {}
    for title in groups:
        names = [name for name, key in keys.items() if ("training" if name in shared else key.group) == title]
        if names:
            group = parser.add_argument_group(title)
            for name in names:
                _add_flag(group, name, keys[name])


def _add_flag(group: argparse._ArgumentGroup, name: str, key: Key) -> None:
    settings: dict[str, Any] = {"dest": name, "help": key.help}
    if key.metavar is not None:
        settings["metavar"] = key.metavar
    if key.choices:
        settings["choices"] = key.choices
    if key.default is not ...:
        settings["default"] = key.default
    if get_origin(key.base) is Sequence:
        settings |= {"action": "append", "default": []}
    else:
        settings["type"] = key.parse or _parser_of(key)
        if key.base is bool:
            settings |= {"nargs": "?", "const": True}
    if name == "save_ckpt_dir":  # or its short form, --run_name
        results = group.add_mutually_exclusive_group(required=key.required)
        results.add_argument("--save_ckpt_dir", **settings)
        results.add_argument(
            "--run_name",
            dest=name,
            metavar="NAME",
            type=run_directory,
            help="short for --save_ckpt_dir runs/NAME",
        )
    else:
        group.add_argument(key.flag or f"--{name}", required=key.required, **settings)


def _parser_of(key: Key) -> Callable[[str], Any]:
    if key.base is bool:
        return str_to_bool
    if key.base is Path and key.optional:
        return optional_path
    return key.base if key.base in (int, float, Path) else str


def optional_path(text: str) -> Path | None:
    """A path; an empty string means none, as scripts pass it for an unused flag."""
    return Path(text) if text else None


def check_options(options: RunOptions | ChatOptions, faults: Faults) -> dict[str, Any]:
    """The options that are in their range; each other one adds a fault."""
    declaration: Any = type(options)
    valid = {}
    for name, key in keys_of(declaration).items():
        value = getattr(options, name)
        try:
            valid[name] = key.convert(value)
        except ValueError as error:
            faults.add(key.flag or f"--{name}", f"{error} ({shown(value)})", f"must be {key.allowed}")
    return valid
