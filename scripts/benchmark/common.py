"""What the benchmarks share: model sizes, random weights, and what the machine can do right now."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from results import BATCH, MODELS

from mindrlhf.configs.keys import ModelConfig


def model_config(name: str, **changes: Any) -> ModelConfig:
    """The sizes ``name`` in float32, with some fields changed."""
    return ModelConfig(**(MODELS[name] | changes))


def random_shards(layouts: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Weights N(0, 0.02^2) of one rank that holds everything; norms are 1."""
    rng = np.random.default_rng(seed)
    return {
        name: np.ones(layout.shape, np.float32)
        if "norm" in name
        else rng.standard_normal(layout.shape, np.float32) * np.float32(0.02)
        for name, layout in layouts.items()
    }


def seconds_of(call: Callable[[], object], repeats: int) -> list[float]:
    """Wall seconds of each of ``repeats`` calls."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def best_matmul(size: int = 2048) -> Callable[[], float]:
    """A float32 product ``size``^3 in MindSpore, compiled; calling it gives GFLOP/s of one run."""
    import mindspore as ms
    from mindspore import Tensor, nn, ops

    class Product(nn.Cell):
        def construct(self, x: Tensor, y: Tensor) -> Tensor:
            return ops.MatMul()(x, y)

    x = Tensor(np.ones((size, size), np.float32))
    product = Product()
    product(x, x).asnumpy()
    ms.runtime.synchronize()

    def run() -> float:
        start = time.perf_counter()
        product(x, x).asnumpy()
        return 2 * size**3 / (time.perf_counter() - start) / 1e9

    return run


def copy_bandwidth(megabytes: int = 256) -> float:
    """Bytes per second read and written by a copy with one thread per core, best of 7."""
    workers = os.cpu_count() or 1
    size = megabytes * 2**20 // 4 // workers
    pairs = [(np.ones(size, np.float32), np.zeros(size, np.float32)) for _ in range(workers)]

    def copy(pair: tuple[np.ndarray, np.ndarray]) -> None:
        np.copyto(pair[1], pair[0])

    with ThreadPoolExecutor(workers) as pool:
        seconds = seconds_of(lambda: list(pool.map(copy, pairs)), 7)
    return 2 * 4 * size * workers / min(seconds)


__all__ = ["BATCH", "MODELS", "best_matmul", "copy_bandwidth", "model_config", "random_shards", "seconds_of"]
