"""Damages the files that MindRLHF reads; every reader must report the fault or read the content.

    python scripts/soak/fuzz.py --cases 10000 --seed 1
    python scripts/soak/fuzz.py --seed 1 --only 4711 --keep /tmp/case    # one case again, its files kept

Case i of a seed is always the same. A defect is an exception that is not a MindRLHFError, a wrong result,
more memory than --memory_mb, more time than --seconds, or a crash of the interpreter. Each is listed with
its case, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from fuzz_mutations import mutate
from fuzz_targets import Target, make_targets

from mindrlhf.utils.command_line import run_main
from mindrlhf.utils.errors import MindRLHFError
from mindrlhf.utils.seeds import random_stream

_BATCH = 500
_HANG_SECONDS = 5.0
_ERROR, _RESULT = "clean error", "correct result"


class Defect(NamedTuple):
    """A case that went wrong."""

    case: int
    target: str
    text: str


class _Hang(BaseException):
    """Not an Exception, so that no reader takes it for a damaged file."""


def run_case(seed: int, case: int, targets: dict[str, Target], directory: Path, seconds: float) -> str:
    """Runs one case; returns ``target: outcome``, a defect unless it is one of the two good outcomes.

    Args:
        seed, case: key of all random numbers.
        targets: see :func:`fuzz_targets.make_targets`.
        directory: for the files; emptied first.
        seconds: time limit.
    """
    random = random_stream("fuzz", seed, case)
    # Python's own limit, and one like MindSpore's: readers must depend on neither.
    sys.setrecursionlimit(1_000 if case // len(targets) % 2 else 20_000)
    name = list(targets)[case % len(targets)]
    target = targets[name]
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for file, content in target.files.items():
        (directory / file).write_bytes(content)
    victim = target.mutated[int(random.integers(len(target.mutated)))]
    damaged, mutations = mutate(target.files[victim], random)
    (directory / victim).write_bytes(damaged)
    try:
        with _alarm(seconds):
            target.read(directory)
    except MindRLHFError as error:
        if str(directory) not in str(error):
            return f"{name}: names no file ({', '.join(mutations)} of {victim}): {error}"
        return f"{name}: {_ERROR}"
    except (_Hang, Exception) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return (
            f"{name}: {type(error).__name__} at {Path(place.filename).name}:{place.lineno} "
            f"({', '.join(mutations)} of {victim}): {str(error)[:200]}"
        )
    return f"{name}: {_RESULT}"


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise _Hang(f"no end after {seconds:g} s")

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def run_batch(
    seed: int, cases: Sequence[int], targets: dict[str, Target], directory: Path, args: argparse.Namespace
) -> tuple[Counter[str], list[Defect]]:
    """Runs cases in a child process with a memory limit, and in another after a case that crashed it."""
    counts: Counter[str] = Counter()
    defects: list[Defect] = []
    left = list(cases)
    while left:
        outcomes, crash = _in_child(seed, left, targets, directory, args)
        for case, outcome in zip(left, outcomes, strict=False):
            _count(case, outcome, counts, defects)
        if crash is not None:
            _count(left[len(outcomes)], crash, counts, defects)
        left = left[len(outcomes) + 1 :] if crash is not None else []
    return counts, defects


def _count(case: int, outcome: str, counts: Counter[str], defects: list[Defect]) -> None:
    name, _, text = outcome.partition(": ")
    if text in (_ERROR, _RESULT):
        counts[outcome] += 1
    else:
        defects.append(Defect(case, name, text))


def _in_child(
    seed: int, cases: Sequence[int], targets: dict[str, Target], directory: Path, args: argparse.Namespace
) -> tuple[list[str], str | None]:
    """The outcomes of the cases until the child crashed, and how it crashed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        code = 1
        try:
            _limit_memory(args.memory_mb)
            with os.fdopen(writing, "w", encoding="utf-8") as pipe:
                for case in cases:
                    outcome = run_case(seed, case, targets, directory, args.seconds)
                    pipe.write(outcome.replace("\n", " | ") + "\n")
                    pipe.flush()
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    outcomes: list[str] = []
    # An alarm in the child does not reach a reader that hangs in C.
    with os.fdopen(reading, encoding="utf-8") as pipe, _killing(child, _HANG_SECONDS + args.seconds):
        for line in pipe:
            outcomes.append(line.rstrip("\n"))
            signal.setitimer(signal.ITIMER_REAL, _HANG_SECONDS + args.seconds)
    _, status = os.waitpid(child, 0)
    if len(outcomes) == len(cases):
        return outcomes, None
    name = list(targets)[cases[len(outcomes)] % len(targets)]
    return outcomes, f"{name}: the interpreter ended with status {os.waitstatus_to_exitcode(status)}"


@contextmanager
def _killing(child: int, seconds: float) -> Iterator[None]:
    def kill(*_: object) -> None:
        os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGALRM, kill)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _limit_memory(megabytes: int) -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--cases", type=int, default=10_000, help="number of cases (default: 10000)")
    parser.add_argument("--seed", type=int, default=1, help="of the damage (default: 1)")
    parser.add_argument("--only", type=int, metavar="CASE", help="run this case alone")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="with --only: leave the files there")
    parser.add_argument("--seconds", type=float, default=5.0, help="time limit of a case (default: 5)")
    parser.add_argument(
        "--memory_mb", type=int, default=256, help="limit of additional memory (default: 256)"
    )
    args = parser.parse_args(argv)
    if args.cases < 1:
        parser.error(f"--cases must be at least 1, got {args.cases}")
    return args


def main() -> int:
    """Runs the cases and prints their outcomes."""
    args = parse_arguments()
    started = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="mindrlhf_fuzz_"))
    counts: Counter[str] = Counter()
    defects: list[Defect] = []
    try:
        targets = make_targets(work / "made")
        cases = list(range(args.cases)) if args.only is None else [args.only]
        for first in range(0, len(cases), _BATCH):
            batch = cases[first : first + _BATCH]
            found = run_batch(args.seed, batch, targets, args.keep or work / "case", args)
            counts += found[0]
            defects += found[1]
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for defect in defects:
        print(f"DEFECT --seed {args.seed} --only {defect.case}  {defect.target}: {defect.text}")
    for outcome, count in sorted(counts.items()):
        print(f"{outcome:<32} {count:6d}")
    seconds = time.monotonic() - started
    print(f"{len(cases)} cases of seed {args.seed} in {seconds:.0f} s: {len(defects)} defects")
    return 1 if defects else 0


if __name__ == "__main__":
    run_main(main)
