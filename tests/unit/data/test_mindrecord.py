"""MindRecord files: read back as written, whole or not at all."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mindrlhf.data.columns import prompt_schema
from mindrlhf.data.mindrecord import (
    Column,
    index_path,
    read_rows,
    read_schema,
    write_mindrecord,
)
from mindrlhf.utils.errors import DataError, MindRLHFError
from tests.probes import read_columns

SCHEMA = {"tokens": Column("int32", 5), "scores": Column("float32", 3), "last": Column("float32", 1)}


def batches(*sizes: int) -> Iterator[dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    for size in sizes:
        yield {
            "tokens": generator.integers(-(2**31), 2**31, (size, 5)).astype(np.int32),
            "scores": generator.standard_normal((size, 3)).astype(np.float32),
            "last": generator.standard_normal((size, 1)).astype(np.float32),
        }


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "体验 a.mindrecord"
    assert write_mindrecord(path, SCHEMA, batches(3, 0, 130, 1)) == 134
    written = list(batches(3, 0, 130, 1))
    columns = read_columns(path, list(SCHEMA))
    for name, column in SCHEMA.items():
        expected = np.concatenate([batch[name] for batch in written])
        assert columns[name].dtype == np.dtype(column.dtype)
        np.testing.assert_array_equal(columns[name], expected)
    assert read_schema(path) == (
        {"tokens": ("int32", (5,)), "scores": ("float32", (3,)), "last": ("float32", (1,))},
        134,
    )
    for numbers in ([133, 0, 7, 7], [5] * 140):  # the second are more than the file has
        rows = read_rows(path, np.array(numbers), ["last"])
        assert [row["last"][0] for row in rows] == [columns["last"][i, 0] for i in numbers]
    assert sorted(path.parent.iterdir()) == [path, index_path(path)]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == index_path(path).stat().st_mode & 0o777 == 0o666 & ~umask


def test_index_names_the_final_file(tmp_path: Path) -> None:
    """MindSpore refuses an index that names another file."""
    path = tmp_path / "a.mindrecord"
    write_mindrecord(path, SCHEMA, batches(2))
    with sqlite3.connect(index_path(path)) as database:
        assert database.execute("SELECT NAME FROM SHARD_NAME").fetchall() == [("a.mindrecord",)]


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[dict[str, np.ndarray]]:
        yield from batches(2)
        raise DataError("a bad line")

    with pytest.raises(DataError, match="a bad line"):
        write_mindrecord(tmp_path / "a.mindrecord", SCHEMA, failing())
    assert not list(tmp_path.iterdir())


def test_failure_keeps_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "a.mindrecord"
    write_mindrecord(path, SCHEMA, batches(2))
    before = [path.read_bytes(), index_path(path).read_bytes()]
    with pytest.raises(DataError, match="there are no rows to write"):
        write_mindrecord(path, SCHEMA, batches(0), overwrite=True)
    with pytest.raises(KeyboardInterrupt):
        write_mindrecord(path, SCHEMA, interrupted(), overwrite=True)
    assert [path.read_bytes(), index_path(path).read_bytes()] == before
    assert len(list(tmp_path.iterdir())) == 2


def interrupted() -> Iterator[dict[str, np.ndarray]]:
    yield from batches(1)
    raise KeyboardInterrupt


def test_a_full_device_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mindspore.mindrecord import FileWriter

    def full(self: object) -> None:
        raise RuntimeError("Unexpected error. Failed to seekp file.\nPlease create an issue")

    monkeypatch.setattr(FileWriter, "commit", full)
    batch = {"prompt_ids": np.ones((1, 2), np.int32)}
    with pytest.raises(DataError, match=r"cannot be written .*Failed to seekp file.*; free space"):
        write_mindrecord(tmp_path / "x.mindrecord", {"prompt_ids": Column("int32", 2)}, [batch])
    assert list(tmp_path.iterdir()) == []


def test_existing_output(tmp_path: Path) -> None:
    path = tmp_path / "a.mindrecord"
    write_mindrecord(path, SCHEMA, batches(2))
    with pytest.raises(MindRLHFError, match=r"a\.mindrecord: exists.*--overwrite"):
        write_mindrecord(path, SCHEMA, batches(3))
    assert read_schema(path)[1] == 2
    write_mindrecord(path, SCHEMA, batches(3), overwrite=True)
    assert read_schema(path)[1] == 3
    path.unlink()
    with pytest.raises(MindRLHFError, match=r"a\.mindrecord\.db: exists"):
        write_mindrecord(path, SCHEMA, batches(3))
    path.write_text("mine")
    with pytest.raises(MindRLHFError, match=r"a\.mindrecord: is not a MindRecord file"):
        write_mindrecord(path, SCHEMA, batches(3), overwrite=True)
    link = tmp_path / "link.mindrecord"
    link.symlink_to(path)
    with pytest.raises(DataError, match=r"is a symbolic link, .*; give .*/a\.mindrecord"):
        write_mindrecord(link, SCHEMA, batches(3), overwrite=True)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("name", ["a:b", "a&b", "a;b", "a ", "a?b"])
def test_names_mindrecord_does_not_take(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="does not take a file name"):
        write_mindrecord(tmp_path / name, SCHEMA, batches(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.zeros((2, 5), np.int64)}, "column tokens: int64"),
        ({"tokens": np.zeros((2, 4), np.int32)}, r"\(2, 4\), expected int32 \(2, 5\)"),
        ({"scores": np.zeros((3, 3), np.float32)}, r"\(3, 3\)"),
        ({"scores": np.zeros(2, np.float32)}, r"\(2,\)"),
        ({"other": np.zeros((2, 1), np.float32)}, "other"),
    ],
)
def test_batch_that_does_not_fit(tmp_path: Path, change: dict[str, np.ndarray], message: str) -> None:
    """MindSpore's writer would drop such rows with a warning."""
    batch = {**next(batches(2)), **change}
    with pytest.raises(ValueError, match=message):
        write_mindrecord(tmp_path / "a.mindrecord", SCHEMA, [batch])
    assert not list(tmp_path.iterdir())


def test_columns() -> None:
    with pytest.raises(ValueError, match="not bfloat16"):
        Column("bfloat16", 1)
    with pytest.raises(ValueError, match="not 0"):
        Column("int32", 0)
    assert {name: column.length for name, column in prompt_schema(4, 9).items()} == {
        "prompt_ids": 4,
        "pretrain_ids": 9,
        "loss_mask": 9,
    }


def test_damaged_files_are_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "a.mindrecord"
    with pytest.raises(DataError, match=r"a\.mindrecord: no such file"):
        read_schema(path)
    write_mindrecord(path, SCHEMA, batches(2))
    renamed = tmp_path / "b.mindrecord"
    shutil.copy(path, renamed)
    with pytest.raises(DataError, match=r"b\.mindrecord\.db: no such file"):
        read_schema(renamed)
    shutil.copy(index_path(path), index_path(renamed))
    path.unlink()
    with pytest.raises(DataError, match="renamed after it was made"):
        read_schema(renamed)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match="cannot be read as MindRecord"):
        read_schema(path)


def test_no_row_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.mindrecord"
    write_mindrecord(path, SCHEMA, batches(2))
    assert read_rows(path, np.array([], int), ["tokens"]) == []
