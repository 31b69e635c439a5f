"""Heartbeats: small files, shared on a host, in which each process of a job says where it stands.

One folder a job and host, in the temporary directory. The monotonic clock of a host is one for all its
processes, so times can be compared.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mindrlhf.runtime.processes import birth_of

SCHEDULER = -1
"""Stands for msrun's scheduler where a rank is wanted."""

RUNNING, FAILED, ENDED = "running", "failed", "ended"


@dataclass(frozen=True)
class Beat:
    """Where one process stands."""

    rank: int
    world_size: int
    pid: int
    birth: int
    """When the process started, in the kernel's ticks: a number is given to other processes later."""
    log: str
    """File of its standard error; empty when that is a terminal or a pipe."""
    state: str = RUNNING
    cause: str = ""
    """Of a failure, in one line."""
    code: int = 0
    """Exit code, once it has ended."""
    iteration: int = 0
    """Counted from 1; 0 before the first."""
    phase: str = "start"
    between: bool = False
    """Whether the phase is over and no other has begun."""
    steps: int = 0
    """Phases begun or ended so far: ranks go through the same ones."""
    done: int = 0
    total: int | None = None
    unit: str = ""
    time: float = 0.0
    """Last sign of progress."""
    timeout: float = 0.0
    """Seconds without progress after which the job has failed; 0: never."""
    may_idle: bool = True
    """Whether the process may rightly wait without using the CPU, as for a disk or a network."""

    @property
    def name(self) -> str:
        """As messages name it."""
        return "msrun's scheduler" if self.rank == SCHEDULER else f"rank {self.rank}"

    @property
    def place(self) -> str:
        """Phase and iteration, in words."""
        where = f"{'after' if self.between else 'in'} phase {self.phase}"
        if self.total and not self.between:
            where += f" ({self.done} of {self.total} {self.unit} done)"
        return f"{where} of iteration {self.iteration}" if self.iteration else where


class Heartbeat:
    """Writes the file of this process; a write takes about 0.1 ms.

    Args:
        directory: of the job on this host.
        rank: of this process.
        world_size: number of workers.
        clock: for tests.
    """

    def __init__(
        self, directory: Path, rank: int, world_size: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.directory = directory
        self.clock = clock
        self.path = directory / ("scheduler.json" if rank == SCHEDULER else f"rank_{rank}.json")
        pid = os.getpid()
        self.beat = Beat(rank, world_size, pid, birth_of(pid), _log_of_this_process(), time=clock())
        self.update()

    def update(self, **changes: Any) -> None:
        """Progress: changes fields of the beat and writes it. A full disk is no reason to fail."""
        self.beat = replace(self.beat, time=self.clock(), **changes)
        temporary = self.path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(asdict(self.beat)), encoding="utf-8")
            temporary.replace(self.path)
        except OSError:
            return


def read_beats(directory: Path) -> dict[int, Beat]:
    """The last beat of each process by rank; empty when the folder is gone."""
    beats = {}
    for path in directory.glob("*.json"):
        try:
            beat = Beat(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue  # of a process that has just gone
        beats[beat.rank] = beat
    return beats


def stack_file(directory: Path, rank: int) -> Path:
    """Where a process writes its Python stacks when asked for them."""
    return directory / f"rank_{rank}.stacks"


def _log_of_this_process() -> str:
    try:
        path = Path("/proc/self/fd/2").readlink()
    except OSError:
        return ""
    return str(path) if path.is_file() else ""
