"""What a kind of device adds to the arithmetic: the process itself, and what its kernels keep."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class DeviceTraits:
    """Constants of a kind of device.

    Attributes:
        measured: whether the constants were measured (on this project's machine) or assumed.
        process: bytes of the process, or of the device's runtime, before there is a model.
        training_imports: more of it, once MindFormers' optimizer is imported.
        transpose_index: bytes that a ``Transpose`` kernel keeps for each element, as long as its graph lives.
        broadcast_index: the same of an element-wise kernel that broadcasts.
        first_graph: bytes that compiling anything at all takes: threads, generated code.
        forward_layer, backward_layer, decode_layer: bytes of a compiled layer in a graph of each kind; the
            graphs of an optimizer step count with the backward pass.
        fused_optimizer: whether an AdamW step is one kernel a parameter, which needs no copies.
        host_shared: whether the models live in the memory of the process.
    """

    measured: bool
    process: int
    training_imports: int
    transpose_index: int
    broadcast_index: int
    first_graph: int
    forward_layer: int
    backward_layer: int
    decode_layer: int
    fused_optimizer: bool
    host_shared: bool


CPU = DeviceTraits(
    measured=True,
    process=400 * MIB,
    training_imports=30 * MIB,
    transpose_index=8,
    broadcast_index=16,
    first_graph=50 * MIB,
    forward_layer=7 * MIB,
    backward_layer=25 * MIB,
    decode_layer=2 * MIB,
    fused_optimizer=True,
    host_shared=True,
)
"""Measured with MindSpore 2.9.0: what its CPU kernels keep, by chains of ten operations of one kind; compiled
graphs, by how the heap grows from phase to phase on models of 4, 6 and 8 layers, and by the peak of the quick
start's 30 layers; a decode layer with the operators of :mod:`mindrlhf.kernels`, and 3 MiB more without."""

ASCEND = DeviceTraits(
    measured=False,
    process=2048 * MIB,
    training_imports=0,
    transpose_index=0,
    broadcast_index=0,
    first_graph=0,
    forward_layer=0,
    backward_layer=0,
    decode_layer=0,
    fused_optimizer=False,
    host_shared=False,
)
"""Assumed: 2 GiB for runtime and communication (HCCL takes 2 x 200 MB a group), nothing in kernels."""

HOST_PROCESS = CPU.process + CPU.training_imports
"""Host memory of a worker whose models live on a device, without copies of weights."""


def traits_of(device_target: str) -> DeviceTraits:
    """The constants of ``context.device_target``; those of Ascend stand in for GPU."""
    return CPU if device_target == "CPU" else ASCEND
