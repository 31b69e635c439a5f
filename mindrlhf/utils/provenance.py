"""What a run was made with: resolved configuration, versions, git revision and machine.

It holds no environment variable, host or user name, command line or git remote, because those hold secrets.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from mindrlhf.utils.files import atomic_file
from mindrlhf.utils.result_files import CONFIG_FILE

PACKAGES = ("mindrlhf", "mindspore", "mindformers", "numpy")
HIDDEN = "(hidden)"

# Not "token" as a part of a name: pad_token_id and stop_token_ids are not secrets.
_SECRET_KEY = re.compile(
    r"passw(or)?d|secret|credential|api_?key|private_?key|(access|auth|bearer|hf|hub)_?token|^token$",
    re.IGNORECASE,
)
_CREDENTIALS_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
_GIT_SECONDS = 10
_BLOCK_BYTES, _BLOCKS = 4 << 20, 64


def provenance(
    configuration: Any, *, package_directory: Path | None = None, now: datetime | None = None
) -> dict[str, Any]:
    """Everything that ``config.json`` holds, as plain JSON values.

    Args:
        configuration: the resolved configuration: a dataclass such as ``JobConfig``, or a mapping.
        package_directory: whose git revision counts; that of the imported ``mindrlhf`` by default.
        now: time of recording; the clock's by default.

    Returns:
        keys ``created`` (UTC, ISO 8601), ``versions``, ``git`` (``None`` outside a git tree), ``machine``
        and ``configuration``.
    """
    directory = Path(__file__).resolve().parents[1] if package_directory is None else package_directory
    return {
        "created": (now or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "git": git_revision(directory),
        "machine": machine(),
        "configuration": plain(configuration),
    }


def fingerprints(
    data: Mapping[str, Path | None], weights: Mapping[str, Path | None] | None = None
) -> dict[str, dict[str, Any]]:
    """Path, bytes and digest of each input: a file, or a directory with all below it, linked ones included.

    The digest is the beginning of a SHA-256 of names, sizes and contents; of a file that cannot be read only
    name and size. Of weights, which every start of a job would read for minutes, 64 blocks of 4 MiB count in
    a file beyond 256 MiB, spread evenly from its first byte to its last: other weights differ in all of
    them, but a change between two blocks passes unseen.

    Args:
        data: by a name of the input; ``None`` for one that is not given.
        weights: likewise.
    """
    given = {name: path for name, path in (weights or {}).items() if path is not None}
    known = {path: _fingerprint(path, _BLOCKS) for path in given.values()}  # models often share a file
    found = {name: _fingerprint(path) for name, path in data.items() if path is not None}
    return found | {name: known[path] for name, path in given.items()}


def _fingerprint(path: Path, most_blocks: int | None = None) -> dict[str, Any]:
    below = (Path(top, name) for top, _, names in os.walk(path, followlinks=True) for name in names)
    files = [path] if path.is_file() else sorted(file for file in below if file.is_file())
    digest, total = hashlib.sha256(), 0
    for file in files:
        size = file.stat().st_size
        total += size
        digest.update(f"{'' if file == path else file.relative_to(path)}\0{size}\0".encode())
        blocks = min(needed := -(-size // _BLOCK_BYTES), most_blocks or needed)
        with suppress(OSError), file.open("rb") as content:
            for block in range(blocks):
                content.seek(max(size - _BLOCK_BYTES, 0) * block // max(blocks - 1, 1))
                digest.update(content.read(_BLOCK_BYTES))
    return {"path": str(path), "bytes": total, "digest": digest.hexdigest()[:16]}


def write_provenance(directory: Path, record: Mapping[str, Any]) -> Path:
    """Writes the ``config.json`` of a run atomically; returns the file.

    Args:
        directory: results of the run; made when missing.
        record: from :func:`provenance`.
    """
    path = directory / CONFIG_FILE
    with atomic_file(path) as temporary:
        text = json.dumps(record, indent=1, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def read_provenance(path: Path) -> dict[str, Any]:
    """The record of :func:`write_provenance`; empty when the file is missing or something else."""
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return record if {"created", "versions", "configuration"} <= record.keys() else {}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def recipe_of(record: Mapping[str, Any]) -> str:
    """``ppo``, or the stage before it that a record of :func:`provenance` is of."""
    return str(record["configuration"].get("stage", "ppo"))


def versions() -> dict[str, str | None]:
    """Versions of Python, of this library and of what it is built on; ``None`` for what is not installed.

    Read from the packages' metadata: importing them takes seconds.
    """
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = installed_version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def git_revision(directory: Path) -> dict[str, Any] | None:
    """Commit of the git tree that tracks the package in ``directory``, and whether files differ from it.

    A package in a virtual environment inside another git tree is not tracked there, and that tree's commit is
    not taken for the package's.

    Returns:
        ``{"revision": 40 hex digits, "modified": bool}``, or ``None`` when there is no git or no such tree.
    """
    if _git(directory, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    revision = _git(directory, "rev-parse", "HEAD")
    if revision is None:
        return None
    changes = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return {"revision": revision, "modified": bool(changes)}


def machine() -> dict[str, Any]:
    """The machine: system, processor, CPUs (also those that this process may use) and bytes of memory."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "cpu_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory_bytes(),
    }


def plain(value: Any) -> Any:
    """``value`` as JSON holds it: dataclasses and mappings as dicts, paths and other types as strings.

    The values of keys that name a secret are replaced by ``(hidden)``, and so are credentials in a URL. A
    float that is not finite becomes its name, because JSON has none.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {
            str(key): HIDDEN if _SECRET_KEY.search(str(key)) else plain(entry) for key, entry in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(entry) for entry in value), key=str)
    if isinstance(value, float) and value - value != 0.0:
        return str(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return _CREDENTIALS_IN_URL.sub(f"{HIDDEN}@", str(value))


def _git(directory: Path, *arguments: str) -> str | None:
    """Output of a git command in ``directory``; ``None`` when it fails or there is no git."""
    # GIT_DIR of a surrounding hook would name another tree.
    environment = {name: text for name, text in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=_GIT_SECONDS,
            env=environment | {"GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _processor() -> str | None:
    """Name of the processor, from Linux's /proc/cpuinfo where that names one."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or None
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or None


def _memory_bytes() -> int | None:
    """Memory of the machine, or of its container where that is less."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(name).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return total
