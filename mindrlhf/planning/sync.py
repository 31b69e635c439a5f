"""What a weight sync moves between ranks, from the layouts alone.

The rule is that of :mod:`mindrlhf.parallel.reshard`: a parameter whose target slice lies inside the rank's
own source slice on every rank is cut out locally; every other one is gathered in the source model-parallel
groups. It is stated again here because that module needs MindSpore; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from mindrlhf.parallel.layout import Layout


@dataclass(frozen=True)
class SyncTraffic:
    """Bytes of one sync from the trained to the generating policy.

    Attributes:
        received: by rank, what the gathers bring in; a rank's own piece is not counted.
        needed: by rank, what its target slices hold that its source slices do not: the least any way of
            moving them could bring in, in the type in which the generating policy stores them.
        gathered: names of the parameters that are gathered.
        largest: bytes of the largest gathered parameter, which a rank holds whole for a moment.
    """

    received: tuple[int, ...]
    needed: tuple[int, ...]
    gathered: tuple[str, ...]
    largest: int

    @property
    def total(self) -> int:
        """Received by all ranks together."""
        return sum(self.received)

    @property
    def least(self) -> int:
        """Needed by all ranks together."""
        return sum(self.needed)


def sync_traffic(
    source: Mapping[str, Layout],
    target: Mapping[str, Layout],
    *,
    source_bytes: int,
    target_bytes: int,
    through_world: bool,
) -> SyncTraffic:
    """Traffic from ``source`` to ``target`` layouts over the same ranks.

    Args:
        source, target: canonical name -> layout; ``source`` may name more.
        source_bytes, target_bytes: of a number as it travels, and as the target stores it.
        through_world: gathers run over all ranks instead of the source group (CPU, parallel/gather.py).
    """
    ranks = next(iter(target.values())).mesh.size
    received, needed = [0] * ranks, [0] * ranks
    gathered: list[str] = []
    largest = 0
    # Parameters of one pair of layouts, in different layers, cost the same.
    costs: dict[tuple[Layout, Layout], tuple[int, list[int]]] = {}
    for name, wanted in target.items():
        held = source[name]
        if (held, wanted) not in costs:
            missing = [prod(wanted.local_shape) - _overlap(held, wanted, rank) for rank in range(ranks)]
            partners = ranks if through_world and held.mesh.dp > 1 else held.mesh.mp
            moved = (partners - 1) * prod(held.local_shape) if any(missing) else 0
            costs[held, wanted] = moved, missing
        moved, missing = costs[held, wanted]
        for rank in range(ranks):
            received[rank] += moved * source_bytes
            needed[rank] += missing[rank] * target_bytes
        if moved:
            gathered.append(name)
            largest = max(largest, (moved + prod(held.local_shape)) * source_bytes)
    return SyncTraffic(tuple(received), tuple(needed), tuple(gathered), largest)


def _overlap(held: Layout, wanted: Layout, rank: int) -> int:
    """Elements that a rank's slices of both layouts have in common."""
    sides = (
        max(0, min(a.stop, b.stop) - max(a.start, b.start))
        for a, b in zip(held.slices(rank), wanted.slices(rank), strict=True)
    )
    return prod(sides)
