"""Failure reports: which process of a job failed or hangs, where, and why."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from mindrlhf.runtime.heartbeat import ENDED, FAILED, RUNNING, SCHEDULER, Heartbeat
from mindrlhf.runtime.processes import ProcessState

MESSAGE_START = "ERROR job failed: "
"""Start of the one-line report; when a job has failed, msrun shows the ERROR lines of the scheduler's log."""

_ASKED_TO_END = frozenset({0, 130, 143, -signal.SIGINT, -signal.SIGTERM})
_LONGEST_CAUSE = 1500

Heartbeats = Mapping[int, Heartbeat]
States = Mapping[int, ProcessState]


@dataclass(frozen=True)
class FailureReport:
    """Which process failed, with its last heartbeat, and why."""

    process: Heartbeat
    cause: str
    is_hang: bool = False

    def message(self, world_size: int, *, extra: str = "") -> str:
        """The report in one line, which begins with :data:`MESSAGE_START`."""
        process = self.process
        of_all = f" of {world_size}" if process.rank != SCHEDULER and world_size > 1 else ""
        log = f"; its log: {process.log}" if process.log else ""
        cause = " | ".join(line.strip() for line in self.cause.splitlines() if line.strip())
        if len(cause) > _LONGEST_CAUSE:
            cause = cause[:_LONGEST_CAUSE] + "..."
        return f"{MESSAGE_START}{process.name}{of_all}, {process.place}: {cause}{extra}{log}"


def find_failure(
    heartbeats: Heartbeats, states: States, failed_before: frozenset[int], *, out_of_memory: bool = False
) -> FailureReport | None:
    """The first failure of a job, if any; to be called repeatedly.

    When a process has died silently and another that reported a failure is still alive, the death is the
    cause: other ranks see it as a communication error. A failure that was reported before the last call came
    first.

    Args:
        heartbeats: the last of every process, by rank.
        states: of these processes, not older than the heartbeats.
        failed_before: ranks that had reported a failure at the last call.
        out_of_memory: whether the kernel has killed a process for lack of memory since then.
    """
    workers_ended = all(b.state == ENDED for rank, b in heartbeats.items() if rank != SCHEDULER)
    silent = [
        rank
        for rank, heartbeat in heartbeats.items()
        if heartbeat.state == RUNNING
        and not states[rank].is_alive
        and states[rank].exit_code not in _ASKED_TO_END
        and not (rank == SCHEDULER and workers_ended)
    ]
    failed = [rank for rank, heartbeat in heartbeats.items() if heartbeat.state == FAILED]
    if failed and (failed_before or not silent or not all(states[rank].is_alive for rank in failed)):
        # All ranks find a fault of the input at once; the lowest reports it.
        rank = _first([rank for rank in failed if rank in failed_before] or failed)
        return FailureReport(heartbeats[rank], heartbeats[rank].cause)
    if silent:
        rank = _first(silent)
        return FailureReport(heartbeats[rank], _cause_of_death(states[rank].exit_code, out_of_memory))
    return None


def find_stalled(heartbeats: Heartbeats, states: States, stacks: Mapping[int, str]) -> list[int]:
    """The ranks that the other ranks wait for; several where they cannot be told apart.

    The first rule that tells ranks apart decides: the process is stopped; the rank is phases behind; its main
    thread is outside MindSpore while others' are inside, or is at another line than most; it has done fewer
    units.

    Args:
        heartbeats: of the ranks that have not ended.
        states: of their processes.
        stacks: their Python stacks as faulthandler writes them.
    """
    ranks = sorted(heartbeats)
    stopped = [rank for rank in ranks if states[rank].state == "T"]
    if stopped:
        return stopped
    places = {rank: (heartbeats[rank].iteration, heartbeats[rank].steps) for rank in ranks}
    behind = [rank for rank in ranks if places[rank] == min(places.values())]
    if len(behind) < len(ranks):
        return behind
    frames = {rank: main_frames(stacks.get(rank, "")) for rank in ranks}
    outside = [rank for rank in ranks if frames[rank] and "/mindspore/" not in frames[rank][0]]
    if 0 < len(outside) < len(ranks):
        return outside
    common, count = Counter(frames.values()).most_common(1)[0]
    if len(ranks) / 2 < count < len(ranks):
        return [rank for rank in ranks if frames[rank] != common]
    fewest = min(heartbeat.done for heartbeat in heartbeats.values())
    return [rank for rank in ranks if heartbeats[rank].done == fewest]


def report_hang(
    heartbeats: Heartbeats, states: States, stacks: Mapping[int, str], now: float, reason: str
) -> FailureReport:
    """The report about a job that makes no progress; arguments as for :func:`find_stalled`.

    Args:
        now: time on the heartbeats' clock.
        reason: the limit that was reached.
    """
    stalled = find_stalled(heartbeats, states, stacks)
    first = heartbeats[stalled[0]]
    cause = f"no progress for {now - first.time:.0f} s ({reason})"
    if states[first.rank].state == "T":
        cause += ", the process is stopped (SIGSTOP)"
    elif frames := main_frames(stacks.get(first.rank, "")):
        cause += f", it is at {frames[0]}"
    if len(stalled) > 1:
        cause += f"; so are rank(s) {_list(stalled[1:])}"
    if waiting := sorted(rank for rank in heartbeats if rank not in stalled):
        cause += f"; rank(s) {_list(waiting)} wait for it, {heartbeats[waiting[0]].place}"
    return FailureReport(first, f"{cause}; Python stacks are in *.stacks beside the logs", is_hang=True)


def main_frames(stacks: str) -> tuple[str, ...]:
    """The main thread's frames, innermost first, as ``FILE:LINE in FUNCTION``; faulthandler shows it last."""
    frames: list[str] = []
    for line in stacks.splitlines():
        if "most recent call first" in line:
            frames = []
        elif line.startswith('  File "'):
            path, _, rest = line.removeprefix('  File "').partition('", line ')
            number, _, function = rest.partition(" in ")
            frames.append(f"{path}:{number} in {function}")
    return tuple(frames)


def _cause_of_death(code: int | None, out_of_memory: bool) -> str:
    if code is None:
        return "the process has ended without reporting a cause"
    if code >= 0:
        return f"the process has ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    if -code != signal.SIGKILL:
        return f"the process was ended by {name}"
    if out_of_memory:
        return f"the process was killed ({name}): the machine was out of memory"
    return f"the process was killed ({name}): kill -9, or a memory limit of its container"


def _first(ranks: list[int]) -> int:
    """The lowest rank; the scheduler only when it is alone."""
    return min(ranks, key=lambda rank: (rank == SCHEDULER, rank))


def _list(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
