#!/usr/bin/env python
"""How iteration time and peak memory grow with batch, response length and layers: a table and a plot.

    python scripts/benchmark/growth.py [--picture FILE.png]

Each point is a run of ppo_iteration.py in its own process; one size varies, the others are those of
the base (small: batch 16, 64 + 64 tokens, 4 layers). The exponent is the slope of a straight line through
the logarithms: 1 is linear, less is better. With fixed costs and quadratic attention, a straight line is a
summary; the last column is the slope between the two largest sizes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from results import MODELS, Steps, append_json, read_json, table

SWEEPS = {
    "batch": (4, 8, 16, 32, 64),
    "response": (16, 32, 64, 128, 256),
    "layers": (2, 4, 8, 16),
}
FIGURES: dict[str, Callable[[Steps], float]] = {
    "iteration s": lambda steps: steps.median("iteration"),
    "rollout": lambda steps: steps.median("rollout"),
    "scoring": lambda steps: steps.median("scoring"),
    "training": lambda steps: steps.median("training"),
    "peak GiB": lambda steps: steps.peak_gib,
    "above start": lambda steps: steps.peak_gib - steps.notes["built_gib"],
}
"""What is drawn and fitted; ``above start``: peak minus what the process held with its models loaded."""


@dataclass
class Sweep:
    """Runs that differ in one size."""

    name: str
    runs: list[Steps] = field(default_factory=list)

    def sizes(self) -> np.ndarray:
        """What varies."""
        return np.array([getattr(run, self.name) for run in self.runs], np.float64)

    def figures(self, of: Callable[[Steps], float]) -> np.ndarray:
        """One figure of each run."""
        return np.array([of(run) for run in self.runs])

    def exponent(self, of: Callable[[Steps], float], last: int = 0) -> float:
        """Slope of the line through the logarithms of all runs, or of the ``last`` ones."""
        sizes, figures = self.sizes()[-last:], self.figures(of)[-last:]
        return float(np.polyfit(np.log(sizes), np.log(figures), 1)[0]) if len(sizes) > 1 else float("nan")


def parse_args() -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="small", help="the base's sizes (default: small)")
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS), help="(default: all)")
    parser.add_argument("--steps", type=int, default=3, help="steps that count (default: 3)")
    parser.add_argument("--limit", type=float, default=240, help="maximum seconds per run (default: 240)")
    parser.add_argument("--prefix", default="", help="command before each run, e.g. 'taskset -c 0,1'")
    parser.add_argument(
        "--runs", type=Path, help="keep runs in this file; those already in it are not repeated"
    )
    parser.add_argument("--picture", type=Path, help="draw the curves into this PNG")
    return parser.parse_args()


def measure(args: argparse.Namespace, flags: Sequence[str]) -> Steps | None:
    """One run; prints so and returns ``None`` when it fails or takes too long."""
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as output:
        command = [*args.prefix.split(), sys.executable, str(Path(__file__).with_name("ppo_iteration.py"))]
        command += ["--model", args.model, "--steps", str(args.steps), *flags, "--json", output.name]
        try:
            subprocess.run(command, check=True, timeout=args.limit, stdout=subprocess.DEVNULL)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            print(f"  FAILED: {error}", flush=True)
            return None
        return read_json(Path(output.name))[0]


def sweep(args: argparse.Namespace, name: str, done: list[Steps]) -> Sweep:
    """All runs of one size; adds new ones to ``done``."""
    result = Sweep(name)
    base = {"batch": 16, "response": 64, "layers": MODELS[args.model]["num_layers"]}
    for size in SWEEPS[name]:
        wanted = base | {name: size}
        run = next((old for old in done if all(getattr(old, key) == wanted[key] for key in wanted)), None)
        if run is None:
            print(f"{name} {size}", flush=True)
            run = measure(args, [f"--{key}={value}" for key, value in wanted.items()])
            if run is None:
                continue
            done.append(run)
            if args.runs:
                append_json(args.runs, run)
        print(f"  {run.median('iteration'):.2f} s, {run.peak_gib:.2f} GiB", flush=True)
        result.runs.append(run)
    return result


def print_sweep(result: Sweep) -> None:
    """Figures by size, then the exponents."""
    columns = (result.name, *FIGURES)
    rows = [
        (str(getattr(run, result.name)), *(f"{of(run):.3f}" for of in FIGURES.values()))
        for run in result.runs
    ]
    rows.append(("exponent", *(f"{result.exponent(of):.2f}" for of in FIGURES.values())))
    rows.append(("of last two", *(f"{result.exponent(of, 2):.2f}" for of in FIGURES.values())))
    print(f"\n{table(columns, rows)}")


def draw(path: Path, results: Sequence[Sweep], model: str) -> None:
    """One column per sweep: time above, memory below, logarithmic axes, with a linear line for comparison."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(results), 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(results), squeeze=False)
    rows = (("iteration s", "rollout", "scoring", "training"), ("peak GiB", "above start"))
    for column, result in enumerate(results):
        sizes = result.sizes()
        for line, names in enumerate(rows):
            axis = axes[line][column]
            for name in names:
                exponent = result.exponent(FIGURES[name])
                label = f"{name} (exponent {exponent:.2f})"
                axis.loglog(sizes, result.figures(FIGURES[name]), "o-", label=label, markersize=4)
            top = result.figures(FIGURES[names[0]])
            axis.loglog(sizes, top[-1] * sizes / sizes[-1], ":", color="grey", label="linear")
            axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
            axis.minorticks_off()
            axis.set_xlabel(result.name)
            axis.set_ylabel("seconds" if line == 0 else "GiB")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
    figure.suptitle(f"One PPO iteration, {model} model, float32, one process on CPU")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Runs, tables, picture."""
    args = parse_args()
    done = read_json(args.runs) if args.runs and args.runs.exists() else []
    done = [run for run in done if run.model == args.model]
    results = [result for name in args.sweeps if len((result := sweep(args, name, done)).runs) > 1]
    if not results:
        raise SystemExit("error: too few runs succeeded to say how anything grows")
    for result in results:
        print_sweep(result)
    if args.picture:
        draw(args.picture, results, args.model)
        print(f"\npicture: {args.picture}")


if __name__ == "__main__":
    main()
