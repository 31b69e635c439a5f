"""What Linux tells of the processes of a host, by /proc: also why one that is dead has ended."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
GONE = "gone"


@dataclass(frozen=True)
class Process:
    """A look at a process."""

    state: str
    """The kernel's letter: R running, S asleep, D in a disk or device, T stopped; ``gone``."""
    cpu_seconds: float = 0.0
    exit_code: int | None = None
    """Of one that has ended: 0 to 255, less than 0 for a signal; ``None`` when nobody knows any more."""

    @property
    def is_alive(self) -> bool:
        """Whether it runs, or could."""
        return self.state != GONE


class Host:
    """The processes of this host."""

    def look(self, pid: int, birth: int) -> Process:
        """How the process does that had this number and started then."""
        fields = _stat(pid)
        if fields is None or int(fields[19]) != birth:
            return Process(GONE)
        state, cpu = fields[0], (int(fields[11]) + int(fields[12])) / _TICKS
        if state in "ZX":  # dead; its parent has not asked for the exit code yet
            return Process(GONE, cpu, _exit_code(int(fields[49])))
        return Process(state, cpu)

    def send(self, pid: int, birth: int, number: signal.Signals) -> None:
        """Sends a signal, to no other process that has come by the number."""
        if self.look(pid, birth).is_alive:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def wants_to_compute(self, pid: int) -> bool:
        """Whether a thread of a process runs, waits for a processor, or for a disk."""
        for thread in Path(f"/proc/{pid}/task").glob("*"):
            fields = _stat_of(thread / "stat")
            if fields is not None and fields[0] in "RD":
                return True
        return False

    def out_of_memory_kills(self) -> int:
        """How often the kernel has killed a process for want of memory since it started."""
        try:
            lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def birth_of(pid: int) -> int:
    """When a process started, in the kernel's ticks; 0 when there is none."""
    fields = _stat(pid)
    return 0 if fields is None else int(fields[19])


def _stat(pid: int) -> list[str] | None:
    return _stat_of(Path(f"/proc/{pid}/stat"))


def _stat_of(path: Path) -> list[str] | None:
    """Fields of a stat file from the third on; the second, the name, may hold anything."""
    try:
        content = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return content[content.rindex(")") + 2 :].split()


def _exit_code(status: int) -> int:
    return -(status & 0x7F) if status & 0x7F else status >> 8
