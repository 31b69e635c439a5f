"""Checksums: against a plain loop, equal for every layout, and sensitive to value and position."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore.common.np_dtype import bfloat16

from mindrlhf.parallel import checksum
from mindrlhf.parallel.checksum import ReplicaMismatchError, checksums, shard_checksum
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import AxisName, Layout, Mesh

MODULUS = 2**64


def splitmix_weight(index: int, dim: int) -> int:
    """The weight by Python's unbounded integers."""
    z = (index + ((dim + 1) << 48) + 1) * 0x9E3779B97F4A7C15 % MODULUS
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % MODULUS
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % MODULUS
    return (z ^ (z >> 31)) | 1


def reference(full: np.ndarray) -> int:
    """The formula of the module, element by element."""
    bits = full.view({2: np.uint16, 4: np.uint32}[full.dtype.itemsize])
    total = 0
    for index in np.ndindex(*full.shape):
        term = int(bits[index])
        for dim, i in enumerate(index):
            term *= splitmix_weight(i, dim)
        total += term
    return total % MODULUS


def one_rank(full: np.ndarray) -> int:
    layout = Layout(Mesh(1, 1), full.shape, (None,) * full.ndim)
    return checksums([("w", full)], {"w": layout}, Groups(layout.mesh, 0))["w"]


def by_shards(full: np.ndarray, layout: Layout) -> int:
    """What the group's ranks would add up."""
    parts = [shard_checksum(layout.take(full, rank), layout, rank) for rank in range(layout.mesh.mp)]
    return sum(parts) % MODULUS if layout.is_split else parts[-1]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16])
@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 3, 4)])
def test_formula(dtype: np.dtype, shape: tuple[int, ...]) -> None:
    full = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    assert one_rank(full) == reference(full)


def test_scalar() -> None:
    assert one_rank(np.float32(1.0).reshape(())) == 0x3F800000


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([("mp", None), (None, "mp"), (None, None)]),
    st.sampled_from([np.float32, np.float16, bfloat16]),
    st.integers(0, 2**32 - 1),
)
def test_same_for_every_layout(
    mp: int, axes: tuple[AxisName | None, ...], dtype: np.dtype, seed: int
) -> None:
    full = np.random.default_rng(seed).standard_normal((16, 24)).astype(dtype)
    assert by_shards(full, Layout(Mesh(1, mp), full.shape, axes)) == one_rank(full)


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    full = np.random.default_rng(0).standard_normal((33, 10)).astype(np.float32)
    whole = one_rank(full)
    for elements in (1, 25, 40, 330):
        monkeypatch.setattr(checksum, "_CHUNK_ELEMENTS", elements)
        assert one_rank(full) == whole


def test_non_contiguous_shard() -> None:
    full = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    assert one_rank(full.T) == one_rank(np.ascontiguousarray(full.T))


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from([np.float32, np.float16, bfloat16]))
def test_sees_any_one_change(data: st.DataObject, dtype: np.dtype) -> None:
    full = np.random.default_rng(0).standard_normal((6, 10)).astype(dtype)
    changed = full.copy()
    bits = changed.view(np.uint32 if dtype is np.float32 else np.uint16)
    row, column = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 9))
    bits[row, column] ^= 1 << data.draw(st.integers(0, bits.dtype.itemsize * 8 - 1))
    assert one_rank(changed) != one_rank(full)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_sees_swaps(data: st.DataObject) -> None:
    full = np.random.default_rng(0).standard_normal((6, 6)).astype(np.float32)
    i, j = data.draw(st.lists(st.integers(0, 5), min_size=2, max_size=2, unique=True))
    order = np.arange(6)
    order[[i, j]] = j, i
    sums = [one_rank(full), one_rank(full[order]), one_rank(full[:, order]), one_rank(full.T)]
    assert len(set(sums)) == 4


def test_sees_swap_of_rows_with_equal_sums() -> None:
    """Weights linear in the position would miss this one: both rows hold the same values."""
    full = np.array([[1, 2, 3, 4], [4, 3, 2, 1]], dtype=np.float32)
    assert one_rank(full) != one_rank(full[::-1])


def test_sees_a_flipped_sign_pair() -> None:
    full = np.ones((4, 4), dtype=np.float32)
    seen = set()
    for index in np.ndindex(4, 4):
        changed = full.copy()
        changed[index] *= -1
        changed[0, 0] *= -1
        seen.add(one_rank(changed))
    assert len(seen) == 16


def test_combines_a_group() -> None:
    """Split tensors add up, replicated ones count once; differing copies are all named."""
    mesh = Mesh(1, 2)
    layouts = {
        "split": Layout(mesh, (4,), ("mp",)),
        "norm": Layout(mesh, (4,), (None,)),
        "bias": Layout(mesh, (4,), (None,)),
    }
    equal = np.array([[2**64 - 1, 7, 9], [3, 7, 9]], dtype=np.uint64)
    assert checksum._combine(list(layouts), equal, layouts) == {"split": 2, "norm": 7, "bias": 9}
    unequal = np.array([[1, 7, 9], [1, 8, 10]], dtype=np.uint64)
    with pytest.raises(ReplicaMismatchError, match=r"norm: 0{15}7, 0{15}8(.|\n)*bias: 0{15}9, 0{15}a"):
        checksum._combine(list(layouts), unequal, layouts)


def test_bad_input() -> None:
    layout = Layout(Mesh(1, 1), (4,), (None,))
    groups = Groups(layout.mesh, 0)
    with pytest.raises(ValueError, match="v: no layout"):
        checksums([("v", np.zeros(4, np.float32))], {"w": layout}, groups)
    with pytest.raises(ValueError, match=r"w: expected the local shard \(4,\), got \(3,\)"):
        checksums([("w", np.zeros(3, np.float32))], {"w": layout}, groups)
    assert checksums([], {"w": layout}, groups) == {}
