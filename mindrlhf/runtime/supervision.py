"""How a process takes part in a supervised job: it joins, reports where it is, and leaves.

Under msrun every process joins in :func:`run_worker`, the scheduler too; a job in one process joins when it
has a watchdog. The first process of a host starts :mod:`mindrlhf.runtime.supervisor`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NoReturn

from mindrlhf.runtime.heartbeat import (
    ENDED,
    FAILED,
    SCHEDULER,
    HeartbeatWriter,
    read_heartbeats,
    stack_file,
)
from mindrlhf.runtime.processes import start_ticks
from mindrlhf.runtime.supervisor import STACK_SIGNAL
from mindrlhf.utils.command_line import EXIT_INTERRUPTED, EXIT_TERMINATED, run_main
from mindrlhf.utils.ranks import env_rank, env_world_size, is_scheduler, under_msrun

_LOCK = "supervisor.lock"
_REPOSITORY = Path(__file__).resolve().parents[2]


class SupervisedProcess:
    """This process as a part of a supervised job.

    Args:
        heartbeat: of this process.
        stacks: the file for its Python stacks.
    """

    def __init__(self, heartbeat: HeartbeatWriter, stacks: IO[str]) -> None:
        self.heartbeat = heartbeat
        self._stacks = stacks

    @property
    def directory(self) -> Path:
        """The job's directory on this host; the supervisor removes it, however the job ends."""
        return self.heartbeat.directory

    def end(self, code: int = 0, cause: str = "") -> None:
        """Reports that this process ends; with a cause, that it has failed.

        The supervisor ends all processes after a failure. Otherwise the last process removes the directory.
        """
        if cause:
            self.heartbeat.update(state=FAILED, cause=cause, code=code)
            return
        self.heartbeat.update(state=ENDED, code=code)
        faulthandler.unregister(STACK_SIGNAL)
        self._stacks.close()
        heartbeats = read_heartbeats(self.directory)
        workers = [rank for rank in heartbeats if rank != SCHEDULER]
        all_ended = all(heartbeat.state == ENDED for heartbeat in heartbeats.values())
        if all_ended and len(workers) >= self.heartbeat.last.world_size:
            shutil.rmtree(self.directory, ignore_errors=True)


_current: SupervisedProcess | None = None


def current_process() -> SupervisedProcess | None:
    """This process, if it is supervised."""
    return _current


def report_progress(**fields: Any) -> None:
    """Changes fields of this process's heartbeat; does nothing when it is not supervised."""
    if _current is not None:
        _current.heartbeat.update(**fields)


def run_worker(main: Callable[[], int | None]) -> NoReturn:
    """Runs the ``main`` of a script that msrun may have started, as a supervised process.

    It ends as :func:`~mindrlhf.utils.command_line.run_main` says; when it fails, the supervisor ends the
    other processes of the job.
    """

    def supervised() -> int | None:
        if under_msrun():
            parent = os.getppid()  # msrun, the same for all processes of this host
            job = f"{parent}_{start_ticks(parent)}"
            join(job, SCHEDULER if is_scheduler() else env_rank(), env_world_size())
        return main()

    def report_exit(cause: str, code: int) -> None:
        if _current is not None:
            _current.end(code, "" if code in (EXIT_INTERRUPTED, EXIT_TERMINATED) else cause)

    run_main(supervised, on_exit=report_exit)


def join(job: str, rank: int, world_size: int) -> None:
    """Makes this process a part of a job, and starts the supervisor when it is the first one on this host.

    It does nothing where processes cannot be watched: without /proc, or without a temporary directory that
    can be written.

    Args:
        job: name that all processes of the job on this host have, and no other job.
        rank: of this process, or ``SCHEDULER``.
        world_size: number of workers.
    """
    global _current
    if start_ticks(os.getpid()) == 0:
        return
    directory = Path(tempfile.gettempdir()) / f"mindrlhf_job_{os.getuid()}_{socket.gethostname()}_{job}"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if directory.stat().st_uid != os.getuid():
            return
        stacks = stack_file(directory, rank).open("w")
    except OSError:
        return
    if under_msrun():
        _append_to_logs()
    faulthandler.register(STACK_SIGNAL, file=stacks, all_threads=True)
    _current = SupervisedProcess(HeartbeatWriter(directory, rank, world_size), stacks)
    if rank == SCHEDULER or not _has_scheduler(directory):
        _start_supervisor(directory)


def leave() -> None:
    """Ends the supervision of this process, which keeps running."""
    global _current
    if _current is not None:
        _current.end()
    _current = None


def _append_to_logs() -> None:
    """msrun does not open logs for appending: what the supervisor adds would be overwritten."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_APPEND)


def _has_scheduler(directory: Path) -> bool:
    """Whether msrun's scheduler runs on this host; it starts before the workers, but may be slower."""
    host = os.environ.get("MS_SCHED_HOST", "")
    if not host:
        return False
    try:
        with socket.socket() as probe:
            probe.bind((host, 0))
    except OSError:
        return False  # the address is that of another machine
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        if (directory / _LOCK).exists():
            return True
        time.sleep(0.02)
    return False


def _start_supervisor(directory: Path) -> None:
    """Starts the supervisor unless another process of the job has."""
    try:
        os.close(os.open(directory / _LOCK, os.O_CREAT | os.O_EXCL, 0o600))
    except OSError:
        return
    path = os.pathsep.join(filter(None, [str(_REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    # In its own session: msrun kills the process group of a worker, Ctrl-C that of the terminal.
    subprocess.Popen(
        [sys.executable, "-m", "mindrlhf.runtime.supervisor", str(directory)],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": path},
    )
