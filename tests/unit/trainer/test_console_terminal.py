"""The console on a terminal: log lines and progress bars do not tear the drawing."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mindrlhf.utils import progress
from mindrlhf.utils.progress import ProgressBar

RUN = """
import pathlib, sys, time
from mindrlhf.trainer.console.open import open_console
from mindrlhf.trainer.console.state import Column
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.progress import track
from mindrlhf.utils.timers import PhaseTimer

columns = [Column(f"objective/{name}", name, "+.4f", 9) for name in ("scores", "kl")]
metrics = {column.metric: 1.0 for column in columns}
with open_console("PPO", "iteration") as console:
    console.total, console.columns, console.status = 3, columns, columns
    timer = PhaseTimer([console])
    for iteration in range(1, 4):
        with timer.phase("rollout", 40, "tokens"):
            timer.advance(10)
            while sys.argv[1:] and not pathlib.Path(sys.argv[1]).exists():
                time.sleep(0.01)
            timer.advance(30)
        get_logger("mindrlhf.x").info("log line %d", iteration)
        list(track(range(3), description="inner bar"))
        console.scalars(iteration, metrics)
get_logger("mindrlhf.x").info("after")
"""


class Screen:
    """As much of a terminal as rich's Live uses: line feeds, cursor up, erase line."""

    def __init__(self) -> None:
        self.lines: list[str] = [""]
        self.row = 0

    def feed(self, text: str) -> None:
        for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
            if token == "\n":
                self.row += 1
                if self.row == len(self.lines):
                    self.lines.append("")
            elif token == "\r":
                self.fresh = True
            elif token == "\x1b[2K":
                self.lines[self.row] = ""
            elif re.fullmatch(r"\x1b\[\d+A", token):
                self.row -= int(token[2:-1])
            elif not token.startswith("\x1b"):
                self.lines[self.row] = token if self.fresh else self.lines[self.row] + token
                self.fresh = False

    fresh = False


DRAWN = b"10/40 tokens"


def run_on_terminal(
    directory: Path, variables: dict[str, str], stderr: Any = None, *, draws: bool = True
) -> str:
    """What RUN writes to a pseudo-terminal, which is its stderr too unless another is given.

    A run that draws waits until :data:`DRAWN` has been read here, however long that takes on a busy machine.
    """
    script, seen = directory / "run.py", directory / "seen"
    script.write_text(RUN, encoding="utf-8")
    master, slave = pty.openpty()
    named = {name: os.ttyname(slave) if value == "TTY" else value for name, value in variables.items()}
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30", **named}
    process = subprocess.Popen(
        [sys.executable, str(script), *([str(seen)] if draws else [])],
        stdin=slave,
        stdout=slave,
        stderr=stderr or slave,
        env=env,
    )
    os.close(slave)
    output = b""
    try:
        while True:
            try:
                part = os.read(master, 65536)
            except OSError:  # the other side has closed
                break
            if not part:
                break
            output += part
            if DRAWN in output:
                seen.touch()
    finally:
        assert process.wait(timeout=60) == 0
        os.close(master)
    return output.decode()


def assert_whole(lines: list[str]) -> None:
    """Log lines and finished iterations in order, each on a line of its own, then the last drawing."""
    lines = [line.rstrip() for line in lines if line.strip()]
    rows = [line for line in lines if re.match(r" +[123]  ", line)]
    assert [row.split()[0] for row in rows] == ["1", "2", "3"]
    logs = [line for line in lines if "log line" in line]
    assert logs == [f"INFO log line {iteration}" for iteration in (1, 2, 3)]
    assert lines.index(logs[1]) < lines.index(rows[1]) < lines.index(logs[2]), "in the order they came"
    heads = [line for line in lines if line.startswith("PPO")]
    assert len(heads) == 1, "one drawing is left, the last"
    assert re.search(r"iteration 3/3 +\d:\d\d elapsed$", heads[0])
    assert not any("rollout" in line for line in lines)


def test_log_lines_do_not_tear_the_drawing_on_a_terminal(tmp_path: Path) -> None:
    output = run_on_terminal(tmp_path, {})
    assert "rollout" in output
    screen = Screen()
    screen.feed(output)
    assert_whole(screen.lines)
    assert [line.rstrip() for line in screen.lines if line.strip()][-1] == "INFO after"
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l"), "the cursor is there again"


def test_a_worker_of_msrun_draws_on_the_terminal_it_is_given_and_logs_to_its_own_file(tmp_path: Path) -> None:
    log = tmp_path / "worker_0.log"
    with log.open("w") as stderr:
        output = run_on_terminal(tmp_path, {"MINDRLHF_CONSOLE": "TTY"}, stderr)
    screen = Screen()
    screen.feed(output)
    assert_whole(screen.lines)
    assert log.read_text().splitlines() == [
        *(f"INFO log line {iteration}" for iteration in (1, 2, 3)),
        "INFO after",
    ]


def test_plain_lines_on_a_terminal_when_asked_for(tmp_path: Path) -> None:
    output = run_on_terminal(tmp_path, {"MINDRLHF_CONSOLE": "plain"}, draws=False)
    assert "INFO log line 3" in output
    assert "tokens" not in output


def test_a_progress_bar_inside_the_live_console_writes_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    from rich.file_proxy import FileProxy

    written = Terminal()
    outer = Console(file=written, width=80, force_terminal=True)
    monkeypatch.setattr(sys, "stderr", FileProxy(outer, written))
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with ProgressBar("rows", 2) as bar:
        bar.update()
    assert "INFO rows: 1/2 in 0 s" in written.getvalue()
    assert "━" not in written.getvalue()
