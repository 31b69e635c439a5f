"""The resharder of every rank, each in a thread, where nobody sends what nobody receives."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from queue import Queue
from threading import Thread

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindrlhf.parallel.layout import AxisName, Layout, Mesh
from mindrlhf.parallel.reshard import Resharder, row_major

PATIENCE = 20  # seconds after which ranks that wait for each other fail
Arrays = dict[str, np.ndarray]
KINDS: dict[str, tuple[tuple[int, ...], tuple[AxisName | None, ...]]] = {
    "rows": ((48, 5), ("mp", None)),
    "columns": ((3, 24), (None, "mp")),
    "bias": ((24,), ("mp",)),
    "norm": ((7,), (None,)),
    "cube": ((2, 24, 3), (None, "mp", None)),
}


class Switchboard:
    """Transports between threads: a sender waits until the receiver has taken what it sent."""

    def __init__(self, ranks: int) -> None:
        self.lines = {pair: (Queue[np.ndarray](), Queue[None]()) for pair in product(range(ranks), repeat=2)}
        self.bytes_received = [0] * ranks

    def transport(self, rank: int) -> Transport:
        return Transport(self, rank)


class Transport:
    """One rank's end."""

    def __init__(self, board: Switchboard, rank: int) -> None:
        self.board = board
        self.rank = rank

    def send(self, array: np.ndarray, receiver: int) -> None:
        there, taken = self.board.lines[self.rank, receiver]
        there.put(array)
        taken.get(timeout=PATIENCE)

    def receive(self, array: np.ndarray, sender: int) -> np.ndarray:
        there, taken = self.board.lines[sender, self.rank]
        array[...] = there.get(timeout=PATIENCE)
        self.board.bytes_received[self.rank] += array.nbytes
        taken.put(None)
        return array


def layouts(mesh: Mesh) -> dict[str, Layout]:
    return {
        f"{kind}{layer}": Layout(mesh, shape, axes)
        for layer in range(2)
        for kind, (shape, axes) in KINDS.items()
    }


