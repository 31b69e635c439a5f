"""In-memory resharding: from the slices of one layout to those of another over the same ranks.

What every rank needs is a :class:`ReshardPlan`, worked out from layouts alone; the plan of a rank says
which pieces of its source model-parallel group make up its target slice. A parameter whose target slice
lies inside the local piece on every rank is cut out locally; every other one is gathered in the
source model-parallel groups first. HybridFlow (arXiv 2409.19256, section 5) does the same between training
and generation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common.np_dtype import bfloat16 as np_bfloat16

from mindrlhf.parallel.gather import GroupAllGather
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Layout, Mesh

Box = tuple[tuple[int, int], ...]
"""First and last-plus-one index per dimension; unlike slices it can be a dictionary key."""


@dataclass(frozen=True)
class ReshardPlan:
    """How one rank makes its target slice of one parameter.

    Args:
        gather: whether the source model-parallel groups gather their pieces first; equal on all ranks.
        pieces: (index of the piece in the group, box in it) in order; without ``gather`` the one
            piece is the rank's own.
        concat_dim: the dimension along which the cut pieces are joined.
    """

    gather: bool
    pieces: tuple[tuple[int, Box], ...]
    concat_dim: int


def plan_reshard(source: Layout, target: Layout, rank: int) -> ReshardPlan:
    """Which cuts of which source pieces make up the target slice of ``rank``.

    Raises:
        ValueError: the layouts differ in full shape or in the number of ranks.
    """
    if source.shape != target.shape:
        raise ValueError(f"cannot reshard shape {source.shape} to shape {target.shape}")
    if source.mesh.size != target.mesh.size:
        raise ValueError(
            f"cannot reshard from {source.mesh} to {target.mesh}: "
            f"{source.mesh.size} ranks against {target.mesh.size}"
        )
    # All ranks must decide alike, or some would wait in a collective for the others.
    gather = source.is_split and not all(
        _overlap(_box(source, peer), _box(target, peer)) == _box(target, peer)
        for peer in range(source.mesh.size)
    )
    pieces = []
    for peer in source.mesh.mp_ranks(rank) if gather else [rank]:
        origin = _box(source, peer)
        wanted = _overlap(origin, _box(target, rank))
        if wanted is not None:
            pieces.append((source.mesh.mp_index(peer), _shifted(wanted, [-start for start, _ in origin])))
    return ReshardPlan(gather, tuple(pieces), source.split_dim or 0)


def assemble(plan: ReshardPlan, pieces: Sequence[np.ndarray]) -> np.ndarray:
    """Applies a plan to the pieces of the source group in NumPy: what a rank's device computes.

    Args:
        plan: the rank's plan.
        pieces: the local arrays of its source model-parallel group, in slice order.
    """
    cuts = [pieces[index][tuple(slice(*part) for part in box)] for index, box in plan.pieces]
    return np.concatenate(cuts, axis=plan.concat_dim)


class Resharder:
    """Turns this rank's source shards into its target shards.

    :meth:`reshard` is collective for parameters with :meth:`needs_gather`: all ranks must call it for
    the same names in the same order (see :class:`~mindrlhf.parallel.gather.GroupAllGather`). On CPU,
    AllGather knows float32, float16 and int32 only, so bfloat16 travels as its bits under the name
    float16 (bit-exact, tested for all 65,536 patterns); on other devices it travels as itself.

    Args:
        source: canonical name -> layout of what the rank has.
        target: canonical name -> layout of what it shall have; names that ``source`` lacks are refused,
            names that only ``source`` has are ignored.
        rank: this rank.
        source_groups: its groups in the source mesh.

    Raises:
        ValueError: a target parameter has no source, or shapes or numbers of ranks differ; all named.
    """

    def __init__(
        self,
        source: Mapping[str, Layout],
        target: Mapping[str, Layout],
        rank: int,
        source_groups: Groups,
    ) -> None:
        _check_group(source, source_groups)
        self._plans = _plans(source, target, rank)
        self._source = source
        self._groups = source_groups
        # Parameters of one shape and plan, in different layers, share one compiled graph.
        self._cells: dict[tuple[ReshardPlan, tuple[int, ...]], _ReshardCell] = {}

    def needs_gather(self, name: str) -> bool:
        """Whether parameter ``name`` is gathered in the source model-parallel group."""
        return self._plans[name].gather

    def reshard(self, name: str, local: Tensor) -> Tensor:
        """This rank's target shard of ``name``; ``local`` itself when nothing changes.

        Args:
            name: canonical parameter name.
            local: this rank's source shard, shape ``source[name].local_shape``.

        Raises:
            KeyError: the target layouts do not name the parameter.
            ValueError: ``local`` has another shape than the source layout says.
        """
        plan = self._plans[name]
        shape = self._source[name].local_shape
        if tuple(local.shape) != shape:
            raise ValueError(f"{name}: expected the local source shard {shape}, got {tuple(local.shape)}")
        if not plan.gather and plan.pieces[0][1] == tuple((0, size) for size in shape):
            return local
        key = (plan, shape)
        if key not in self._cells:
            self._cells[key] = _ReshardCell(plan, shape[0], self._groups)
        cell = self._cells[key]
        if local.dtype == ms.bfloat16 and ms.get_context("device_target") == "CPU":
            bits = Tensor(local.asnumpy().view(np.float16))
            return Tensor(cell(bits).asnumpy().view(np_bfloat16))
        return cell(local)


class _ReshardCell(nn.Cell):
    """The compiled form of :func:`assemble`, with the gather in front.

    Args:
        plan: what to cut out and join.
        rows: first size of the local source shard.
        groups: the rank's groups in the source mesh.
    """

    def __init__(self, plan: ReshardPlan, rows: int, groups: Groups) -> None:
        super().__init__()
        self.gather = GroupAllGather(groups) if plan.gather else None
        # The gather joins along dimension 0 whatever the split: piece i is rows i*rows .. (i+1)*rows.
        boxes = [
            _shifted(box, [index * rows if plan.gather else 0] + [0] * (len(box) - 1))
            for index, box in plan.pieces
        ]
        self.cuts = tuple(
            (tuple(start for start, _ in box), tuple(stop - start for start, stop in box)) for box in boxes
        )
        self.slice = ops.Slice()
        self.concat = ops.Concat(plan.concat_dim) if len(boxes) > 1 else None

    def construct(self, x: Tensor) -> Tensor:
        """``x`` of the source's local shape -> the target's local shape."""
        if self.gather is not None:
            x = self.gather(x)
        if self.concat is None:
            return self.slice(x, self.cuts[0][0], self.cuts[0][1])
        return self.concat([self.slice(x, begin, size) for begin, size in self.cuts])


def _plans(source: Mapping[str, Layout], target: Mapping[str, Layout], rank: int) -> dict[str, ReshardPlan]:
    plans: dict[str, ReshardPlan] = {}
    faults: list[str] = []
    for name, layout in target.items():
        if name not in source:
            faults.append(f"{name}: not among the source parameters")
            continue
        try:
            plans[name] = plan_reshard(source[name], layout, rank)
        except ValueError as fault:
            faults.append(f"{name}: {fault}")
    if faults:
        raise ValueError(f"cannot reshard {len(faults)} parameter(s):\n  " + "\n  ".join(faults))
    return plans


def _check_group(source: Mapping[str, Layout], groups: Groups) -> None:
    meshes: set[Mesh] = {layout.mesh for layout in source.values()}
    if meshes - {groups.mesh}:
        raise ValueError(
            f"source layouts are on {', '.join(sorted(map(str, meshes)))}, their groups on {groups.mesh}"
        )
    if groups.mesh.mp > 1 and groups.mp_group is None:
        raise ValueError(f"source groups of {groups.mesh} have no model-parallel group; see create_groups")


def _box(layout: Layout, rank: int) -> Box:
    return tuple((part.start, part.stop) for part in layout.slices(rank))


def _overlap(a: Box, b: Box) -> Box | None:
    """Where two boxes overlap, ``None`` when they do not."""
    both = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return both if all(start < stop for start, stop in both) else None


def _shifted(box: Box, by: Sequence[int]) -> Box:
    return tuple((start + step, stop + step) for (start, stop), step in zip(box, by, strict=True))
