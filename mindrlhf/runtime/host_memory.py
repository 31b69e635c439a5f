"""Memory of the process."""

from __future__ import annotations

import ctypes
import gc
import sys


def release_freed_memory() -> None:
    """Gives memory that was freed back to the system.

    glibc keeps it in its arenas, for instance after checkpoints were loaded. Elsewhere this only collects
    garbage.
    """
    gc.collect()
    if not sys.platform.startswith("linux"):
        return
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
