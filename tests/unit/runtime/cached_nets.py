"""A process that takes what graphs it can from a compile cache; run by ``test_compile_cache.py``.

    cached_nets.py DIRECTORY SCALE NET...

Cells share a parameter of three numbers: ``read`` gives SCALE times its sum, ``grad`` the gradient of the sum
of squares, ``step`` takes 1 off each; ``hidden`` is ``grad`` that reaches the parameter by a closure only.
Twice Python puts numbers into the parameter's memory, ones and then tens, and the nets named are called.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindrlhf.runtime.compile_cache import CompileCache

ms.set_context(mode=ms.GRAPH_MODE)


class Read(nn.Cell):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.weight = Parameter(Tensor(np.ones(3, np.float32)), name="weight")

    def construct(self) -> Tensor:
        return self.weight.sum() * self.scale


class Squares(nn.Cell):
    def __init__(self, weight: Parameter) -> None:
        super().__init__(auto_prefix=False)
        self.weight = weight

    def construct(self) -> Tensor:
        return (self.weight * self.weight).sum()


class Hidden(nn.Cell):
    def __init__(self, loss: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.function = ops.value_and_grad(loss, None, loss.trainable_params())

    def construct(self) -> Tensor:
        return self.function()[1][0]


class Grad(Hidden):
    def __init__(self, loss: nn.Cell) -> None:
        super().__init__(loss)
        self.loss = loss


class Step(nn.Cell):
    def __init__(self, weight: Parameter) -> None:
        super().__init__(auto_prefix=False)
        self.weight = weight

    def construct(self) -> Tensor:
        return ops.depend(ops.ones((), ms.float32), ops.assign_sub(self.weight, ops.ones_like(self.weight)))


def main(directory: str, scale: str, *names: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        cache = CompileCache(Path(directory), Path(scratch), ["test"])
        cache.open()
        read = Read(float(scale))
        loss = Squares(read.weight)
        nets = {"read": read, "grad": Grad(loss), "hidden": Hidden(loss), "step": Step(read.weight)}
        results = []
        for start in (1, 10):
            read.weight.asnumpy()[:] = start
            results.append([nets[name]().asnumpy().tolist() for name in names])
        answer = {
            "results": results,
            "weight": read.weight.asnumpy().tolist(),
            "records": [[record.network, record.taken] for record in cache.records],
            "refused": cache.refused,
            "summary": cache.summary(),
            "gains": all(record.compile_seconds > 0 for record in cache.records),
        }
        cache.close()
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
