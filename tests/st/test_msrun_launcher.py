"""The launcher with scripts that never touch MindSpore, so that a job takes seconds."""

from __future__ import annotations

import importlib.util
import io
import os
import signal
import socket
import sys
import threading
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
@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [
        ("raise ValueError('worker one is broken')", 1, "exit code 1: ValueError: worker one is broken"),
        ("os.kill(os.getpid(), 9)", 128 + 9, "ended by SIGKILL"),
    ],
    ids=["raises", "is killed"],
)
def test_failure_is_one_message_about_the_worker_that_failed(
    launcher: ModuleType, tmp_path: Path, fault: str, code: int, says: str
) -> None:
    """The other worker and the scheduler, both asleep, are ended and not waited for."""
    body = f"if worker and rank == '1':\n    {fault}\ntime.sleep(600)\n"
    begin = time.monotonic()
    found, output = run(launcher, tmp_path, body)
    assert found == code
    assert time.monotonic() - begin < 60
    message = f"ERROR job failed: rank 1: {says}; its log: {tmp_path}/log/worker_1.log"
    assert output.splitlines() == [
        *("", message, f"msrun job failed with exit code {code}; logs are in {tmp_path}/log")
    ]
    assert ("Traceback" in (tmp_path / "log" / "worker_1.log").read_text()) == (code == 1)


@pytest.mark.msrun
def test_an_error_of_the_user_keeps_its_exit_code(launcher: ModuleType, tmp_path: Path) -> None:
    """Of a script as ours are: the message is the supervisor's, which msrun itself shows, too."""
    body = (
        "from mindrlhf.runtime.supervision import run_worker\n"
        "from mindrlhf.utils.errors import DataError\n"
        "def main():\n"
        "    if worker and rank == '1':\n"
        "        raise DataError('prompts.mindrecord: no such file')\n"
        "    time.sleep(600)\n"
        "run_worker(main)\n"
    )
    code, output = run(launcher, tmp_path, body)
    assert code == 2
    assert "rank 1 of 2, in phase start: prompts.mindrecord: no such file; its log: " in output
    assert output.count("prompts.mindrecord") == 1


SAVES = (
    "import signal\n"
    "def save(number, frame):\n"
    "    pathlib.Path(f'saved{rank}_{number}').touch()\n"
    "    sys.exit(130 if number == signal.SIGINT else 0)\n"
    "if worker:\n"
    "    signal.signal(signal.SIGTERM, save)\n"
    "    signal.signal(signal.SIGINT, save)\n"
    "    pathlib.Path(f'ready{rank}').touch()\n"
    "    time.sleep(600)\n"
    "while not list(pathlib.Path().glob('saved1*')):\n"  # the scheduler is to outlive the workers
    "    time.sleep(0.1)\n"
)


@pytest.mark.msrun
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_go_to_the_workers_which_save(
    launcher: ModuleType, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    def send() -> None:
        while len(list(tmp_path.glob("ready*"))) < 2:
            time.sleep(0.1)
        os.kill(os.getpid(), number)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=send)
    thread.start()
    found, output = run(launcher, tmp_path, SAVES)
    thread.join()
    assert found == code
    assert sorted(path.name for path in tmp_path.glob("saved*")) == [
        f"saved{r}_{int(number)}" for r in (0, 1)
    ]
    assert output == "", "a job that was stopped has not failed"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.msrun
def test_a_job_that_does_not_stop_is_killed_after_the_grace(launcher: ModuleType, tmp_path: Path) -> None:
    body = (
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "pathlib.Path(f'ready{rank}').touch() if worker else None\ntime.sleep(600)\n"
    )

    def send() -> None:
        while len(list(tmp_path.glob("ready*"))) < 2:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send)
    thread.start()
    code, output = run(launcher, tmp_path, body, stop_grace=1)
    thread.join()
    assert (code, output) == (143, "")


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
        (["--master_port", "80", __file__], "--master_port must be from 1024 to 65535, got 80"),
    ],
)
def test_bad_arguments(
    launcher: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        launcher.parse_args(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_port_in_use_is_refused(launcher: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        with pytest.raises(SystemExit) as stop:
            launcher.parse_args(["--master_port", port, __file__])
    assert stop.value.code == 2
    assert f"--master_port {port} is in use" in capsys.readouterr().err
    assert launcher.parse_args(["--master_port", str(launcher.free_port()), __file__]).master_port > 0


def test_the_message_is_the_supervisors(launcher: ModuleType) -> None:
    from mindrlhf.runtime.failures import MESSAGE_START

    assert launcher._SUPERVISOR_SAYS == MESSAGE_START


def test_script_arguments_are_the_scripts(launcher: ModuleType) -> None:
    args = launcher.parse_args(["--workers", "3", __file__, "--workers", "5", "x"])
    assert args.workers == 3
    assert args.arguments == ["--workers", "5", "x"]
