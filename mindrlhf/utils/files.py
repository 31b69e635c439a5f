"""Files and directories that appear complete or not at all, and directories that belong to one job."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from mindrlhf.utils.errors import CheckpointError, MindRLHFError, inline_list
from mindrlhf.utils.logging import get_logger

LOCK_FILE = ".lock"
"""In a directory of results, see :func:`job_lock`."""

_LOCK_TRIES, _LOCK_SECONDS = 5, 0.05  # another process may just be asking, see check_unlocked

logger = get_logger(__name__)


def _temporary(path: Path, label: str = "tmp") -> Path:
    return path.with_name(f".{path.name}.{label}-{os.getpid()}")


def read_json_object(
    path: Path, error: type[MindRLHFError], remedy: str = "fix it or copy it again"
) -> dict[str, Any]:
    """The JSON object in a UTF-8 file.

    Args:
        path: the file.
        error: what is raised.
        remedy: ends its message.

    Raises:
        MindRLHFError: ``error``; the file cannot be read, is not JSON or not an object, or in one of its
            objects a key occurs twice: Python would silently take the second value.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = [f"{key!r:.60}" for key, count in Counter(key for key, _ in pairs).items() if count > 1]
            raise ValueError(f"keys occur twice: {inline_list(twice)}")
        return found

    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=unique)
    except OSError as fault:
        raise error(f"{path}: cannot be read ({fault.strerror}); {remedy}") from fault
    except (ValueError, RecursionError) as fault:
        raise error(f"{path}: not JSON ({fault}); {remedy}") from fault
    if not isinstance(content, dict):
        raise error(f"{path}: expected a JSON object, found a JSON {type(content).__name__}; {remedy}")
    return content


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
def job_lock(directory: Path, *, joins: bool = False) -> Iterator[Callable[[str], None]]:
    """Keeps every other job out of a directory of results while the block runs, and no longer.

    All processes of a job share one flock, which the kernel drops when they end, however they end; Linux
    carries it to the other hosts of an NFS. For people, its file names the job's first process, or the last
    one that has received a signal. A process that leaves while no other has the lock removes the file. When
    several leave at once, or are killed, the file may stay; it is not locked.

    Args:
        directory: ``--save_ckpt_dir``; made when missing, and removed if the block fails and leaves it empty.
        joins: False in the first process of a job; True in all others, once the first has the lock.

    Yields:
        a function that tells other jobs why this one is about to end.

    Raises:
        MindRLHFError: another job has the directory.
        CheckpointError: it cannot be written.
    """
    path = directory / LOCK_FILE
    holder = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}"

    def describe(end: str = "") -> None:
        with suppress(OSError), path.open("r+", encoding="utf-8") as file:  # the lock holds without it
            file.write(f"{holder}, which has received {end} and is ending\n" if end else f"{holder}\n")
            file.truncate()

    with ExitStack() as stack:
        try:
            probe_directory(directory)
            stack.enter_context(parents_of(path))
            descriptor = _open_locked(path, fcntl.LOCK_SH if joins else fcntl.LOCK_EX)
        except OSError as error:
            raise CheckpointError(
                f"--save_ckpt_dir {directory}: cannot be written ({error.strerror}); "
                "give a directory that can"
            ) from error
        try:
            if not joins:
                describe()
                _lock(descriptor, fcntl.LOCK_SH, directory)
            yield describe
        finally:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            os.close(descriptor)


def check_unlocked(directory: Path) -> None:
    """Refuses a directory of results that another job has; takes nothing, so every process may ask.

    Raises:
        MindRLHFError: it is in use, perhaps by the job before, which is ending.
    """
    with suppress(OSError):  # no lock, or no right to it: the job finds out when it takes the directory
        descriptor = os.open(directory / LOCK_FILE, os.O_RDWR)
        try:
            _lock(descriptor, fcntl.LOCK_EX, directory)
        finally:
            os.close(descriptor)


def _open_locked(path: Path, kind: int) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor, kind, path.parent)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the job before has removed it meanwhile


def _lock(descriptor: int, kind: int, directory: Path) -> None:
    try:
        for _ in range(_LOCK_TRIES):
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                return
            time.sleep(_LOCK_SECONDS)
        holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "another job"
        raise MindRLHFError(
            f"--save_ckpt_dir {directory} is in use by {holder}; wait until that has ended, or give another "
            "directory"
        )
    except OSError as error:  # ENOLCK, ENOSYS: Lustre without -o flock, for example
        logger.warning("%s cannot be locked (%s): make sure only one job uses it", directory, error.strerror)


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
        for directory in {path.parent for _, path, _ in moves}:
            sync_to_disk(directory)
    except BaseException:
        for move in moves:
            new, path, old = move
            is_away = os.path.lexists(old)
            if os.path.lexists(path) and (is_away or move not in there):
                path.replace(new)
            if is_away:
                old.replace(path)
        raise
