"""Plans of exchanges: every rank gets what it lacks, once, from somebody who has it, and nothing else."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindrlhf.parallel.exchange_plan import Box, ExchangePlan, plan_exchange
from mindrlhf.parallel.layout import Layout, Mesh

Layouts = dict[str, Layout]


@st.composite
def layout_pairs(draw: st.DrawFn) -> tuple[Layouts, Layouts]:
    """Up to 3 tensors of any dimensions over the same 1 to 8 ranks, each split along any dimension."""
    ranks = draw(st.integers(1, 8))
    divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
    meshes = [Mesh(ranks // mp, mp) for mp in (draw(st.sampled_from(divisors)) for _ in range(2))]
    sides: tuple[Layouts, Layouts] = ({}, {})
    for number in range(draw(st.integers(1, 3))):
        shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
        splits = [draw(st.none() | st.integers(0, len(shape) - 1)) for _ in meshes]
        for dim in range(len(shape)):
            shape[dim] *= math.lcm(*(m.mp for m, split in zip(meshes, splits, strict=True) if split == dim))
        for side, mesh, split in zip(sides, meshes, splits, strict=True):
            axes = tuple("mp" if dim == split else None for dim in range(len(shape)))
            side[f"w{number}"] = Layout(mesh, tuple(shape), axes)  # type: ignore[arg-type]
    return sides


def held(layout: Layout, rank: int) -> np.ndarray:
    """Which elements of the full tensor a rank has."""
    mask = np.zeros(layout.shape, bool)
    mask[layout.slices(rank)] = True
    return mask


def numbers(shape: tuple[int, ...], box: Box) -> np.ndarray:
    """Flat indices in the full tensor of the elements of a box, in row-major order."""
    flat = np.arange(math.prod(shape)).reshape(shape)
    return flat[tuple(slice(*part) for part in box)].ravel()


@settings(max_examples=300, deadline=None)
@given(layout_pairs(), st.integers(1, 20))
def test_every_rank_gets_what_it_lacks_once(pair: tuple[Layouts, Layouts], bucket: int) -> None:
    source, target = pair
    plan = plan_exchange(source, target, bucket_elements=bucket)
    ranks = next(iter(source.values())).mesh.size
    came = {
        (name, rank): np.zeros(math.prod(source[name].shape), int) for name in source for rank in range(ranks)
    }
    for transfer in plan.transfers:
        assert transfer.sender != transfer.receiver
        for contents in transfer.buckets:
            for cut in contents:
                elements = numbers(source[cut.name].shape, cut.box)[cut.first : cut.last]
                assert len(elements) == cut.last - cut.first > 0
                assert held(source[cut.name], transfer.sender).ravel()[elements].all()
                came[cut.name, transfer.receiver][elements] += 1
    for rank in range(ranks):
        lacking = 0
        for name, layout in source.items():
            missing = held(target[name], rank) & ~held(layout, rank)
            np.testing.assert_array_equal(came[name, rank], missing.ravel())
            lacking += int(missing.sum())
        assert plan.received(rank) == lacking, "more than the least that can be moved"


@settings(max_examples=200, deadline=None)
@given(layout_pairs(), st.integers(1, 20))
def test_buckets_are_full_bounded_and_come_in_time(pair: tuple[Layouts, Layouts], bucket: int) -> None:
    source, target = pair
    plan = plan_exchange(source, target, bucket_elements=bucket)
    assert len({(transfer.sender, transfer.receiver) for transfer in plan.transfers}) == len(plan.transfers)
    names = list(target)
    arrivals = [(names.index(name), *item) for name, items in plan.due.items() for item in items]
    assert len(arrivals) == plan.collectives
    senders = Counter(transfer.receiver for transfer in plan.transfers)
    limit = max(1, bucket // max(senders.values(), default=1))
    for at, transfer, index in arrivals:
        contents = transfer.buckets[index]
        # Its first cut is needed at once, all others then or later.
        assert names.index(contents[0].name) == at
        assert all(names.index(cut.name) >= at for cut in contents)
        ends = [cut.offset + cut.last - cut.first for cut in contents]
        assert [0, *ends[:-1]] == [cut.offset for cut in contents]
        assert transfer.size(index) == ends[-1] <= limit
    for transfer in plan.transfers:
        fewest = math.ceil(transfer.elements / limit)
        assert len(transfer.buckets) <= fewest
        mine = [index for _, other, index in arrivals if other is transfer]
        assert mine == sorted(mine), "a bucket would overtake another of its pair"


def layouts(mesh: Mesh, count: int = 1) -> Layouts:
    return {f"w{number}": Layout(mesh, (8, 3), ("mp", None)) for number in range(count)}


def pairs(plan: ExchangePlan) -> list[tuple[int, int]]:
    return [(transfer.sender, transfer.receiver) for transfer in plan.transfers]


def plan(source: Mesh, target: Mesh, count: int = 1, bucket: int = 1000) -> ExchangePlan:
    return plan_exchange(layouts(source, count), layouts(target, count), bucket_elements=bucket)


def test_halves_to_quarters() -> None:
    """Ranks 0 and 3 have their quarter; 1 and 2 lack theirs, which their own replicas' neighbours have."""
    found = plan(Mesh(2, 2), Mesh(1, 4))
    assert pairs(found) == [(0, 1), (3, 2)]
    assert [found.received(rank) for rank in range(4)] == [0, 6, 6, 0]
    first = found.transfers[0]
    assert [(cut.name, cut.box, cut.first, cut.last, cut.offset) for cut in first.buckets[0]] == [
        ("w0", ((2, 4), (0, 3)), 0, 6, 0)
    ]


