"""Who is to blame, by hand-made heartbeats and looks; the supervisor's clock is a number."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mindrlhf.runtime import supervisor as supervisor_module
from mindrlhf.runtime.failures import (
    MESSAGE_START,
    Verdict,
    find_failure,
    find_stalled,
    main_frames,
    stall_verdict,
)
from mindrlhf.runtime.heartbeat import ENDED, FAILED, SCHEDULER, Beat, Heartbeat, read_beats
from mindrlhf.runtime.processes import GONE, Host, Process, birth_of
from mindrlhf.runtime.supervisor import IDLE_SECONDS, Supervisor

ALIVE = Process("S")
NONE: frozenset[int] = frozenset()
COLLECTIVE = """Thread 0x00007f01 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 1 in wait

Current thread 0x00007f02 (most recent call first):
  File "/venv/site-packages/mindspore/common/api.py", line 10 in run
  File "/work/mindrlhf/trainer/runtime.py", line 20 in gather_rows
"""
ELSEWHERE = """Current thread 0x00007f02 (most recent call first):
  File "/home/user/rewards.py", line 3 in ask
  File "/work/mindrlhf/trainer/runtime.py", line 20 in gather_rows
"""


def beat(rank: int, **changes: Any) -> Beat:
    given = {"log": f"/logs/worker_{rank}.log", "phase": "train", "iteration": 2, "steps": 7, "time": 100.0}
    return Beat(rank, 4, pid=1000 + rank, birth=1, **{**given, **changes})


def beats(*changes: Mapping[str, Any]) -> dict[int, Beat]:
    """One beat a mapping, of ranks 0, 1, ..."""
    return {rank: beat(rank, **change) for rank, change in enumerate(changes)}


def looks(**special: Process) -> dict[int, Process]:
    """Looks at four ranks and the scheduler; ``r2=Process(...)`` for another than alive."""
    return {rank: special.get(f"r{rank}", ALIVE) for rank in range(4)} | {SCHEDULER: special.get("s", ALIVE)}


def test_all_is_well() -> None:
    assert find_failure(beats({}, {}, {}, {}), looks(), NONE) is None
    ended = beats({"state": ENDED}, {}, {}, {})
    assert find_failure(ended, looks(r0=Process(GONE, exit_code=0)), NONE) is None


def test_a_report_is_the_cause_and_those_that_msrun_kills_after_it_are_not() -> None:
    state = beats({}, {}, {"state": FAILED, "cause": "ValueError: x"}, {})
    verdict = find_failure(state, looks(), NONE)
    assert verdict == Verdict(state[2], "ValueError: x")
    killed = Process(GONE, exit_code=-9)
    verdict = find_failure(state, looks(r0=killed, r1=killed, r2=Process(GONE, exit_code=1)), NONE)
    assert verdict is not None
    assert verdict.blamed.rank == 2


def test_a_death_is_the_cause_of_an_error_of_communication() -> None:
    state = beats({"state": FAILED, "cause": "RuntimeError: peer closed"}, {}, {}, {})
    verdict = find_failure(state, looks(r3=Process(GONE, exit_code=-9)), NONE)
    assert verdict is not None
    assert (verdict.blamed.rank, "SIGKILL" in verdict.cause) == (3, True)
    # Reported before the death was there: the report was first.
    verdict = find_failure(state, looks(r3=Process(GONE, exit_code=-9)), frozenset({0}))
    assert verdict is not None
    assert verdict.blamed.rank == 0


@pytest.mark.parametrize(
    ("code", "out_of_memory", "said"),
    [
        (-9, True, "the machine was out of memory"),
        (-9, False, "kill -9, or a memory limit"),
        (-11, True, "ended by SIGSEGV"),
        (3, False, "exit code 3"),
        (None, False, "without a word"),
    ],
)
def test_causes_of_death(code: int | None, out_of_memory: bool, said: str) -> None:
    verdict = find_failure(
        beats({}, {}), looks(r1=Process(GONE, exit_code=code)), NONE, out_of_memory=out_of_memory
    )
    assert verdict is not None
    assert verdict.blamed.rank == 1
    assert said in verdict.cause


@pytest.mark.parametrize("code", [0, 130, 143, -2, -15])
def test_a_process_that_was_asked_to_end_has_not_failed(code: int) -> None:
    assert find_failure(beats({}, {}), looks(r1=Process(GONE, exit_code=code)), NONE) is None


def test_a_scheduler_that_dies_is_a_failure_until_all_workers_have_ended() -> None:
    dead = looks(s=Process(GONE, exit_code=-9))
    scheduler = {SCHEDULER: replace(beat(0), rank=SCHEDULER, phase="start", iteration=0)}
    verdict = find_failure(beats({}, {}) | scheduler, dead, NONE)
    assert verdict is not None
    assert verdict.message(4).startswith(f"{MESSAGE_START}msrun's scheduler, in phase start: the process was")
    ended = beats({"state": ENDED}, {"state": ENDED})
    assert find_failure(ended | scheduler, dead, NONE) is None


def test_the_message_is_one_line() -> None:
    found = Verdict(beat(1, done=3, total=8, unit="minibatches"), "ConfigError: 2 errors:\n  - a\n  - b\n")
    assert found.message(4, extra="; more") == (
        f"{MESSAGE_START}rank 1 of 4, in phase train (3 of 8 minibatches done) of iteration 2: "
        "ConfigError: 2 errors: | - a | - b; more; its log: /logs/worker_1.log"
    )
    assert len(Verdict(beat(0, log=""), "x" * 10_000).message(1)) < 2000


def test_main_frames_are_those_of_the_last_thread() -> None:
    assert main_frames(COLLECTIVE) == (
        "/venv/site-packages/mindspore/common/api.py:10 in run",
        "/work/mindrlhf/trainer/runtime.py:20 in gather_rows",
    )
    assert main_frames("") == ()


def test_stalled_is_the_rank_that_is_phases_behind() -> None:
    state = beats({"steps": 9}, {"steps": 8}, {"steps": 9}, {"steps": 9})
    assert find_stalled(state, looks(), {}) == [1]
    state = beats({"iteration": 3, "steps": 1}, {"iteration": 3, "steps": 1}, {"iteration": 2, "steps": 9})
    assert find_stalled(state, looks(), {}) == [2]


def test_stalled_is_a_stopped_process_before_all() -> None:
    state = beats({"steps": 9}, {"steps": 8}, {"steps": 9}, {"steps": 9})
    assert find_stalled(state, looks(r3=Process("T")), {}) == [3]


def test_stalled_is_the_rank_outside_the_collective_all_else_equal() -> None:
    state = beats({}, {}, {})
    stacks = {0: COLLECTIVE, 1: COLLECTIVE, 2: ELSEWHERE}
    assert find_stalled(state, looks(), stacks) == [2]
    assert find_stalled(beats({}, {}), looks(), {0: ELSEWHERE, 1: COLLECTIVE}) == [0]
    # All in MindSpore, one by another way.
    other = COLLECTIVE.replace("gather_rows", "load")
    assert find_stalled(state, looks(), {0: COLLECTIVE, 1: other, 2: COLLECTIVE}) == [1]


def test_stalled_are_all_that_cannot_be_told_apart() -> None:
    stacks = dict.fromkeys(range(3), COLLECTIVE)
    assert find_stalled(beats({}, {}, {}), looks(), stacks) == [0, 1, 2]
    assert find_stalled(beats({"done": 4}, {"done": 3}, {"done": 4}), looks(), stacks) == [1]


def test_a_stall_says_who_where_and_who_waits() -> None:
    state = beats({}, {}, {"phase": "score", "steps": 5})
    verdict = stall_verdict(state, looks(), {2: ELSEWHERE}, 145.0, "--watchdog_timeout 40")
    assert verdict.is_hang
    assert verdict.message(4) == (
        f"{MESSAGE_START}rank 2 of 4, in phase score of iteration 2: no progress for 45 s "
        "(--watchdog_timeout 40), it is at /home/user/rewards.py:3 in ask; rank(s) 0, 1 wait for it, "
        "in phase train of iteration 2; Python stacks are in *.stacks beside the logs; "
        "its log: /logs/worker_2.log"
    )


class FakeHost(Host):
    """Processes that are what the test says; ``cpu`` seconds of each."""

    def __init__(self) -> None:
        self.cpu = 0.0
        self.states: dict[int, str] = {}
        self.starved = False

    def look(self, pid: int, birth: int) -> Process:
        return Process(self.states.get(pid - 1000, "S"), self.cpu)

    def wants_to_compute(self, pid: int) -> bool:
        return self.starved

    def send(self, pid: int, birth: int, number: int) -> None:
        pass

    def out_of_memory_kills(self) -> int:
        return 0


class Watched:
    """A supervisor of two ranks, and the clock of all three."""

    def __init__(self, directory: Path, **beat_fields: Any) -> None:
        self.now = 1000.0
        self.host = FakeHost()
        self.ranks = {rank: beat(rank, log="", **{"time": self.now, **beat_fields}) for rank in (0, 1)}
        self.supervisor = Supervisor(directory, self.host, lambda: self.now)

    def examine(self) -> Verdict | None:
        seen = {rank: self.host.look(state.pid, 1) for rank, state in self.ranks.items()}
        return self.supervisor.examine(self.ranks, seen)

    def run(self, seconds: float, *, cpu: float = 0.0, progress: tuple[int, ...] = ()) -> float | None:
        """Looks each second; the seconds until the verdict."""
        begin = self.now
        while self.now < begin + seconds:
            self.now += 1
            self.host.cpu += cpu
            for rank in progress:
                self.ranks[rank] = replace(self.ranks[rank], time=self.now)
            if self.examine() is not None:
                return self.now - begin
        return None


@pytest.fixture
def no_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "STACK_SECONDS", 0)


@pytest.mark.usefixtures("no_sleep")
class TestStandstill:
    """When the supervisor speaks of a standstill."""

    def test_after_the_timeout_without_progress_of_any_rank(self, tmp_path: Path) -> None:
        assert Watched(tmp_path, timeout=60).run(200, cpu=1) == 61

    def test_never_when_the_timeout_is_off(self, tmp_path: Path) -> None:
        assert Watched(tmp_path, timeout=0).run(5000, cpu=1) is None

    def test_not_while_one_rank_goes_on(self, tmp_path: Path) -> None:
        """It compiles for long, while the others wait."""
        assert Watched(tmp_path, timeout=60).run(200, cpu=1, progress=(0,)) is None

    def test_progress_starts_the_wait_anew(self, tmp_path: Path) -> None:
        watched = Watched(tmp_path, timeout=60)
        assert watched.run(50, cpu=1) is None
        assert watched.run(1, cpu=1, progress=(1,)) is None
        assert watched.run(200, cpu=1) == 61

    def test_sooner_when_nobody_computes_where_all_should(self, tmp_path: Path) -> None:
        assert Watched(tmp_path, timeout=1800, may_idle=False).run(200, cpu=0.01) == IDLE_SECONDS + 2

    def test_not_sooner_while_they_compute(self, tmp_path: Path) -> None:
        assert Watched(tmp_path, timeout=1800, may_idle=False).run(200, cpu=0.1) is None

    def test_not_sooner_while_others_have_all_processors(self, tmp_path: Path) -> None:
        watched = Watched(tmp_path, timeout=1800, may_idle=False)
        watched.host.starved = True
        assert watched.run(200) is None

    def test_not_sooner_where_one_may_wait_for_something_else(self, tmp_path: Path) -> None:
        watched = Watched(tmp_path, timeout=1800, may_idle=False)
        watched.ranks[1] = replace(watched.ranks[1], may_idle=True)
        assert watched.run(200) is None

    def test_not_sooner_while_one_waits_for_a_disk(self, tmp_path: Path) -> None:
        watched = Watched(tmp_path, timeout=1800, may_idle=False)
        watched.host.states[1] = "D"
        assert watched.run(200) is None

    def test_time_in_which_all_are_stopped_does_not_count(self, tmp_path: Path) -> None:
        watched = Watched(tmp_path, timeout=60, may_idle=False)
        watched.host.states = {0: "T", 1: "T"}
        assert watched.run(500) is None
        watched.host.states = {}
        assert watched.run(500, cpu=1) == pytest.approx(61, abs=1)

    def test_time_in_which_the_machine_slept_does_not_count(self, tmp_path: Path) -> None:
        watched = Watched(tmp_path, timeout=60, may_idle=False)
        watched.run(5)
        watched.now += 3600
        assert watched.examine() is None
        assert watched.run(500, cpu=1) == pytest.approx(56, abs=1)

    def test_a_job_that_is_partly_stopped_names_who(self, tmp_path: Path) -> None:
        watched = Watched(tmp_path, timeout=10)
        watched.host.states = {1: "T"}
        watched.now += 1
        assert watched.examine() is None
        while (verdict := watched.examine()) is None:
            watched.now += 1
        assert verdict.blamed.rank == 1
        assert "SIGSTOP" in verdict.cause


def test_heartbeats_are_read_back_and_junk_is_not(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path, 3, 4, clock=lambda: 12.5)
    heart.update(phase="sync", iteration=2, done=5, total=7, unit="parameters")
    (tmp_path / "rank_1.json").write_text('{"rank": 1')
    found = read_beats(tmp_path)
    assert found == {3: heart.beat}
    assert found[3].place == "in phase sync (5 of 7 parameters done) of iteration 2"
    assert found[3].time == 12.5
    assert read_beats(tmp_path / "gone") == {}


def test_a_heartbeat_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path / "job", 0, 1)
    heart.update(phase="train")


def test_folders_of_jobs_that_died_with_their_supervisor_are_swept_up(tmp_path: Path) -> None:
    own, dead, living = (tmp_path / f"mindrlhf_job_0_host_{name}" for name in ("1_1", "2_2", "3_3"))
    for folder in (own, dead, living, tmp_path / "mindrlhf_job_0_other_4_4"):
        folder.mkdir()
        Heartbeat(folder, 0, 1)
    path = dead / "rank_0.json"
    path.write_text(path.read_text().replace('"birth": ', '"birth": 9'))
    Supervisor(own).sweep()
    assert not dead.exists()
    assert own.exists()
    assert living.exists()


def test_a_host_tells_how_a_process_does() -> None:
    host = Host()
    command = ["bash", "-c", "read line; kill -11 $$"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
        birth = birth_of(child.pid)
        assert host.look(child.pid, birth).is_alive
        assert host.look(child.pid, birth + 1) == Process(GONE)
        assert host.look(os.getpid(), birth_of(os.getpid())).cpu_seconds > 0
        assert host.wants_to_compute(os.getpid())
        child.send_signal(signal.SIGSTOP)
        wait_until(lambda: host.look(child.pid, birth).state == "T")
        assert not host.wants_to_compute(child.pid)
        host.send(child.pid, birth + 1, signal.SIGKILL)
        host.send(child.pid, birth, signal.SIGCONT)
        assert child.stdin is not None
        child.stdin.close()
        wait_until(lambda: not host.look(child.pid, birth).is_alive)
        assert host.look(child.pid, birth).exit_code == -11, "not asked for by its parent yet"
    assert host.look(child.pid, birth) == Process(GONE)
    host.send(child.pid, birth, signal.SIGKILL)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
