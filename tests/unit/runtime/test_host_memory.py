"""Freed memory goes back to the system."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from mindrlhf.runtime.host_memory import release_freed_memory


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_freed_memory_is_returned() -> None:
    # Blocks below the size from which malloc asks the system for each one, the last of them kept in use, so
    # that the heap cannot shrink from its end by itself.
    blocks = [bytearray(64_000) for _ in range(4_000)]
    last = blocks[-1]
    full = resident_bytes()
    del blocks
    release_freed_memory()
    assert resident_bytes() < full - 150_000_000
    assert len(last) == 64_000
