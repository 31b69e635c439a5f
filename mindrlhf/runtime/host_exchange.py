"""Small exchanges between the hosts of all workers, outside of any graph of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from mindspore import Tensor, nn, ops

from mindrlhf.parallel.layout import Mesh
from mindrlhf.runtime.device import Runtime
from mindrlhf.utils.errors import CheckpointError, MindRLHFError


class _GatherRows(nn.Cell):
    """AllGather over all workers, stacked on dimension 0."""

    def __init__(self) -> None:
        super().__init__()
        self.all_gather = ops.AllGather()

    def construct(self, x: Tensor) -> Tensor:
        """``x`` (rows, columns) -> (world * rows, columns)."""
        return self.all_gather(x)


class HostExchange:
    """Gathers rows that data-parallel replicas have made, so that every rank holds the same global batch.

    All arrays of a call travel bit for bit in one int32 AllGather, and every rank keeps the copy of the same
    source rank: replicas cannot drift apart through rounding.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._gather = _GatherRows() if runtime.world_size > 1 else None

    def gather_rows(self, arrays: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, np.ndarray]:
        """This rank's rows -> the rows of all replicas of ``mesh``, in replica order.

        Args:
            arrays: name -> (b, ...) float32 or int32, b equal for all; equal within a model-parallel group.
            mesh: the mesh of the model that made them.

        Returns:
            name -> (b * dp, ...), the same types, bit-equal on every rank.
        """
        if self._gather is None:
            return dict(arrays)
        packed = np.concatenate([_as_int32_rows(name, array) for name, array in arrays.items()], axis=1)
        everyone = self._gather(Tensor(packed)).asnumpy().reshape(self.runtime.world_size, *packed.shape)
        chosen = everyone[:: mesh.mp].reshape(-1, packed.shape[1])
        result: dict[str, np.ndarray] = {}
        column = 0
        for name, array in arrays.items():
            width = array[0].size
            part = np.ascontiguousarray(chosen[:, column : column + width])
            result[name] = part.view(array.dtype).reshape(chosen.shape[0], *array.shape[1:])
            column += width
        return result

    def every_rank(self, array: np.ndarray) -> np.ndarray:
        """One (k,) int32 or float32 array per rank -> (world, k), in rank order."""
        return self.gather_rows({"x": array[None]}, Mesh(dp=self.runtime.world_size))["x"]

    def sum(self, array: np.ndarray, mesh: Mesh) -> np.ndarray:
        """The sum of one float32 array over the replicas of ``mesh``, equal on every rank."""
        return self.gather_rows({"x": array[None]}, mesh)["x"].sum(axis=0)

    def barrier(self) -> None:
        """Returns when every worker has called it."""
        if self._gather is not None:
            self.every_rank(np.zeros(1, np.int32))


@contextmanager
def together(exchange: HostExchange, task: str) -> Iterator[None]:
    """Raises on every rank when the block fails on one of them, so that none waits for it; collective.

    Args:
        exchange: between the ranks.
        task: what the block does, as in "cannot {task}".

    Raises:
        MindRLHFError: the block's own; of its OSError, and on the ranks where it succeeded, a new one.
    """
    fault: MindRLHFError | OSError | None = None
    try:
        yield
    except (MindRLHFError, OSError) as error:
        fault = error
    failed = np.flatnonzero(exchange.every_rank(np.array([fault is not None], np.int32)))
    if isinstance(fault, OSError):
        remedy = "make it writable, or free space"
        raise CheckpointError(f"cannot {task}: {fault.strerror or fault}; {remedy}") from fault
    if fault is not None:
        raise fault
    if len(failed):
        raise CheckpointError(f"rank {failed[0]} cannot {task}; its log says why")


def _as_int32_rows(name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype not in (np.float32, np.int32):
        raise TypeError(f"{name}: only float32 and int32 rows can be gathered, got {array.dtype}")
    return np.ascontiguousarray(array).view(np.int32).reshape(len(array), -1)


def local_rows(count: int, mesh: Mesh, rank: int) -> slice:
    """The rows, of ``count`` global ones, that the replica of ``rank`` works on."""
    part = count // mesh.dp
    first = mesh.dp_index(rank) * part
    return slice(first, first + part)
