"""``ppo_one_stage.py`` that also records, for the soak scripts, what each worker does and what it holds.

In the directory that the environment variable MINDRLHF_SOAK_DIR names, worker r keeps

    phase_r          "PID ITERATION PHASE", always up to date
    holds_r.jsonl    resident bytes, open files and compiled graphs, one line per iteration
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mindrlhf.cli.ppo import main
from mindrlhf.runtime.supervision import run_worker
from mindrlhf.utils.ranks import env_rank, is_scheduler
from mindrlhf.utils.timers import PhaseTimer

FOLDER = "MINDRLHF_SOAK_DIR"
WIDTH = 64


class Observer:
    """Listens to phases; an iteration begins with its rollout.

    Args:
        directory: for its files.
        rank: of this worker.
    """

    def __init__(self, directory: Path, rank: int) -> None:
        self.iteration = 0
        self.compiled = 0
        self._depth = 0  # a rollout has phases inside
        self._phase = os.open(directory / f"phase_{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._holds = directory / f"holds_{rank}.jsonl"

    def phase_started(self, name: str, total: int | None, unit: str) -> None:
        """Records the phase and, at a rollout, what earlier iterations have left."""
        if name == "rollout":
            if self.iteration:
                self.record_holdings()
            self.iteration += 1
        self._depth += 1
        if self._depth == 1:
            self._write(name)

    def phase_advanced(self, done: int) -> None:
        """Nothing to record."""

    def phase_ended(self, name: str) -> None:
        """Records that no phase runs."""
        self._depth -= 1
        if not self._depth:
            self._write("between")

    def record_holdings(self) -> None:
        """Records what this worker holds now."""
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        line = {
            "iteration": self.iteration,
            "resident_bytes": resident,
            "open_files": len(list(Path("/proc/self/fd").iterdir())),
            "compiled_graphs": self.compiled,
        }
        with self._holds.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _write(self, phase: str) -> None:
        text = f"{os.getpid()} {self.iteration} {phase}".ljust(WIDTH)
        os.pwrite(self._phase, text.encode(), 0)


def observe(directory: Path, rank: int) -> Observer:
    """Makes every phase timer call an observer, which also counts compilations."""
    import mindspore.graph.api

    observer = Observer(directory, rank)
    make = PhaseTimer.__init__

    def make_observed(timer: PhaseTimer, listeners: Any = ()) -> None:
        make(timer, (*listeners, observer))

    PhaseTimer.__init__ = make_observed  # type: ignore[method-assign, assignment]
    # MindSpore calls this just before each compilation of a cell or function, and only then.
    check = mindspore.graph.api._check_recompile

    def count(*arguments: Any) -> Any:
        observer.compiled += 1
        return check(*arguments)

    mindspore.graph.api._check_recompile = count
    return observer


def run() -> None:
    """Runs the job, observed, and records what it holds at the end."""
    folder = os.environ.get(FOLDER)
    if folder is None or is_scheduler():
        main()
        return
    observer = observe(Path(folder), env_rank())
    main()
    observer.record_holdings()


if __name__ == "__main__":
    run_worker(run)
