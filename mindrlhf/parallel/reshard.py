"""In-memory resharding: from the slices of one layout to those of another over the same ranks.

:mod:`mindrlhf.parallel.exchange_plan` says which rank sends what to whom; here buckets are packed from the
slices, and target slices assembled from buckets, one parameter after another. Both are done on the host:
the generating model takes its weights from there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from mindrlhf.parallel.exchange_plan import Cut, Transfer, box_of, inside, overlap, plan_exchange
from mindrlhf.parallel.layout import Layout

if TYPE_CHECKING:
    from mindspore import Tensor

BUCKET_BYTES = 64 << 20
"""Approximate bytes of received buckets on a rank at a time: few enough collectives, little memory."""


class Transport(Protocol):
    """Moves arrays between ranks, bit for bit, in the order in which they are sent."""

    def send(self, array: np.ndarray, receiver: int) -> None:
        """Sends ``array`` (n,), which must not be modified afterwards, to the rank ``receiver``."""

    def receive(self, array: np.ndarray, sender: int) -> np.ndarray:
        """What the rank ``sender`` sends, in the shape and type of ``array``, which may be written over."""


class DeviceTransport:
    """Send and Receive in the group of all ranks (HCCL on Ascend, MCCL on CPU).

    No groups of two: every group of HCCL takes memory for itself, and CPU has Broadcast for the group of all
    ranks only. Called one by one, these compile nothing. Only bytes travel, so that every type of number can.
    """

    def send(self, array: np.ndarray, receiver: int) -> None:
        """See :class:`Transport`."""
        from mindspore import Tensor
        from mindspore.communication import GlobalComm
        from mindspore.ops.auto_generate.gen_ops_prim import dist_comm_isend_op

        # What mint.distributed.send does, but for its check of ranks, which calls the group of all ranks by
        # the name it had when mint was imported: HCCL's, on every device.
        bits = Tensor.from_numpy(array.view(np.int8))
        sent = dist_comm_isend_op(bits, receiver, GlobalComm.WORLD_COMM_GROUP, 0)
        if isinstance(sent, tuple):
            sent[1].wait()

    def receive(self, array: np.ndarray, sender: int) -> np.ndarray:
        """See :class:`Transport`."""
        from mindspore import Tensor
        from mindspore.mint import distributed

        received = Tensor.from_numpy(array.view(np.int8))
        distributed.recv(received, sender)
        result: np.ndarray = received.asnumpy().view(array.dtype)
        return result


class Resharder:
    """Turns this rank's source shards into its target shards; bit for bit where the type does not change.

    Every rank receives exactly what it lacks. Beside its shards it holds one packed bucket, the received ones
    (about ``bucket_bytes``) and the parameter that is being assembled; off the CPU, also host copies of
    the parameters that these buckets belong to. It never holds more of the model.

    Args:
        source: canonical name -> layout of what the ranks have.
        target: canonical name -> layout of what they are to have; names that ``source`` lacks are refused,
            names that only ``source`` has are ignored.
        rank: this rank.
        dtype: of the target; numbers are cast to it before they travel.
        bucket_bytes: see :func:`plan_exchange`; of ``dtype``.
        transport: how buckets travel.

    Raises:
        ValueError: a target parameter has no source, or shapes or numbers of ranks differ; all named.
    """

    def __init__(
        self,
        source: Mapping[str, Layout],
        target: Mapping[str, Layout],
        rank: int,
        *,
        dtype: npt.DTypeLike = np.float32,
        bucket_bytes: int = BUCKET_BYTES,
        transport: Transport | None = None,
    ) -> None:
        self.dtype = np.dtype(dtype)
        self.plan = plan_exchange(source, target, bucket_elements=bucket_bytes // self.dtype.itemsize)
        self.rank = rank
        self._source, self._target = dict(source), dict(target)
        self._transport = transport or DeviceTransport()
        self._arriving: dict[str, list[tuple[Transfer, int, Cut]]] = defaultdict(list)
        for transfer in self.plan.transfers:
            if rank == transfer.receiver:
                for index, bucket in enumerate(transfer.buckets):
                    for cut in bucket:
                        self._arriving[cut.name].append((transfer, index, cut))

    def reshard(self, parameters: Mapping[str, Tensor | np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        """(name, this rank's target shard) one after another, in the order of the target layouts.

        Collective: ALL ranks must go through to the end. A shard that needs no other
        rank and no cast is a view of the parameter, not a copy.

        Args:
            parameters: canonical name -> this rank's source shard; others are ignored.

        Raises:
            ValueError: parameters are missing, or have other shapes than their source layouts; all named.
        """
        faults = [f"{name}: missing" for name in self._target if name not in parameters]
        faults += [
            f"{name}: expected the local source shard {self._source[name].local_shape}, "
            f"got {tuple(parameters[name].shape)}"
            for name in self._target
            if name in parameters and tuple(parameters[name].shape) != self._source[name].local_shape
        ]
        if faults:
            raise ValueError("cannot reshard these parameters:\n  " + "\n  ".join(faults))
        return self._walk(_HostArrays(parameters))

    def _walk(self, held: _HostArrays) -> Iterator[tuple[str, np.ndarray]]:
        arrived: dict[tuple[int, int], np.ndarray] = {}
        for name in self._target:
            for transfer, index in self.plan.due.get(name, ()):
                if self.rank == transfer.sender:
                    self._transport.send(self._pack(transfer, index, held), transfer.receiver)
                elif self.rank == transfer.receiver:
                    bucket = np.empty(transfer.size(index), self.dtype)
                    arrived[transfer.sender, index] = self._transport.receive(bucket, transfer.sender)
            yield name, self._assemble(name, held[name], arrived)
            held.pop(name)

    def _pack(self, transfer: Transfer, index: int, held: _HostArrays) -> np.ndarray:
        """Bucket ``index`` of a transfer."""
        bucket = np.empty(transfer.size(index), self.dtype)
        at = 0
        for cut in transfer.buckets[index]:
            origin = box_of(self._source[cut.name], self.rank)
            for part in row_major(held[cut.name][inside(cut.box, origin)], cut.first, cut.last):
                bucket[at : at + part.size].reshape(part.shape)[...] = part
                at += part.size
        return bucket

    def _assemble(
        self, name: str, local: np.ndarray, arrived: dict[tuple[int, int], np.ndarray]
    ) -> np.ndarray:
        """The target shard, from the source shard and buckets, which are dropped when they are used up."""
        held, wanted = (box_of(layouts[name], self.rank) for layouts in (self._source, self._target))
        kept = overlap(held, wanted)
        if kept == wanted:
            return local[inside(wanted, held)].astype(self.dtype, copy=False)
        result = np.empty(self._target[name].local_shape, self.dtype)
        if kept is not None:
            result[inside(kept, wanted)] = local[inside(kept, held)]
        for transfer, index, cut in self._arriving[name]:
            bucket, at = arrived[transfer.sender, index], cut.offset
            for part in row_major(result[inside(cut.box, wanted)], cut.first, cut.last):
                part[...] = bucket[at : at + part.size].reshape(part.shape)
                at += part.size
            if cut is transfer.buckets[index][-1]:
                del arrived[transfer.sender, index]
        return result


class _HostArrays(dict[str, np.ndarray]):
    """Parameters as arrays, each fetched from the device at its first use."""

    def __init__(self, parameters: Mapping[str, Tensor | np.ndarray]) -> None:
        super().__init__()
        self._parameters = parameters

    def __missing__(self, name: str) -> np.ndarray:
        parameter = self._parameters[name]
        self[name] = parameter if isinstance(parameter, np.ndarray) else parameter.asnumpy()
        return self[name]


def row_major(array: np.ndarray, first: int, last: int) -> Iterator[np.ndarray]:
    """Elements ``first`` .. ``last - 1`` of ``array`` in row-major order, as views of it.

    Args:
        array: of one or more dimensions, contiguous or not.
        first, last: 0 <= first < last <= array.size.
    """
    if array.ndim == 1:
        yield array[first:last]
        return
    size = prod(array.shape[1:])
    begin, end = -(-first // size), last // size
    if begin > end:  # inside one row
        yield from row_major(array[end], first - end * size, last - end * size)
        return
    if first % size:
        yield from row_major(array[begin - 1], first % size, size)
    if begin < end:
        yield array[begin:end]
    if last % size:
        yield from row_major(array[end], 0, last % size)
