"""The launcher with scripts that never touch MindSpore, so that a job takes seconds."""

from __future__ import annotations

import importlib.util
import io
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

HEAD = (
    "import os, pathlib, sys, time\n"
    "worker = os.environ['MS_ROLE'] == 'MS_WORKER'\n"
    "rank = os.environ['RANK_ID']\n"
)


@pytest.fixture(scope="module")
def launcher() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "scripts" / "msrun_launcher.py"
    spec = importlib.util.spec_from_file_location("msrun_launcher", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(launcher: ModuleType, tmp_path: Path, body: str, **options: Any) -> tuple[int, str]:
    """Launches a script of two workers; returns exit code and what was reported."""
    script = tmp_path / "script with space.py"
    script.write_text(HEAD + body)
    output = io.StringIO()
    options = {"timeout": 120, "arguments": ["--flag", "a b"], **options}
    code = launcher.launch(
        script, workers=2, log_dir=tmp_path / "log", output=output, cwd=tmp_path, **options
    )
    left = [p for p in psutil.process_iter(["cmdline"]) if str(script) in (p.info["cmdline"] or [])]
    assert left == [], "processes left behind"
    return code, output.getvalue()


@pytest.mark.msrun
def test_success(launcher: ModuleType, tmp_path: Path) -> None:
    """Arguments, environment and this repository reach the workers; one worker's output is shown whole."""
    body = (
        "import mindrlhf\n"
        "print('rank', rank, sys.argv[1:], os.environ['EXTRA'])\n"
        "pathlib.Path(f'done{rank}').touch() if worker else None\n"
    )
    code, output = run(launcher, tmp_path, body, env={"EXTRA": "given"}, show_rank=1)
    assert code == 0
    assert output == "rank 1 ['--flag', 'a b'] given\n"
    assert sorted(path.name for path in tmp_path.glob("done*")) == ["done0", "done1"]


@pytest.mark.msrun
def test_failure_shows_the_worker_that_raised(launcher: ModuleType, tmp_path: Path) -> None:
    """The other worker and the scheduler, both asleep, are ended and not waited for."""
    body = "if worker and rank == '1':\n    raise ValueError('worker one is broken')\ntime.sleep(600)\n"
    begin = time.monotonic()
    code, output = run(launcher, tmp_path, body)
    assert code not in (0, launcher.TIMED_OUT)
    assert time.monotonic() - begin < 60
    assert "ValueError: worker one is broken" in output
    assert "worker 0" not in output


@pytest.mark.msrun
def test_timeout(launcher: ModuleType, tmp_path: Path) -> None:
    body = "print('slow', flush=True)\ntime.sleep(600)\n"
    code, output = run(launcher, tmp_path, body, timeout=8)
    assert code == launcher.TIMED_OUT
    assert "ran out of time (8 s)" in output
    assert "slow" in output


def test_free_port_is_one_msrun_takes(launcher: ModuleType) -> None:
    assert 1024 <= launcher.free_port() <= 65535


def test_environment_puts_this_python_first(launcher: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine")
    env = launcher._environment({"A": "1"})
    assert env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert env["PYTHONPATH"].split(os.pathsep) == [str(launcher.REPOSITORY), "/mine"]
    assert env["A"] == "1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0", __file__], "--workers must be at least 1, got 0"),
        (["--workers", "2", "--show_rank", "2", __file__], "--show_rank 2 is not one of the 2 workers"),
        (["no_such_script.py"], "no such script: no_such_script.py"),
    ],
)
def test_bad_arguments(
    launcher: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        launcher.parse_args(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_script_arguments_are_the_scripts(launcher: ModuleType) -> None:
    args = launcher.parse_args(["--workers", "3", __file__, "--workers", "5", "x"])
    assert args.workers == 3
    assert args.arguments == ["--workers", "5", "x"]
