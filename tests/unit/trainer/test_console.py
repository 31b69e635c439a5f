"""The console: what is drawn, and what is said without a terminal."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mindrlhf.configs.keys import PPOConfig
from mindrlhf.trainer.console import open as console_open
from mindrlhf.trainer.console.live import LiveConsole
from mindrlhf.trainer.console.open import open_console
from mindrlhf.trainer.console.plain import PlainConsole
from mindrlhf.trainer.console.state import RunState, clock_text
from mindrlhf.trainer.shown_metrics import REWARD_MODEL_METRICS, ppo_metrics
from mindrlhf.trainer.trackers.tracker import RunStart
from mindrlhf.utils.timers import PhaseTimer

METRICS = {
    "objective/scores": 0.25,
    "objective/kl": 0.5,
    "response/length": 12.5,
    "response/eos_rate": 0.75,
    "loss/policy": -0.01,
    "loss/value": 1.5,
    "tokens_per_second": 321.4,
    "time/iteration": 9.0,
}
EVALUATION = {"eval/scores": 0.5, "eval/kl": 1.0}


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def live(clock: Callable[[], float], total: int = 3, width: int = 100, **options: Any) -> LiveConsole:
    """A console that draws into memory."""
    terminal = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console = LiveConsole("PPO", "iteration", console=terminal, clock=clock)
    shown = ppo_metrics(PPOConfig(**options))
    console.total, console.columns, console.status = total, shown.columns, shown.status
    return console


def drawing(console: LiveConsole) -> list[str]:
    """The lines at the foot of the terminal."""
    paper = Console(file=io.StringIO(), width=console.console.width, color_system=None)
    paper.print(console.render())
    assert isinstance(paper.file, io.StringIO)
    return [line.rstrip() for line in paper.file.getvalue().splitlines()]


def test_drawing_of_a_run(clock: Clock) -> None:
    console = live(clock)
    timer = PhaseTimer([console])
    with timer.phase("load"):
        head, phase, status = drawing(console)
        assert "iteration 1/3" in head
        assert "0:00 elapsed, -:-- left" in head
        assert phase.startswith("load")
        assert re.fullmatch(r"memory \d+\.\d\d GiB, peak \d+\.\d\d", status)
    with timer.phase("rollout", 512, "tokens"):
        timer.advance(128)
        clock.now += 7
        (_, phase, _) = drawing(console)
        assert re.fullmatch(r"rollout ━{8} +128/512 tokens +0:07", phase), "a quarter of 32 is filled"
    console.scalars(1, METRICS)
    console.scalars(2, METRICS | {"objective/scores": 0.375})
    (head, status) = drawing(console)
    assert "iteration 3/3" in head
    assert "score +0.3750 (+0.1250)  KL +0.5000 (+0.0000)  length 12.5  tok/s 321  memory" in status


def test_finished_iterations_scroll_above_the_drawing_and_evaluations_do_not(clock: Clock) -> None:
    console = live(clock, width=80)
    console.scalars(0, EVALUATION)
    console.scalars(1, METRICS)
    console.scalars(1, EVALUATION)
    console.scalars(2, METRICS)
    assert isinstance(console.console.file, io.StringIO)
    title, *rows = console.console.file.getvalue().splitlines()
    assert " ".join(title.split()) == "iteration score KL length stop pi loss v loss tok/s seconds"
    assert [row.split()[:4] for row in rows] == [
        ["1", "+0.2500", "+0.5000", "12.5"],
        ["2", "+0.2500", "+0.5000", "12.5"],
    ]
    assert {len(line) for line in (title, *rows)} == {len(title)}, "columns stand below their titles"
    assert len(title) <= 80

    narrow = live(clock, width=59)
    narrow.scalars(1, METRICS)
    assert isinstance(narrow.console.file, io.StringIO)
    title, row = narrow.console.file.getvalue().splitlines()
    assert " ".join(title.split()) == "iteration score KL length stop pi loss"
    assert len(row.split()) == 6
    assert max(map(len, drawing(narrow))) <= 59


def test_a_stage_shows_every_so_many_steps_and_the_last_evaluation(clock: Clock) -> None:
    console = live(clock, total=5)
    console.columns, console.status = REWARD_MODEL_METRICS.columns, REWARD_MODEL_METRICS.status
    console.log_interval = 2
    console.scalars(0, {"eval/loss": 0.75, "eval/accuracy": 0.5, "eval/margin": 0.0})
    for step in range(1, 6):
        console.scalars(step, {"loss/train": 0.5, "train/accuracy": 0.75, "lr": 1e-5, "grad_norm": 1.0})
    assert isinstance(console.console.file, io.StringIO)
    _, *rows = console.console.file.getvalue().splitlines()
    assert [row.split()[:4] for row in rows] == [
        [str(step), "0.5000", "0.7500", "1.00e-05"] for step in (2, 4, 5)
    ]
    status = " ".join(drawing(console))
    assert "loss 0.5000  accuracy 0.7500  held-out loss 0.7500  held-out accuracy 0.5000" in status


def test_time_left_leaves_the_first_iteration_out(clock: Clock) -> None:
    state = RunState("PPO", "iteration", clock=clock)
    state.total = 10
    clock.now += 60  # compiles
    state.scalars(1, METRICS)
    assert state.seconds_left() is None
    for iteration in (2, 3):
        clock.now += 6
        state.scalars(iteration, METRICS)
    assert state.seconds_left() == pytest.approx(7 * 6)
    clock.now += 4
    assert state.seconds_left() == pytest.approx(7 * 6 - 4)
    state.start(RunStart(Path(), {}, first_step=6, is_resumed=True))
    assert (state.current_step, state.seconds_left()) == (6, None)


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-:--"), (0, "0:00"), (61.4, "1:01"), (3600 * 26 + 59.6, "26:01:00")]
)
def test_clock_text(seconds: float | None, text: str) -> None:
    assert clock_text(seconds) == text


def test_a_phase_inside_another_and_no_critic_no_column(clock: Clock) -> None:
    console = live(clock, critic="none")
    timer = PhaseTimer([console])
    with timer.phase("evaluate", 8, "prompts"):
        timer.advance(4)
        with timer.phase("decode", 3, "tokens"):
            _, outer, inner, _ = drawing(console)
            assert "4/8 prompts" in outer
            assert "0/3 tokens" in inner
    console.scalars(1, {name: value for name, value in METRICS.items() if name != "loss/value"})
    assert isinstance(console.console.file, io.StringIO)
    title, row = console.console.file.getvalue().splitlines()
    assert " ".join(title.split()) == "iteration score KL length stop pi loss tok/s seconds"
    assert "-" not in row.split(), "every column has its metric"


def test_a_closed_terminal_ends_the_drawing_only(clock: Clock) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    console = live(clock)
    console.open()
    console.console.file = Closed()
    with PhaseTimer([console]).phase("rollout", 4, "tokens"):
        console.scalars(1, METRICS)
    console.shut()


def test_plain_lines_every_ten_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    console = PlainConsole("PPO", "iteration", clock=clock)
    console.total = 20
    timer = PhaseTimer([console])

    def wait(seconds: int) -> None:
        for _ in range(seconds):
            clock.now += 1
            console.tick()

    with timer.phase("load"):
        wait(12)
    with timer.phase("rollout", 512, "tokens"):
        wait(9)
        timer.advance(64)
        wait(2)
    wait(30)
    console.scalars(1, METRICS)
    with timer.phase("sync", 3, "parameters"):
        wait(9)
    with timer.phase("train", 4, "minibatches"):
        timer.advance()
        wait(20)
    assert capsys.readouterr().err.splitlines() == [
        "INFO load 10 s",
        "INFO iteration 1/20: rollout 0/512 tokens 8 s",
        "INFO iteration 2/20: train 1/4 minibatches 1 s",
        "INFO iteration 2/20: train 1/4 minibatches 11 s",
    ]


def test_a_phase_without_progress_is_named_by_the_clock_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mindrlhf.trainer.console.plain.SECONDS_BETWEEN_LINES", 0.5)
    with open_console("PPO", "iteration") as console:
        assert isinstance(console, PlainConsole), "pytest's stderr is not a terminal"
        said, end = "", time.monotonic() + 20
        with PhaseTimer([console]).phase("save"):
            while not said and time.monotonic() < end:
                time.sleep(0.05)
                said = capsys.readouterr().err
    assert re.fullmatch(r"INFO save [1-9] s\n", said)


def test_other_ranks_show_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "2", "RANK_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    with open_console("PPO", "iteration") as console:
        assert type(console) is RunState
        assert not console.shows_metrics
    assert capsys.readouterr().err == ""


def test_a_device_that_is_no_terminal_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for device, fault in (("/dev/null", "is not a terminal"), ("/dev/none/1", "cannot be opened")):
        monkeypatch.setenv(console_open.CONSOLE_VARIABLE, device)
        with open_console("PPO", "iteration") as console:
            assert isinstance(console, PlainConsole)
        assert fault in capsys.readouterr().err
