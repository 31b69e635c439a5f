"""Compiled graphs kept from run to run, each under a digest of everything it was made from.

MindSpore's own compile cache has two traps (2.9.0, measured on CPU). A loaded graph finds its parameters by
name in ``parameters_dict()`` of the called cell: a parameter that the graph reaches otherwise, for example
through a closure, becomes separate memory with arbitrary content that no update reaches. And graphs are
numbered in order of compilation within a process: a run with another order silently loads wrong graphs. So
MindSpore is given a directory of this process that holds only the one graph that is wanted, and a graph with
a parameter that its cell does not list is not kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mindspore as ms
from mindspore.graph.api import _cell_graph_executor as executor
from mindspore.train.mind_ir_pb2 import ModelProto

from mindrlhf.runtime.device import Runtime
from mindrlhf.runtime.graph_identity import code_identity, identity_of, inputs_identity
from mindrlhf.utils.errors import MindRLHFError
from mindrlhf.utils.files import atomic_file, probe_directory
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.provenance import versions
from mindrlhf.utils.ranks import env_rank, env_world_size

logger = get_logger(__name__)

KEPT_BYTES = 2 << 30
"""Bytes of graphs kept per rank once a run has stored new ones; the least recently used are removed."""

_FORCE = "MS_DEV_FORCE_USE_COMPILE_CACHE"  # without it MindSpore stops looking for graphs after a miss
_NUMBERED = re.compile(r"(\w*compile_cache_)(\d+)(\.mindir)")


def cache_directory(rank: int, world_size: int) -> Path:
    """Where a rank's graphs are kept: in ``MS_COMPILER_CACHE_PATH``, or in ``~/.cache/mindrlhf/graphs``."""
    given = os.environ.get("MS_COMPILER_CACHE_PATH")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(given) if given else home / "mindrlhf" / "graphs") / f"rank_{rank}_of_{world_size}"


@dataclass(frozen=True)
class GraphRecord:
    """One graph of this process.

    Attributes:
        network: class of its cell.
        taken: whether it came from the cache.
        seconds: until it could run.
        compile_seconds: the same in the process that compiled it.
    """

    network: str
    taken: bool
    seconds: float
    compile_seconds: float


class CompileCache:
    """Makes MindSpore load graphs of cells from a directory, and stores there what had to be compiled.

    It listens to the phases of a run and logs after the first iteration how much time the cache has saved.

    Args:
        directory: of this rank; several processes may use it at the same time.
        scratch: an empty directory of this process alone.
        made_from: what graphs depend on besides their cells: configuration, code, versions.
        last_phase: of an iteration; when it has ended for the first time, all graphs have been compiled.

    Attributes:
        records: every graph so far.
        refused: networks whose graphs were not kept, with the parameters that their cells do not list.

    Raises:
        MindRLHFError: the directory cannot be written.
    """

    def __init__(
        self, directory: Path, scratch: Path, made_from: Iterable[Any], last_phase: str = ""
    ) -> None:
        try:
            probe_directory(directory)
        except OSError as error:
            raise MindRLHFError(
                f"--enable_compile_cache True: {directory} cannot be written ({error.strerror}); set "
                "MS_COMPILER_CACHE_PATH to a directory that can"
            ) from error
        self.directory = directory
        self.records: list[GraphRecord] = []
        self.refused: dict[str, list[str]] = {}
        self._last_phase = last_phase
        self._made_from = identity_of(*made_from)
        self._scratch = scratch
        self._place = _first_place(scratch)  # of MindSpore's next graph
        self._call: tuple[Any, ...] = ()
        self._entry: _Entry | None = None
        self._provided: tuple[Path, int] | None = None
        self._forced = os.environ.get(_FORCE)
        self._logged = False

    def open(self) -> None:
        """From now on graphs come from the cache when it has them."""
        ms.set_context(enable_compile_cache=True, compile_cache_path=str(self._scratch))
        os.environ[_FORCE] = "1"
        # One executor serves all cells. It calls the second method only for a graph that it does not have.
        executor.compile = self._compile
        executor._set_compile_cache_dep_files = self._before_compilation

    def close(self) -> None:
        """MindSpore compiles by itself again."""
        del executor.compile, executor._set_compile_cache_dep_files
        ms.set_context(enable_compile_cache=False)
        os.environ.pop(_FORCE)
        if self._forced is not None:
            os.environ[_FORCE] = self._forced

    def _compile(self, network: Any, *args: Any, **kwargs: Any) -> tuple[str, bool]:
        """Replaces the executor's own method, which usually finds nothing to do."""
        self._call = (network, args, kwargs)
        started = time.perf_counter()
        try:
            phase, is_new = type(executor).compile(executor, network, *args, **kwargs)
        finally:
            self._call = ()
        if is_new:
            self._after_compilation(network, time.perf_counter() - started)
        return phase, is_new

    def _before_compilation(self, phase: str) -> None:
        """Puts the graph where MindSpore will look for it."""
        # No files of the script: their digest is MindSpore's key to the whole directory.
        executor._graph_executor.set_compile_cache_dep_files([])
        network, args, kwargs = self._call
        key = identity_of(self._made_from, network, inputs_identity(args, kwargs))
        self._entry = _Entry(self.directory / f"{_name(network)}-{key[:40]}")
        self._provided = None
        for left in _graphs(self._scratch):
            left.unlink()
        if self._entry.is_whole():
            self._place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._entry.graph, self._place)
            self._provided = self._place, self._place.stat().st_mtime_ns

    def _after_compilation(self, network: Any, seconds: float) -> None:
        """Records whether MindSpore loaded the graph that was put there; stores one that it compiled."""
        assert self._entry is not None
        # MindSpore writes every graph that it compiles, over one that it could not read or beside it.
        written = [
            path for path in _graphs(self._scratch) if (path, path.stat().st_mtime_ns) != self._provided
        ]
        taken = self._provided is not None and not written
        for path in written[:1]:
            self._place = path
            unlisted = _unlisted_parameters(path, network)
            if unlisted:
                self.refused[_name(network)] = unlisted
                logger.debug("compile cache: %s is not kept, unlisted: %s", _name(network), unlisted)
            else:
                self._entry.store(path, seconds)
        self._place = _place_after(self._place)
        stored = self._entry.use() if taken else seconds
        self.records.append(GraphRecord(_name(network), taken, seconds, stored))

    def summary(self) -> str:
        """How much time the cache has saved so far, in one line."""
        taken = [record for record in self.records if record.taken]
        compiled = [record for record in self.records if not record.taken]
        parts = []
        if taken:
            now, before = sum(r.seconds for r in taken), sum(r.compile_seconds for r in taken)
            parts.append(
                f"{len(taken)} graph(s) taken in {now:.1f} s instead of {before:.1f} s to compile "
                f"({before - now:.1f} s gained)"
            )
        if compiled:
            parts.append(f"{len(compiled)} compiled in {sum(r.seconds for r in compiled):.1f} s")
            kept = len(compiled) - len(self.refused)
            parts.append(f"{kept} of them kept for the next run")
        return f"compile cache {self.directory}: {', '.join(parts) or 'no graph yet'}"

    def phase_started(self, name: str, total: int | None, unit: str) -> None:
        """Nothing to do."""

    def phase_advanced(self, done: int) -> None:
        """Nothing to do."""

    def phase_ended(self, name: str) -> None:
        """Logs :meth:`summary` after the first iteration, when all graphs have been compiled."""
        if name == self._last_phase and not self._logged:
            self._logged = True
            logger.info("%s", self.summary())
            if not all(record.taken for record in self.records):
                remove_oldest(self.directory, KEPT_BYTES)


