"""``manifest.json``: size and SHA-256 of every file of a checkpoint, so that damage is detected at once.

It is written last. A checkpoint without one is half-written; one whose files differ from it is damaged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from mindrlhf.utils.errors import CheckpointError
from mindrlhf.utils.files import atomic_file

MANIFEST_FILE = "manifest.json"
VERSION = 1

_BLOCK_BYTES = 8 << 20
_DEEP_OR_HUGE = (RecursionError, OverflowError)  # JSON nested too deep; the size 1e999


class FileRecord(NamedTuple):
    """The manifest's record of one file."""

    size: int
    sha256: str


class Digest:
    """Takes in the bytes of a file as they are written or read."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._size = 0

    def update(self, data: bytes) -> None:
        """The next bytes."""
        self._hash.update(data)
        self._size += len(data)

    @property
    def record(self) -> FileRecord:
        """Of all bytes so far."""
        return FileRecord(self._size, self._hash.hexdigest())


def digest_file(path: Path) -> FileRecord:
    """Size and SHA-256 of a file, read in blocks."""
    digest = Digest()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.record


def write_manifest(directory: Path, files: Mapping[str, FileRecord]) -> Path:
    """Writes the manifest of ``directory``; ``files`` has one record per path below it."""
    path = directory / MANIFEST_FILE
    content = {
        "version": VERSION,
        "files": {name: record._asdict() for name, record in sorted(files.items())},
    }
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def read_manifest(directory: Path) -> dict[str, FileRecord]:
    """The records of a checkpoint's files by their path below ``directory``.

    Raises:
        CheckpointError: there is no manifest, or it is damaged.
    """
    path = directory / MANIFEST_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise CheckpointError(f"{path}: version {content['version']}, this program reads {VERSION}")
        files = {
            _inside(name): FileRecord(int(entry["size"]), str(entry["sha256"]))
            for name, entry in content["files"].items()
        }
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory}: no {MANIFEST_FILE}, so this is not a complete checkpoint; name an "
            "iteration_NNNNNN directory (step_NNNNNN of sft.py and reward_model.py) that has one"
        ) from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError, *_DEEP_OR_HUGE) as error:
        raise CheckpointError(f"{path}: damaged ({error}); resume from another checkpoint") from error
    if not files:
        raise CheckpointError(f"{path}: damaged (it names no file); resume from another checkpoint")
    return files


def find_size_faults(directory: Path, files: Mapping[str, FileRecord]) -> list[str]:
    """One line per file that is missing or has another size; reads no content."""
    faults = []
    for name, record in files.items():
        path = directory / name
        try:
            size = path.stat().st_size
        except OSError:
            faults.append(f"{name} is missing")
            continue
        if size != record.size:
            faults.append(f"{name} has {size} bytes, the manifest says {record.size}")
    return faults


def find_damaged(directory: Path, files: Mapping[str, FileRecord], names: Iterable[str]) -> list[str]:
    """Those of ``names`` whose content is not what the manifest says, or cannot be read."""
    damaged = []
    for name in names:
        try:
            is_whole = digest_file(directory / name) == files[name]
        except OSError:
            is_whole = False
        if not is_whole:
            damaged.append(name)
    return damaged


def _inside(name: str) -> str:
    """``name``, refused if it leads out of the checkpoint."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"it names {name!r}, which is not in the checkpoint")
    return name
