"""Bytes of a weight sync: by hand, and against what the resharder does."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import pytest

from mindrlhf.configs.schema import JobConfig
from mindrlhf.parallel.layout import Layout, Mesh
from mindrlhf.parallel.parameters import parameter_layouts
from mindrlhf.planning.memory import plan_sync
from mindrlhf.planning.sync import sync_traffic

MakeJob = Callable[..., JobConfig]
MESHES = [Mesh(4, 1), Mesh(2, 2), Mesh(1, 4)]


def layout(mesh: Mesh, split: int | None = 0) -> dict[str, Layout]:
    axes = tuple("mp" if dim == split else None for dim in range(2))
    return {"w": Layout(mesh, (8, 3), axes)}  # type: ignore[arg-type]


def traffic(source: dict[str, Layout], target: dict[str, Layout], *, through_world: bool = False):  # type: ignore[no-untyped-def]
    return sync_traffic(source, target, source_bytes=4, target_bytes=2, through_world=through_world)


def test_whole_parameters_are_cut_locally() -> None:
    found = traffic(layout(Mesh(4, 1)), layout(Mesh(1, 4)))
    assert found.received == found.needed == (0, 0, 0, 0)
    assert found.gathered == ()
    assert found.total == found.least == found.largest == 0


def test_halves_to_quarters() -> None:
    found = traffic(layout(Mesh(2, 2)), layout(Mesh(1, 4)))
    # Each rank gathers the other half of its pair: 4 rows x 3 float32.
    assert found.received == (48, 48, 48, 48)
    # Ranks 0 and 3 have their quarter; 1 and 2 lack all 2 rows x 3 of theirs, stored in 2 bytes.
    assert found.needed == (0, 12, 12, 0)
    assert (found.total, found.least) == (192, 24)
    assert found.largest == 96
    assert found.gathered == ("w",)


def test_on_cpu_the_whole_world_gathers() -> None:
    found = traffic(layout(Mesh(2, 2)), layout(Mesh(1, 4)), through_world=True)
    assert found.received == (3 * 48,) * 4
    # Without replicas the world is the group.
    assert traffic(layout(Mesh(1, 4)), layout(Mesh(4, 1)), through_world=True).received == (3 * 24,) * 4


def test_quarters_to_whole_and_parameters_that_are_not_split() -> None:
    found = traffic(layout(Mesh(1, 4)), layout(Mesh(4, 1)))
    assert found.received == (72,) * 4
    assert found.needed == (36,) * 4
    assert traffic(layout(Mesh(2, 2), None), layout(Mesh(1, 4), None)).total == 0


@pytest.mark.parametrize("source", MESHES, ids=str)
@pytest.mark.parametrize("target", MESHES, ids=str)
def test_the_resharder_gathers_the_same(tiny_job: MakeJob, source: Mesh, target: Mesh) -> None:
    # Needs MindSpore, which other unit tests of the suite import too.
    from mindrlhf.parallel.reshard import plan_reshard

    config = tiny_job().infer.model
    config = type(config)(**(vars(config) | {"n_kv_heads": 4}))
    held, wanted = parameter_layouts(config, source), parameter_layouts(config, target)
    found = traffic(held, wanted)
    for rank in range(4):
        plans = {name: plan_reshard(held[name], wanted[name], rank) for name in wanted}
        gathered = [name for name, plan in plans.items() if plan.gather]
        assert sorted(gathered) == sorted(found.gathered)
        moved = sum((source.mp - 1) * 4 * prod(held[name].local_shape) for name in gathered)
        assert found.received[rank] == moved
        # Pieces that come from other ranks are what was needed.
        missing = sum(
            2 * prod(stop - start for start, stop in box)
            for plan in plans.values()
            for index, box in plan.pieces
            if plan.gather and index != source.mp_index(rank)
        )
        assert found.needed[rank] == missing


def test_7b_from_dp2_mp2_to_dp1_mp4(shipped_job: MakeJob) -> None:
    found = plan_sync(shipped_job("qwen2_7b"))
    # Every split parameter (7,615,616,512 numbers less 57 norms of 3584) comes as its other half, in float32.
    split = 7_615_616_512 - 57 * 3584
    assert found.received == (4 * split // 2,) * 4
    # Two ranks lack their whole quarter in bfloat16.
    assert found.needed == (0, 2 * split // 4, 2 * split // 4, 0)