def run_ranks(
    source: dict[str, Layout], target: dict[str, Layout], full: Arrays, dtype: np.dtype, bucket_bytes: int
) -> tuple[list[Arrays], Switchboard]:
    """What every rank ends with."""
    ranks = next(iter(source.values())).mesh.size
    board = Switchboard(ranks)
    results: list[Arrays] = [{} for _ in range(ranks)]

    def work(rank: int) -> None:
        resharder = Resharder(
            source, target, rank, dtype=dtype, bucket_bytes=bucket_bytes, transport=board.transport(rank)
        )
        shards = {name: source[name].take(array, rank) for name, array in full.items()}
        results[rank] = {name: array.copy() for name, array in resharder.reshard(shards)}

    threads = [Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, board


def mesh_pairs() -> Iterator[tuple[Mesh, Mesh]]:
    for ranks in (1, 4, 6, 8):
        meshes = [Mesh(ranks // mp, mp) for mp in range(1, ranks + 1) if ranks % mp == 0]
        yield from product(meshes, repeat=2)


@pytest.mark.parametrize("bucket_bytes", [1 << 20, 52], ids=["one bucket a pair", "many buckets"])
@pytest.mark.parametrize(("before", "after"), list(mesh_pairs()), ids=str)
def test_every_rank_ends_with_its_slices(before: Mesh, after: Mesh, bucket_bytes: int) -> None:
    source, target = layouts(before), layouts(after)
    rng = np.random.default_rng(0)
    full = {name: rng.standard_normal(layout.shape).astype(np.float32) for name, layout in source.items()}
    results, board = run_ranks(source, target, full, np.dtype(np.float32), bucket_bytes)
    for rank, result in enumerate(results):
        assert list(result) == list(target)
        for name, array in result.items():
            np.testing.assert_array_equal(array, target[name].take(full[name], rank), err_msg=name)
        lacking = 0
        for name, layout in source.items():
            has, needs = np.zeros(layout.shape, bool), np.zeros(layout.shape, bool)
            has[layout.slices(rank)] = needs[target[name].slices(rank)] = True
            lacking += int((needs & ~has).sum())
        assert board.bytes_received[rank] == 4 * lacking


@pytest.mark.parametrize(("dtype", "size"), [(np.float16, 2), (np.float64, 8)])
def test_numbers_are_cast_before_they_travel(dtype: type[np.floating], size: int) -> None:
    source, target = layouts(Mesh(2, 2)), layouts(Mesh(1, 4))
    rng = np.random.default_rng(0)
    full = {name: rng.standard_normal(layout.shape).astype(np.float32) for name, layout in source.items()}
    results, board = run_ranks(source, target, full, np.dtype(dtype), 1 << 20)
    for rank, result in enumerate(results):
        for name, array in result.items():
            assert array.dtype == dtype
            np.testing.assert_array_equal(array, target[name].take(full[name], rank).astype(dtype))
    split = sum(math.prod(shape) for shape, axes in KINDS.values() if "mp" in axes) * 2  # two layers
    # Ranks 1 and 2 lack a quarter.
    assert board.bytes_received == [0, size * split // 4, size * split // 4, 0]


def test_every_bit_pattern_travels() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(256, 256)
    source = {"w": Layout(Mesh(1, 4), bits.shape, ("mp", None))}
    target = {"w": Layout(Mesh(4, 1), bits.shape, ("mp", None))}
    results, _ = run_ranks(source, target, {"w": bits}, bits.dtype, 1000)
    assert all(result["w"].tobytes() == bits.tobytes() for result in results)


def test_what_a_rank_has_is_not_copied() -> None:
    for before, after in ((Mesh(), Mesh()), (Mesh(4, 1), Mesh(1, 4))):
        source, target = layouts(before), layouts(after)
        shards = {name: np.ones(layout.local_shape, np.float32) for name, layout in source.items()}
        for rank in range(before.size):
            for name, array in Resharder(source, target, rank).reshard(shards):
                assert np.shares_memory(array, shards[name])


def test_used_buckets_are_dropped() -> None:
    """A rank holds the bucket of each sender that it still needs, not what has come before."""
    count = 40
    source = {f"w{n}": Layout(Mesh(1, 2), (8, 4), ("mp", None)) for n in range(count)}
    target = {name: layout.on(Mesh(2, 1)) for name, layout in source.items()}
    held: list[int] = []

    class Spy(Resharder):
        def _assemble(self, name: str, local: np.ndarray, arrived: dict) -> np.ndarray:  # type: ignore[type-arg]
            held.append(sum(bucket.nbytes for bucket in arrived.values()))
            return super()._assemble(name, local, arrived)

    class Nothing:
        def send(self, array: np.ndarray, receiver: int) -> None: ...

        def receive(self, array: np.ndarray, sender: int) -> np.ndarray:
            return array

    resharder = Spy(source, target, 0, bucket_bytes=200, transport=Nothing())
    shards = {name: np.zeros(layout.local_shape, np.float32) for name, layout in source.items()}
    assert len(list(resharder.reshard(shards))) == count
    # Half of a parameter, 64 bytes, may lie in two buckets of less than 200.
    assert max(held) <= 400 < count * 64
    assert resharder.plan.collectives == 2 * math.ceil(count * 64 / 200) == 26


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_row_major(shape: list[int], data: st.DataObject) -> None:
    array = np.arange(math.prod(shape) * 8).reshape([2 * size for size in shape[:1]] + shape[1:] + [4])
    view = array[::2, ..., 1:3]
    first = data.draw(st.integers(0, view.size - 1))
    last = data.draw(st.integers(first + 1, view.size))
    parts = list(row_major(view, first, last))
    np.testing.assert_array_equal(np.concatenate([part.ravel() for part in parts]), view.ravel()[first:last])
    assert all(np.shares_memory(part, array) for part in parts)


def test_bad_parameters_are_all_named_before_anything_travels() -> None:
    layout = Layout(Mesh(1, 2), (4,), ("mp",))
    names = ("a", "b", "c")
    target = {name: layout.on(Mesh(2, 1)) for name in names}
    resharder = Resharder(dict.fromkeys(names, layout), target, 0, transport=Switchboard(2).transport(0))
    with pytest.raises(ValueError, match=r"c: missing\n *a: expected the local source shard \(2,\), got"):
        resharder.reshard({"a": np.zeros(5), "b": np.zeros(2)})
