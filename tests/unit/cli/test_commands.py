"""The commands that installing gives, their help, their exit codes, and the scripts that are the same."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mindrlhf.utils.command_line import new_parser, shows_default

ROOT = Path(__file__).resolve().parents[3]
TUTORIAL = ROOT / "examples" / "qwen_ppo_tutorial"
NAMES = ("chat", "convert", "data", "ppo", "report", "reward", "sft")
SCRIPTS = {
    "chat": "chat.py",
    "convert": "convert_weight.py",
    "data": "rlhf_data.py",
    "ppo": "ppo_one_stage.py",
    "reward": "reward_model.py",
    "sft": "sft.py",
}
# One wrong use each that only the program itself can find, and what it says.
MISTAKES = {
    "chat": (["--checkpoint", "no_such"], "no_such does not exist"),
    "convert": (["--input_path", "no_such", "--output_path", "x.ckpt"], "no_such is not a directory"),
    "data": (
        ["--file_path", "no_such", "--output_path", "x.mindrecord", "--tokenizer_path", "gone"],
        "gone: no such tokenizer",
    ),
    "ppo": (
        [
            *("--sft_path_infer", "a.yaml", "--sft_path_train", "a.yaml"),
            *("--reward_path", "a.yaml", "--critic_path", "a.yaml", "--ppo_config", "a.yaml"),
            *("--mind_dataset_dir", "d", "--save_ckpt_dir", "s", "--use_parallel", "False"),
        ],
        "a.yaml",
    ),
    "report": (["no_such"], "no_such"),
    "reward": (
        [
            *("--reward_path", "a.yaml", "--load_sft_checkpoint", "w", "--mind_dataset_dir", "d"),
            *("--save_ckpt_dir", "s", "--use_parallel", "False"),
        ],
        "a.yaml",
    ),
    "sft": (
        [
            *("--sft_path", "a.yaml", "--load_sft_checkpoint", "w", "--mind_dataset_dir", "d"),
            *("--save_ckpt_dir", "s", "--use_parallel", "False"),
        ],
        "a.yaml",
    ),
}
# A number's help says what it counts or measures.
UNITS = re.compile(
    r"token|row|line|prompt|step|second|byte|worker|rank|sample|passes|epoch|iteration|response|column|"
    r"fraction|probability|number|coefficient|divides|peak|norm|draws|data|draw from|split|\bport\b"
)


@pytest.fixture(scope="module")
def commands() -> dict[str, str]:
    """Command -> ``module:function`` as setup.py declares them."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (table,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "COMMANDS"
    )
    return {name: f"{home}:command" for name, home in ast.literal_eval(table).items()}


def resolved(entry: str) -> Callable[[], Any]:
    module, _, function = entry.partition(":")
    found: Callable[[], Any] = getattr(importlib.import_module(module), function)
    return found


