"""ranks.py, logging.py and progress.py, under the environment msrun makes."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest

from mindrlhf.utils import progress
from mindrlhf.utils.errors import MindRLHFError
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.progress import ProgressBar, track
from mindrlhf.utils.ranks import env_rank, env_world_size
from mindrlhf.utils.timers import PhaseTimer


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch):
    def become(rank: int, size: int) -> None:
        for name, value in {
            "MS_ROLE": "MS_WORKER",
            "RANK_ID": rank,
            "MS_NODE_ID": rank,
            "MS_WORKER_NUM": size,
        }.items():
            monkeypatch.setenv(name, str(value))

    return become


@pytest.fixture(autouse=True)
def fresh_logger() -> Iterator[None]:
    """The library's logger is set up once per process; here it is set up anew for each test."""
    root = logging.getLogger("mindrlhf")
    before = root.handlers[:], root.level, root.propagate
    root.handlers[:] = []
    yield
    root.handlers[:], root.level, root.propagate = before


def test_without_msrun_there_is_one_worker() -> None:
    assert (env_rank(), env_world_size()) == (0, 1)


def test_stray_rank_id_is_not_msrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK_ID", "3")
    monkeypatch.setenv("MS_WORKER_NUM", "4")
    assert (env_rank(), env_world_size()) == (0, 1)


def test_under_msrun(worker) -> None:
    worker(2, 4)
    assert (env_rank(), env_world_size()) == (2, 4)


def test_node_id_stands_in_for_rank_id(worker, monkeypatch: pytest.MonkeyPatch) -> None:
    worker(3, 4)
    monkeypatch.delenv("RANK_ID")
    assert env_rank() == 3


def test_rank_that_is_no_number(worker, monkeypatch: pytest.MonkeyPatch) -> None:
    worker(1, 4)
    monkeypatch.setenv("RANK_ID", "first")
    with pytest.raises(MindRLHFError, match="RANK_ID='first'"):
        env_rank()


def test_single_worker_logs_without_prefix(capsys: pytest.CaptureFixture[str]) -> None:
    log = get_logger("mindrlhf.trainer.ppo")
    log.info("step %d", 1)
    log.debug("hidden")
    assert capsys.readouterr().err == "INFO step 1\n"


def test_rank_zero_speaks_and_others_warn(worker, capsys: pytest.CaptureFixture[str]) -> None:
    worker(0, 2)
    get_logger("mindrlhf.a").info("hello")
    assert capsys.readouterr().err == "[rank 0] INFO hello\n"


def test_other_ranks_only_warn(worker, capsys: pytest.CaptureFixture[str]) -> None:
    worker(1, 2)
    log = get_logger("mindrlhf.a")
    log.info("hello")
    log.warning("careful")
    assert capsys.readouterr().err == "[rank 1] WARNING careful\n"


def test_level_from_environment(
    worker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Debug lines tell when and where; on every rank."""
    worker(1, 2)
    monkeypatch.setenv("MINDRLHF_LOG", "debug")
    get_logger("mindrlhf.a").debug("detail")
    said = capsys.readouterr().err
    assert re.fullmatch(r"\[rank 1\] \d\d:\d\d:\d\d\.\d{3} DEBUG mindrlhf\.a: detail\n", said)


@pytest.mark.parametrize(
    ("word", "heard"), [("info", "iwe"), ("WARNING", "we"), (" Error ", "e"), ("critical", "")]
)
def test_every_level_can_be_asked_for(
    word: str, heard: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINDRLHF_LOG", word)
    log = get_logger("mindrlhf.a")
    log.debug("d")
    log.info("i")
    log.warning("w")
    log.error("e")
    lines = capsys.readouterr().err.splitlines()
    assert "".join(line.split()[-1] for line in lines) == heard


def test_a_word_that_is_not_a_level_is_named_once_and_ignored(
    worker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINDRLHF_LOG", "loud")
    get_logger("mindrlhf.a").info("hello")
    get_logger("mindrlhf.b").debug("hidden")
    assert capsys.readouterr().err == (
        "WARNING MINDRLHF_LOG=loud is not a level, so it is ignored; "
        "use one of debug, info, warning, error, critical\nINFO hello\n"
    )


def test_phases_are_timed_at_debug_level(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINDRLHF_LOG", "debug")
    get_logger("mindrlhf.utils.timers")
    timer = PhaseTimer()
    with timer.phase("rollout"):
        pass
    assert re.search(r"DEBUG mindrlhf\.utils\.timers: rollout: 0\.\d{3} s\n", capsys.readouterr().err)


def test_script_loggers_hang_below_the_library_and_print_once(capsys: pytest.CaptureFixture[str]) -> None:
    get_logger("__main__").info("once")
    get_logger("__main__").info("twice")
    assert get_logger("__main__").name == "mindrlhf.__main__"
    assert capsys.readouterr().err == "INFO once\nINFO twice\n"


def test_track_yields_everything_and_stays_quiet_when_fast(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track([1, 2, 3], description="rows")) == [1, 2, 3]
    assert list(track(iter("ab"), description="rows")) == ["a", "b"]
    assert capsys.readouterr().err == ""


def test_plain_lines_say_how_far(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with ProgressBar("rows", total=40) as bar:
        for _ in range(4):
            now[0] += 6.0
            bar.update(10)
    assert capsys.readouterr().err.splitlines() == [
        "INFO rows: 20/40 in 12 s",
        "INFO rows: 40/40 in 24 s",
        "INFO rows: 40/40 in 24 s",
    ]


def test_other_ranks_show_no_progress(
    worker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    worker(1, 2)
    monkeypatch.setenv("MINDRLHF_LOG", "debug")
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    assert list(track(range(3), description="rows")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