def test_whole_tensors_are_cut_locally() -> None:
    assert pairs(plan(Mesh(4, 1), Mesh(1, 4))) == pairs(plan(Mesh(2, 2), Mesh(2, 2))) == []


def test_pairs_act_in_rounds_without_a_common_rank() -> None:
    found = pairs(plan(Mesh(1, 4), Mesh(4, 1)))
    assert found == [
        *((0, 1), (1, 0), (2, 3), (3, 2)),
        *((0, 2), (2, 0), (1, 3), (3, 1)),
        *((0, 3), (3, 0), (1, 2), (2, 1)),
    ]


def test_work_is_spread_over_the_replicas() -> None:
    """dp2 mp4 -> dp1 mp8: six ranks lack an eighth; its own replica alone would have a rank send two."""
    source = {"w": Layout(Mesh(2, 4), (8,), ("mp",))}
    target = {"w": Layout(Mesh(1, 8), (8,), ("mp",))}
    found = pairs(plan_exchange(source, target, bucket_elements=9))
    assert len(found) == 6
    assert max(Counter(sender for sender, _ in found).values()) == 1


def test_parameters_share_buckets() -> None:
    """Five tensors of 6 travelling elements: one bucket a pair, or three of ten."""
    assert plan(Mesh(2, 2), Mesh(1, 4), count=5).collectives == 2
    few = plan(Mesh(2, 2), Mesh(1, 4), count=5, bucket=13)
    assert [transfer.size(index) for transfer in few.transfers for index in range(3)] == [10] * 6
    assert {name: len(buckets) for name, buckets in few.due.items()} == {"w0": 2, "w1": 2, "w3": 2}


def test_a_rank_holds_no_more_of_all_senders_together() -> None:
    """Three senders share the limit of 12."""
    found = plan(Mesh(1, 4), Mesh(4, 1), count=4, bucket=12)
    assert {transfer.size(index) for transfer in found.transfers for index in range(6)} == {4}


def test_all_faults_together() -> None:
    mesh = Mesh(2, 1)
    source = {"a": Layout(mesh, (4,), (None,)), "b": Layout(mesh, (4,), (None,))}
    target = {
        "a": Layout(mesh, (6,), (None,)),
        "b": Layout(Mesh(4, 1), (4,), (None,)),
        "c": Layout(mesh, (4,), (None,)),
    }
    with pytest.raises(ValueError, match=r"3 fault(.|\n)*a: .*\(6,\)(.|\n)*b: .*2 ranks(.|\n)*c: not"):
        plan_exchange(source, target, bucket_elements=9)
