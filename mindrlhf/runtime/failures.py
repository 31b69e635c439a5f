"""Which process of a job is to blame when it fails or stands still, and what the one message says."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from mindrlhf.runtime.heartbeat import ENDED, FAILED, RUNNING, SCHEDULER, Beat
from mindrlhf.runtime.processes import Process

MESSAGE_START = "ERROR job failed: "
"""Begins the one line; msrun shows a scheduler's lines with ERROR when a job has failed."""

INTERRUPTED = frozenset({0, 130, 143, -signal.SIGINT, -signal.SIGTERM})
"""Exit codes of processes that were asked to end."""

_LONGEST_CAUSE = 1500


@dataclass(frozen=True)
class Verdict:
    """Who, where and why."""

    blamed: Beat
    cause: str
    is_hang: bool = False

    def message(self, world_size: int, *, extra: str = "") -> str:
        """One line, with :data:`MESSAGE_START`."""
        beat = self.blamed
        who = f"{beat.name} of {world_size}" if beat.rank != SCHEDULER and world_size > 1 else beat.name
        log = f"; its log: {beat.log}" if beat.log else ""
        cause = " | ".join(line.strip() for line in self.cause.splitlines() if line.strip())
        if len(cause) > _LONGEST_CAUSE:
            cause = cause[:_LONGEST_CAUSE] + "..."
        return f"{MESSAGE_START}{who}, {beat.place}: {cause}{extra}{log}"


def find_failure(
    beats: Mapping[int, Beat],
    looks: Mapping[int, Process],
    reported_before: frozenset[int],
    *,
    out_of_memory: bool = False,
) -> Verdict | None:
    """The first failure of a job, if any; to be called again and again.

    A process that died without a word is the cause where one that reported a failure still lives: an error of
    communication is what the others see of a death. One that had reported at the look before this was first.

    Args:
        beats: last sign of each process, by rank.
        looks: at these processes, not older than the beats.
        reported_before: ranks whose failure was already there at the last look.
        out_of_memory: whether the kernel has killed for want of memory in the meantime.
    """
    silent = [
        rank
        for rank, beat in beats.items()
        if beat.state == RUNNING
        and not looks[rank].is_alive
        and looks[rank].exit_code not in INTERRUPTED
        and not (rank == SCHEDULER and _all_ended(beats))
    ]
    reported = sorted((rank for rank, beat in beats.items() if beat.state == FAILED), key=_workers_first)
    if reported and (reported_before or not silent or not all(looks[rank].is_alive for rank in reported)):
        # Faults of input are found by all ranks at once; the lowest speaks for them.
        first = next((rank for rank in reported if rank in reported_before), reported[0])
        return Verdict(beats[first], beats[first].cause)
    if silent:
        first = min(silent, key=_workers_first)
        return Verdict(beats[first], _cause_of_death(looks[first], out_of_memory=out_of_memory))
    return None


def find_stalled(
    beats: Mapping[int, Beat], looks: Mapping[int, Process], stacks: Mapping[int, str]
) -> list[int]:
    """The ranks that the others wait for.

    In this order: a process that is stopped; the rank that is phases behind; one whose main thread is not in
    a call of MindSpore while others' are, or elsewhere than most; the one with fewer units done; the one that
    was heard of last. More than one where they cannot be told apart.

    Args:
        beats, looks: of the ranks that have not ended.
        stacks: their Python stacks as faulthandler writes them.
    """
    ranks = sorted(beats)
    stopped = [rank for rank in ranks if looks[rank].state == "T"]
    if stopped:
        return stopped
    behind = _lowest(ranks, {rank: (beats[rank].iteration, beats[rank].steps) for rank in ranks})
    if len(behind) < len(ranks):
        return behind
    frames = {rank: main_frames(stacks.get(rank, "")) for rank in ranks}
    outside = [rank for rank in ranks if frames[rank] and "/mindspore/" not in frames[rank][0]]
    if 0 < len(outside) < len(ranks):
        return outside
    common, count = Counter(frames.values()).most_common(1)[0]
    if len(ranks) / 2 < count < len(ranks):
        return [rank for rank in ranks if frames[rank] != common]
    return _lowest(ranks, {rank: (beats[rank].done,) for rank in ranks})


def stall_verdict(
    beats: Mapping[int, Beat],
    looks: Mapping[int, Process],
    stacks: Mapping[int, str],
    now: float,
    reason: str,
) -> Verdict:
    """Who is to blame for a standstill."""
    blamed = find_stalled(beats, looks, stacks)
    first = beats[blamed[0]]
    cause = f"no progress for {now - first.time:.0f} s ({reason})"
    if looks[first.rank].state == "T":
        cause += ", the process is stopped (SIGSTOP)"
    elif frames := main_frames(stacks.get(first.rank, "")):
        cause += f", it is at {frames[0]}"
    others = sorted(rank for rank in beats if rank not in blamed)
    if len(blamed) > 1:
        cause += f"; so are rank(s) {_list(blamed[1:])}"
    if others:
        cause += f"; rank(s) {_list(others)} wait for it, {beats[others[0]].place}"
    return Verdict(first, f"{cause}; Python stacks are in *.stacks beside the logs", is_hang=True)


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


def _cause_of_death(look: Process, *, out_of_memory: bool) -> str:
    code = look.exit_code
    if code is None:
        return "the process has ended without a word"
    if code >= 0:
        return f"the process has ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    if -code != signal.SIGKILL:
        return f"the process was ended by {name}"
    if out_of_memory:
        return f"the process was killed ({name}): the machine was out of memory"
    return f"the process was killed ({name}): kill -9, or a memory limit of its container"


def _all_ended(beats: Mapping[int, Beat]) -> bool:
    return all(beat.state == ENDED for rank, beat in beats.items() if rank != SCHEDULER)


def _workers_first(rank: int) -> tuple[bool, int]:
    return rank == SCHEDULER, rank


def _lowest(ranks: list[int], keys: Mapping[int, tuple[float, ...]]) -> list[int]:
    lowest = min(keys.values())
    return [rank for rank in ranks if keys[rank] == lowest]


def _list(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
