"""Which rank sends what to which rank when weights change their layout, worked out from layouts alone.

The slice that a rank is to have is cut up by the slices of the source layout. What the rank already holds
stays; every other piece comes from ONE of the ranks that hold it. So a rank receives exactly what it lacks,
and no scheme can move less. HybridFlow (arXiv 2409.19256, section 5) moves weights between training and
generation by gathers in a grouping of ranks chosen for that; pairs need no such grouping.

All pieces from one sender to one receiver make up a stream, in the order of the parameters, cut into buckets.
All ranks walk the buckets of all pairs in one order, and each takes part in its own, so no two ranks
can wait for each other. Nothing here needs MindSpore.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod

from mindrlhf.parallel.layout import Layout, Mesh

Box = tuple[tuple[int, int], ...]
"""First and last-plus-one index per dimension."""

Pieces = dict[tuple[int, int], list[tuple[str, Box]]]
"""(sender, receiver) -> (parameter, box in the full tensor), in the order of the parameters."""


@dataclass(frozen=True)
class Cut:
    """What a bucket holds of one piece.

    Attributes:
        name: parameter.
        box: the piece, in the full tensor.
        first, last: which of its elements in row-major order, ``last`` excluded.
        offset: where they begin in the bucket.
    """

    name: str
    box: Box
    first: int
    last: int
    offset: int


@dataclass(frozen=True)
class Transfer:
    """Everything that one rank sends to another.

    Attributes:
        sender, receiver: ranks.
        buckets: what is in them, one cut after another.
    """

    sender: int
    receiver: int
    buckets: tuple[tuple[Cut, ...], ...]

    def size(self, index: int) -> int:
        """Elements of a bucket."""
        last = self.buckets[index][-1]
        return last.offset + last.last - last.first

    @property
    def elements(self) -> int:
        """Elements of all buckets."""
        return sum(self.size(index) for index in range(len(self.buckets)))


@dataclass(frozen=True)
class ExchangePlan:
    """What all ranks do.

    Attributes:
        transfers: pairs of ranks in the order in which they act: those that can act at the same time, because
            they have no rank in common, are adjacent.
        due: parameter -> (transfer, number of the bucket), the buckets that must have arrived before the
            parameter can be assembled, in the order in which all ranks walk them.
    """

    transfers: tuple[Transfer, ...]
    due: Mapping[str, tuple[tuple[Transfer, int], ...]]

    def received(self, rank: int) -> int:
        """Elements that ``rank`` receives."""
        return sum(transfer.elements for transfer in self.transfers if transfer.receiver == rank)

    @property
    def collectives(self) -> int:
        """Buckets of all pairs."""
        return sum(len(transfer.buckets) for transfer in self.transfers)


def plan_exchange(
    source: Mapping[str, Layout], target: Mapping[str, Layout], *, bucket_elements: int
) -> ExchangePlan:
    """The plan for all ranks; equal on each of them.

    Args:
        source: canonical name -> layout of what the ranks have.
        target: canonical name -> layout of what they are to have, in the order in which parameters are
            assembled; names that only ``source`` has are ignored.
        bucket_elements: a rank holds about one bucket of each of its senders at a time; all these together
            have no more elements than this.

    Raises:
        ValueError: a target parameter has no source, or shapes or numbers of ranks differ; all named.
    """
    _check(source, target)
    pieces = _pieces(source, target)
    senders = Counter(receiver for _, receiver in pieces)
    limit = max(1, bucket_elements // max(senders.values(), default=1))
    transfers = tuple(_transfer(*pair, pieces[pair], limit) for pair in sorted(pieces, key=_round_order))
    due: dict[str, list[tuple[Transfer, int]]] = defaultdict(list)
    for transfer in transfers:
        for index, bucket in enumerate(transfer.buckets):
            due[bucket[0].name].append((transfer, index))
    return ExchangePlan(transfers, {name: tuple(due[name]) for name in target if name in due})


def box_of(layout: Layout, rank: int) -> Box:
    """Where the slice of ``rank`` lies in the full tensor."""
    return tuple((part.start, part.stop) for part in layout.slices(rank))


def overlap(a: Box, b: Box) -> Box | None:
    """What two boxes have in common."""
    common = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None


def inside(box: Box, origin: Box) -> tuple[slice, ...]:
    """The index of ``box`` in an array that holds ``origin``; both are boxes of the full tensor."""
    return tuple(
        slice(start - begin, stop - begin) for (start, stop), (begin, _) in zip(box, origin, strict=True)
    )


def _size(box: Box) -> int:
    return prod(stop - start for start, stop in box)


def _check(source: Mapping[str, Layout], target: Mapping[str, Layout]) -> None:
    faults: list[str] = []
    for name, wanted in target.items():
        if name not in source:
            faults.append(f"{name}: not among the source parameters")
            continue
        held = source[name]
        if held.shape != wanted.shape:
            faults.append(f"{name}: cannot reshard shape {held.shape} to shape {wanted.shape}")
        if held.mesh.size != wanted.mesh.size:
            faults.append(
                f"{name}: cannot reshard from {held.mesh} to {wanted.mesh}: "
                f"{held.mesh.size} ranks against {wanted.mesh.size}"
            )
    if faults:
        raise ValueError(f"cannot reshard, {len(faults)} fault(s):\n  " + "\n  ".join(faults))


@cache
def _missing_pieces(held: Layout, wanted: Layout) -> tuple[tuple[int, int, Box], ...]:
    """(rank, index of a source slice, piece of it) of all that ranks need and do not hold.

    Layers have equal layouts, so most answers come from the cache.
    """
    if not held.is_split:
        return ()
    result = []
    for rank in range(held.mesh.size):
        for index in range(held.mesh.mp):
            # The rank of this number has the slice of this number: it is in the first replica.
            piece = overlap(box_of(held, index), box_of(wanted, rank))
            if piece is not None and index != held.mesh.mp_index(rank):
                result.append((rank, index, piece))
    return tuple(result)


def _pieces(source: Mapping[str, Layout], target: Mapping[str, Layout]) -> Pieces:
    """Who sends which pieces to whom."""
    # One sender for all that a receiver needs of one source slice, so that there are few pairs.
    demands: dict[tuple[int, Mesh, int], list[tuple[str, Box]]] = defaultdict(list)
    for name, wanted in target.items():
        for rank, index, piece in _missing_pieces(source[name], wanted):
            demands[rank, source[name].mesh, index].append((name, piece))
    sent: Counter[int] = Counter()
    result: Pieces = defaultdict(list)
    for (rank, mesh, index), pieces in sorted(demands.items(), key=lambda item: (item[0][0], item[0][2])):
        sender = _sender(mesh, index, rank, sent)
        sent[sender] += sum(_size(piece) for _, piece in pieces)
        result[sender, rank] += pieces
    return result


def _sender(mesh: Mesh, index: int, receiver: int, sent: Counter[int]) -> int:
    """The holder of a slice that has sent least; of equals, the one in the receiver's own replica.

    Ranks of one replica are neighbours (see :class:`Mesh`).
    """
    holders = mesh.dp_ranks(index)
    own = mesh.dp_index(receiver)
    return min(holders, key=lambda holder: (sent[holder], mesh.dp_index(holder) != own, holder))


def _round_order(pair: tuple[int, int]) -> tuple[int, int, int]:
    """Order of the pairs: in each round, one value of the exclusive or, every rank has one partner."""
    return pair[0] ^ pair[1], min(pair), pair[0]


def _transfer(sender: int, receiver: int, pieces: list[tuple[str, Box]], limit: int) -> Transfer:
    """Cuts the stream of ``pieces`` into buckets of nearly equal size, at most ``limit`` elements."""
    total = sum(_size(box) for _, box in pieces)
    size = -(-total // -(-total // limit))
    buckets: list[list[Cut]] = [[] for _ in range(-(-total // size))]
    at = 0
    for name, box in pieces:
        first = 0
        while first < _size(box):
            index, offset = divmod(at, size)
            count = min(size - offset, _size(box) - first)
            buckets[index].append(Cut(name, box, first, first + count, offset))
            first += count
            at += count
    return Transfer(sender, receiver, tuple(map(tuple, buckets)))
