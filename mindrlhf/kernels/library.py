"""Compiles the C++ operators of this package and keeps what comes out.

As PyTorch's ``torch.utils.cpp_extension.load`` does: compiled when first wanted, then taken from a directory,
under a digest of the source, the command and the libraries it is linked with. One file serves all processes.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path

from mindrlhf.utils.errors import MindRLHFError
from mindrlhf.utils.files import atomic_file, locked
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.ranks import env_int

logger = get_logger(__name__)

PRODUCTS = Path(__file__).with_name("bf16_products.cpp")
DECODE_STEPS = Path(__file__).with_name("decode_steps.cpp")
NEEDED_FLAG = "avx512_bf16"
"""The processor's name for the instructions of bfloat16 products (those with AMX have them, too)."""

DECODE_FLAGS = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"})
"""Instructions that ``decode_steps.cpp`` is written in."""

# GCC 12 takes its own vector intrinsics for uninitialized (its bug 105593).
_OPTIONS = (
    "-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
)  # fmt: skip


def processor_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """What the processor can do, in Linux's words; nothing where Linux does not say."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return next((set(line.split()[2:]) for line in lines if line.startswith("flags")), set())


def check_processor() -> None:
    """Refuses bfloat16 products on a processor without instructions for them.

    Raises:
        MindRLHFError: it has none; oneDNN would emulate them, slower than float32.
    """
    if NEEDED_FLAG not in processor_flags():
        raise MindRLHFError(
            f"--cpu_matmul_dtype bfloat16: this processor ({platform.machine()}) has no {NEEDED_FLAG} "
            "instructions; leave it at float32"
        )


@functools.cache
def product_library() -> Path:
    """The operators of ``bf16_products.cpp``, compiled, loaded, and told how many threads to use.

    Raises:
        MindRLHFError: the processor has no bfloat16 instructions, there is no compiler, or it fails.
    """
    check_processor()
    onednn = _onednn()
    linked = (f"-L{onednn.parent}", f"-l:{onednn.name}", f"-Wl,-rpath,{onednn.parent}")
    try:
        return _loaded(_compiled(PRODUCTS, linked))
    except MindRLHFError as error:
        raise MindRLHFError(f"--cpu_matmul_dtype bfloat16: {error}, or leave it at float32") from error


@functools.cache
def decode_library() -> Path | None:
    """The operators of ``decode_steps.cpp``, likewise; nothing where this machine cannot have them.

    Generation does the same in MindSpore's own operations then, two to three times slower; a line says why.
    """
    flags = processor_flags()
    try:
        if missing := DECODE_FLAGS - flags:
            raise MindRLHFError(f"this processor ({platform.machine()}) has no {', '.join(sorted(missing))}")
        wanted = sorted(DECODE_FLAGS | ({NEEDED_FLAG} & flags))
        return _loaded(_compiled(DECODE_STEPS, tuple(f"-m{flag.replace('_', '')}" for flag in wanted)))
    except MindRLHFError as error:
        logger.warning("decoding by MindSpore's own operations, which is slower: %s", error)
        return None


def thread_count() -> int:
    """Threads of one product: ``OMP_NUM_THREADS``, or an equal part of the processors it may use.

    Workers on other hosts count too, so with several hosts ``OMP_NUM_THREADS`` should say it.
    """
    given = env_int("OMP_NUM_THREADS")
    if given:
        return max(1, given)
    workers = max(1, env_int("MS_WORKER_NUM") or 1)
    return max(1, len(os.sched_getaffinity(0)) // workers)


def library_directory() -> Path:
    """Where compiled operators are kept: ``~/.cache/mindrlhf/kernels``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mindrlhf" / "kernels"


def _onednn() -> Path:
    """MindSpore's own oneDNN."""
    package = importlib.util.find_spec("mindspore")
    places = [] if package is None else list(package.submodule_search_locations or [])
    found = [file for place in places for file in sorted(Path(place, "lib").glob("libdnnl.so.3*"))]
    if not found:
        raise MindRLHFError(
            f"--cpu_matmul_dtype bfloat16: no lib/libdnnl.so.3 (oneDNN) in MindSpore's package {places}; "
            "leave it at float32"
        )
    return found[0]


def _loaded(library: Path) -> Path:
    """Tells it its threads. MindSpore loads the same file, so there is one copy of what it keeps."""
    ctypes.CDLL(str(library)).SetThreads(thread_count())
    return library


def _compiled(source: Path, options: tuple[str, ...]) -> Path:
    """The library made from a source and the headers beside it."""
    compiler = os.environ.get("CXX") or "g++"
    command = [compiler, *_OPTIONS, str(source), *options]
    made_from = [path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h")))]
    digest = hashlib.sha256(b"|".join([*made_from, " ".join([compiler, *_OPTIONS, *options]).encode()]))
    library = library_directory() / f"{source.stem}_{digest.hexdigest()[:16]}.so"
    if library.is_file():
        return library
    if shutil.which(compiler) is None:
        raise MindRLHFError(f"there is no C++ compiler {compiler}; install g++, or set CXX")
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with locked(library.parent):  # one worker compiles, the others find it
            if not library.is_file():
                logger.info("compiling %s with %s into %s", source.name, compiler, library)
                with atomic_file(library) as temporary:
                    subprocess.run(
                        [*command, "-o", str(temporary)], check=True, capture_output=True, text=True, timeout=300
                    )
    except subprocess.CalledProcessError as error:
        raise MindRLHFError(f"{' '.join(command)} failed:\n{error.stderr[-2000:]}") from error
    except subprocess.TimeoutExpired as error:
        raise MindRLHFError(f"{' '.join(command)} took longer than {error.timeout:.0f} s") from error
    except OSError as error:
        raise MindRLHFError(f"{library} cannot be written: {error.strerror}; set XDG_CACHE_HOME") from error
    return library
