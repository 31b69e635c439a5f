"""The one statement of how a tensor is split over ranks.

Layer shapes, checkpoint slices, strategy files and train -> infer resharding all derive from
:class:`Layout`, so they cannot disagree. Nothing here needs MindSpore or a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mindrlhf.configs.keys import RunConfig
from mindrlhf.utils.sizes import exact_div

AxisName = Literal["mp"]


@dataclass(frozen=True)
class Mesh:
    """A (data parallel, model parallel) grid of ranks; ``rank = dp_index * mp + mp_index``.

    Ranks of one model-parallel group are neighbours, so tensor-parallel traffic stays inside a host
    (Megatron-LM, arXiv 1909.08053, section 5).
    """

    dp: int = 1
    mp: int = 1

    def __post_init__(self) -> None:
        if self.dp < 1 or self.mp < 1:
            raise ValueError(f"a mesh needs positive sizes, got dp={self.dp}, mp={self.mp}")

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.dp * self.mp

    def dp_index(self, rank: int) -> int:
        """Which data-parallel replica ``rank`` belongs to, 0 .. dp-1."""
        return self._checked(rank) // self.mp

    def mp_index(self, rank: int) -> int:
        """Which slice of every split tensor ``rank`` holds, 0 .. mp-1."""
        return self._checked(rank) % self.mp

    def mp_ranks(self, rank: int) -> list[int]:
        """Ranks that together hold one whole model with ``rank``, in slice order."""
        first = self.dp_index(rank) * self.mp
        return list(range(first, first + self.mp))

    def dp_ranks(self, rank: int) -> list[int]:
        """Ranks that hold the same slices as ``rank``, in replica order."""
        return list(range(self.mp_index(rank), self.size, self.mp))

    def _checked(self, rank: int) -> int:
        if not 0 <= rank < self.size:
            raise ValueError(f"rank {rank} is outside a mesh of dp={self.dp} x mp={self.mp} ranks")
        return rank

    def __str__(self) -> str:
        return f"dp{self.dp} mp{self.mp}"


@dataclass(frozen=True)
class Layout:
    """A full tensor shape and, per dimension, the mesh axis that splits it (``None``: not split).

    Args:
        mesh: the grid of ranks.
        shape: full shape.
        axes: one entry per dimension; at most one may be ``"mp"``.
    """

    mesh: Mesh
    shape: tuple[int, ...]
    axes: tuple[AxisName | None, ...]

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.shape):
            raise ValueError(f"layout has {len(self.axes)} axes for a tensor of shape {self.shape}")
        if sum(axis is not None for axis in self.axes) > 1:
            raise ValueError(f"the mp axis can split one dimension only, got {self.axes}")
        self.local_shape  # noqa: B018  a size that does not divide must fail here, not at first use

    @property
    def split_dim(self) -> int | None:
        """The dimension that is split, ``None`` when every rank holds the whole tensor."""
        return next((dim for dim, axis in enumerate(self.axes) if axis is not None), None)

    @property
    def is_split(self) -> bool:
        """Whether a rank holds less than the whole tensor."""
        return self.split_dim is not None and self.mesh.mp > 1

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of what one rank holds."""
        return tuple(
            size
            if axis is None
            else exact_div(size, self.mesh.mp, f"dimension {dim} of shape {self.shape} by mp")
            for dim, (size, axis) in enumerate(zip(self.shape, self.axes, strict=True))
        )

    def slices(self, rank: int) -> tuple[slice, ...]:
        """Where the part of ``rank`` lies in the full tensor."""
        index = self.mesh.mp_index(rank)
        return tuple(
            slice(0, size) if axis is None else slice(index * part, (index + 1) * part)
            for size, axis, part in zip(self.shape, self.axes, self.local_shape, strict=True)
        )

    def take(self, full: np.ndarray, rank: int) -> np.ndarray:
        """The part of ``full`` (shape ``self.shape``) that ``rank`` holds, as a view."""
        if full.shape != self.shape:
            raise ValueError(f"expected a full tensor of shape {self.shape}, got {full.shape}")
        return full[self.slices(rank)]

    def on(self, mesh: Mesh) -> Layout:
        """The same tensor, split along the same dimension over another mesh."""
        return Layout(mesh, self.shape, self.axes)


def mesh_of(config: RunConfig) -> Mesh:
    """The mesh that a YAML asks for."""
    return Mesh(config.parallel.data_parallel, config.parallel.model_parallel)
