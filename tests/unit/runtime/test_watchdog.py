"""What the watchdog writes at each phase."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mindrlhf.runtime import supervision
from mindrlhf.runtime.heartbeat import Heartbeat, HeartbeatWriter
from mindrlhf.runtime.watchdog import Watchdog, supervised
from mindrlhf.utils.timers import PhaseTimer

COMPUTING = frozenset({"rollout", "score", "train"})


@pytest.fixture
def heart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HeartbeatWriter]:
    """The heartbeat of a process that has joined; no supervisor is started."""
    with (tmp_path / "stacks").open("w") as stacks:
        process = supervision.SupervisedProcess(HeartbeatWriter(tmp_path, 1, 4), stacks)
        monkeypatch.setattr(supervision, "_current", process)
        yield process.heartbeat


def test_phases_and_their_progress_are_written(heart: HeartbeatWriter) -> None:
    watchdog = Watchdog(60.0, computing=COMPUTING)
    iteration = 4
    watchdog.follow(lambda: iteration)
    timer = PhaseTimer([watchdog])
    with timer.phase("rollout", 10, "tokens"):
        assert heart.last.place == "in phase rollout (0 of 10 tokens done) of iteration 4"
        timer.advance(3)
        timer.advance(4)
        assert heart.last.done == 7
        assert (heart.last.timeout, heart.last.may_idle, heart.last.steps) == (60.0, False, 1)
    assert heart.last.place == "after phase rollout of iteration 4"
    assert (heart.last.may_idle, heart.last.steps) == (True, 2)
    with timer.phase("save"):
        assert heart.last.place == "in phase save of iteration 4"
        assert heart.last.may_idle, "a save waits for a disk"
    iteration = 5
    with timer.phase("rollout"):
        assert heart.last.iteration == 5


def test_a_phase_inside_another_does_not_lose_its_count(heart: HeartbeatWriter) -> None:
    """A stage evaluates and saves in the middle of its training phase."""
    timer = PhaseTimer([Watchdog(60.0, computing=COMPUTING)])
    with timer.phase("train", 54, "steps"):
        timer.advance(20)
        with timer.phase("save"):
            assert heart.last.place == "in phase save"
            assert heart.last.may_idle
        assert heart.last.place == "in phase train (20 of 54 steps done)"
        assert not heart.last.may_idle
        timer.advance()
        assert heart.last.done == 21
    assert heart.last.place == "after phase train"


def test_a_failure_stays_where_it_was(heart: HeartbeatWriter) -> None:
    timer = PhaseTimer([Watchdog()])

    def fail() -> None:
        with timer.phase("train"):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert heart.last.place == "in phase train"


def test_a_phase_that_asks_a_server_may_wait(heart: HeartbeatWriter) -> None:
    watchdog = Watchdog(60.0, computing=COMPUTING - {"score"})
    watchdog.phase_started("score", None, "")
    assert heart.last.may_idle
    # A device computes while its host waits; and the watchdog is off.
    for other in (
        Watchdog(60.0, computing=COMPUTING, device_target="Ascend"),
        Watchdog(0, computing=COMPUTING),
    ):
        other.phase_started("train", None, "")
        assert heart.last.may_idle


def test_after_the_loop_there_is_no_limit(heart: HeartbeatWriter) -> None:
    watchdog = Watchdog(60.0, computing=COMPUTING)
    timer = PhaseTimer([watchdog])
    with timer.phase("save", 3, "files"):
        pass
    assert heart.last.timeout == 60.0
    watchdog.suspend("export")
    assert (heart.last.place, heart.last.timeout) == ("in phase export", 0.0)
    with timer.phase("train"):  # later phases do not bring it back
        assert (heart.last.timeout, heart.last.may_idle) == (0.0, True)


def test_without_a_supervisor_a_watchdog_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "_current", None)
    Watchdog().phase_started("train", None, "")
    Watchdog().suspend("export")


def test_one_process_is_supervised_while_the_block_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    started: list[Path] = []
    monkeypatch.setattr(supervision, "_start_supervisor", started.append)
    with supervised(60.0):
        process = supervision.current_process()
        assert process is not None
        assert [process.directory] == started == list(tmp_path.iterdir())
        beat: Heartbeat = process.heartbeat.last
        assert (beat.rank, beat.world_size) == (0, 1)
        with supervised(60.0):
            assert supervision.current_process() is process
        assert supervision.current_process() is process
    assert supervision.current_process() is None
    assert list(tmp_path.iterdir()) == []
    with supervised(0):
        assert supervision.current_process() is None
