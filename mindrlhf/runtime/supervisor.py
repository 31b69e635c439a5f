"""The process that watches a job on one host, and ends all of it when one of its processes fails or hangs.

    python -m mindrlhf.runtime.supervisor DIRECTORY

It is started by the first process of the job (:mod:`mindrlhf.runtime.supervision`). It reads heartbeats and
/proc and needs nothing of Python or MindSpore in the processes it watches: not even the interpreter's lock,
which a compilation or a regular expression may hold for minutes.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mindrlhf.runtime.failures import FailureReport, Heartbeats, States, find_failure, report_hang
from mindrlhf.runtime.heartbeat import ENDED, FAILED, RUNNING, SCHEDULER, read_heartbeats, stack_file
from mindrlhf.runtime.processes import Host

POLL_SECONDS = 0.2
IDLE_SECONDS = 30.0
"""How long a job may neither make progress nor use the CPU while all of its processes should compute."""
IDLE_CPU_SECONDS = 1.0
"""CPU time that all processes together may use in that time, because background threads keep running."""
LATE_SECONDS = 5.0
"""A poll that is this late shows that the machine, or this process, was suspended."""
GRACE_SECONDS = 5.0
"""For a failed process to write its traceback and to end."""
NOTICE_SECONDS = 1.5
"""For msrun to see that it has ended."""
JOIN_SECONDS = 5.0
"""Time within which all processes of a host have joined, after the first."""
STACK_SECONDS = 1.5
STACK_SIGNAL = signal.SIGUSR2


class Supervisor:
    """Watches the processes of a job.

    Args:
        directory: of the heartbeats.
        host: the processes.
        clock: monotonic, in seconds.
    """

    def __init__(
        self, directory: Path, host: Host | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.directory = directory
        self.host = host or Host()
        self.clock = clock
        self._kills_before = self.host.out_of_memory_kills()
        self._failed_before: frozenset[int] = frozenset()
        self._last_poll = self._started = clock()
        self._paused = 0.0
        self._idle_since, self._idle_cpu = clock(), 0.0
        self._progress: tuple[float, ...] = ()

    def run(self) -> None:
        """Watches until the job is over."""
        self.remove_abandoned()
        while True:
            heartbeats, states = self._read()
            if not self.directory.is_dir():
                return  # the last process to end has removed it
            report = self.examine(heartbeats, states)
            if report is not None:
                self._end(report, heartbeats)
                return
            workers = [rank for rank in heartbeats if rank != SCHEDULER]
            all_gone = heartbeats and not any(state.is_alive for state in states.values())
            workers_ended = workers and all(
                heartbeats[rank].state == ENDED and not states[rank].is_alive for rank in workers
            )
            if all_gone or workers_ended:  # msrun may kill its scheduler before that removes the directory
                shutil.rmtree(self.directory, ignore_errors=True)
                return
            time.sleep(POLL_SECONDS)

    def examine(self, heartbeats: Heartbeats, states: States) -> FailureReport | None:
        """The report, once there is a failure or a hang."""
        failure = find_failure(
            heartbeats,
            states,
            self._failed_before,
            out_of_memory=self.host.out_of_memory_kills() > self._kills_before,
        )
        self._failed_before = frozenset(rank for rank, beat in heartbeats.items() if beat.state == FAILED)
        return failure or self._find_hang(heartbeats, states)

    def remove_abandoned(self) -> None:
        """Removes the directories of jobs that were killed together with their supervisor."""
        prefix = self.directory.name.rsplit("_", 2)[0]
        for directory in self.directory.parent.glob(f"{prefix}_*"):
            processes = read_heartbeats(directory).values()
            if processes and not any(self.host.state_of(p.pid, p.started).is_alive for p in processes):
                shutil.rmtree(directory, ignore_errors=True)

    def _read(self) -> tuple[Heartbeats, States]:
        """Heartbeats, not older than the states: that of a process found dead is its last."""
        seen = read_heartbeats(self.directory)
        states = {rank: self.host.state_of(beat.pid, beat.started) for rank, beat in seen.items()}
        again = read_heartbeats(self.directory)
        return {rank: again.get(rank, beat) for rank, beat in seen.items()}, states

    def _find_hang(self, heartbeats: Heartbeats, states: States) -> FailureReport | None:
        now, last = self.clock(), self._last_poll
        self._last_poll = now
        active = {r: beat for r, beat in heartbeats.items() if r != SCHEDULER and beat.state == RUNNING}
        if not active:
            return None
        progress = tuple(beat.time for beat in active.values())
        if progress != self._progress:
            self._progress, self._paused = progress, 0.0
            self._restart_idle_time(states, now)
        letters = {states[rank].state for rank in active}
        if now - last > LATE_SECONDS or letters == {"T"}:
            self._paused += now - last  # no process could make progress in this time
            self._restart_idle_time(states, now)
        cpu = sum(states[rank].cpu_seconds for rank in active)
        if cpu - self._idle_cpu > IDLE_CPU_SECONDS or "D" in letters:
            self._restart_idle_time(states, now)
        timeout = max(beat.timeout for beat in active.values())
        if timeout and now - max(progress) - self._paused > timeout:
            reason = f"--watchdog_timeout {timeout:g}"
        elif any(beat.may_idle for beat in active.values()) or now - self._idle_since <= IDLE_SECONDS:
            return None
        elif any(self.host.wants_to_compute(beat.pid) for beat in active.values()):
            self._restart_idle_time(states, now)  # other programs have taken all processors
            return None
        else:
            reason = f"no rank has computed for {IDLE_SECONDS:g} s"
        return report_hang(active, states, self._collect_stacks(active), now, reason)

    def _restart_idle_time(self, states: States, now: float) -> None:
        self._idle_since = now
        self._idle_cpu = sum(state.cpu_seconds for rank, state in states.items() if rank != SCHEDULER)

    def _collect_stacks(self, heartbeats: Heartbeats) -> dict[int, str]:
        """Python stacks of processes, which stay beside their logs."""
        for rank, beat in heartbeats.items():
            if stack_file(self.directory, rank).exists():  # else the signal would end the process
                self.host.send(beat.pid, beat.started, STACK_SIGNAL)
        time.sleep(STACK_SECONDS)
        stacks = {}
        for rank, beat in heartbeats.items():
            with contextlib.suppress(OSError):
                stacks[rank] = stack_file(self.directory, rank).read_text(errors="replace")
                if beat.log:
                    Path(beat.log).with_suffix(".stacks").write_text(stacks[rank], encoding="utf-8")
                else:
                    _write_line("", f"Python stacks of {beat.name}:\n{stacks[rank]}")
        return stacks

    def _end(self, report: FailureReport, heartbeats: Heartbeats) -> None:
        """Writes the report and ends all processes: workers first, because msrun waits for the scheduler."""
        scheduler, extra = heartbeats.get(SCHEDULER), ""
        if self._lacks_workers(heartbeats) and self.clock() - self._started > JOIN_SECONDS:
            extra = "; workers of other hosts end by their own watchdog"
        # msrun shows the scheduler's log when a job fails; a process alone shares its standard error.
        message = report.message(report.process.world_size, extra=extra)
        _write_line("" if scheduler is None else scheduler.log, message)
        someone_lives = any(self.host.state_of(b.pid, b.started).is_alive for b in heartbeats.values())
        if not report.is_hang and someone_lives:
            self._let_failed_end(report)
        self._kill_workers(heartbeats)
        shutil.rmtree(self.directory, ignore_errors=True)
        if scheduler is not None:
            self.host.send(scheduler.pid, scheduler.started, signal.SIGKILL)

    def _let_failed_end(self, report: FailureReport) -> None:
        """Waits for failed processes to write their traceback; others may be about to find the same fault.

        Then it waits for msrun, which polls once per second and takes its exit code from the first process
        that it finds ended: that must be a failed one, not a killed one.
        """
        begin = last_alive = self.clock()
        while (now := self.clock()) < begin + GRACE_SECONDS and now < last_alive + NOTICE_SECONDS:
            failed = [beat for beat in read_heartbeats(self.directory).values() if beat.state == FAILED]
            if any(self.host.state_of(b.pid, b.started).is_alive for b in (report.process, *failed)):
                last_alive = now
            time.sleep(POLL_SECONDS)

    def _kill_workers(self, heartbeats: Heartbeats) -> None:
        """Kills all workers; early in a job it waits for those that are about to join."""
        while True:
            processes = {**heartbeats, **read_heartbeats(self.directory)}
            for rank, beat in sorted(processes.items()):
                if rank != SCHEDULER:
                    self.host.send(beat.pid, beat.started, signal.SIGKILL)
            if not self._lacks_workers(processes) or self.clock() - self._started > JOIN_SECONDS:
                return
            time.sleep(POLL_SECONDS)

    @staticmethod
    def _lacks_workers(heartbeats: Heartbeats) -> bool:
        """Whether workers have not joined, or run on other hosts."""
        return len(heartbeats.keys() - {SCHEDULER}) < max(beat.world_size for beat in heartbeats.values())


def _write_line(log: str, text: str) -> None:
    """Appends to a process's log, or writes to standard error where it has none."""
    if log:
        with contextlib.suppress(OSError), Path(log).open("a", encoding="utf-8", errors="replace") as file:
            file.write(text + "\n")
            return
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    Supervisor(Path(sys.argv[1])).run()
