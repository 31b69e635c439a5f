"""Bytes of a weight sync: by hand, and against the buckets that the resharder moves."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mindrlhf.configs.keys import JobConfig
from mindrlhf.models.qwen2.layouts import parameter_layouts
from mindrlhf.parallel.layout import Layout, Mesh
from mindrlhf.parallel.reshard import Resharder
from mindrlhf.planning.traffic import SyncTraffic, plan_sync, sync_traffic

MakeJob = Callable[..., JobConfig]
MESHES = [Mesh(4, 1), Mesh(2, 2), Mesh(1, 4)]


def layout(mesh: Mesh, split: int | None = 0) -> dict[str, Layout]:
    axes = tuple("mp" if dim == split else None for dim in range(2))
    return {"w": Layout(mesh, (8, 3), axes)}  # type: ignore[arg-type]


def traffic(source: dict[str, Layout], target: dict[str, Layout]) -> SyncTraffic:
    return sync_traffic(source, target, number_bytes=2)


def test_whole_parameters_are_cut_locally() -> None:
    found = traffic(layout(Mesh(4, 1)), layout(Mesh(1, 4)))
    assert found.received == found.sent == found.needed == (0, 0, 0, 0)
    assert found.total == found.least == found.pairs == found.buckets == 0


def test_halves_to_quarters() -> None:
    found = traffic(layout(Mesh(2, 2)), layout(Mesh(1, 4)))
    # Ranks 0 and 3 have their quarter; 1 and 2 lack all 2 rows x 3 numbers of theirs.
    assert found.received == found.needed == (0, 12, 12, 0)
    assert sum(found.sent) == found.total == found.least == 24
    assert (found.pairs, found.buckets) == (2, 2)


def test_quarters_to_whole_and_parameters_that_are_not_split() -> None:
    found = traffic(layout(Mesh(1, 4)), layout(Mesh(4, 1)))
    # Each rank lacks three quarters of 24 numbers, and gives its own to the three others.
    assert found.received == found.sent == found.needed == (36,) * 4
    assert found.pairs == 12
    assert traffic(layout(Mesh(2, 2), None), layout(Mesh(1, 4), None)).total == 0


@pytest.mark.parametrize("source", MESHES, ids=str)
@pytest.mark.parametrize("target", MESHES, ids=str)
def test_the_resharder_moves_the_same(tiny_job: MakeJob, source: Mesh, target: Mesh) -> None:
    config = tiny_job().infer.model
    config = type(config)(**(vars(config) | {"n_kv_heads": 4}))
    held, wanted = parameter_layouts(config, source), parameter_layouts(config, target)
    found = traffic(held, wanted)
    for rank in range(4):
        plan = Resharder(held, wanted, rank, dtype="float16").plan
        assert found.received[rank] == 2 * plan.received(rank)
        assert found.needed[rank] == found.received[rank]


def test_7b_from_dp2_mp2_to_dp1_mp4(shipped_job: MakeJob) -> None:
    found = plan_sync(shipped_job("qwen2_7b"))
    # Every parameter is split but the 57 norms of 3584. Ranks 1 and 2 lack their whole quarter, in bfloat16.
    split = 7_615_616_512 - 57 * 3584
    assert found.received == found.needed == (0, 2 * split // 4, 2 * split // 4, 0)
