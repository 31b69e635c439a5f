"""Resharding plans simulated over all ranks, and the one-process resharder."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore.common.np_dtype import bfloat16

from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import AxisName, Layout, Mesh
from mindrlhf.parallel.reshard import Resharder, ReshardPlan, _ReshardCell, assemble, plan_reshard

SPLITS: dict[int, list[tuple[AxisName | None, ...]]] = {
    1: [(None,), ("mp",)],
    2: [(None, None), ("mp", None), (None, "mp")],
    3: [(None, None, None), ("mp", None, None), (None, "mp", None), (None, None, "mp")],
}


@st.composite
def layout_pairs(draw: st.DrawFn) -> tuple[Layout, Layout]:
    """Two layouts of one tensor over the same 1 to 8 ranks, not necessarily split along one dimension."""
    ranks = draw(st.integers(1, 8))
    divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
    source_mp, target_mp = draw(st.sampled_from(divisors)), draw(st.sampled_from(divisors))
    ndim = draw(st.integers(1, 3))
    unit = np.lcm(source_mp, target_mp)
    shape = tuple(int(unit * draw(st.integers(1, 3))) for _ in range(ndim))
    return (
        Layout(Mesh(ranks // source_mp, source_mp), shape, draw(st.sampled_from(SPLITS[ndim]))),
        Layout(Mesh(ranks // target_mp, target_mp), shape, draw(st.sampled_from(SPLITS[ndim]))),
    )


@settings(max_examples=300, deadline=None)
@given(layout_pairs())
def test_plan_gives_every_rank_its_target_slice(pair: tuple[Layout, Layout]) -> None:
    source, target = pair
    full = np.arange(np.prod(source.shape)).reshape(source.shape)
    decisions = set()
    for rank in range(source.mesh.size):
        plan = plan_reshard(source, target, rank)
        held = [source.take(full, peer) for peer in source.mesh.mp_ranks(rank)]
        np.testing.assert_array_equal(assemble(plan, held), target.take(full, rank))
        if not plan.gather:
            assert [index for index, _ in plan.pieces] == [source.mesh.mp_index(rank)]
        decisions.add(plan.gather)
    assert len(decisions) == 1, "ranks would deadlock"


@settings(max_examples=100, deadline=None)
@given(layout_pairs())
def test_gathers_only_when_a_rank_lacks_something(pair: tuple[Layout, Layout]) -> None:
    """Independent criterion: mark what each rank holds, look whether its target is all marked."""
    source, target = pair
    complete = []
    for rank in range(source.mesh.size):
        held = np.zeros(source.shape, dtype=bool)
        held[source.slices(rank)] = True
        complete.append(bool(target.take(held, rank).all()))
    for rank in range(source.mesh.size):
        assert plan_reshard(source, target, rank).gather == (not all(complete))


@pytest.mark.parametrize(
    ("source", "target", "gather"),
    [
        (Mesh(2, 2), Mesh(1, 4), True),  # rank 1 holds half 1 but needs quarter 1, which is in half 0
        (Mesh(1, 4), Mesh(2, 2), True),
        (Mesh(4, 1), Mesh(1, 4), False),
        (Mesh(1, 4), Mesh(4, 1), True),
        (Mesh(2, 2), Mesh(2, 2), False),
    ],
    ids=str,
)
def test_known_decisions(source: Mesh, target: Mesh, gather: bool) -> None:
    for shape, axes in (((8, 4), ("mp", None)), ((4, 8), (None, "mp")), ((8,), ("mp",))):
        layout = Layout(source, shape, axes)  # type: ignore[arg-type]
        assert [plan_reshard(layout, layout.on(target), rank).gather for rank in range(4)] == [gather] * 4
    replicated = Layout(source, (8,), (None,))
    assert not plan_reshard(replicated, replicated.on(target), 1).gather


def test_known_plan() -> None:
    """dp1 mp4 -> dp2 mp2, columns: rank 3 has quarter 3 and needs the right half, quarters 2 and 3."""
    layout = Layout(Mesh(1, 4), (2, 8), (None, "mp"))
    plan = plan_reshard(layout, layout.on(Mesh(2, 2)), 3)
    assert plan == ReshardPlan(True, ((2, ((0, 2), (0, 2))), (3, ((0, 2), (0, 2)))), 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16])
def test_one_process(dtype: np.dtype) -> None:
    mesh = Mesh(1, 1)
    layouts = {"w": Layout(mesh, (4, 6), ("mp", None)), "b": Layout(mesh, (4,), (None,))}
    resharder = Resharder(layouts, layouts, 0, Groups(mesh, 0))
    tensor = ms.Tensor(np.arange(24).reshape(4, 6).astype(dtype))
    assert not resharder.needs_gather("w")
    assert resharder.reshard("w", tensor) is tensor


@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16])
@pytest.mark.parametrize("axes", [("mp", None), (None, "mp")])
def test_local_cut(dtype: np.dtype, axes: tuple[AxisName | None, ...]) -> None:
    """Whole copies -> slices needs no communication, so it runs here, as every rank in turn."""
    source, target = Layout(Mesh(4, 1), (8, 12), axes), Layout(Mesh(1, 4), (8, 12), axes)
    full = np.random.default_rng(0).standard_normal((8, 12)).astype(dtype)
    for rank in range(4):
        resharder = Resharder({"w": source}, {"w": target}, rank, Groups(source.mesh, rank))
        cut = resharder.reshard("w", ms.Tensor(full))
        assert cut.dtype == ms.Tensor(full).dtype
        assert cut.asnumpy().tobytes() == np.ascontiguousarray(target.take(full, rank)).tobytes()


def test_gathered_cell_assembles() -> None:
    """The graph after the gather, fed with what AllGather gives: all pieces joined along dimension 0.

    Groups without a communicator gather nothing.
    """
    rng = np.random.default_rng(0)
    for axes in (("mp", None), (None, "mp")):
        source: Layout = Layout(Mesh(1, 4), (8, 12), axes)  # type: ignore[arg-type]
        full = rng.standard_normal(source.shape).astype(np.float32)
        pieces = [source.take(full, rank) for rank in range(4)]
        for target in (source.on(Mesh(2, 2)), source.on(Mesh(4, 1)), Layout(Mesh(2, 2), (8, 12), axes[::-1])):  # type: ignore[arg-type]
            for rank in range(4):
                plan = plan_reshard(source, target, rank)
                assert plan.gather
                cell = _ReshardCell(plan, source.local_shape[0], Groups(source.mesh, rank))
                out = cell(ms.Tensor(np.concatenate(pieces)))
                np.testing.assert_array_equal(out.asnumpy(), target.take(full, rank))


def test_layers_share_a_graph() -> None:
    mesh, wide = Mesh(2, 1), Mesh(1, 2)
    source = {f"layer{n}": Layout(mesh, (4, 4), ("mp", None)) for n in range(5)}
    resharder = Resharder(source, {n: layout.on(wide) for n, layout in source.items()}, 0, Groups(mesh, 0))
    for name in source:
        resharder.reshard(name, ms.Tensor(np.zeros((4, 4), np.float32)))
    assert len(resharder._cells) == 1


class TestBadInput:
    def test_all_faults_together(self) -> None:
        mesh = Mesh(2, 1)
        source = {"a": Layout(mesh, (4,), (None,)), "b": Layout(mesh, (4,), (None,))}
        target = {
            "a": Layout(mesh, (6,), (None,)),
            "b": Layout(Mesh(4, 1), (4,), (None,)),
            "c": Layout(mesh, (4,), (None,)),
        }
        with pytest.raises(
            ValueError, match=r"3 parameter(.|\n)*a: .*\(6,\)(.|\n)*b: .*2 ranks(.|\n)*c: not"
        ):
            Resharder(source, target, 0, Groups(mesh, 0))

    def test_wrong_local_shape(self) -> None:
        layout = Layout(Mesh(1, 1), (4,), (None,))
        resharder = Resharder({"a": layout}, {"a": layout}, 0, Groups(Mesh(1, 1), 0))
        with pytest.raises(ValueError, match=r"a: expected the local source shard \(4,\), got \(5,\)"):
            resharder.reshard("a", ms.Tensor(np.zeros(5, np.float32)))

    def test_groups_of_another_mesh(self) -> None:
        layout = Layout(Mesh(2, 2), (4,), ("mp",))
        with pytest.raises(ValueError, match="on dp2 mp2, their groups on dp1 mp4"):
            Resharder({"a": layout}, {"a": layout}, 0, Groups(Mesh(1, 4), 0, "g"))
        with pytest.raises(ValueError, match="no model-parallel group"):
            Resharder({"a": layout}, {"a": layout}, 0, Groups(Mesh(2, 2), 0))
