"""The launcher with scripts that never touch MindSpore; where msrun itself does not matter, without it."""

from __future__ import annotations

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

from tests.st.conftest import load_launcher

HEAD = (
    "import os, pathlib, signal, sys, time\n"
    "worker = os.environ['MS_ROLE'] == 'MS_WORKER'\n"
    "rank = os.environ['RANK_ID']\n"
)
# What msrun does and says, without the seconds that its imports take.
FAKE_MSRUN = """
import os, subprocess, sys, time
log_dir, workers, *command = sys.argv[1:]
started = []
for name, role, rank in [("scheduler", "MS_SCHED", "0"), *(
    (f"worker_{rank}", "MS_WORKER", str(rank)) for rank in range(int(workers))
)]:
    log = open(f"{log_dir}/{name}.log", "w")
    started.append(subprocess.Popen(
        [sys.executable, *command], env=os.environ | {"MS_ROLE": role, "RANK_ID": rank},
        stdout=log, stderr=log, start_new_session=True,
    ))
while not (failed := [worker for worker in started[1:] if worker.poll()]):
    if all(worker.poll() == 0 for worker in started[1:]):
        sys.exit(started[0].wait())
    time.sleep(0.1)
print(f"Worker process {failed[0].pid} exit with exception. Error code: {failed[0].returncode}", flush=True)
for worker in started[1:]:
    worker.kill()
sys.exit(started[0].wait())
"""


@pytest.fixture(scope="module")
def launcher() -> ModuleType:
    return load_launcher()


@pytest.fixture
def without_msrun(launcher: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(workers: int, log_dir: Path, port: int) -> list[str]:
        return [sys.executable, "-c", FAKE_MSRUN, str(log_dir), str(workers)]

    monkeypatch.setattr(launcher, "_msrun", command)


def run(launcher: ModuleType, tmp_path: Path, body: str, **options: Any) -> tuple[int, str]:
    """Launches a script of two workers; returns exit code and output."""
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


def assert_one_message(launcher: ModuleType, tmp_path: Path, fault: str, code: int, says: str) -> None:
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
def test_a_worker_that_is_killed_is_one_message(launcher: ModuleType, tmp_path: Path) -> None:
    assert_one_message(launcher, tmp_path, "os.kill(os.getpid(), 9)", 128 + 9, "ended by SIGKILL")


def test_an_exception_is_one_message(launcher: ModuleType, tmp_path: Path, without_msrun: None) -> None:
    fault = "time.sleep(1)\n    raise ValueError('worker one is broken')"
    assert_one_message(launcher, tmp_path, fault, 1, "exit code 1: ValueError: worker one is broken")


@pytest.mark.msrun
def test_an_error_of_the_user_keeps_its_exit_code(launcher: ModuleType, tmp_path: Path) -> None:
    """In a script of the library, the message is the supervisor's, which msrun itself shows, too."""
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


def run_and_signal(
    launcher: ModuleType, tmp_path: Path, body: str, number: signal.Signals, **options: Any
) -> tuple[int, str]:
    """Sends this process a signal as soon as both workers are ready."""

    def send() -> None:
        while len(list(tmp_path.glob("ready*"))) < 2:
            time.sleep(0.1)
        time.sleep(0.5)  # until the launcher has seen them
        os.kill(os.getpid(), number)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=send)
    thread.start()
    found = run(launcher, tmp_path, body, **options)
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before
    return found


def saved(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.glob("saved*"))


@pytest.mark.msrun
def test_sigterm_goes_to_the_workers_which_save(launcher: ModuleType, tmp_path: Path) -> None:
    """A job that was stopped has not failed: nothing is said."""
    assert run_and_signal(launcher, tmp_path, SAVES, signal.SIGTERM) == (0, "")
    assert saved(tmp_path) == ["saved0_15", "saved1_15"]


def test_sigint_does_so_too_with_its_exit_code(
    launcher: ModuleType, tmp_path: Path, without_msrun: None
) -> None:
    # One exits a little later, so that the other is not killed before it has saved.
    body = SAVES.replace("    sys.exit", "    time.sleep(0.5)\n    sys.exit")
    assert run_and_signal(launcher, tmp_path, body, signal.SIGINT) == (130, "")
    assert saved(tmp_path) == ["saved0_2", "saved1_2"]


def test_a_job_that_does_not_stop_is_killed_after_the_grace(
    launcher: ModuleType, tmp_path: Path, without_msrun: None
) -> None:
    body = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "pathlib.Path(f'ready{rank}').touch() if worker else None\ntime.sleep(600)\n"
    )
    assert run_and_signal(launcher, tmp_path, body, signal.SIGTERM, stop_grace=1) == (143, "")


def test_timeout(launcher: ModuleType, tmp_path: Path, without_msrun: None) -> None:
    body = "print('slow', flush=True)\ntime.sleep(600)\n"
    code, output = run(launcher, tmp_path, body, timeout=3)
    assert code == launcher.TIMED_OUT
    assert "ran out of time (3 s)" in output
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
