"""How a process of a job takes part in its supervision: it joins, says where it stands, and leaves.

Under msrun every process joins in :func:`run_worker`, the scheduler too; a job in one
process joins when it has a watchdog. The first one of a host starts :mod:`mindrlhf.runtime.supervisor`.
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
from typing import IO, NoReturn

from mindrlhf.runtime.heartbeat import ENDED, FAILED, SCHEDULER, Heartbeat, read_beats, stack_file
from mindrlhf.runtime.processes import birth_of
from mindrlhf.runtime.supervisor import STACK_SIGNAL
from mindrlhf.utils.command_line import EXIT_INTERRUPTED, EXIT_TERMINATED, run_main
from mindrlhf.utils.ranks import env_rank, env_world_size, is_scheduler, under_msrun

_LOCK = "supervisor.lock"
_REPOSITORY = Path(__file__).resolve().parents[2]


def run_worker(main: Callable[[], int | None]) -> NoReturn:
    """Runs the ``main`` of a script that msrun may have started, as a supervised process.

    It ends as :func:`~mindrlhf.utils.command_line.run_main` says; when it fails, the supervisor ends the
    other processes of the job.
    """

    def supervised() -> int | None:
        join_under_msrun()
        return main()

    run_main(supervised, on_exit=_report_exit)


def _report_exit(cause: str, code: int) -> None:
    if _membership is None:
        return
    if cause and code not in (EXIT_INTERRUPTED, EXIT_TERMINATED):
        _membership.fail(cause, code)
    else:
        _membership.leave(code)


class Membership:
    """This process as a part of a supervised job."""

    def __init__(self, heartbeat: Heartbeat, stacks: IO[str]) -> None:
        self.heartbeat = heartbeat
        self._stacks = stacks

    @property
    def directory(self) -> Path:
        """The job's folder on this host; the supervisor removes it, however the job ends."""
        return self.heartbeat.directory

    def fail(self, cause: str, code: int = 1) -> None:
        """Reports a failure; the supervisor ends the other processes."""
        self.heartbeat.update(state=FAILED, cause=cause, code=code)

    def leave(self, code: int = 0) -> None:
        """Says that this process ends as it should; the last one removes the folder."""
        self.heartbeat.update(state=ENDED, code=code)
        faulthandler.unregister(STACK_SIGNAL)
        self._stacks.close()
        beats = read_beats(self.directory)
        workers = [rank for rank in beats if rank != SCHEDULER]
        if len(workers) >= self.heartbeat.beat.world_size and all(b.state == ENDED for b in beats.values()):
            shutil.rmtree(self.directory, ignore_errors=True)


_membership: Membership | None = None


def membership() -> Membership | None:
    """This process's membership, if it has joined."""
    return _membership


def join_under_msrun() -> Membership | None:
    """Joins the job that msrun has started; ``None`` without msrun, or where there is no /proc."""
    if not under_msrun():
        return None
    parent = os.getppid()  # msrun, the same for all of this host
    return join(
        f"{parent}_{birth_of(parent)}",
        SCHEDULER if is_scheduler() else env_rank(),
        env_world_size(),
    )


def join(job: str, rank: int, world_size: int) -> Membership | None:
    """Makes this process a part of a job, and starts the supervisor when it is the first one on this host.

    Args:
        job: name that all processes of the job on this host have, and no other job.
        rank: of this process, or ``SCHEDULER``.
        world_size: number of workers.

    Returns:
        ``None`` where processes cannot be watched: without /proc, or without a writable temporary directory.
    """
    global _membership
    if birth_of(os.getpid()) == 0:
        return None
    directory = Path(tempfile.gettempdir()) / f"mindrlhf_job_{os.getuid()}_{socket.gethostname()}_{job}"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if directory.stat().st_uid != os.getuid():
            return None
        stacks = stack_file(directory, rank).open("w")
    except OSError:
        return None
    if under_msrun():
        _append_to_logs()
    faulthandler.register(STACK_SIGNAL, file=stacks, all_threads=True)
    _membership = Membership(Heartbeat(directory, rank, world_size), stacks)
    if rank == SCHEDULER or not _has_scheduler(directory):
        _start_supervisor(directory)
    return _membership


def _append_to_logs() -> None:
    """msrun opens logs to be written from where one stands: what the supervisor adds would be overwritten."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_APPEND)


def leave() -> None:
    """Forgets the membership, as a test must."""
    global _membership
    if _membership is not None:
        _membership.leave()
    _membership = None


def _has_scheduler(directory: Path) -> bool:
    """Whether msrun's scheduler runs on this host; it starts before the workers, but may be slower."""
    host = os.environ.get("MS_SCHED_HOST", "")
    if not host or not is_local(host):
        return False
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        if (directory / _LOCK).exists():
            return True
        time.sleep(0.02)
    return False


def is_local(host: str) -> bool:
    """Whether an address is one of this machine."""
    try:
        with socket.socket() as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True


def _start_supervisor(directory: Path) -> None:
    """Starts the supervisor unless another process of the job has."""
    try:
        os.close(os.open(directory / _LOCK, os.O_CREAT | os.O_EXCL, 0o600))
    except OSError:
        return
    path = os.pathsep.join(filter(None, [str(_REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    # A session of its own: msrun kills the process group of a worker, Ctrl-C that of the terminal.
    subprocess.Popen(
        [sys.executable, "-m", "mindrlhf.runtime.supervisor", str(directory)],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": path},
    )
