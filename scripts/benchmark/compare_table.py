#!/usr/bin/env python
"""Prints the runs of compare.sh as one table, with the ratios of TRL's figures to MindRLHF's.

TRL's float32 is compared with our float32, its two kinds of bfloat16 with our bfloat16 products, if any.

python scripts/benchmark/compare_table.py RUNS.jsonl
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from results import COLUMNS, Steps, pooled, read_json, row, table

OURS = "MindRLHF"
GOALS = {"float32": 2.0, "autocast": 1.5, "bf16": 1.0}
"""How many times faster an iteration is to be than TRL's of that type."""


def grouped(runs: list[Steps]) -> list[Steps]:
    """One entry per kind of run, in the order of the first runs."""
    groups: dict[tuple[str, ...], list[Steps]] = defaultdict(list)
    for run in runs:
        key = (run.model, run.system, run.dtype, *map(str, (run.batch, run.prompt, run.response, run.layers)))
        groups[key].append(run)
    order = {model: place for place, model in enumerate(dict.fromkeys(run.model for run in runs))}
    return sorted((pooled(group) for group in groups.values()), key=lambda run: order[run.model])


def ratios(run: Steps, ours: dict[tuple[str, str], Steps]) -> tuple[str, ...]:
    """Which of ours it is compared with; iteration, rollout, scoring, training and memory over ours; goal."""
    like = "float32" if run.dtype == "float32" else "bfloat16"
    base = ours.get((run.model, like)) or ours.get((run.model, "float32"))
    if run.system == OURS or base is None:
        return ("",) * 7
    times = [run.median(name) / base.median(name) for name in ("iteration", "rollout", "scoring", "training")]
    return (
        base.dtype,
        *(f"{ratio:.2f}" for ratio in (*times, run.peak_gib / base.peak_gib)),
        f"{GOALS[run.dtype]:.1f}",
    )


def main() -> None:
    """Read, pool, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, help="what --json of ppo_iteration.py and trl_baseline.py wrote")
    runs = grouped(read_json(parser.parse_args().runs))
    ours = {(run.model, run.dtype): run for run in runs if run.system == OURS}
    columns = (
        *COLUMNS,
        "beside our",
        "x iteration",
        "x rollout",
        "x scoring",
        "x training",
        "x memory",
        "goal",
    )
    print("medians of all clean steps, highest peaks; x: TRL's figure over MindRLHF's\n")
    print(table(columns, [row(run) + ratios(run, ours) for run in runs]))


if __name__ == "__main__":
    main()
