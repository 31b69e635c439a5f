"""Kills a small PPO job again and again, resumes it each time, and compares it with an undisturbed one.

    python scripts/soak/kill_resume.py --kills 20

Each round starts the job through scripts/msrun_launcher.py with --resume_training True, waits until it is in
the next phase of rollout, train, sync and save and, at a random moment after that, sends SIGKILL to one
random worker or to all. The last round runs to the end. Two undisturbed runs show how far two runs of the
same job differ by themselves, because MindSpore's CPU kernels do not repeat bit by bit. Exit code 1 when a
job did not end after its kill, left a process behind, or has metrics that differ by more than --tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from job_inputs import REPOSITORY, SPLITS, JobInputs

from mindrlhf.utils.command_line import run_main
from mindrlhf.utils.errors import MindRLHFError
from mindrlhf.utils.result_files import METRICS_FILE, checkpoint_numbers
from mindrlhf.utils.tables import markdown_table

PHASES = ("rollout", "train", "sync", "save")
LONGEST_END = 60.0  # seconds from a kill to the end of the job
CLOCK = ("time/", "tokens_per_second", "memory/")
# Smaller metrics count as zero plus rounding: sums of differences have no significant digits.
SMALLEST = 1e-2


@dataclass
class Round:
    """One kill and its outcome."""

    number: int
    wanted: str
    phase: str
    victim: str
    iteration: int
    came_from: int
    seconds: float
    code: int
    left_alive: int

    @property
    def is_good(self) -> bool:
        """Whether the job ended in time with a failure and left nothing behind."""
        return self.code != 0 and self.seconds <= LONGEST_END and not self.left_alive


class Job:
    """A running job, and what its workers are doing."""

    def __init__(self, inputs: JobInputs, save: Path, logs: Path, overrides: Mapping[str, object]) -> None:
        self.workers = inputs.workers
        self.logs = logs
        shutil.rmtree(logs, ignore_errors=True)
        logs.mkdir(parents=True)
        self.save = save
        script = str(Path(__file__).with_name("observed_ppo.py"))
        command = [sys.executable, str(REPOSITORY / "scripts" / "msrun_launcher.py")]
        command += ["--workers", str(inputs.workers), "--log_dir", str(logs), script]
        command += [*inputs.flags(save, overrides), "--resume_training", "True"]
        self._output = (logs / "launcher.log").open("w")
        self.process = subprocess.Popen(
            command,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "MINDRLHF_SOAK_DIR": str(logs), "GLOG_v": "3"},
            start_new_session=True,
        )

    def doing(self, rank: int) -> tuple[int, int, str]:
        """Process number, iteration since its start, and phase of a worker; zeros before it has begun."""
        try:
            pid, iteration, phase = (self.logs / f"phase_{rank}").read_text().split()
        except (OSError, ValueError):
            return 0, 0, ""
        return int(pid), int(iteration), phase

    def wait_until(self, rank: int, iteration: int, phase: str) -> bool:
        """Waits for a phase; False when the job has ended before."""
        while self.process.poll() is None:
            _, now, doing = self.doing(rank)
            if now >= iteration and doing == phase:
                return True
            time.sleep(0.001)
        return False

    def kill(self, ranks: list[int]) -> list[psutil.Process]:
        """Kills workers; returns all worker processes as they were before."""
        everyone = [process for rank in range(self.workers) if (process := _process(self.doing(rank)[0]))]
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(self.doing(rank)[0], signal.SIGKILL)
        return everyone

    def finish(self, timeout: float) -> int:
        """The exit code; a job that takes longer is killed."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.kill()
            self.process.wait()
            code = -1
        self._output.close()
        return code

    def fail(self, event: str) -> MindRLHFError:
        """An error with the end of the log."""
        tail = (self.logs / "launcher.log").read_text(errors="replace")[-3000:]
        return MindRLHFError(f"{event}; logs in {self.logs}\n{tail}")


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid) if pid else None
    except psutil.NoSuchProcess:
        return None


def run_undisturbed(
    inputs: JobInputs, directory: Path, overrides: Mapping[str, object]
) -> list[dict[str, Any]]:
    """The metrics of a run that is not killed."""
    shutil.rmtree(directory, ignore_errors=True)
    job = Job(inputs, directory / "save", directory / "logs", overrides)
    if job.finish(3600):
        raise job.fail("the undisturbed run failed")
    return read_metrics(directory / "save")


