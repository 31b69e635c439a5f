"""The device and the communication of one worker."""

from __future__ import annotations

from dataclasses import dataclass

import mindspore as ms

from mindrlhf.configs.keys import ContextConfig, ModelConfig
from mindrlhf.kernels.library import product_library
from mindrlhf.utils.errors import MindRLHFError


@dataclass(frozen=True)
class Runtime:
    """Which worker this is among how many."""

    rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        """Whether this is the worker that writes metrics and logs."""
        return self.rank == 0


def check_device(context: ContextConfig) -> None:
    """Refuses a device that this machine does not have, before anything is built.

    Raises:
        MindRLHFError: names the device of the YAML and the flag that overrides it.
    """
    if not ms.hal.is_available(context.device_target):
        raise MindRLHFError(
            f"context.device_target is {context.device_target!r}, but this machine has no such device (or no "
            "driver for it); pass --device_target CPU to run on the CPU instead"
        )


def check_matmul_dtype(model: ModelConfig) -> None:
    """Compiles the operators that ``--cpu_matmul_dtype`` needs, before anything is built.

    Raises:
        MindRLHFError: names what this machine lacks.
    """
    if model.matmul_dtype == "bfloat16":
        product_library()


def start_runtime(context: ContextConfig, *, use_parallel: bool, scratch_dir: str) -> Runtime:
    """Chooses the device and graph mode, and joins the other workers if there are any.

    Args:
        context: the YAML's ``context`` section.
        use_parallel: whether to initialise communication (HCCL on Ascend, MCCL on CPU).
        scratch_dir: directory for the files that MindSpore writes of its own accord.
    """
    ms.set_device(context.device_target)
    options: dict[str, object] = {"mode": ms.GRAPH_MODE, "save_graphs_path": scratch_dir}
    if context.device_target != "CPU" and context.max_device_memory:
        options["max_device_memory"] = context.max_device_memory
    ms.set_context(**options)
    ms.set_recursion_limit(context.max_call_depth)
    if not use_parallel:
        return Runtime(0, 1)
    from mindspore.communication import get_group_size, get_rank, init

    init()
    return Runtime(get_rank(), get_group_size())
