"""What a weight sync moves between ranks, from the plan that it follows (parallel/exchange_plan.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from mindrlhf.parallel.exchange_plan import plan_exchange
from mindrlhf.parallel.layout import Layout
from mindrlhf.parallel.reshard import BUCKET_BYTES


@dataclass(frozen=True)
class SyncTraffic:
    """Bytes of one sync from the trained to the generating policy, in the type in which that one stores them.

    Attributes:
        received: by rank, what comes from other ranks.
        sent: by rank, what goes to other ranks.
        needed: by rank, what its target slices hold that its source slices do not: the least that any way of
            moving weights could bring.
        pairs: of ranks that talk to each other, one way.
        buckets: messages of all pairs.
    """

    received: tuple[int, ...]
    sent: tuple[int, ...]
    needed: tuple[int, ...]
    pairs: int
    buckets: int

    @property
    def total(self) -> int:
        """Received by all ranks together."""
        return sum(self.received)

    @property
    def least(self) -> int:
        """Needed by all ranks together."""
        return sum(self.needed)


def sync_traffic(
    source: Mapping[str, Layout], target: Mapping[str, Layout], *, number_bytes: int
) -> SyncTraffic:
    """Traffic from ``source`` to ``target`` layouts over the same ranks.

    Args:
        source, target: canonical name -> layout; ``source`` may name more.
        number_bytes: of a number as the target stores it; it is cast before it travels.
    """
    ranks = range(next(iter(target.values())).mesh.size)
    plan = plan_exchange(source, target, bucket_elements=BUCKET_BYTES // number_bytes)
    sent = [
        sum(transfer.elements for transfer in plan.transfers if transfer.sender == rank) for rank in ranks
    ]
    needed = [sum(_missing(source[name], wanted, rank) for name, wanted in target.items()) for rank in ranks]
    return SyncTraffic(
        received=tuple(plan.received(rank) * number_bytes for rank in ranks),
        sent=tuple(count * number_bytes for count in sent),
        needed=tuple(count * number_bytes for count in needed),
        pairs=len(plan.transfers),
        buckets=plan.collectives,
    )


def _missing(held: Layout, wanted: Layout, rank: int) -> int:
    """Elements of a rank's target slice that its source slice has not."""
    sides = (
        max(0, min(a.stop, b.stop) - max(a.start, b.start))
        for a, b in zip(held.slices(rank), wanted.slices(rank), strict=True)
    )
    return prod(wanted.local_shape) - prod(sides)
