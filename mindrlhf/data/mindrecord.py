"""Writes MindRecord files atomically, and reads them with errors that say what to do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindrlhf.utils.errors import DataError
from mindrlhf.utils.files import parents_of, probe_directory

Batch = Mapping[str, np.ndarray]

COLUMN_TYPES = ("int32", "int64", "float32", "float64")


@dataclass(frozen=True)
class Column:
    """One column of a MindRecord file: an array of fixed length in every row.

    Attributes:
        dtype: int32, int64, float32 or float64.
        length: values per row.
    """

    dtype: str
    length: int

    def __post_init__(self) -> None:
        """Refuses what MindRecord cannot store."""
        if self.dtype not in COLUMN_TYPES:
            raise ValueError(f"MindRecord stores {', '.join(COLUMN_TYPES)}, not {self.dtype}")
        if self.length < 1:
            raise ValueError(f"a column holds at least one value per row, not {self.length}")


def index_path(path: str | Path) -> Path:
    """The index that MindSpore keeps beside a MindRecord file."""
    path = Path(path)
    return path.with_name(path.name + ".db")


def check_output(path: str | Path, *, overwrite: bool) -> None:
    """Refuses an output path before any work is spent on it.

    Raises:
        DataError: the file or its index exists and ``overwrite`` is off; the path is a directory; or
            MindRecord does not take the name.
    """
    path = Path(path)
    forbidden = sorted(set(path.name) & set("\\/:*?\"<>|`&';"))
    if forbidden or path.name != path.name.strip(" "):
        raise DataError(
            f"{path}: MindRecord does not take a file name with {' '.join(forbidden) or 'outer blanks'}"
        )
    for file in (path, index_path(path)):
        if file.is_dir():
            raise DataError(f"{file}: is a directory; give a file name")
        if file.exists() and not overwrite:
            raise DataError(f"{file}: exists already; give another output path, or --overwrite")
    try:
        probe_directory(path.absolute().parent)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}); give another path"
        ) from error


def write_mindrecord(
    path: str | Path, schema: Mapping[str, Column], batches: Iterable[Batch], *, overwrite: bool = False
) -> int:
    """Writes a MindRecord file (and its index ``<path>.db``) from a stream of batches.

    The pair is written in a temporary directory beside ``path`` and moved there when it is whole; on any
    failure, one inside ``batches`` included, nothing is left behind and an older file stays as it was.
    Batches of a hundred rows or more are written fastest.

    Args:
        path: the output file; keep its name afterwards, since the index refers to it.
        schema: the columns.
        batches: each maps every column to an array (B, length) of exactly the column's type; B may vary.
        overwrite: replace an existing file.

    Returns:
        The number of rows written.

    Raises:
        DataError: the output exists, cannot be written, or there is no row to write.
        ValueError: a batch does not fit the schema.
    """
    path = Path(path).absolute()
    check_output(path, overwrite=overwrite)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with parents_of(path):
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                # The index holds the file's own name, so the temporary one differs in its directory.
                rows = _write(temporary / path.name, schema, batches)
                if rows == 0:
                    raise DataError(f"{path}: no row to write")
                _move_pair(temporary / path.name, path)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}); free space, or give another path"
        ) from error
    return rows


def _write(path: Path, schema: Mapping[str, Column], batches: Iterable[Batch]) -> int:
    # Here, not at the top: it costs two seconds, which a mistyped flag should not.
    from mindspore.mindrecord import FileWriter

    writer = FileWriter(str(path), shard_num=1)
    writer.add_schema(
        {name: {"type": column.dtype, "shape": [column.length]} for name, column in schema.items()}
    )
    rows = 0
    for batch in batches:
        size = _check_batch(batch, schema)
        if size == 0:
            continue
        try:
            writer.write_raw_data([{name: batch[name][i] for name in schema} for i in range(size)])
        except RuntimeError as error:
            raise OSError(f"MindRecord: {_first_line(error)}") from error
        rows += size
    if rows:
        writer.commit()
    return rows


def _check_batch(batch: Batch, schema: Mapping[str, Column]) -> int:
    """Checks shapes and types: MindSpore's writer drops a row that does not fit with a warning."""
    if batch.keys() != schema.keys():
        raise ValueError(f"batch has the columns {sorted(batch)}, the schema {sorted(schema)}")
    size = len(next(iter(batch.values())))
    for name, column in schema.items():
        array = batch[name]
        if array.dtype != np.dtype(column.dtype) or array.shape != (size, column.length):
            raise ValueError(
                f"column {name}: {array.dtype} {array.shape}, expected {column.dtype} {(size, column.length)}"
            )
    return size


