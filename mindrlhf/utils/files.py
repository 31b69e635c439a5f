"""Files and directories that appear complete or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def _temporary(path: Path, label: str = "tmp") -> Path:
    return path.with_name(f".{path.name}.{label}-{os.getpid()}")


def sync_to_disk(path: Path) -> None:
    """Returns when the content of a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Removes a file, a directory with all that is in it, or a link but not what it names."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def probe_directory(directory: Path) -> None:
    """Checks that files can be created in ``directory``, which need not exist; leaves nothing behind.

    Raises:
        OSError: they cannot, for example because a file is in the way.
    """
    place = next(path for path in [directory, *directory.absolute().parents] if path.exists())
    probe = place / f".write_test-{os.getpid()}"
    try:
        probe.touch()
    finally:
        with suppress(OSError):
            probe.unlink()


@contextmanager
def parents_of(path: Path) -> Iterator[None]:
    """Makes the directories above ``path``; when the block fails, those that it made are removed if empty."""
    missing = [parent for parent in path.absolute().parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        raise


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Lets one process of a machine at a time into the block; leaves nothing behind."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` that becomes ``path`` when the block succeeds.

    A missing parent directory is made. After an exception nothing is left behind, and an older ``path`` is
    as it was. A symbolic link stays one, to the new file.

    Raises:
        FileNotFoundError: the block ended without writing the temporary file.
    """
    path = Path(os.path.realpath(path))
    temporary = _temporary(path)
    with parents_of(path):
        remove(temporary)
        try:
            yield temporary
            sync_to_disk(temporary)
            temporary.replace(path)
        except BaseException:
            remove(temporary)
            raise
    sync_to_disk(path.parent)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields an empty temporary directory that becomes ``path`` when the block succeeds.

    An existing ``path`` is replaced once the new one is complete. After an exception nothing is left behind,
    and the older directory is as it was. A symbolic link stays one, to the new directory.
    """
    path = Path(os.path.realpath(path))
    temporary, old = _temporary(path), _temporary(path, "old")
    with parents_of(path):
        remove(temporary)
        try:
            temporary.mkdir()
            yield temporary
            for entry in [*temporary.rglob("*"), temporary]:
                if not entry.is_symlink():
                    sync_to_disk(entry)
            swap_in((temporary, path, old))
        except BaseException:
            remove(temporary)
            raise
    remove(old)


def swap_in(*moves: tuple[Path, Path, Path]) -> None:
    """For each ``(new, path, old)``, moves ``new`` to ``path``, and what was there, if anything, to ``old``.

    All that is there moves first, so that old and new files are never side by side. A directory cannot be
    renamed over a non-empty one. A link is moved, never what it names. After a failure all is as before.
    """
    for _, _, old in moves:
        remove(old)
    there = [move for move in moves if os.path.lexists(move[1])]
    try:
        for _, path, old in there:
            path.replace(old)
        for new, path, _ in moves:
            new.replace(path)
    except BaseException:
        for move in moves:
            new, path, old = move
            is_away = os.path.lexists(old)
            if os.path.lexists(path) and (is_away or move not in there):
                path.replace(new)
            if is_away:
                old.replace(path)
        raise
    for directory in {path.parent for _, path, _ in moves}:
        sync_to_disk(directory)
