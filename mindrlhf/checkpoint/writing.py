"""Writes a source to a weights file that appears whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO, cast

from mindrlhf.checkpoint.ckpt_file import write_ckpt
from mindrlhf.checkpoint.manifest import Digest
from mindrlhf.checkpoint.opening import CKPT, MINDSPORE_SUFFIXES
from mindrlhf.checkpoint.safetensors_file import write_safetensors
from mindrlhf.checkpoint.source import WeightSource
from mindrlhf.checkpoint.views import CastSource
from mindrlhf.utils.errors import CheckpointError
from mindrlhf.utils.files import atomic_file, probe_directory


class _Digested:
    """A file for writing whose bytes go through a digest, too."""

    def __init__(self, file: IO[bytes], digest: Digest) -> None:
        self._file = file
        self._digest = digest

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)


def write_weights(
    path: Path,
    source: WeightSource,
    *,
    producer: str = "ms",
    description: str | None = None,
    digest: Digest | None = None,
) -> None:
    """Writes every tensor of ``source`` to ``path``, as ``.ckpt`` or ``.safetensors`` by its suffix.

    Args:
        path: the file; an older one is replaced when the new one is whole.
        source: what to write, one block at a time.
        producer: the ``format`` in a safetensors header: "ms", or "pt" as transformers expects.
        description: what a progress bar should say; none is shown without.
        digest: takes in what is written, so that a manifest needs no second reading.

    Raises:
        CheckpointError: another suffix, the disk refuses, or values do not fit a :class:`CastSource`'s type.
    """
    check_suffix(path)
    try:
        with atomic_file(path) as temporary:
            with temporary.open("wb") as opened:
                file = opened if digest is None else cast(IO[bytes], _Digested(opened, digest))
                if path.suffix == CKPT:
                    write_ckpt(file, source, description)
                else:
                    write_safetensors(file, source, {"format": producer}, description)
            if isinstance(source, CastSource):
                source.check_overflow()
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}; free space, or write elsewhere"
        ) from error


def check_suffix(path: Path) -> None:
    """Raises :class:`CheckpointError` unless ``path`` is named like a MindSpore weights file."""
    if path.suffix not in MINDSPORE_SUFFIXES:
        raise CheckpointError(f"{path}: the output must end with {' or '.join(MINDSPORE_SUFFIXES)}")


def check_output_file(path: Path, *, overwrite: bool) -> None:
    """Raises :class:`CheckpointError` when ``path`` cannot or must not be written."""
    check_suffix(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a directory, the output must be a file: choose another name")
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} exists: choose another name or give --overwrite")
    _check_place(path)


def _check_place(path: Path) -> None:
    """Finds out before any work whether ``path`` can be made."""
    try:
        probe_directory(path.absolute().parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}; write elsewhere") from error


def check_output_directory(path: Path, is_ours: Callable[[Path], bool], *, overwrite: bool) -> None:
    """Raises :class:`CheckpointError` when directory ``path`` cannot or must not be replaced.

    Args:
        path: the output directory.
        is_ours: whether an entry of it is one that a former output would have; anything else would be
            lost with the directory, so it must be moved away first.
        overwrite: whether a former output may be replaced.
    """
    _check_place(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file, the output must be a directory: choose another name")
    entries = sorted(path.iterdir())
    if entries and not overwrite:
        raise CheckpointError(f"{path} exists and is not empty: choose another name or give --overwrite")
    foreign = [entry.name for entry in entries if not is_ours(entry)]
    if foreign:
        raise CheckpointError(
            f"{path} also holds {', '.join(foreign)}, which overwriting would delete: move it"
        )
