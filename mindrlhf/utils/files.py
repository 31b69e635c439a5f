"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _temporary(path: Path, label: str = "tmp") -> Path:
    return path.with_name(f".{path.name}.{label}-{os.getpid()}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` that becomes ``path`` when the block succeeds.

    The parent directory is made when missing; on an exception nothing is left behind and an older
    ``path`` stays as it was.

    Raises:
        FileNotFoundError: the block ended without writing the temporary file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    _remove(temporary)
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    except BaseException:
        _remove(temporary)
        raise
    _sync(path.parent)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields an empty temporary directory that becomes ``path`` when the block succeeds.

    An existing ``path`` is replaced, and only when the new one is whole; on an exception nothing is
    left behind and the older directory stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _temporary(path), _temporary(path, "old")
    _remove(temporary)
    temporary.mkdir()
    try:
        yield temporary
        for entry in [*temporary.rglob("*"), temporary]:
            if not entry.is_symlink():
                _sync(entry)
        _swap_in(temporary, path, old)
    except BaseException:
        _remove(temporary)
        raise
    _remove(old)
    _sync(path.parent)


def _swap_in(new: Path, path: Path, old: Path) -> None:
    """Moves ``new`` to ``path``; a directory cannot be renamed over a non-empty one, so via ``old``."""
    if not path.exists():
        new.replace(path)
        return
    _remove(old)
    path.replace(old)
    try:
        new.replace(path)
    except BaseException:
        old.replace(path)
        raise
