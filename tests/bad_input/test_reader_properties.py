"""Whatever bytes a file holds, readers give exactly what is in it or name exactly what is wrong."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mindrlhf.checkpoint.shards import load_shard, save_shard
from mindrlhf.configs.faults import Faults
from mindrlhf.configs.read_yaml import read_mapping
from mindrlhf.data.jsonl import CValuesReader
from mindrlhf.parallel.layout import Layout, Mesh
from mindrlhf.utils.errors import ConfigError, DataError

_EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+")
KEYS = ("prompt", "pos_resp", "neg_resp")

texts = st.text(max_size=6)
rows = st.dictionaries(st.sampled_from([*KEYS, "other"]), texts | st.integers() | st.none(), max_size=4)
good_rows = st.fixed_dictionaries(dict.fromkeys(KEYS, texts))
lines = st.one_of(
    st.one_of(rows, good_rows, good_rows).flatmap(
        lambda row: st.sampled_from([True, False]).map(
            lambda ascii_only: json.dumps(row, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
        )
    ),
    st.binary(max_size=12).map(lambda line: line.replace(b"\n", b" ")),
    st.sampled_from([b"", b"  ", b"\r", b"[]", b"3", b"\xef\xbb\xbf", b"[" * 5000, b'{"prompt": NaN}']),
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("properties")


def expected(line: bytes, number: int) -> tuple[str, ...] | bool | None:
    """What a line holds, independently: the texts, ``None`` for a blank line, False for a bad one."""
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        if not line.strip(b"\xef\xbb\xbf \t\r\n"):
            return None
        row = json.loads(text)
        found = tuple(row[key] for key in KEYS)
        "".join(found).encode()
    except (ValueError, RecursionError, KeyError, TypeError, IndexError):
        return None if not line.strip(b"\xef\xbb\xbf \t\r\n") else False
    return found if all(part.strip() for part in found) else False


@settings(max_examples=150, deadline=None)
@given(st.lists(lines, max_size=14))
def test_jsonl_gives_the_good_lines_and_names_the_bad_ones(directory: Path, content: list[bytes]) -> None:
    path = directory / "data.jsonl"
    content = [*content, b'{"prompt": "p", "pos_resp": "yes", "neg_resp": "no"}']  # without one it is refused
    path.write_bytes(b"\n".join(content))
    wanted = {number: expected(line, number) for number, line in enumerate(content, start=1)}
    good = [(number, found) for number, found in wanted.items() if isinstance(found, tuple)]
    bad = [number for number, found in wanted.items() if found is False]
    reader = CValuesReader(path, pairs=True, skip_bad_lines=True)
    read = [(sample.line, (sample.prompt, sample.response, sample.rejected)) for sample in reader]
    assert read == good
    assert reader.bad_lines == len(bad)
    if not bad:
        assert len(list(CValuesReader(path, pairs=True))) == len(good)
        return
    with pytest.raises(DataError) as caught:
        list(CValuesReader(path, pairs=True))
    named = re.findall(rf"^  - {re.escape(str(path))}:(\d+): ", str(caught.value), re.MULTILINE)
    assert [int(number) for number in named] == bad[:10]


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8), st.dates()
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
mappings = st.dictionaries(st.text(max_size=8) | st.integers(), values, max_size=5)


def read_yaml(path: Path) -> tuple[dict[Any, Any] | None, list[str]]:
    faults = Faults()
    root = read_mapping(path, faults)
    try:
        faults.raise_if_any()
    except ConfigError as error:
        return root, list(error.faults)
    return root, []


@settings(max_examples=150, deadline=None)
@given(mappings, st.booleans())
def test_yaml_is_read_as_it_was_written(directory: Path, root: dict[Any, Any], flow: bool) -> None:
    path = directory / "file.yaml"
    # The text "1e6" is written without quotes by PyYAML; we read it as the number that everybody means.
    assume(not any(_EXPONENT.fullmatch(word) for word in _strings(root)))
    path.write_text(yaml.safe_dump(root, default_flow_style=flow), encoding="utf-8", newline="")
    found, faults = read_yaml(path)
    assert faults == []
    assert found == root


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [word for pair in value.items() for part in pair for word in _strings(part)]
    if isinstance(value, list):
        return [word for part in value for word in _strings(part)]
    return [value] if isinstance(value, str) else []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.from_regex(r"[a-z]{1,3}", fullmatch=True), min_size=1, max_size=8))
def test_yaml_names_the_line_of_a_key_given_twice(directory: Path, keys: list[str]) -> None:
    path = directory / "keys.yaml"
    path.write_text("".join(f"'{key}': {number}\n" for number, key in enumerate(keys)), encoding="utf-8")
    found, faults = read_yaml(path)
    twice = next((i for i, key in enumerate(keys) if key in keys[:i]), None)
    if twice is None:
        assert found == {key: number for number, key in enumerate(keys)}
        return
    assert found is None
    assert len(faults) == 1
    assert f"line {twice + 1}, column 1: the key {keys[twice]} is given twice" in faults[0]


@st.composite
def two_layouts(draw: st.DrawFn) -> tuple[Layout, Layout]:
    """One tensor of any dimensions on two meshes of 1 to 8 ranks, split along one dimension or none."""
    meshes = [Mesh(draw(st.integers(1, 8 // mp)), mp) for mp in draw(st.tuples(*[st.integers(1, 8)] * 2))]
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    split = draw(st.none() | st.integers(0, len(shape) - 1))
    if split is not None:
        shape[split] *= math.lcm(*(mesh.mp for mesh in meshes))
    axes = tuple("mp" if dim == split else None for dim in range(len(shape)))
    first, second = (Layout(mesh, tuple(shape), axes) for mesh in meshes)  # type: ignore[arg-type]
    return first, second


@settings(max_examples=40, deadline=None)
@given(two_layouts(), st.sampled_from(["<f4", "<f2", "<f8"]))
def test_rank_files_of_any_mesh_are_read_by_any_other(
    tmp_path_factory: pytest.TempPathFactory, pair: tuple[Layout, Layout], dtype: str
) -> None:
    stored, wanted = pair
    full = np.random.default_rng(0).normal(size=stored.shape).astype(dtype)
    directory = tmp_path_factory.mktemp("ranks")
    for rank in range(stored.mesh.size):
        save_shard(directory, rank, {"w": stored.take(full, rank)})
    for rank in range(wanted.mesh.size):
        (array,) = load_shard(directory, {"w": wanted}, rank, stored=stored.mesh).values()
        assert array.dtype == full.dtype
        np.testing.assert_array_equal(array, wanted.take(full, rank))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any tensor of up to 4 dimensions, sizes of 0 and 1 among them, on any mesh of up to 8 ranks."""
    mp = draw(st.integers(1, 8))
    dp = draw(st.integers(1, 8 // mp))
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    split = draw(st.none() | st.integers(0, len(shape) - 1)) if shape else None
    if split is not None:
        shape[split] *= mp
    axes = tuple("mp" if dim == split else None for dim in range(len(shape)))
    return Layout(Mesh(dp, mp), tuple(shape), axes)  # type: ignore[arg-type]


@settings(max_examples=300, deadline=None)
@given(layouts())
def test_ranks_hold_every_element_equally_often(layout: Layout) -> None:
    full = np.arange(np.prod(layout.shape, dtype=int)).reshape(layout.shape)
    held = np.zeros(layout.shape, int)
    for rank in range(layout.mesh.size):
        part = layout.take(full, rank)
        assert part.shape == layout.local_shape
        assert np.array_equal(part, full[layout.slices(rank)])
        held[layout.slices(rank)] += 1
        group = [layout.take(full, peer) for peer in layout.mesh.mp_ranks(rank)]
        whole = group[0] if layout.split_dim is None else np.concatenate(group, axis=layout.split_dim)
        assert np.array_equal(whole, full)
        assert all(np.array_equal(layout.take(full, peer), part) for peer in layout.mesh.dp_ranks(rank))
    assert (held == (layout.mesh.dp if layout.split_dim is not None else layout.mesh.size)).all()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 8), st.data())
def test_a_size_that_does_not_divide_is_refused_and_named(
    shape: list[int], mp: int, data: st.DataObject
) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    axes = tuple("mp" if i == dim else None for i in range(len(shape)))
    if shape[dim] % mp == 0:
        assert Layout(Mesh(1, mp), tuple(shape), axes).local_shape[dim] * mp == shape[dim]  # type: ignore[arg-type]
        return
    with pytest.raises(ValueError, match=rf"dimension {dim} of shape .*by mp") as caught:
        Layout(Mesh(1, mp), tuple(shape), axes)  # type: ignore[arg-type]
    assert str(shape[dim]) in str(caught.value)
    assert str(mp) in str(caught.value)
