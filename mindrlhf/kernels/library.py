"""Compiles the C++ operators of this package and keeps the library.

As PyTorch's ``torch.utils.cpp_extension.load`` does: compiled on first use, then taken from a directory,
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
from contextlib import suppress
from pathlib import Path

from mindrlhf.utils.errors import MindRLHFError
from mindrlhf.utils.files import atomic_file, locked
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.ranks import env_int

logger = get_logger(__name__)

SOURCES = ("decode_steps.cpp", "fused_layers.cpp", "log_probs.cpp")
PRODUCTS = "bf16_products.cpp"
"""Compiled in only where the processor has instructions for it."""

NEEDED_FLAG = "avx512_bf16"
"""The processor's name for the instructions of bfloat16 products (those with AMX have them, too)."""

KERNEL_FLAGS = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"})
"""Instructions that the operators are written in."""

SWITCH = "MINDRLHF_KERNELS"
"""Environment variable: ``off`` leaves everything to MindSpore's own operations, for comparison."""

# GCC 12 takes its own vector intrinsics for uninitialized (its bug 105593).
_OPTIONS = (
    "-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
)  # fmt: skip


def processor_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """What the processor can do, in Linux's terms; empty where Linux does not say."""
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
def kernel_library() -> Path | None:
    """The operators of this package, compiled, loaded, and told how many threads to use.

    ``None`` where this machine cannot have them: MindSpore's own operations then do the same more slowly, and
    a warning says why.
    """
    try:
        return _library()
    except MindRLHFError as error:
        logger.warning("MindSpore's own operations in place of our kernels, which is slower: %s", error)
        return None


def product_library() -> Path:
    """The same for bfloat16 products, for which MindSpore has no operations.

    Raises:
        MindRLHFError: the processor has no bfloat16 instructions, or there is no oneDNN or working compiler.
    """
    check_processor()
    try:
        _onednn()
        return _library()
    except MindRLHFError as error:
        raise MindRLHFError(f"--cpu_matmul_dtype bfloat16: {error}; or leave it at float32") from error


@functools.cache
def _library() -> Path:
    flags = processor_flags()
    if os.environ.get(SWITCH) == "off":
        raise MindRLHFError(f"{SWITCH} is off")
    if missing := KERNEL_FLAGS - flags:
        raise MindRLHFError(f"this processor ({platform.machine()}) has no {', '.join(sorted(missing))}")
    sources, wanted, linked = list(SOURCES), sorted(KERNEL_FLAGS), []
    if NEEDED_FLAG in flags:
        wanted.append(NEEDED_FLAG)
        with suppress(MindRLHFError):
            onednn = _onednn()
            linked = [f"-L{onednn.parent}", f"-l:{onednn.name}", f"-Wl,-rpath,{onednn.parent}"]
            sources.append(PRODUCTS)
    library = _compiled(sources, [f"-m{flag.replace('_', '')}" for flag in wanted] + linked)
    # MindSpore loads the same file, so there is one copy of its state.
    ctypes.CDLL(str(library)).SetThreads(thread_count())
    return library


def thread_count() -> int:
    """Threads of one product: ``OMP_NUM_THREADS``, or an equal part of the processors it may use.

    Workers on other hosts count too, so with several hosts ``OMP_NUM_THREADS`` should be set.
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
        raise MindRLHFError(f"there is no lib/libdnnl.so.3 (oneDNN) in MindSpore's package {places}")
    return found[0]


def _compiled(sources: list[str], options: list[str]) -> Path:
    """The library made from sources of this package and the headers beside them."""
    here = Path(__file__).parent
    compiler = os.environ.get("CXX") or "g++"
    command = [compiler, *_OPTIONS, *(str(here / source) for source in sources), *options]
    digest = hashlib.sha256(" ".join([compiler, *_OPTIONS, *options]).encode())
    for path in [*(here / source for source in sources), *sorted(here.glob("*.h"))]:
        digest.update(b"|" + path.read_bytes())
    library = library_directory() / f"kernels_{digest.hexdigest()[:16]}.so"
    if library.is_file():
        return library
    if shutil.which(compiler) is None:
        raise MindRLHFError(f"there is no C++ compiler {compiler}; install g++, or set CXX")
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with locked(library.parent):  # one worker compiles, the others find it
            if not library.is_file():
                _compile(command, library)
    except subprocess.CalledProcessError as error:
        raise MindRLHFError(f"{' '.join(command)} failed:\n{error.stderr[-2000:]}") from error
    except subprocess.TimeoutExpired as error:
        raise MindRLHFError(f"{' '.join(command)} took longer than {error.timeout:.0f} s") from error
    except OSError as error:
        raise MindRLHFError(f"{library} cannot be written: {error.strerror}; set XDG_CACHE_HOME") from error
    return library


def _compile(command: list[str], library: Path) -> None:
    logger.info("compiling the CPU kernels with %s into %s", command[0], library)
    with atomic_file(library) as temporary:
        whole = [*command, "-o", str(temporary)]
        subprocess.run(whole, check=True, capture_output=True, text=True, timeout=300)