def run(command: Callable[[], Any], name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", [f"/usr/bin/mindrlhf-{name}", *arguments])
    with pytest.raises(SystemExit) as stopped:
        command()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_setup_declares_every_command(commands: dict[str, str]) -> None:
    assert sorted(commands) == list(NAMES)
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert 'f"mindrlhf-{name} = {home}:command"' in text


@pytest.mark.parametrize("name", NAMES)
def test_help_is_there_under_the_commands_own_name(
    name: str, commands: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(resolved(commands[name]), name, ["--help"], monkeypatch) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"usage: mindrlhf-{name} [-h]")
    assert f"mindrlhf-{name}" in said.out.partition("options:")[0]
    assert said.err == ""


@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_is_one_message_and_exit_code_2(
    name: str,
    commands: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    command = resolved(commands[name])
    arguments, message = MISTAKES[name]
    assert run(command, name, arguments, monkeypatch) == 2
    said = capsys.readouterr().err
    assert "error: " in said
    assert message in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []
    assert run(command, name, ["--no_such_flag"], monkeypatch) == 2
    assert f"usage: mindrlhf-{name}" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_the_tutorials_script_is_the_same_program(
    name: str, commands: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = str(TUTORIAL / SCRIPTS[name])
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(script, run_name="__main__")
    assert stopped.value.code == 0
    of_script = capsys.readouterr().out
    assert of_script.startswith(f"usage: {SCRIPTS[name]} [-h]")
    run(resolved(commands[name]), name, ["--help"], monkeypatch)
    of_command = capsys.readouterr().out
    # The usage differs by the name and where it is broken into lines.
    assert of_script.partition("\n\n")[2] == of_command.partition("\n\n")[2]


def test_importing_a_script_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for script in SCRIPTS.values():
        runpy.run_path(str(TUTORIAL / script), run_name="imported")
    assert capsys.readouterr().out == ""


def parser_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser that a script parses its arguments with."""
    found: list[argparse.ArgumentParser] = []

    class Found(Exception):  # noqa: N818
        pass

    def note(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        found.append(self)
        raise Found

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", note)
    monkeypatch.setattr(sys, "argv", [str(path)])
    monkeypatch.syspath_prepend(str(path.parent))
    with pytest.raises(Found):
        load(path, monkeypatch).main()
    return found[0]


def load(path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script as a module; the tutorial's are their commands' modules."""
    match = re.search(r"from (mindrlhf\.cli\.\w+) import", path.read_text(encoding="utf-8"))
    if match:
        return importlib.import_module(match.group(1))
    spec = importlib.util.spec_from_file_location(f"help_of_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def names_default(text: str, action: argparse.Action) -> bool:
    """Whether an option's help names its default, and no other number as such."""
    number = re.search(r"default: (-?[\d.]*\d)", text)
    if number and isinstance(action.default, (int, float)):
        return float(number.group(1)) == action.default
    return "default" in text


ALL_SCRIPTS = [
    *(TUTORIAL / script for script in SCRIPTS.values()),
    ROOT / "mindrlhf" / "report" / "__main__.py",
    *sorted(
        path
        for path in (ROOT / "scripts").glob("*.py")
        if re.search(r"ArgumentParser\(|new_parser\(", path.read_text(encoding="utf-8"))
    ),
]


@pytest.mark.parametrize("path", ALL_SCRIPTS, ids=lambda path: path.stem)
def test_help_is_grouped_with_defaults_and_units(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = parser_of(path, monkeypatch)
    loose = [
        action.dest
        for group in parser._action_groups
        if group.title in ("options", "positional arguments")
        for action in group._group_actions
    ]
    assert loose == ["help"], "flags belong into a group with a title"
    faults = []
    for action in parser._actions:
        text = parser._get_formatter()._expand_help(action) if action.help else ""
        if not text:
            faults.append(f"{action.dest}: no help")
        elif shows_default(action) and not names_default(
            parser._get_formatter()._expand_help(action), action
        ):
            faults.append(f"{action.dest}: its help does not name the default {action.default}")
        elif action.type in (int, float) and not UNITS.search(text):
            faults.append(f"{action.dest}: a number of what? {text!r}")
    assert faults == []


def test_defaults_are_shown_once_and_only_where_there_are_any() -> None:
    parser = new_parser("What it does.\n\n    like this")
    group = parser.add_argument_group("numbers")
    group.add_argument("--rows", type=int, default=8, help="rows a call")
    group.add_argument("--seed", type=int, default=1, help="of the draws; default: 1")
    group.add_argument("--name", help="of the run")
    group.add_argument("--fast", action="store_true", help="skip the slow part")
    group.add_argument("--use", default=False, help="whether to")
    text = parser.format_help()
    assert "\n    like this\n" in text
    assert text.count("default") == 3
    assert "rows a call (default: 8)" in text
    assert "whether to (default: False)" in text
    with pytest.raises(SystemExit):
        parser.parse_args(["--row", "3"])
