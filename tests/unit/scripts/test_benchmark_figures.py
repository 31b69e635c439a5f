"""What the benchmarks work out of their measurements: medians, ratios, exponents, bytes of a sync."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mindrlhf.parallel.layout import Layout, Mesh

Load = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def load(repo_root: Path) -> Iterator[Load]:
    """Imports a module of scripts/benchmark, whose modules import each other by plain name."""
    folder, before = str(repo_root / "scripts" / "benchmark"), set(sys.modules)
    sys.path.insert(0, folder)

    def load_module(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load_module
    sys.path.remove(folder)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(folder):
            del sys.modules[name]


def steps(load: Load, system: str, seconds: list[float], **changes: Any) -> Any:
    sizes = {"batch": 16, "prompt": 64, "response": 64, "layers": 4, "warm_up": 2, "peak_gib": 2.0}
    rows = [
        {"iteration": s, "rollout": s / 4, "scoring": s / 4, "training": s / 2, "sync": 0.0} for s in seconds
    ]
    return load("results").Steps(system, "small", "float32", **(sizes | changes), seconds=rows)


def test_medians_leave_the_warm_up_out(load: Load) -> None:
    run = steps(load, "MindRLHF", [90.0, 80.0, 1.0, 4.0, 2.0])
    assert run.median("iteration") == 2.0
    assert run.median("training") == 1.0
    assert run.tokens_per_second() == 16 * 64 / 2.0


def test_runs_survive_json_and_pool(load: Load, tmp_path: Path) -> None:
    results = load("results")
    runs = [
        steps(load, "MindRLHF", [9.0, 9.0, 1.0, 2.0]),
        steps(load, "MindRLHF", [9.0, 9.0, 6.0], peak_gib=3.0),
    ]
    for run in runs:
        results.append_json(tmp_path / "runs.jsonl", run)
    assert results.read_json(tmp_path / "runs.jsonl") == runs
    pooled = results.pooled(runs)
    assert [step["iteration"] for step in pooled.clean()] == [1.0, 2.0, 6.0]
    assert pooled.median("iteration") == 2.0
    assert pooled.peak_gib == 3.0


def test_ratios_are_theirs_over_ours(load: Load) -> None:
    table = load("compare_table")
    ours = steps(load, "MindRLHF", [9.0, 9.0, 2.0])
    theirs = steps(load, "TRL 1.12.0", [9.0, 9.0, 5.0], peak_gib=1.0)
    rounding = dataclasses.replace(steps(load, "MindRLHF", [9.0, 9.0, 1.0]), dtype="bfloat16")
    own = {("small", "float32"): ours, ("small", "bfloat16"): rounding}
    assert table.ratios(ours, own) == table.ratios(rounding, own) == ("",) * 7
    assert table.ratios(theirs, own) == ("float32", "2.50", "2.50", "2.50", "2.50", "0.50", "2.0")
    autocast = dataclasses.replace(theirs, dtype="autocast")
    assert table.ratios(autocast, own)[:2] == ("bfloat16", "5.00")
    assert table.ratios(autocast, {("small", "float32"): ours})[:2] == ("float32", "2.50")


def test_exponent_is_the_slope_of_the_logarithms(load: Load) -> None:
    growth = load("growth")
    runs = [steps(load, "MindRLHF", [0.0, 0.0, 3.0 * size**1.5], batch=size) for size in (4, 8, 16)]
    result = growth.Sweep("batch", runs)
    np.testing.assert_array_equal(result.sizes(), [4, 8, 16])
    assert result.exponent(growth.FIGURES["iteration s"]) == pytest.approx(1.5)
    assert result.exponent(growth.FIGURES["peak GiB"], 2) == pytest.approx(0.0)


def test_bytes_needed_by_a_weight_that_is_split_another_way(load: Load) -> None:
    """dp2 mp2 -> dp1 mp4 by hand: ranks 0 and 3 hold their quarter, 1 and 2 lack theirs."""
    shape = (8, 2)
    source = {"w": Layout(Mesh(2, 2), shape, ("mp", None)), "norm": Layout(Mesh(2, 2), (2,), (None,))}
    target = {"w": Layout(Mesh(1, 4), shape, ("mp", None)), "norm": Layout(Mesh(1, 4), (2,), (None,))}
    quarter = 4 * 4  # bytes
    assert load("sync").bytes_needed(source, target) == 2 * quarter
    assert load("sync").bytes_needed(source, source) == 0
