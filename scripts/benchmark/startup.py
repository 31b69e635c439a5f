#!/usr/bin/env python
"""How long a job takes from launch to its first rollout, and where the time goes.

    python scripts/benchmark/startup.py --model default

Fresh processes do what ppo_one_stage.py does, with random weights from a file: imports, building and loading
the models, then one iteration, in which every graph is compiled once. Alternately a process has no compile
cache (cold) and one that an earlier process has filled (warm). Graphs are timed network by network; the
remainder of a phase of the first iteration is its run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from results import BATCH, MODELS, table


def parse_args() -> argparse.Namespace:
    """Flags; ``--child`` is for the fresh process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="default", help="sizes by name (default: default)")
    parser.add_argument("--layers", type=int, default=0, help="0: the model's (default)")
    parser.add_argument("--decode_steps", type=int, default=8, help="tokens per decode call (default: 8)")
    parser.add_argument("--repeats", type=int, default=2, help="processes of each kind (default: 2)")
    parser.add_argument("--json", type=Path, help="append every process to this file")
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)  # the time of the launch
    parser.add_argument("--cached", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


class Laps:
    """Seconds since the launch, from lap to lap; the clock is the system's, so that processes agree."""

    def __init__(self, launched: float) -> None:
        self.launched = self.last = launched
        self.seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Attributes the time since the previous lap to ``name``."""
        now = time.time()
        self.seconds[name], self.last = now - self.last, now

    def total(self) -> float:
        """Since the launch."""
        return self.last - self.launched


def time_compilations(compiled: dict[str, float]) -> None:
    """Adds the seconds that each network takes to compile to ``compiled``, by class and number."""
    from mindspore.graph.api import _CellGraphExecutor

    compile_cell = _CellGraphExecutor.compile

    def timed(self: Any, network: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        phase, is_new = compile_cell(self, network, *args, **kwargs)
        if is_new:
            name = type(network).__name__.lstrip("_")
            while name in compiled:
                name += "'"
            compiled[name] = time.perf_counter() - start
        return phase, is_new

    _CellGraphExecutor.compile = timed


def child(args: argparse.Namespace) -> dict[str, Any]:
    """What the fresh process measures."""
    laps = Laps(args.child)
    compiled: dict[str, float] = {}
    laps.lap("start Python")
    import mindspore

    laps.lap("import mindspore")
    from mindrlhf.runtime import compile_cache
    from mindrlhf.runtime.device import Runtime
    from mindrlhf.trainer.mindformers_schedules import load_build_lr
    from mindrlhf.trainer.recipes.ppo_job import graph_configuration

    load_build_lr()
    laps.lap("import mindrlhf and MindFormers' schedules")
    from ppo_iteration import build_job, build_trainer, write_inputs

    time_compilations(compiled)
    sizes = {"prompt": 64, "response": 64, "batch": BATCH[args.model], "micro_batch": 0, "score_batch": 0}
    settings = argparse.Namespace(**vars(args), **sizes, dtype="float32", steps=1, warm_up=0)
    job = build_job(settings)
    with tempfile.TemporaryDirectory(prefix="mindrlhf_") as directory:
        files = write_inputs(job, Path(directory))
        written = time.time()
        laps.launched += written - laps.last  # a real launch finds its inputs on disk
        laps.last = written
        if args.cached:
            compile_cache.open_compile_cache(
                graph_configuration(job), Runtime(0, 1), Path(directory) / "scratch", last_phase="sync"
            )
        trainer = build_trainer(job, Path(directory), files)
        laps.lap("build and load models")
        roll_out = trainer.rollout

        def rollout(batch: Any, iteration: int) -> Any:
            result = roll_out(batch, iteration)
            laps.lap("first rollout")
            laps.seconds["to first rollout"] = laps.total()
            return result

        trainer.rollout = rollout
        with trainer.run.timed_step(trainer):
            trainer.step(0)
        laps.lap("rest of iteration 1")
    laps.seconds["to end of iteration 1"] = laps.total()
    del mindspore
    return {"laps": laps.seconds, "compiled": compiled}


def launch(args: argparse.Namespace, cache: Path | None) -> dict[str, Any]:
    """Starts a fresh process and reads what it measured."""
    command = [sys.executable, __file__, "--model", args.model, "--layers", str(args.layers)]
    command += ["--decode_steps", str(args.decode_steps), "--child", repr(time.time())]
    environment = os.environ | {"GLOG_v": "3", "MINDRLHF_LOG": "ERROR"}
    if cache is not None:
        command.append("--cached")
        environment["MS_COMPILER_CACHE_PATH"] = str(cache)
    with tempfile.TemporaryDirectory(prefix="mindrlhf_") as scratch:
        environment["LOCAL_DEFAULT_PATH"] = scratch
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def print_runs(runs: list[dict[str, Any]]) -> None:
    """Laps and compilations, one column per process."""
    columns = ("", *(f"{run['kind']}, s" for run in runs))
    for title, key in (("from launch on", "laps"), ("graphs", "compiled")):
        rows = [(name, *(f"{run[key].get(name, float('nan')):.2f}" for run in runs)) for name in runs[0][key]]
        if key == "compiled":
            rows.append(("all", *(f"{sum(run[key].values()):.2f}" for run in runs)))
        print(f"\n{title}\n{table(columns, rows)}")


def main() -> None:
    """One process that fills a cache, then warm and cold ones alternately."""
    args = parse_args()
    if args.child:
        print(json.dumps(child(args)))
        return
    runs = []
    with tempfile.TemporaryDirectory(prefix="mindrlhf_") as directory:
        for number in range(2 * args.repeats + 1):
            kind = "fills the cache" if number == 0 else ("warm", "cold")[number % 2]
            run = {"kind": kind} | launch(args, None if kind == "cold" else Path(directory))
            laps = run["laps"]
            print(
                f"{kind}: first rollout after {laps['to first rollout']:.1f} s, "
                f"iteration 1 after {laps['to end of iteration 1']:.1f} s",
                flush=True,
            )
            runs.append(run)
            if args.json:
                with args.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"model": args.model, **run}) + "\n")
    print_runs(runs)


if __name__ == "__main__":
    main()
