"""Communication groups of a rank in a mesh."""

from __future__ import annotations

from dataclasses import dataclass

from mindrlhf.parallel.layout import Mesh


@dataclass(frozen=True)
class Groups:
    """The groups one rank communicates in; ``None`` where the rank would be alone.

    ``splits_rows``: activations between the products are split over the model-parallel group by rows
    (sequence parallelism, see :mod:`mindrlhf.parallel.collectives`).
    """

    mesh: Mesh
    rank: int
    mp_group: str | None = None
    dp_group: str | None = None
    splits_rows: bool = False

    @property
    def mp_index(self) -> int:
        """Which slice of every split tensor this rank holds."""
        return self.mesh.mp_index(self.rank)

    @property
    def dp_index(self) -> int:
        """Which data-parallel replica this rank belongs to."""
        return self.mesh.dp_index(self.rank)


def create_groups(mesh: Mesh, rank: int, *, splits_rows: bool = False) -> Groups:
    """Creates (or finds) the groups of ``rank`` in ``mesh``; every rank must call it in the same order.

    Group names spell out their ranks, so two models whose meshes agree on a group share one
    communicator. ``mindspore.communication.init`` must have run when the mesh has more than one rank.
    ``splits_rows`` has no effect on a rank that holds a whole model.
    """
    if mesh.size == 1:
        return Groups(mesh, rank)
    mp_group, dp_group = _group(mesh.mp_ranks(rank)), _group(mesh.dp_ranks(rank))
    return Groups(mesh, rank, mp_group, dp_group, splits_rows and mesh.mp > 1)


_created: set[str] = set()


def _group(ranks: list[int]) -> str | None:
    from mindspore.communication import GlobalComm, create_group, get_group_size

    if len(ranks) == 1:
        return None
    if len(ranks) == get_group_size():
        return str(GlobalComm.WORLD_COMM_GROUP)
    name = "ranks_" + "_".join(map(str, ranks))
    if name not in _created:
        create_group(name, ranks)
        _created.add(name)
    return name
