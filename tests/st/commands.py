"""A command as a person runs it: plain environment, own working directory, msrun on a free port."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

REPO_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Finished:
    """A command that ended."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    directory: Path
    temporary: Path

    @property
    def logs(self) -> str:
        """Everything it said, and the ends of the workers' logs."""
        logs = sorted(self.directory.glob("ppo_log/*.log"))
        tails = [f"--- {log.name}\n{log.read_text(errors='replace')[-2500:]}" for log in logs]
        return "\n".join([self.stdout[-1500:], self.stderr[-1500:], *tails])


class Command:
    """A command in a directory of its own; ends with all it started when it takes too long."""

    def __init__(self, arguments: Sequence[str], directory: Path) -> None:
        directory.mkdir(parents=True)
        self.directory = directory
        self.temporary = directory.with_name(directory.name + "_tmp")
        self.temporary.mkdir()
        self.begin = time.monotonic()
        self.process = subprocess.Popen(
            arguments,
            cwd=directory,
            env=plain_environment(self.temporary),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, timeout: float) -> Finished:
        """Waits; a time-out is a failure of the test."""
        try:
            stdout, stderr = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            # Workers of msrun lead sessions of their own: a process group is not enough.
            started = psutil.Process(self.process.pid).children(recursive=True)
            for process in (*started, self.process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            stdout, stderr = self.process.communicate()
            seconds = time.monotonic() - self.begin
            result = Finished(-1, stdout, stderr, seconds, self.directory, self.temporary)
            pytest.fail(f"ran out of time ({timeout:g} s)\n{result.logs}", pytrace=False)
        seconds = time.monotonic() - self.begin
        return Finished(self.process.returncode, stdout, stderr, seconds, self.directory, self.temporary)


def plain_environment(temporary: Path) -> dict[str, str]:
    """The environment without what tests/conftest.py adds to keep such files away: here they must show."""
    hidden = ("LOCAL_DEFAULT_PATH", "LOG_MF_PATH", "MS_OM_PATH", "MS_COMPILER_CACHE_PATH", "GLOG_v")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    return env | {"TMPDIR": str(temporary), "MPLCONFIGDIR": str(temporary.parent / "matplotlib")}


def msrun(script: Path, *arguments: str, workers: int) -> list[str]:
    """The tutorial's command, ``msrun ... --log_dir=ppo_log SCRIPT ...``, on a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    program = shutil.which("msrun")
    assert program is not None
    return [
        program,
        *(f"--worker_num={workers}", f"--local_worker_num={workers}", f"--master_port={port}"),
        *("--join=True", "--log_dir=ppo_log"),
        *(str(script), *arguments),
    ]
