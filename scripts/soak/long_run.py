"""Runs a small PPO job for a long time and checks whether memory, open files or compiled graphs grow.

    python scripts/soak/long_run.py --workers 4 --iterations 200

Every worker records its resident memory, open files and compiled graphs before each iteration. The medians of
ten iterations after --settle (20) are compared with those of the last ten. Exit code 1 when memory or open
files of a worker have grown by more than --limit (2 %), or when a graph was compiled after --settle
iterations: the first iteration compiles the networks, and the first save one exchange of a few bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from job_inputs import REPOSITORY, SPLITS, JobInputs
from observed_ppo import FOLDER

from mindrlhf.utils.command_line import run_main
from mindrlhf.utils.errors import MindRLHFError
from mindrlhf.utils.tables import markdown_table

SPAN = 10  # iterations per median
MIB = 1 << 20


@dataclass(frozen=True)
class Growth:
    """What one worker held at the beginning and at the end."""

    rank: int
    memory: tuple[float, float]
    files: tuple[float, float]
    compiled: tuple[int, int, int]
    """Graphs compiled in the first iteration, from then until ``--settle``, and later."""

    def is_flat(self, limit: float) -> bool:
        """Whether nothing has grown by more than the fraction ``limit``."""
        grown = [last > first * (1 + limit) for first, last in (self.memory, self.files)]
        return not any(grown) and not self.compiled[-1]

    def row(self) -> list[str]:
        """Cells of the table."""
        first, last = self.memory
        return [
            str(self.rank),
            f"{first / MIB:.1f}",
            f"{last / MIB:.1f}",
            f"{100 * (last / first - 1):+.2f} %",
            f"{self.files[0]:.0f}",
            f"{self.files[1]:.0f}",
            *map(str, self.compiled),
        ]


HEADER = [
    *("rank", "memory settled, MiB", "at the end, MiB", "growth"),
    *("open files settled", "at the end", "graphs compiled in iteration 1", "until settled", "later"),
]


def run(inputs: JobInputs, directory: Path, iterations: int, settle: int) -> float:
    """Runs the job, which saves every ``settle / 2`` iterations; returns its seconds."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    overrides = {"total_iterations": iterations, "save_interval": max(1, settle // 2)}
    command = [sys.executable, str(REPOSITORY / "scripts" / "msrun_launcher.py")]
    command += ["--workers", str(inputs.workers), "--log_dir", str(directory)]
    command += [
        str(Path(__file__).with_name("observed_ppo.py")),
        *inputs.flags(directory / "save", overrides),
    ]
    started = time.monotonic()
    code = subprocess.run(command, env={**os.environ, FOLDER: str(directory), "GLOG_v": "3"}).returncode
    if code:
        raise MindRLHFError(f"the job failed with {code}; logs in {directory}")
    return time.monotonic() - started


def measure(path: Path, rank: int, settle: int) -> Growth:
    """The growth of one worker, from its file of records."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    memory, files, compiled = (
        np.array([line[name] for line in lines])
        for name in ("resident_bytes", "open_files", "compiled_graphs")
    )
    span = min(SPAN, max(1, (len(lines) - settle) // 2))
    settled, end = slice(settle, settle + span), slice(len(lines) - span, len(lines))
    return Growth(
        rank,
        (float(np.median(memory[settled])), float(np.median(memory[end]))),
        (float(np.median(files[settled])), float(np.median(files[end]))),
        (int(compiled[0]), int(compiled[settle] - compiled[0]), int(compiled[-1] - compiled[settle])),
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=4, choices=sorted(SPLITS))
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--settle", type=int, default=20, help="iterations before growth counts")
    parser.add_argument("--limit", type=float, default=0.02, help="allowed growth, a fraction")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/soak_long"), help="replaced")
    arguments = parser.parse_args()
    if arguments.settle + 2 > arguments.iterations:
        parser.error(f"--settle {arguments.settle} leaves nothing of {arguments.iterations} iterations")
    return arguments


def main() -> int:
    """Runs everything and prints the table."""
    options = parse_arguments()
    base = options.work_dir.resolve()
    inputs = JobInputs(base / "inputs", options.workers)
    inputs.write()
    seconds = run(inputs, base / "job", options.iterations, options.settle)
    growths = [
        measure(base / "job" / f"holds_{rank}.jsonl", rank, options.settle) for rank in range(options.workers)
    ]
    print(f"{options.iterations} iterations on {options.workers} workers in {seconds:.0f} s")
    print(markdown_table(HEADER, [growth.row() for growth in growths]))
    return 0 if all(growth.is_flat(options.limit) for growth in growths) else 1


if __name__ == "__main__":
    run_main(main)
