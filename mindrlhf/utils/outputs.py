"""What a program writes, held against all that it reads and all that is there, before any work is done.

An output never takes the place of an input or of another output, however the two paths are written. What is
there is replaced only when ``--overwrite`` allows it, and only when it is of the kind that is written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

from mindrlhf.utils.errors import MindRLHFError
from mindrlhf.utils.files import probe_directory

KindCheck = Callable[[Path], str]
"""An existing path -> why it is not of the kind that is written, in words; empty when it is."""


def file_of(kind: str, is_one: Callable[[Path], bool]) -> KindCheck:
    """The :attr:`Output.fault` of a file.

    Args:
        kind: with its article, as "a report".
        is_one: whether an existing file is of that kind.
    """

    def fault(path: Path) -> str:
        if path.is_file() and is_one(path):
            return ""
        return f"is {'a directory, ' if path.is_dir() else ''}not {kind}"

    return fault


def directory_of(
    kind: str, is_ours: Callable[[Path], bool], is_one: Callable[[Path], bool] = lambda path: True
) -> KindCheck:
    """The :attr:`Output.fault` of a directory that is replaced as a whole.

    Args:
        kind: with its article, as "a directory of ranks".
        is_ours: whether an entry is one that the program writes.
        is_one: whether a directory that holds such entries alone, and at least one, is of that kind.
    """

    def fault(path: Path) -> str:
        if not path.is_dir():
            return f"is a file, not {kind}"
        entries = sorted(path.iterdir())
        foreign = [entry.name for entry in entries if not is_ours(entry)]
        if foreign:
            return f"is not {kind} alone, it also holds {', '.join(foreign)}"
        return "" if not entries or is_one(path) else f"is not {kind}"

    return fault


@dataclass(frozen=True)
class Output:
    """A file or directory that a program writes.

    Attributes:
        flag: which names it.
        path: as given.
        fault: see :data:`KindCheck`.
        overwrite: whether an existing one may be replaced.
        names: for a directory that is added to, not replaced: the entries that are written in it.
    """

    flag: str
    path: Path
    fault: KindCheck = lambda path: ""
    overwrite: bool = False
    names: re.Pattern[str] | None = None

    def takes(self, path: Path) -> str:
        """How writing the output would change ``path``, in words; empty when it would not."""
        entry = _entry(path, self.path)
        if self.names is not None:
            return "writes in" if entry and self.names.fullmatch(entry) else ""
        return "" if entry is None else "holds" if entry else "is"


def check_outputs(outputs: Iterable[Output], inputs: Iterable[tuple[str, Path | None]]) -> None:
    """Refuses outputs that would destroy something.

    A new name in the working directory may lie in an input: otherwise ``--tokenizer_path .`` would forbid
    every relative path.

    Args:
        outputs: all that a program writes, the files that come along with another one included.
        inputs: all that it reads, each with its flag.

    Raises:
        MindRLHFError: an output is, holds or lies in an input or another output; something else than such an
            output is there, or one that must not be replaced; or it cannot be written.
    """
    outputs, here = list(outputs), Path.cwd()
    read = [(flag, path) for flag, path in inputs if path is not None]
    untouchable = [*read, *_files_in(read), ("the working directory", here)]
    relations = [
        *((one, one.takes(path), flag, path) for one in outputs for flag, path in untouchable),
        *((one, one.takes(other.path), other.flag, other.path) for one, other in permutations(outputs, 2)),
        *(
            (one, "lies in", flag, path)
            for one in outputs
            for flag, path in read
            if _entry(one.path, path) is not None and _entry(here, path) is None
        ),
    ]
    for output, relation, flag, path in relations:
        if relation:
            raise MindRLHFError(f"{output.flag} {output.path}: {relation} {flag} {path}; give another path")
    for output in outputs:
        check_place(output)


def _files_in(read: Iterable[tuple[str, Path]]) -> Iterator[tuple[str, Path]]:
    """The files of directories that are read; of their subdirectories those that lie elsewhere, too."""
    for flag, path in read:
        yield from ((flag, file) for file in path.glob("*") if file.is_file())
        place = Path(os.path.realpath(path))
        for file in path.glob("*/*"):  # the depth of rank directories
            with suppress(OSError):
                is_here = os.path.realpath(file) == str(place / file.relative_to(path))
                if file.is_file() and (not is_here or file.stat().st_nlink > 1):
                    yield flag, file


def check_place(output: Output) -> None:
    """Refuses to replace what must not be replaced, and a place where nothing can be written.

    Raises:
        MindRLHFError: what is there is of another kind, or exists without ``overwrite``; or nothing can be
            written there.
    """
    path, where = output.path, f"{output.flag} {output.path}"
    if output.names is not None:
        return
    try:
        if path.exists():
            if fault := output.fault(path):
                raise MindRLHFError(f"{where}: {fault}; give another path")
            if not output.overwrite and (path.is_file() or any(path.iterdir())):
                raise MindRLHFError(f"{where}: exists; give another path, or --overwrite to replace it")
        probe_directory(Path(os.path.realpath(path)).parent)
    except OSError as error:
        raise MindRLHFError(
            f"{where}: cannot be written ({error.strerror or error}); give another path"
        ) from error


def _entry(inner: Path, outer: Path) -> str | None:
    """The name in ``outer`` of what is or holds ``inner``; empty for one place, ``None`` for two apart."""
    inner, outer = (Path(os.path.realpath(path)) for path in (inner, outer))
    name = ""
    for place in (inner, *inner.parents):
        if _is_same(place, outer):
            return name
        name = place.name
    return None


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one == other or one.samefile(other)  # hard links, and places that are mounted twice
    except OSError:
        return False
