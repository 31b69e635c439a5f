"""Failure reports of hand-made heartbeats and process states; the supervisor's clock is a number."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mindrlhf.runtime import supervisor as supervisor_module
from mindrlhf.runtime.failures import (
    MESSAGE_START,
    FailureReport,
    find_failure,
    find_stalled,
    main_frames,
    report_hang,
)
from mindrlhf.runtime.heartbeat import ENDED, FAILED, SCHEDULER, Heartbeat, HeartbeatWriter, read_heartbeats
from mindrlhf.runtime.processes import GONE, Host, ProcessState, start_ticks
from mindrlhf.runtime.supervisor import IDLE_SECONDS, Supervisor

ALIVE = ProcessState("S")
NONE: frozenset[int] = frozenset()
COLLECTIVE = """Thread 0x00007f01 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 1 in wait

Current thread 0x00007f02 (most recent call first):
  File "/venv/site-packages/mindspore/common/api.py", line 10 in run
  File "/work/mindrlhf/runtime/host_exchange.py", line 20 in gather_rows
"""
ELSEWHERE = """Current thread 0x00007f02 (most recent call first):
  File "/home/user/rewards.py", line 3 in ask
  File "/work/mindrlhf/runtime/host_exchange.py", line 20 in gather_rows
"""


def beat(rank: int, **changes: Any) -> Heartbeat:
    given = {"log": f"/logs/worker_{rank}.log", "phase": "train", "iteration": 2, "steps": 7, "time": 100.0}
    return Heartbeat(rank, 4, pid=1000 + rank, started=1, **{**given, **changes})


def beats(*changes: Mapping[str, Any]) -> dict[int, Heartbeat]:
    """One heartbeat per mapping, of ranks 0, 1, ..."""
    return {rank: beat(rank, **change) for rank, change in enumerate(changes)}


def states(**special: ProcessState) -> dict[int, ProcessState]:
    """States of four ranks and the scheduler; ``r2=ProcessState(...)`` for another than alive."""
    return {rank: special.get(f"r{rank}", ALIVE) for rank in range(4)} | {SCHEDULER: special.get("s", ALIVE)}


def test_all_is_well() -> None:
    assert find_failure(beats({}, {}, {}, {}), states(), NONE) is None
    ended = beats({"state": ENDED}, {}, {}, {})
    assert find_failure(ended, states(r0=ProcessState(GONE, exit_code=0)), NONE) is None


def test_a_report_is_the_cause_and_those_that_msrun_kills_after_it_are_not() -> None:
    heartbeats = beats({}, {}, {"state": FAILED, "cause": "ValueError: x"}, {})
    report = find_failure(heartbeats, states(), NONE)
    assert report == FailureReport(heartbeats[2], "ValueError: x")
    killed = ProcessState(GONE, exit_code=-9)
    report = find_failure(heartbeats, states(r0=killed, r1=killed, r2=ProcessState(GONE, exit_code=1)), NONE)
    assert report is not None
    assert report.process.rank == 2


def test_of_ranks_that_fail_at_once_the_lowest_reports_and_one_that_failed_before_comes_first() -> None:
    failed = {"state": FAILED, "cause": "no such file"}
    heartbeats = beats({}, failed, failed, failed)
    for before, reporter in ((NONE, 1), (frozenset({3}), 3)):
        report = find_failure(heartbeats, states(), before)
        assert report is not None
        assert report.process.rank == reporter


def test_a_death_is_the_cause_of_an_error_of_communication() -> None:
    heartbeats = beats({"state": FAILED, "cause": "RuntimeError: peer closed"}, {}, {}, {})
    report = find_failure(heartbeats, states(r3=ProcessState(GONE, exit_code=-9)), NONE)
    assert report is not None
    assert (report.process.rank, "SIGKILL" in report.cause) == (3, True)
    # Reported before the death was there: the report was first.
    report = find_failure(heartbeats, states(r3=ProcessState(GONE, exit_code=-9)), frozenset({0}))
    assert report is not None
    assert report.process.rank == 0


@pytest.mark.parametrize(
    ("code", "out_of_memory", "said"),
    [
        (-9, True, "the machine was out of memory"),
        (-9, False, "kill -9, or a memory limit"),
        (-11, True, "ended by SIGSEGV"),
        (3, False, "exit code 3"),
        (None, False, "without reporting a cause"),
    ],
)
def test_causes_of_death(code: int | None, out_of_memory: bool, said: str) -> None:
    report = find_failure(
        beats({}, {}), states(r1=ProcessState(GONE, exit_code=code)), NONE, out_of_memory=out_of_memory
    )
    assert report is not None
    assert report.process.rank == 1
    assert said in report.cause


@pytest.mark.parametrize("code", [0, 130, 143, -2, -15])
def test_a_process_that_was_asked_to_end_has_not_failed(code: int) -> None:
    assert find_failure(beats({}, {}), states(r1=ProcessState(GONE, exit_code=code)), NONE) is None


def test_a_scheduler_that_dies_is_a_failure_until_all_workers_have_ended() -> None:
    dead = states(s=ProcessState(GONE, exit_code=-9))
    scheduler = {SCHEDULER: replace(beat(0), rank=SCHEDULER, phase="start", iteration=0)}
    report = find_failure(beats({}, {}) | scheduler, dead, NONE)
    assert report is not None
    assert report.message(4).startswith(f"{MESSAGE_START}msrun's scheduler, in phase start: the process was")
    ended = beats({"state": ENDED}, {"state": ENDED})
    assert find_failure(ended | scheduler, dead, NONE) is None


def test_the_message_is_one_line() -> None:
    found = FailureReport(
        beat(1, done=3, total=8, unit="minibatches"), "ConfigError: 2 errors:\n  - a\n  - b\n"
    )
    assert found.message(4, extra="; more") == (
        f"{MESSAGE_START}rank 1 of 4, in phase train (3 of 8 minibatches done) of iteration 2: "
        "ConfigError: 2 errors: | - a | - b; more; its log: /logs/worker_1.log"
    )
    assert len(FailureReport(beat(0, log=""), "x" * 10_000).message(1)) < 2000


def test_main_frames_are_those_of_the_last_thread() -> None:
    assert main_frames(COLLECTIVE) == (
        "/venv/site-packages/mindspore/common/api.py:10 in run",
        "/work/mindrlhf/runtime/host_exchange.py:20 in gather_rows",
    )
    assert main_frames("") == ()


def test_stalled_is_the_rank_that_is_phases_behind() -> None:
    heartbeats = beats({"steps": 9}, {"steps": 8}, {"steps": 9}, {"steps": 9})
    assert find_stalled(heartbeats, states(), {}) == [1]
    heartbeats = beats(
        {"iteration": 3, "steps": 1}, {"iteration": 3, "steps": 1}, {"iteration": 2, "steps": 9}
    )
    assert find_stalled(heartbeats, states(), {}) == [2]


def test_stalled_is_a_stopped_process_before_all() -> None:
    heartbeats = beats({"steps": 9}, {"steps": 8}, {"steps": 9}, {"steps": 9})
    assert find_stalled(heartbeats, states(r3=ProcessState("T")), {}) == [3]


def test_stalled_is_the_rank_outside_the_collective_all_else_equal() -> None:
    heartbeats = beats({}, {}, {})
    stacks = {0: COLLECTIVE, 1: COLLECTIVE, 2: ELSEWHERE}
    assert find_stalled(heartbeats, states(), stacks) == [2]
    assert find_stalled(beats({}, {}), states(), {0: ELSEWHERE, 1: COLLECTIVE}) == [0]
    # All in MindSpore, one by another way.
    other = COLLECTIVE.replace("gather_rows", "load")
    assert find_stalled(heartbeats, states(), {0: COLLECTIVE, 1: other, 2: COLLECTIVE}) == [1]


def test_stalled_are_all_that_cannot_be_told_apart() -> None:
    stacks = dict.fromkeys(range(3), COLLECTIVE)
    assert find_stalled(beats({}, {}, {}), states(), stacks) == [0, 1, 2]
    assert find_stalled(beats({"done": 4}, {"done": 3}, {"done": 4}), states(), stacks) == [1]


def test_a_stall_says_who_where_and_who_waits() -> None:
    heartbeats = beats({}, {}, {"phase": "score", "steps": 5})
    report = report_hang(heartbeats, states(), {2: ELSEWHERE}, 145.0, "--watchdog_timeout 40")
    assert report.is_hang
    assert report.message(4) == (
        f"{MESSAGE_START}rank 2 of 4, in phase score of iteration 2: no progress for 45 s "
        "(--watchdog_timeout 40), it is at /home/user/rewards.py:3 in ask; rank(s) 0, 1 wait for it, "
        "in phase train of iteration 2; Python stacks are in *.stacks beside the logs; "
        "its log: /logs/worker_2.log"
    )


@pytest.fixture
def no_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "STACK_SECONDS", 0)


class FakeHost(Host):
    """Processes that are what the test says; ``cpu`` seconds of each."""

    def __init__(self) -> None:
        self.cpu = 0.0
        self.states: dict[int, str] = {}
        self.starved = False

    def state_of(self, pid: int, started: int) -> ProcessState:
        return ProcessState(self.states.get(pid - 1000, "S"), self.cpu)

    def wants_to_compute(self, pid: int) -> bool:
        return self.starved

    def send(self, pid: int, started: int, number: int) -> None:
        pass

    def out_of_memory_kills(self) -> int:
        return 0


class Watched:
    """A supervisor of two ranks, and the clock of all three."""

    def __init__(self, directory: Path, **fields: Any) -> None:
        self.now = 1000.0
        self.host = FakeHost()
        self.ranks = {rank: beat(rank, log="", **{"time": self.now, **fields}) for rank in (0, 1)}
        self.supervisor = Supervisor(directory, self.host, lambda: self.now)

    def examine(self) -> FailureReport | None:
        seen = {rank: self.host.state_of(state.pid, 1) for rank, state in self.ranks.items()}
        return self.supervisor.examine(self.ranks, seen)

    def run(self, seconds: float, *, cpu: float = 0.0, progress: tuple[int, ...] = ()) -> float | None:
        """Polls once per second; the seconds until there is a report."""
        begin = self.now
        while self.now < begin + seconds:
            self.now += 1
            self.host.cpu += cpu
            for rank in progress:
                self.ranks[rank] = replace(self.ranks[rank], time=self.now)
            if self.examine() is not None:
                return self.now - begin
        return None


BUSY = {"timeout": 1800, "may_idle": False}


@pytest.mark.parametrize(
    ("fields", "host", "run", "expected"),
    [
        ({"timeout": 60}, {}, {"cpu": 1}, 61),
        ({"timeout": 0}, {}, {"cpu": 1}, None),
        ({"timeout": 60}, {}, {"cpu": 1, "progress": (0,)}, None),  # one compiles for long, the other waits
        (BUSY, {}, {"cpu": 0.01}, IDLE_SECONDS + 2),
        (BUSY, {}, {"cpu": 0.1}, None),
        (BUSY, {"starved": True}, {}, None),  # other programs have all processors
        (BUSY, {"states": {1: "D"}}, {}, None),  # one waits for a disk
        (BUSY | {"may_idle": True}, {}, {}, None),
    ],
)
def test_a_job_hangs_after_the_timeout_or_sooner_when_nobody_computes(
    tmp_path: Path,
    no_sleep: None,
    fields: dict[str, Any],
    host: dict[str, Any],
    run: dict[str, Any],
    expected: float | None,
) -> None:
    watched = Watched(tmp_path, **fields)
    vars(watched.host).update(host)
    assert watched.run(200, **run) == expected


def test_one_rank_that_may_idle_is_enough(tmp_path: Path, no_sleep: None) -> None:
    watched = Watched(tmp_path, **BUSY)
    watched.ranks[1] = replace(watched.ranks[1], may_idle=True)
    assert watched.run(200) is None


def test_progress_starts_the_wait_anew(tmp_path: Path, no_sleep: None) -> None:
    watched = Watched(tmp_path, timeout=60)
    assert watched.run(50, cpu=1) is None
    assert watched.run(1, cpu=1, progress=(1,)) is None
    assert watched.run(200, cpu=1) == 61


def test_time_in_which_nobody_could_go_on_does_not_count(tmp_path: Path, no_sleep: None) -> None:
    watched = Watched(tmp_path, timeout=60, may_idle=False)
    watched.host.states = {0: "T", 1: "T"}
    assert watched.run(500) is None
    watched.host.states = {}
    assert watched.run(500, cpu=1) == pytest.approx(61, abs=1)
    asleep = Watched(tmp_path, timeout=60, may_idle=False)
    asleep.run(5)
    asleep.now += 3600
    assert asleep.examine() is None
    assert asleep.run(500, cpu=1) == pytest.approx(56, abs=1)


def test_a_job_that_is_partly_stopped_names_who(tmp_path: Path, no_sleep: None) -> None:
    watched = Watched(tmp_path, timeout=10)
    watched.host.states = {1: "T"}
    watched.now += 1
    assert watched.examine() is None
    while (report := watched.examine()) is None:
        watched.now += 1
    assert report.process.rank == 1
    assert "SIGSTOP" in report.cause


def test_heartbeats_are_read_back_and_junk_is_not(tmp_path: Path) -> None:
    heart = HeartbeatWriter(tmp_path, 3, 4, clock=lambda: 12.5)
    heart.update(phase="sync", iteration=2, done=5, total=7, unit="parameters")
    (tmp_path / "rank_1.json").write_text('{"rank": 1')
    found = read_heartbeats(tmp_path)
    assert found == {3: heart.last}
    assert found[3].place == "in phase sync (5 of 7 parameters done) of iteration 2"
    assert found[3].time == 12.5
    assert read_heartbeats(tmp_path / "gone") == {}


def test_heartbeats_of_a_job_that_ends_while_they_are_read(tmp_path: Path) -> None:
    directory = tmp_path / "job"
    over = threading.Event()

    def come_and_go() -> None:
        while not over.is_set():
            directory.mkdir()
            HeartbeatWriter(directory, 0, 1)
            shutil.rmtree(directory)

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(5000):
            assert set(read_heartbeats(directory)) <= {0}
    finally:
        over.set()
        thread.join()


def test_a_heartbeat_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    heart = HeartbeatWriter(tmp_path / "job", 0, 1)
    heart.update(phase="train")


def test_directories_of_jobs_that_died_with_their_supervisor_are_swept_up(tmp_path: Path) -> None:
    own, dead, living = (tmp_path / f"mindrlhf_job_0_host_{name}" for name in ("1_1", "2_2", "3_3"))
    for directory in (own, dead, living, tmp_path / "mindrlhf_job_0_other_4_4"):
        directory.mkdir()
        HeartbeatWriter(directory, 0, 1)
    path = dead / "rank_0.json"
    path.write_text(path.read_text().replace('"started": ', '"started": 9'))
    Supervisor(own).remove_abandoned()
    assert not dead.exists()
    assert own.exists()
    assert living.exists()


def test_a_host_tells_how_a_process_does() -> None:
    host = Host()
    command = ["bash", "-c", "read line; kill -11 $$"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
        started = start_ticks(child.pid)
        assert host.state_of(child.pid, started).is_alive
        assert host.state_of(child.pid, started + 1) == ProcessState(GONE)
        assert host.state_of(os.getpid(), start_ticks(os.getpid())).cpu_seconds > 0
        assert host.wants_to_compute(os.getpid())
        child.send_signal(signal.SIGSTOP)
        wait_until(lambda: host.state_of(child.pid, started).state == "T")
        assert not host.wants_to_compute(child.pid)
        host.send(child.pid, started + 1, signal.SIGKILL)
        host.send(child.pid, started, signal.SIGCONT)
        assert child.stdin is not None
        child.stdin.close()
        wait_until(lambda: not host.state_of(child.pid, started).is_alive)
        assert host.state_of(child.pid, started).exit_code == -11, "not asked for by its parent yet"
    assert host.state_of(child.pid, started) == ProcessState(GONE)
    host.send(child.pid, started, signal.SIGKILL)
    with subprocess.Popen(["bash", "-c", "exit 7"]) as child:
        started = start_ticks(child.pid)
        wait_until(lambda: not host.state_of(child.pid, started).is_alive)
        assert host.state_of(child.pid, started).exit_code == 7


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
