"""errors.py and cli.py."""

from __future__ import annotations

import argparse
import pickle

import pytest

from mindrlhf.utils.command_line import run_main, str_to_bool
from mindrlhf.utils.errors import CheckpointError, ConfigError, DataError, MindRLHFError


def test_config_error_lists_every_fault() -> None:
    error = ConfigError(["a.yaml: x", "b.yaml: y"])
    assert str(error) == "2 configuration errors:\n  - a.yaml: x\n  - b.yaml: y"
    assert error.faults == ("a.yaml: x", "b.yaml: y")
    assert str(ConfigError(["one"])).startswith("1 configuration error:\n")


def test_config_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ConfigError(["a", "b"])))
    assert error.faults == ("a", "b")
    assert str(error) == str(ConfigError(["a", "b"]))


@pytest.mark.parametrize("kind", [DataError, CheckpointError, MindRLHFError])
def test_every_error_is_the_users_to_mend(kind: type[MindRLHFError]) -> None:
    assert issubclass(kind, MindRLHFError)
    assert issubclass(ConfigError, MindRLHFError)


@pytest.mark.parametrize("text", ["True", "true", "TRUE", "1", "yes", "Yes", " true "])
def test_str_to_bool_true(text: str) -> None:
    assert str_to_bool(text) is True


@pytest.mark.parametrize("text", ["False", "false", "FALSE", "0", "no", "No"])
def test_str_to_bool_false(text: str) -> None:
    assert str_to_bool(text) is False


@pytest.mark.parametrize("text", ["", "2", "on", "truee", "None"])
def test_str_to_bool_refuses(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="True or False"):
        str_to_bool(text)


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_run_main_exits_with_the_code(returned: int | None, code: int) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run_main(lambda: returned)
    assert exit_info.value.code == code


def test_run_main_prints_user_errors(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise DataError("prompts.jsonl:7: no key 'prompt'")

    with pytest.raises(SystemExit) as exit_info:
        run_main(main)
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert captured.err == "error: prompts.jsonl:7: no key 'prompt'\n"
    assert captured.out == ""


def test_run_main_on_interrupt() -> None:
    def main() -> int:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_info:
        run_main(main)
    assert exit_info.value.code == 130


def test_run_main_lets_defects_through() -> None:
    def main() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_main(main)
