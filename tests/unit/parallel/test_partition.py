"""Buckets, and what replicas exchange where collectives give each its part, as on Ascend."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from mindspore import Tensor

from mindrlhf.parallel import partition as module
from mindrlhf.parallel.partition import Partition, buckets, sum_together

REPLICAS = 3
SHAPES = ((2, 3), (5,), (1,), (4, 2))


def replica(index: int, collective: Callable[[Tensor], Tensor]) -> Partition:
    """One that has no group: ``collective`` stands for both."""
    made = object.__new__(Partition)
    made._replicas, made._index, made._by_sum = REPLICAS, index, False
    made._reduce_scatter = made._all_gather = collective
    return made


def exchanged(
    run: Callable[[Partition], list[Tensor]], combine: Callable[..., list[Tensor]]
) -> list[list[Tensor]]:
    """What each replica gets: what all send is noted first, then what the collective makes of it returned."""
    sent: list[Tensor] = []

    class SentError(Exception):
        pass

    def note(row: Tensor) -> Tensor:
        sent.append(row)
        raise SentError

    for index in range(REPLICAS):
        with pytest.raises(SentError):
            run(replica(index, note))
    received = combine(sent)
    return [run(replica(index, lambda _, index=index: received[index])) for index in range(REPLICAS)]


def test_parts_of_sums_and_the_way_back() -> None:
    rng = np.random.default_rng(0)
    tensors = [[rng.standard_normal(shape).astype(np.float32) for shape in SHAPES] for _ in range(REPLICAS)]
    totals = [sum(one) for one in zip(*tensors, strict=True)]

    def scatter(sent: list[Tensor]) -> list[Tensor]:
        total = np.sum([row.asnumpy() for row in sent], axis=0)
        return [Tensor(part.copy()) for part in np.split(total, REPLICAS)]

    def gather(sent: list[Tensor]) -> list[Tensor]:
        return [Tensor(np.concatenate([row.asnumpy() for row in sent]))] * REPLICAS

    parts = exchanged(lambda one: one.reduce_scatter(list(map(Tensor, tensors[one._index]))), scatter)
    for index, of_replica in enumerate(parts):
        for part, total in zip(of_replica, totals, strict=True):
            wanted = replica(index, lambda row: row).take(Tensor(total))
            np.testing.assert_allclose(part.asnumpy(), wanted.asnumpy(), rtol=1e-6)
    whole = exchanged(lambda one: one.all_gather(parts[one._index], SHAPES), gather)
    for of_replica in whole:
        for found, total in zip(of_replica, totals, strict=True):
            np.testing.assert_allclose(found.asnumpy(), total, rtol=1e-6)


def test_sums_of_many_tensors_are_one_collective() -> None:
    calls = []

    def twice(row: Tensor) -> Tensor:
        calls.append(row.shape)
        return row * 2

    tensors = [Tensor(np.full(shape, number, np.float32)) for number, shape in enumerate(SHAPES)]
    found = sum_together(tensors, twice)
    assert calls == [(20,)]
    for one, other in zip(found, tensors, strict=True):
        np.testing.assert_array_equal(one.asnumpy(), 2 * other.asnumpy())


def test_buckets_keep_the_order_and_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUCKET_BYTES", 10)
    sizes = {"a": 4, "b": 6, "c": 1, "d": 30, "e": 2, "f": 8, "g": 1}
    assert buckets(sizes) == [["a", "b"], ["c"], ["d"], ["e", "f"], ["g"]]
    assert buckets({}) == []