def open_compile_cache(
    configuration: Mapping[str, Any], runtime: Runtime, scratch: Path, *, last_phase: str
) -> CompileCache:
    """The cache of this worker for a job, open.

    Args:
        configuration: all keys of the job that may enter a graph; jobs that agree in them share graphs.
        runtime: this worker.
        scratch: scratch directory of this process; a directory in it is used.
        last_phase: of an iteration, see :class:`CompileCache`.

    Raises:
        MindRLHFError: its directory cannot be written.
    """
    directory = cache_directory(runtime.rank, runtime.world_size)
    package = Path(__file__).resolve().parents[1]
    made_from = [configuration, versions(), code_identity(package), runtime.rank, runtime.world_size]
    cache = CompileCache(directory, scratch / "compile_cache", made_from, last_phase)
    cache.open()
    return cache


class _Entry:
    """A stored graph: its file, and beside it the digest of that file and the seconds of its compilation."""

    def __init__(self, stem: Path) -> None:
        self.graph = stem.with_name(stem.name + ".mindir")
        self.note = stem.with_name(stem.name + ".json")

    def is_whole(self) -> bool:
        """Whether it exists, unchanged since it was stored."""
        try:
            return bool(self._read()["sha256"] == _digest(self.graph))
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def use(self) -> float:
        """Marks it as used now; returns the seconds that its compilation took."""
        with suppress(OSError):
            os.utime(self.note)
        try:
            return float(self._read()["seconds"])
        except (OSError, ValueError, KeyError, TypeError):  # another process has removed it since
            return 0.0

    def store(self, graph: Path, seconds: float) -> None:
        """Stores a graph; a full disk costs the cache, not the run."""
        try:
            with atomic_file(self.graph) as temporary:
                shutil.copyfile(graph, temporary)
            with atomic_file(self.note) as temporary:
                temporary.write_text(json.dumps({"sha256": _digest(graph), "seconds": seconds}))
        except OSError as error:
            logger.warning("compile cache: %s cannot be kept (%s)", self.graph, error.strerror)

    def _read(self) -> Any:
        return json.loads(self.note.read_text(encoding="utf-8"))


def remove_oldest(directory: Path, limit: int) -> None:
    """Removes the least recently used graphs of a rank until they take at most ``limit`` bytes."""
    found = []
    for note in directory.glob("*.json"):
        with suppress(OSError):  # another process has removed it already
            graph = note.with_suffix(".mindir")
            found.append((note.stat().st_mtime, graph.stat().st_size, note, graph))
    total = 0
    for _, size, note, graph in sorted(found, reverse=True):
        total += size
        if total > limit:
            note.unlink(missing_ok=True)
            graph.unlink(missing_ok=True)


def _name(network: Any) -> str:
    return type(network).__name__.strip("_")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _first_place(scratch: Path) -> Path:
    """Where MindSpore looks for the first graph of this process."""
    role = "MS_WORKER" if env_world_size() > 1 else ""
    return scratch / f"rank_{env_rank()}" / "graph_cache" / f"{role}compile_cache_0.mindir"


def _place_after(place: Path) -> Path:
    found = _NUMBERED.fullmatch(place.name)
    assert found is not None
    return place.with_name(f"{found[1]}{int(found[2]) + 1}{found[3]}")


def _graphs(scratch: Path) -> list[Path]:
    return [path for path in scratch.glob("*/graph_cache/*.mindir") if _NUMBERED.fullmatch(path.name)]


def _unlisted_parameters(graph: Path, network: Any) -> list[str]:
    """Parameters of a graph that it would not share with other graphs if it were loaded."""
    model = ModelProto()
    model.ParseFromString(graph.read_bytes())
    listed = network.parameters_dict()
    # MindSpore writes "number of the graph:name".
    names = [parameter.name.partition(":")[2] for parameter in model.graph.parameter]
    return [name for name in names if name not in listed]
