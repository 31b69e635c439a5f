"""Heartbeats: small files, shared on a host, in which every process of a job reports where it is.

A job has one directory per host, in the temporary directory. All processes of a host share one monotonic
clock, so their times can be compared.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mindrlhf.runtime.processes import start_ticks

SCHEDULER = -1
"""Stands for msrun's scheduler in place of a rank."""

RUNNING, FAILED, ENDED = "running", "failed", "ended"


@dataclass(frozen=True)
class Heartbeat:
    """Where one process is."""

    rank: int
    world_size: int
    pid: int
    started: int
    """Start of the process in clock ticks, because the kernel gives its number to other processes later."""
    log: str
    """File of its standard error; empty when that is a terminal or a pipe."""
    state: str = RUNNING
    cause: str = ""
    """Cause of a failure, in one line."""
    code: int = 0
    """Exit code, once it has ended."""
    iteration: int = 0
    """Counted from 1; 0 before the first."""
    phase: str = "start"
    between: bool = False
    """Whether the phase is over and the next has not begun."""
    steps: int = 0
    """Phases begun or ended so far: all ranks go through the same ones."""
    done: int = 0
    total: int | None = None
    unit: str = ""
    time: float = 0.0
    """Last sign of progress, in seconds."""
    timeout: float = 0.0
    """Seconds without progress after which the job has failed; 0: never."""
    may_idle: bool = True
    """Whether the process may legitimately wait without using the CPU, such as for a disk or a network."""

    @property
    def name(self) -> str:
        """The process as messages name it."""
        return "msrun's scheduler" if self.rank == SCHEDULER else f"rank {self.rank}"

    @property
    def place(self) -> str:
        """Phase and iteration in words."""
        where = f"{'after' if self.between else 'in'} phase {self.phase}"
        if self.total and not self.between:
            where += f" ({self.done} of {self.total} {self.unit} done)"
        return f"{where} of iteration {self.iteration}" if self.iteration else where


class HeartbeatWriter:
    """Writes the heartbeat of this process; a write takes about 0.1 ms.

    Args:
        directory: of the job on this host.
        rank: of this process, or ``SCHEDULER``.
        world_size: number of workers.
        clock: monotonic, in seconds.

    Attributes:
        last: the heartbeat written last.
    """

    def __init__(
        self, directory: Path, rank: int, world_size: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.directory = directory
        self._clock = clock
        self._path = directory / ("scheduler.json" if rank == SCHEDULER else f"rank_{rank}.json")
        pid = os.getpid()
        self.last = Heartbeat(rank, world_size, pid, start_ticks(pid), _log_of_this_process())
        self.update()

    def update(self, **fields: Any) -> None:
        """Reports progress with changed fields; a full disk does not make the job fail."""
        self.last = replace(self.last, time=self._clock(), **fields)
        temporary = self._path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(asdict(self.last)), encoding="utf-8")
            temporary.replace(self._path)
        except OSError:
            return


def read_heartbeats(directory: Path) -> dict[int, Heartbeat]:
    """The last heartbeat of every process by rank; empty when the directory is gone."""
    heartbeats = {}
    for path in _files_of(directory):
        try:
            heartbeat = Heartbeat(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue  # the process has just gone
        heartbeats[heartbeat.rank] = heartbeat
    return heartbeats


def _files_of(directory: Path) -> list[Path]:
    """Not ``Path.glob``, which raises when the directory goes while it looks."""
    try:
        return [path for path in directory.iterdir() if path.suffix == ".json"]
    except OSError:
        return []


def stack_file(directory: Path, rank: int) -> Path:
    """Where a process writes its Python stacks when asked for them."""
    return directory / f"rank_{rank}.stacks"


def _log_of_this_process() -> str:
    try:
        path = Path("/proc/self/fd/2").readlink()
    except OSError:
        return ""
    return str(path) if path.is_file() else ""
