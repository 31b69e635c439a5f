"""The compile cache: a graph that is taken shares its parameters with all others, and is the right one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from mindrlhf.runtime.compile_cache import CompileCache, cache_directory, remove_oldest
from mindrlhf.runtime.graph_identity import code_identity, identity_of, inputs_identity
from mindrlhf.utils.errors import MindRLHFError

NETS = Path(__file__).with_name("cached_nets.py")
Answer = dict[str, Any]


def run_nets(directory: Path, scale: float, *names: str) -> Answer:
    command = [sys.executable, str(NETS), str(directory), str(scale), *names]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "GLOG_v": "4"})
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """A run that fills the cache; one that takes from it in another order, one graph broken meanwhile."""
    directory = tmp_path_factory.mktemp("graphs")
    filled = run_nets(directory, 2.0, "read", "hidden", "grad", "step", "read")
    [broken] = directory.glob("Grad-*.mindir")
    broken.chmod(0o600)
    broken.write_bytes(broken.read_bytes()[:-20])
    taken = run_nets(directory, 2.0, "step", "grad", "hidden", "read")
    return {"filled": filled, "taken": taken, "changed": run_nets(directory, 3.0, "grad", "read", "step")}


def test_a_run_that_fills_the_cache_computes_as_without(runs: dict[str, Answer]) -> None:
    filled = runs["filled"]
    # read, gradient twice, step, read after it: 2 sum w, 2 w, -, 2 sum (w - 1)
    assert filled["results"] == [[6, [2] * 3, [2] * 3, 1, 0], [60, [20] * 3, [20] * 3, 1, 54]]
    assert filled["records"] == [["Read", False], ["Hidden", False], ["Grad", False], ["Step", False]]


def test_graphs_that_are_taken_share_parameters_with_all_others(runs: dict[str, Answer]) -> None:
    """With the update of another graph, and with what Python writes into their memory."""
    taken = runs["taken"]
    assert taken["results"] == [[1, [0] * 3, [0] * 3, 0], [1, [18] * 3, [18] * 3, 54]]
    assert taken["weight"] == [9, 9, 9]


def test_order_does_not_matter_and_broken_files_are_compiled_again(runs: dict[str, Answer]) -> None:
    assert runs["taken"]["records"] == [["Step", True], ["Grad", False], ["Hidden", False], ["Read", True]]
    assert runs["taken"]["gains"]


def test_another_constant_in_one_cell_is_another_graph_of_that_cell(runs: dict[str, Answer]) -> None:
    assert runs["changed"]["records"] == [["Grad", True], ["Read", False], ["Step", True]]
    assert runs["changed"]["results"] == [[[2] * 3, 9, 1], [[20] * 3, 90, 1]]


def test_a_graph_whose_parameters_its_cell_does_not_list_is_not_kept(runs: dict[str, Answer]) -> None:
    assert [run["refused"] for run in runs.values()] == [{"Hidden": ["weight"]}] * 2 + [{}]


def test_the_gain_is_said_in_one_line(runs: dict[str, Answer]) -> None:
    assert "4 compiled in " in runs["filled"]["summary"]
    assert "3 of them kept for the next run" in runs["filled"]["summary"]
    assert "2 graph(s) taken in " in runs["taken"]["summary"]
    assert " s instead of " in runs["taken"]["summary"]


def times(factor: float) -> Callable[[Tensor], Tensor]:
    """A function that closes over a number."""
    return lambda x: x * factor


class Net(nn.Cell):
    """A cell with a constant of each kind."""

    def __init__(self, number: float = 1.0, table: int = 1, name: str = "w", **settings: Any) -> None:
        super().__init__()
        self.number = number
        self.table = Tensor(np.array([1, table]))
        self.weight = Parameter(Tensor(np.full((2, 3), settings.get("value", 0.0), np.float32)), name=name)
        self.product = ops.MatMul(transpose_b=settings.get("transpose", False))
        self.inner = nn.Dense(3, settings.get("width", 2))
        self.function = ops.value_and_grad(times(settings.get("factor", 2.0)))


CHANGES: dict[str, Callable[[], nn.Cell]] = {
    "a number": lambda: Net(number=1.5),
    "a constant tensor": lambda: Net(table=2),
    "a parameter's name": lambda: Net(name="v"),
    "an operator's attribute": lambda: Net(transpose=True),
    "an inner cell": lambda: Net(width=5),
    "what a function closes over": lambda: Net(factor=3.0),
    "the training flag": lambda: Net().set_train(),
    "another class": lambda: type("Other", (Net,), {})(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_identity_tells_cells_apart(change: str) -> None:
    assert identity_of(CHANGES[change]()) != identity_of(Net())


def test_identity_is_the_same_for_the_same_cell_whatever_its_weights() -> None:
    assert identity_of(Net()) == identity_of(Net()) == identity_of(Net(value=7.0))


class Doubled(nn.Cell):
    """Two cells that run by themselves, one in the other."""

    def __init__(self, inner: nn.Cell) -> None:
        super().__init__()
        self.inner = inner

    def construct(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2.0


def test_identity_is_the_same_after_a_run() -> None:
    ms.set_context(mode=ms.GRAPH_MODE)  # else nothing is compiled
    outer = Doubled(nn.Dense(3, 2))
    before = identity_of(outer)
    for cell in (outer.inner, outer):
        cell(Tensor(np.ones((1, 3), np.float32)))
    assert identity_of(outer) == before


def test_identity_of_inputs() -> None:
    row, again = Tensor(np.ones(3, np.float32)), Tensor(np.zeros(3, np.float32))
    same = inputs_identity((row, 1), {"phase": "a"})
    assert same == inputs_identity((again, 1), {"phase": "b"})
    others = [
        inputs_identity((row.reshape(1, 3), 1), {}),
        inputs_identity((row.astype(ms.int32), 1), {}),
        inputs_identity((row, 2), {}),
        inputs_identity(((row,), 1), {}),
    ]
    assert len({same, *others}) == 5
    assert inputs_identity(((row,),), {}) != inputs_identity(((again,),), {})  # in a tuple: a constant


def test_identity_of_code(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    before = code_identity(tmp_path)
    (tmp_path / "notes.txt").write_text("no code\n")
    assert code_identity(tmp_path) == before
    (tmp_path / "a.py").write_text("x = 2\n")
    assert code_identity(tmp_path) != before


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    for age, name in enumerate("abc"):
        for suffix in ("mindir", "json"):
            path = tmp_path / f"{name}.{suffix}"
            path.write_bytes(b"0" * 100)
            os.utime(path, (1000 - age, 1000 - age))
    remove_oldest(tmp_path, 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.mindir", "b.json", "b.mindir"]


def test_directory_of_a_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MS_COMPILER_CACHE_PATH", raising=False)
    assert cache_directory(1, 4) == tmp_path / "mindrlhf/graphs/rank_1_of_4"
    monkeypatch.setenv("MS_COMPILER_CACHE_PATH", str(tmp_path / "mine"))
    assert cache_directory(0, 1) == tmp_path / "mine/rank_0_of_1"


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MindRLHFError, match=r"file/graphs cannot be written .* set MS_COMPILER_CACHE_PATH"):
        CompileCache(tmp_path / "file" / "graphs", tmp_path / "scratch", [])