def run_killed(
    inputs: JobInputs,
    directory: Path,
    overrides: Mapping[str, object],
    kills: int,
    seed: int,
    straight: list[dict[str, Any]],
) -> tuple[list[Round], list[dict[str, Any]]]:
    """The rounds, and the metrics of their run; ``straight`` are the metrics of an undisturbed one."""
    rng = np.random.default_rng(seed)
    shutil.rmtree(directory, ignore_errors=True)
    save = directory / "save"
    rounds: list[Round] = []
    for number in range(1, kills + 1):
        before = newest(save)
        job = Job(inputs, save, directory / f"logs_{number:02d}", overrides)
        phase = PHASES[(number - 1) % len(PHASES)]
        rank = int(rng.integers(inputs.workers))
        # The first iteration of a process compiles; wait for a second one only while that cannot finish the
        # job.
        first = int(rng.integers(1, 3)) if before < number else 1
        if not job.wait_until(rank, first, phase):
            job.finish(10)
            raise job.fail(f"round {number}: the job ended before its {phase}; give more --iterations")
        time.sleep(float(rng.uniform(0, phase_seconds(straight, phase, is_compiling=first == 1))))
        is_all = bool(rng.integers(4) == 0)
        _, iteration, caught = job.doing(rank)
        started = time.monotonic()
        everyone = job.kill(list(range(inputs.workers)) if is_all else [rank])
        code = job.finish(LONGEST_END + 30)
        seconds = time.monotonic() - started
        _, alive = psutil.wait_procs(everyone, timeout=5)
        victim = "all" if is_all else f"rank {rank}"
        rounds.append(
            Round(number, phase, caught, victim, before + iteration, before, seconds, code, len(alive))
        )
        print(describe(rounds[-1]), flush=True)
        for process in alive:
            process.kill()
    job = Job(inputs, save, directory / "logs_last", overrides)
    if job.finish(3600):
        raise job.fail("the last round, which was not killed, failed")
    return rounds, read_metrics(save)


def phase_seconds(straight: list[dict[str, Any]], phase: str, *, is_compiling: bool) -> float:
    """Seconds of a phase, in the first iteration of a process or later; saving is not recorded."""
    times = [line.get(f"time/{phase}", 0.1) for line in straight]
    return float(times[0] if is_compiling else np.median(times[1:]))


def newest(save: Path) -> int:
    """The iteration of the newest checkpoint."""
    return max(checkpoint_numbers(save, "iteration"), default=0)


def read_metrics(save: Path) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl."""
    path = save / METRICS_FILE
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def largest_difference(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> tuple[float, str, int]:
    """The largest relative difference of two runs' metrics, its metric and its iteration."""
    if [line["iteration"] for line in one] != [line["iteration"] for line in other]:
        return float("inf"), "iteration", 0
    worst = (0.0, "none", 0)
    for first, second in zip(one, other, strict=True):
        for name, value in first.items():
            if not name.startswith(CLOCK):
                scale = max(abs(value), SMALLEST)
                worst = max(worst, (abs(second[name] - value) / scale, name, int(first["iteration"])))
    return worst


def describe(item: Round) -> str:
    """One line about a round."""
    return (
        f"kill {item.number}: {item.victim} in {item.phase} (wanted: {item.wanted}) of iteration "
        f"{item.iteration}, resumed after {item.came_from}; ended {item.seconds:.1f} s later with {item.code}"
        + ("" if item.is_good else "  <-- NOT GOOD")
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=4, choices=sorted(SPLITS))
    parser.add_argument("--iterations", type=int, help="default: 2 x kills + 6")
    parser.add_argument("--seed", type=int, default=1, help="of the moments and victims")
    parser.add_argument(
        "--tolerance", type=float, default=1e-3, help="largest relative difference of a metric"
    )
    parser.add_argument("--work_dir", type=Path, default=Path("runs/soak_kill"), help="replaced")
    return parser.parse_args()


def main() -> int:
    """Runs everything and prints the table."""
    options = parse_arguments()
    inputs = JobInputs(options.work_dir.resolve() / "inputs", options.workers)
    inputs.write()
    overrides = {
        "total_iterations": options.iterations or 2 * options.kills + 6,
        "save_interval": 1,
        "seed": 7,
    }
    started = time.monotonic()
    base = options.work_dir.resolve()
    straight = run_undisturbed(inputs, base / "undisturbed", overrides)
    again = run_undisturbed(inputs, base / "undisturbed_again", overrides)
    rounds, killed = run_killed(inputs, base / "killed", overrides, options.kills, options.seed, straight)
    header = [
        *("kill", "wanted", "was in", "victim", "in iteration"),
        *("resumed after", "seconds to end", "exit", "left"),
    ]
    rows = [
        [
            *(str(item.number), item.wanted, item.phase, item.victim, str(item.iteration)),
            *(str(item.came_from), f"{item.seconds:.1f}", str(item.code), str(item.left_alive)),
        ]
        for item in rounds
    ]
    print(markdown_table(header, rows))
    noise, difference = largest_difference(straight, again), largest_difference(straight, killed)
    for title, (size, name, iteration) in (("undisturbed twice", noise), ("killed and resumed", difference)):
        print(f"{title}: metrics differ by at most {size:.2e} ({name}, iteration {iteration})")
    good = sum(item.is_good for item in rounds)
    print(f"{good} of {len(rounds)} kills recovered by themselves; {time.monotonic() - started:.0f} s")
    return 0 if good == len(rounds) and difference[0] <= options.tolerance else 1


if __name__ == "__main__":
    run_main(main)
