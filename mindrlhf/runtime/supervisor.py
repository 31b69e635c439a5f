"""The process that watches a job on one host: ends all of it when a part fails or stands still.

    python -m mindrlhf.runtime.supervisor DIRECTORY

It is started by the first process of the job (:mod:`mindrlhf.runtime.supervision`), reads heartbeats and
/proc, and needs nothing of Python or MindSpore in the processes it watches: not the interpreter's lock, which
a compilation or a regular expression may hold for minutes.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from mindrlhf.runtime.failures import Verdict, find_failure, stall_verdict
from mindrlhf.runtime.heartbeat import ENDED, FAILED, RUNNING, SCHEDULER, Beat, read_beats, stack_file
from mindrlhf.runtime.processes import Host, Process

POLL_SECONDS = 0.2
IDLE_SECONDS = 30.0
"""So long may a job neither go on nor use the CPU, where all its processes compute."""
IDLE_CPU_SECONDS = 1.0
"""CPU time of all its processes in that time, at most: their own threads tick on."""
LATE_SECONDS = 5.0
"""A look that comes so late says that the machine was suspended, or this process was."""
GRACE_SECONDS = 5.0
"""For a failed process to write its traceback and to end."""
NOTICE_SECONDS = 1.5
"""For msrun to see that it has ended."""
JOIN_SECONDS = 5.0
"""Within which all processes of a host have joined, after the first."""
STACK_SECONDS = 1.5
STACK_SIGNAL = signal.SIGUSR2

Beats = dict[int, Beat]
Looks = dict[int, Process]


class Supervisor:
    """Looks at a job's processes.

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
        self._reported: frozenset[int] = frozenset()
        self._last_look = self._started = clock()
        self._paused = 0.0
        self._idle_since, self._idle_cpu = clock(), 0.0
        self._progress: tuple[float, ...] = ()

    def read(self) -> tuple[Beats, Looks]:
        """Beats, then looks: a process that has died has written its last beat."""
        seen = read_beats(self.directory)
        looks = {rank: self.host.look(beat.pid, beat.birth) for rank, beat in seen.items()}
        beats = {**seen, **{r: b for r, b in read_beats(self.directory).items() if r in seen}}
        return beats, looks

    def examine(self, beats: Mapping[int, Beat], looks: Mapping[int, Process]) -> Verdict | None:
        """The verdict, once there is one."""
        failure = find_failure(
            beats,
            looks,
            self._reported,
            out_of_memory=self.host.out_of_memory_kills() > self._kills_before,
        )
        self._reported = frozenset(rank for rank, beat in beats.items() if beat.state == FAILED)
        return failure or self._standstill(beats, looks)

    def _standstill(self, beats: Mapping[int, Beat], looks: Mapping[int, Process]) -> Verdict | None:
        now, last = self.clock(), self._last_look
        self._last_look = now
        active = {rank: beat for rank, beat in beats.items() if rank != SCHEDULER and beat.state == RUNNING}
        if not active:
            return None
        progress = tuple(beat.time for beat in active.values())
        if progress != self._progress:
            self._progress, self._paused = progress, 0.0
            self._rest(looks, now)
        states = {looks[rank].state for rank in active}
        if now - last > LATE_SECONDS or states == {"T"}:
            # Nobody could go on in this time.
            self._paused += now - last
            self._rest(looks, now)
        cpu = sum(looks[rank].cpu_seconds for rank in active)
        if cpu - self._idle_cpu > IDLE_CPU_SECONDS or "D" in states:
            self._rest(looks, now)
        reason = ""
        timeout = max(beat.timeout for beat in active.values())
        if timeout and now - max(progress) - self._paused > timeout:
            reason = f"--watchdog_timeout {timeout:g}"
        elif not any(beat.may_idle for beat in active.values()) and now - self._idle_since > IDLE_SECONDS:
            if any(self.host.wants_to_compute(beat.pid) for beat in active.values()):
                self._rest(looks, now)  # others have taken all processors
            else:
                reason = f"no rank has computed for {IDLE_SECONDS:g} s"
        if not reason:
            return None
        stacks = self._stacks(active)
        return stall_verdict(active, looks, stacks, now, reason)

    def _rest(self, looks: Mapping[int, Process], now: float) -> None:
        """Starts the wait for a job that computes no more anew."""
        self._idle_since = now
        self._idle_cpu = sum(look.cpu_seconds for rank, look in looks.items() if rank != SCHEDULER)

    def _stacks(self, beats: Mapping[int, Beat]) -> dict[int, str]:
        """Python stacks of some processes; they stay beside the logs."""
        for beat in beats.values():
            if stack_file(self.directory, beat.rank).exists():  # else the signal would end it
                self.host.send(beat.pid, beat.birth, STACK_SIGNAL)
        if beats:
            time.sleep(STACK_SECONDS)
        stacks = {}
        for rank, beat in beats.items():
            with contextlib.suppress(OSError):
                stacks[rank] = stack_file(self.directory, rank).read_text(errors="replace")
                if beat.log:
                    Path(beat.log).with_suffix(".stacks").write_text(stacks[rank], encoding="utf-8")
                else:
                    write_line("", f"Python stacks of {beat.name}:\n{stacks[rank]}")
        return stacks

    def end(self, verdict: Verdict, beats: Mapping[int, Beat]) -> None:
        """Says why, and ends all processes of the job: the workers first, msrun waits for the scheduler."""
        scheduler, extra = beats.get(SCHEDULER), ""
        if self._is_missing_one(beats) and self.clock() - self._started > JOIN_SECONDS:
            extra = "; workers of other hosts end by their own watchdog"
        message = verdict.message(verdict.blamed.world_size, extra=extra)
        # msrun shows the scheduler's log of a failed job; alone, standard error is this process's, too.
        write_line("" if scheduler is None else scheduler.log, message)
        if not verdict.is_hang and any(self.host.look(b.pid, b.birth).is_alive for b in beats.values()):
            self._let_failed_end(verdict.blamed)
        self._kill_workers(beats)
        shutil.rmtree(self.directory, ignore_errors=True)
        if scheduler is not None:
            self.host.send(scheduler.pid, scheduler.birth, signal.SIGKILL)

    def _kill_workers(self, beats: Mapping[int, Beat]) -> None:
        """Kills all workers, early in a job also those that are about to join."""
        while True:
            workers = {**beats, **read_beats(self.directory)}
            for beat in [beat for rank, beat in sorted(workers.items()) if rank != SCHEDULER]:
                self.host.send(beat.pid, beat.birth, signal.SIGKILL)
            if not self._is_missing_one(workers) or self.clock() - self._started > JOIN_SECONDS:
                return
            time.sleep(POLL_SECONDS)

    @staticmethod
    def _is_missing_one(beats: Mapping[int, Beat]) -> bool:
        workers = [beat for rank, beat in beats.items() if rank != SCHEDULER]
        return len(workers) < max(beat.world_size for beat in beats.values())

    def _let_failed_end(self, blamed: Beat) -> None:
        """Waits for those that have failed to write their traceback; others may be about to find the same.

        Then for msrun, which looks once a second: it must find the first failure before it finds the others
        killed, for its exit code.
        """
        begin = last_alive = self.clock()
        while (now := self.clock()) < begin + GRACE_SECONDS and now < last_alive + NOTICE_SECONDS:
            failed = [beat for beat in read_beats(self.directory).values() if beat.state == FAILED]
            if any(self.host.look(beat.pid, beat.birth).is_alive for beat in (blamed, *failed)):
                last_alive = now
            time.sleep(POLL_SECONDS)

    def run(self) -> None:
        """Watches until the job is over."""
        self.sweep()
        while True:
            beats, looks = self.read()
            if not self.directory.is_dir():
                return  # the last one to end has removed it
            if beats and not any(look.is_alive for look in looks.values()):
                verdict = self.examine(beats, looks)
                if verdict is not None:
                    self.end(verdict, beats)
                shutil.rmtree(self.directory, ignore_errors=True)
                return
            verdict = self.examine(beats, looks)
            if verdict is not None:
                self.end(verdict, beats)
                return
            if self._only_scheduler_left(beats, looks):
                # msrun may kill it before it can remove the folder itself.
                shutil.rmtree(self.directory, ignore_errors=True)
                return
            time.sleep(POLL_SECONDS)

    def sweep(self) -> None:
        """Removes the folders of jobs that were killed together with their supervisor."""
        prefix = self.directory.name.rsplit("_", 2)[0]
        for folder in self.directory.parent.glob(f"{prefix}_*"):
            beats = read_beats(folder).values()
            if beats and not any(self.host.look(beat.pid, beat.birth).is_alive for beat in beats):
                shutil.rmtree(folder, ignore_errors=True)

    @staticmethod
    def _only_scheduler_left(beats: Mapping[int, Beat], looks: Mapping[int, Process]) -> bool:
        """Whether all workers have ended well."""
        workers = [rank for rank in beats if rank != SCHEDULER]
        return bool(workers) and all(
            beats[rank].state == ENDED and not looks[rank].is_alive for rank in workers
        )


def write_line(log: str, text: str) -> None:
    """Appends to a process's log, or to standard error where it has none."""
    if log:
        with contextlib.suppress(OSError), Path(log).open("a", encoding="utf-8", errors="replace") as file:
            file.write(text + "\n")
            return
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    Supervisor(Path(sys.argv[1])).run()
