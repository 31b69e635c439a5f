"""Files and directories that appear complete or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mindrlhf.utils.errors import CheckpointError


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


def check_experience_place(path: Path | None) -> None:
    """Refuses a ``--save_data_file`` whose directory cannot be made or written; leaves nothing behind.

    Raises:
        CheckpointError: names the path.
    """
    try:
        if path is not None:
            probe_directory(path.absolute().parent)
    except OSError as error:
        raise CheckpointError(
            f"--save_data_file {path}: cannot be written ({error.strerror}); give another path"
        ) from error


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
    as it was.

    Raises:
        FileNotFoundError: the block ended without writing the temporary file.
    """
    path = Path(path)
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
    and the older directory is as it was.
    """
    path = Path(path)
    temporary, old = _temporary(path), _temporary(path, "old")
    with parents_of(path):
        remove(temporary)
        try:
            temporary.mkdir()
            yield temporary
            for entry in [*temporary.rglob("*"), temporary]:
                if not entry.is_symlink():
                    sync_to_disk(entry)
            swap_in(temporary, path, old)
        except BaseException:
            remove(temporary)
            raise
    remove(old)


def swap_in(new: Path, path: Path, old: Path) -> None:
    """Moves ``new`` to ``path``, and what was there, if anything, to ``old``.

    A directory cannot be renamed over a non-empty one. A link is moved, never what it names. After a failure
    all is as before.
    """
    remove(old)
    if os.path.lexists(path):
        path.replace(old)
    try:
        new.replace(path)
    except BaseException:
        if os.path.lexists(old):
            old.replace(path)
        raise
    sync_to_disk(path.parent)
