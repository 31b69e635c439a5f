"""What Linux reports about the processes of a host.

This reads /proc itself: psutil gives neither the exit code of a process that is not a child, nor the states
of threads, nor a start time that is independent of clock changes.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
GONE = "gone"


@dataclass(frozen=True)
class ProcessState:
    """The state of a process at one moment."""

    state: str
    """The kernel's letter: R running, S asleep, D waiting for a disk or device, T stopped; or ``GONE``."""
    cpu_seconds: float = 0.0
    exit_code: int | None = None
    """0 to 255, or minus the number of a signal; ``None`` while it runs and when it is no longer known."""

    @property
    def is_alive(self) -> bool:
        """Whether it runs, or could."""
        return self.state != GONE


class Host:
    """The processes of this host; each is named by its number and its start, see :func:`start_ticks`."""

    def state_of(self, pid: int, started: int) -> ProcessState:
        """The state of a process."""
        fields = _stat(Path(f"/proc/{pid}/stat"))
        if fields is None or int(fields[19]) != started:
            return ProcessState(GONE)
        state, cpu = fields[0], (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND
        if state in "ZX":  # dead, but its parent has not asked for the exit code yet
            status = int(fields[49])
            return ProcessState(GONE, cpu, -(status & 0x7F) if status & 0x7F else status >> 8)
        return ProcessState(state, cpu)

    def send(self, pid: int, started: int, number: signal.Signals) -> None:
        """Sends a signal to a process, and to no other that has got its number since."""
        if self.state_of(pid, started).is_alive:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def wants_to_compute(self, pid: int) -> bool:
        """Whether a thread of a process runs, or waits for a processor or a disk."""
        try:
            threads = [_stat(thread / "stat") for thread in Path(f"/proc/{pid}/task").iterdir()]
        except OSError:  # the process has just gone
            return False
        return any(fields is not None and fields[0] in "RD" for fields in threads)

    def out_of_memory_kills(self) -> int:
        """How many processes the kernel has killed for lack of memory since it started."""
        try:
            lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def start_ticks(pid: int) -> int:
    """When a process started, in the kernel's clock ticks; 0 when there is none."""
    fields = _stat(Path(f"/proc/{pid}/stat"))
    return 0 if fields is None else int(fields[19])


def _stat(path: Path) -> list[str] | None:
    """Fields of a stat file from the third on; the second is the command's name, which may hold anything."""
    try:
        content = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return content[content.rindex(")") + 2 :].split()
