"""Writes MindRecord files atomically, and reads them with errors that say what to do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from mindrlhf.utils.errors import DataError
from mindrlhf.utils.files import parents_of, remove, swap_in
from mindrlhf.utils.outputs import Output, check_outputs, file_of

Batch = Mapping[str, np.ndarray]

COLUMN_TYPES = ("int32", "int64", "float32", "float64")

_DATA_START, _INDEX_START = b'{"header_size":', b"SQLite format 3\0"


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
    return Path(f"{path}.db")


def step_path(path: Path, unit: str, step: str) -> Path:
    """The file beside ``path`` for a step, which goes into its name; or the pattern for several steps."""
    return path.parent / f"{path.stem}_{unit}_{step}{path.suffix or '.mindrecord'}"


def record_outputs(flag: str, path: str | Path, *, overwrite: bool = False) -> list[Output]:
    """A MindRecord file and its index, for :func:`mindrlhf.utils.outputs.check_outputs`.

    Raises:
        DataError: MindRecord does not take the name.
    """
    path = Path(path)
    forbidden = sorted(set(path.name) & set("\\/:*?\"<>|`&';"))
    if forbidden or path.name != path.name.strip(" "):
        raise DataError(
            f"{flag} {path}: MindRecord does not take a file name with "
            f"{' '.join(forbidden) or 'outer blanks'}; give another path"
        )
    if path.is_symlink():
        raise DataError(
            f"{flag} {path}: is a symbolic link, but the index of a MindRecord file must be beside it; give "
            f"{os.path.realpath(path)}"
        )
    return [
        Output(flag, path, file_of("a MindRecord file", partial(_has, _DATA_START, 8)), overwrite),
        Output(flag, index_path(path), file_of("its index", partial(_has, _INDEX_START, 0)), overwrite),
    ]


def _has(start: bytes, offset: int, path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(offset + len(start))[offset:] == start


def write_mindrecord(
    path: str | Path, schema: Mapping[str, Column], batches: Iterable[Batch], *, overwrite: bool = False
) -> int:
    """Writes a MindRecord file (and its index ``<path>.db``) from a stream of batches.

    On any failure, one inside ``batches`` included, nothing is left behind and an older file stays as it was.
    Batches of a hundred rows or more are written fastest.

    Args:
        path: the output file; keep its name afterwards, since the index refers to it.
        schema: the columns.
        batches: each maps every column to an array (B, length) of exactly the column's type; B may vary.
        overwrite: replace an existing file.

    Returns:
        The number of rows written.

    Raises:
        MindRLHFError: the output exists or cannot be written.
        DataError: the data set would be empty.
        ValueError: a batch does not fit the schema.
    """
    check_outputs(record_outputs("output", path, overwrite=overwrite), [])
    with atomic_records([Path(path)]) as [temporary]:
        return write_rows(temporary, schema, batches)


@contextmanager
def atomic_records(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Yields temporary paths of MindRecord files that become ``paths`` together when the block succeeds.

    After an exception nothing is left behind, and older files are as they were.

    Raises:
        DataError: a file cannot be written.
    """
    moves: list[tuple[Path, Path, Path]] = []
    try:
        with ExitStack() as stack:
            for path in map(Path.absolute, paths):
                stack.enter_context(parents_of(path))
                # The index holds the file's own name, so the temporary one differs in its directory.
                directory = path.with_name(f".{path.name}.tmp-{os.getpid()}")
                stack.callback(shutil.rmtree, directory, ignore_errors=True)
                shutil.rmtree(directory, ignore_errors=True)
                directory.mkdir()
                temporary = directory / path.name
                old = path.with_name(f".{path.name}.old-{os.getpid()}")
                moves += [
                    (temporary, path, old),
                    (index_path(temporary), index_path(path), index_path(old)),
                ]
            yield [temporary for temporary, _, _ in moves[::2]]
            umask = os.umask(0)
            os.umask(umask)
            for temporary, _, _ in moves:
                temporary.chmod(0o666 & ~umask)  # MindSpore makes them readable by the owner alone
            swap_in(*moves)
            for _, _, old in moves:
                remove(old)
    except OSError as error:
        named = ", ".join(map(str, paths))
        raise DataError(
            f"{named}: cannot be written ({error.strerror or error}); free space, or give another path"
        ) from error


def write_rows(path: Path, schema: Mapping[str, Column], batches: Iterable[Batch]) -> int:
    """Writes a MindRecord file to a path of :func:`atomic_records`; returns the number of rows.

    Raises:
        DataError: the data set would be empty.
        OSError: the file cannot be written.
        ValueError: a batch does not fit the schema.
    """
    # Here, not at the top: it costs two seconds, which a mistyped flag should not.
    from mindspore.mindrecord import FileWriter

    with _as_os_error():
        writer = FileWriter(str(path), shard_num=1)
        writer.add_schema(
            {name: {"type": column.dtype, "shape": [column.length]} for name, column in schema.items()}
        )
    rows = 0
    for batch in batches:
        size = _check_batch(batch, schema)
        if size:
            with _as_os_error():
                writer.write_raw_data([{name: batch[name][i] for name in schema} for i in range(size)])
        rows += size
    if rows == 0:
        raise DataError(f"{path.name}: there are no rows to write")
    with _as_os_error():
        writer.commit()
    return rows


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Turns MindSpore's errors, of a device that is full for example, into one line."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"MindRecord: {_first_line(error)}") from error


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
