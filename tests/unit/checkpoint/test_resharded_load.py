"""Rank directories of one layout, read by the ranks of another."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from mindrlhf.checkpoint.shards import load_resharded, save_shard
from mindrlhf.checkpoint.sources import FileSource
from mindrlhf.parallel.layout import AxisName, Layout, Mesh
from mindrlhf.utils.errors import CheckpointError

MESHES = [Mesh(1, 1), Mesh(4, 1), Mesh(2, 2), Mesh(1, 4), Mesh(1, 2), Mesh(1, 8)]
FULL = {
    "adam_m.rows": np.arange(16 * 6, dtype=np.float32).reshape(16, 6),
    "adam_v.columns": -np.arange(5 * 24, dtype=np.float32).reshape(5, 24),
    "norm": np.linspace(0, 1, 7, dtype=np.float32),
    "global_step": np.array([12], np.int32),
}


def layouts(mesh: Mesh) -> dict[str, Layout]:
    axes: dict[str, tuple[AxisName | None, ...]] = {
        "adam_m.rows": ("mp", None),
        "adam_v.columns": (None, "mp"),
    }
    return {
        name: Layout(mesh, array.shape, axes.get(name, (None,) * array.ndim)) for name, array in FULL.items()
    }


def save(directory: Path, mesh: Mesh) -> None:
    for rank in range(mesh.size):
        local = {name: layout.take(FULL[name], rank) for name, layout in layouts(mesh).items()}
        save_shard(directory, rank, {name: np.ascontiguousarray(array) for name, array in local.items()})


@pytest.mark.parametrize("target", MESHES, ids=str)
@pytest.mark.parametrize("stored", MESHES, ids=str)
def test_every_rank_gets_its_slices_bit_for_bit(tmp_path: Path, stored: Mesh, target: Mesh) -> None:
    save(tmp_path, stored)
    for rank in range(target.size):
        found = load_resharded(tmp_path, layouts(target), rank, stored)
        assert list(found) == list(FULL)
        for name, layout in layouts(target).items():
            expected = layout.take(FULL[name], rank)
            assert found[name].dtype == expected.dtype
            np.testing.assert_array_equal(found[name], expected, err_msg=name)


def test_only_the_slices_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of what is split, and what is not split once."""
    save(tmp_path, Mesh(1, 2))
    count = 0
    read = FileSource._read_file

    def counted(self: FileSource, name: str, position: int, buffer: memoryview) -> None:
        nonlocal count
        count += len(buffer)
        read(self, name, position, buffer)

    monkeypatch.setattr(FileSource, "_read_file", counted)
    load_resharded(tmp_path, layouts(Mesh(1, 4)), 3, Mesh(1, 2))
    split = FULL["adam_m.rows"].nbytes + FULL["adam_v.columns"].nbytes
    assert count == split // 4 + FULL["norm"].nbytes + FULL["global_step"].nbytes


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    save(tmp_path, Mesh(1, 4))
    shutil.rmtree(tmp_path / "rank_2")
    with pytest.raises(CheckpointError, match=r"needs 4 directories .* found 3: rank_0, rank_1, rank_3"):
        load_resharded(tmp_path, layouts(Mesh(1, 2)), 0, Mesh(1, 4))


def test_shards_of_another_model_are_refused(tmp_path: Path) -> None:
    save(tmp_path, Mesh(1, 4))
    wanted = layouts(Mesh(1, 2)) | {"norm": Layout(Mesh(1, 2), (9,), (None,))}
    with pytest.raises(CheckpointError, match=r"norm is \(7,\), the model has \(9,\)"):
        load_resharded(tmp_path, wanted, 0, Mesh(1, 4))
