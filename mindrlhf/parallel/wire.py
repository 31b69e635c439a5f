"""From one rank's host to another's, through the devices' collective library."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Wire(Protocol):
    """Moves arrays between ranks, bit for bit, in the order in which they are sent."""

    def send(self, array: np.ndarray, receiver: int) -> None:
        """Sends ``array`` (n,), which nobody may write to any more, to the rank ``receiver``."""

    def receive(self, array: np.ndarray, sender: int) -> np.ndarray:
        """What the rank ``sender`` sends, in the shape and type of ``array``, which may be written over."""


class DeviceWire:
    """By Send and Receive in the group of all ranks (HCCL on Ascend, MCCL on CPU).

    No groups of two: every group of HCCL takes memory for itself, and CPU has Broadcast for the group of all
    ranks only. Called one by one, these compile nothing. Only bytes travel, so that every type of number can.
    """

    def send(self, array: np.ndarray, receiver: int) -> None:
        """See :class:`Wire`."""
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
        """See :class:`Wire`."""
        from mindspore import Tensor
        from mindspore.mint import distributed

        received = Tensor.from_numpy(array.view(np.int8))
        distributed.recv(received, sender)
        result: np.ndarray = received.asnumpy().view(array.dtype)
        return result