def _move_pair(source: Path, path: Path) -> None:
    """Moves file and index; an index is never beside another file than its own."""
    umask = os.umask(0)
    os.umask(umask)
    for file in (source, index_path(source)):
        # MindSpore makes them readable by the owner alone.
        file.chmod(0o666 & ~umask)
    index_path(path).unlink(missing_ok=True)
    source.replace(path)
    index_path(source).replace(index_path(path))


def _first_line(error: BaseException) -> str:
    """MindSpore's message without the framework's call stack."""
    lines = [line.strip() for line in str(error).splitlines()]
    wanted = [
        line.removeprefix("[ERROR] ") for line in lines if line and not line.startswith(("-", "Exception "))
    ]
    return wanted[0] if wanted else type(error).__name__


def read_schema(path: str | Path) -> tuple[dict[str, tuple[str, tuple[int, ...]]], int]:
    """Columns and row count of a MindRecord file.

    Returns:
        Type and shape of each column (a length of -1 is "any"; () a scalar), and the number of rows.

    Raises:
        DataError: the file or its index is missing, foreign, damaged or renamed.
    """
    path = Path(path)
    for file in (path, index_path(path)):
        if not file.is_file():
            raise DataError(f"{file}: no such file (a MindRecord data set is a file and its .db index)")
    from mindspore.mindrecord import FileReader

    try:
        reader = FileReader(str(path), num_consumer=1)
    except RuntimeError as error:
        raise DataError(
            f"{path}: cannot be read as MindRecord; it is damaged, or was renamed after it was made "
            f"({_first_line(error)[:200]}); make it again with rlhf_data.py"
        ) from error
    try:
        columns = {
            name: (str(entry["type"]), tuple(entry.get("shape", ())))
            for name, entry in reader.schema().items()
        }
        return columns, int(reader.len())
    finally:
        reader.close()


def read_rows(path: str | Path, rows: np.ndarray, columns: Sequence[str]) -> list[dict[str, np.ndarray]]:
    """Rows by number, in the given order, without reading the others.

    Args:
        path: a MindRecord file that :func:`read_schema` accepts.
        rows: (n,) row numbers, any order; a number may occur twice.
        columns: which columns.

    Raises:
        DataError: a row cannot be read.
    """
    import mindspore.dataset as dataset

    if len(rows) == 0:
        return []
    # MindSpore's sampler reads at most as many rows as the file has, so each is asked for once.
    different, places = np.unique(rows, return_inverse=True)
    try:
        pipeline = dataset.MindDataset(
            str(path),
            columns_list=list(columns),
            num_parallel_workers=1,
            sampler=dataset.SubsetSampler(different.tolist()),
        )
        found = [
            dict(zip(columns, values, strict=True))
            for values in pipeline.create_tuple_iterator(num_epochs=1, output_numpy=True)
        ]
    except RuntimeError as error:
        raise DataError(f"{path}: a row cannot be read ({_first_line(error)[:200]})") from error
    if len(found) != len(different):
        raise DataError(f"{path}: asked for {len(different)} rows, read {len(found)}; the file is damaged")
    return [found[place] for place in places]


def read_columns(path: str | Path, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """Whole columns of a MindRecord file, in row order; for small files and tests.

    Returns:
        Each column as an array (rows, length).

    Raises:
        DataError: the file cannot be read or has no such column.
    """
    found, rows = read_schema(path)
    missing = [name for name in columns if name not in found]
    if missing:
        raise DataError(f"{path}: no column {', '.join(missing)} (the file has {', '.join(sorted(found))})")
    content = read_rows(path, np.arange(rows), columns)
    return {name: np.stack([row[name] for row in content]) for name in columns}
