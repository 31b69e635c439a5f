"""Memory of the process on the host."""

from __future__ import annotations

import ctypes
import gc
import sys


def release_freed_memory() -> None:
    """Collects garbage and returns freed memory to the system.

    glibc keeps freed memory in its arenas, for example after checkpoints were loaded. Other C libraries have
    no such call; there this only collects garbage.
    """
    gc.collect()
    if not sys.platform.startswith("linux"):
        return
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
