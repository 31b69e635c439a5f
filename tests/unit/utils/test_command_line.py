"""Types of flags, exit codes, and errors as users see them."""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import sys
from typing import NoReturn

import pytest

from mindrlhf.utils.command_line import run_main, str_to_bool
from mindrlhf.utils.errors import CheckpointError, ConfigError, DataError, MindRLHFError


def test_config_error_lists_every_fault_also_when_pickled() -> None:
    for error in (
        ConfigError(["a.yaml: x", "b.yaml: y"]),
        pickle.loads(pickle.dumps(ConfigError(["a", "b"]))),
    ):
        assert str(error) == "2 configuration errors:" + "".join(f"\n  - {fault}" for fault in error.faults)
        assert len(error.faults) == 2
    assert str(ConfigError(["one"])).startswith("1 configuration error:\n")


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
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: returned)
    assert stop.value.code == code


@pytest.mark.parametrize(
    ("error", "code", "said", "cause"),
    [
        (DataError("p.jsonl:7: bad"), 2, "error: p.jsonl:7: bad\n", "p.jsonl:7: bad"),
        (CheckpointError("c"), 2, "error: c\n", "c"),
        (MindRLHFError("m"), 2, "error: m\n", "m"),
        (KeyboardInterrupt(), 130, "interrupted\n", ""),
        (SystemExit(5), 5, "", "it has ended with exit code 5"),
        (ZeroDivisionError("one\nmore"), 1, "", "ZeroDivisionError: one"),
    ],
)  # fmt: skip
def test_run_main_says_and_reports_how_it_ends(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str, cause: str
) -> None:
    """Only a defect of the library keeps its traceback."""
    reports: list[tuple[str, int]] = []

    def main() -> NoReturn:
        raise error

    kind = ZeroDivisionError if code == 1 else SystemExit
    with pytest.raises(kind) as stop:
        run_main(main, on_exit=lambda *report: reports.append(report))
    assert getattr(stop.value, "code", 1) == code
    assert reports == [(cause, code)]
    assert capsys.readouterr() == ("", said)


WRITES = "from mindrlhf.utils.command_line import run_main; run_main(lambda: print('long ' * 99999))"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("shell", "code", "said"),
    [
        ("{} | :; exit ${{PIPESTATUS[0]}}", 141, ""),
        ("{} > /dev/full", 2, "error: standard output cannot be written (No space left on device)"),
        ("{} >&-", 2, "error: standard output is closed; send it to"),
        ("PYTHONUTF8=0 LC_ALL=POSIX {}", 2, "ascii here, not UTF-8 (PYTHONUTF8=0, LC_ALL=POSIX)"),
        ("PYTHONIOENCODING=latin-1 {}", 2, "iso8859-1 here, not UTF-8 (PYTHONIOENCODING=latin-1)"),
    ],
)  # fmt: skip
def test_output_that_cannot_be_written_is_one_line_at_most(
    shell: str, code: int, said: str, unbuffered: str
) -> None:
    env = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    done = subprocess.run(
        ["bash", "-c", shell.format('"$0" -c "$1"'), sys.executable, WRITES],
        capture_output=True, text=True, check=False, env=env | {"PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    assert done.returncode == code
    assert said in done.stderr
    assert done.stderr.count("\n") == bool(said)


def test_other_faults_of_files_keep_their_traceback() -> None:
    def main() -> NoReturn:
        raise ConnectionResetError("by a server")

    with pytest.raises(ConnectionResetError):
        run_main(main)
