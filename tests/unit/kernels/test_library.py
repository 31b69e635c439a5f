"""Compiling the operators: what is refused, and that a compiled file is found again."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mindrlhf.kernels import library
from mindrlhf.utils.errors import MindRLHFError
from tests.unit.kernels.rounding import needs_bfloat16

ORIGINAL_FLAGS = library.processor_flags  # the fixture below replaces it


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv(library.SWITCH, raising=False)
    monkeypatch.setattr(library, "processor_flags", lambda: {library.NEEDED_FLAG, *library.KERNEL_FLAGS})
    forget()
    yield
    forget()


def forget() -> None:
    library._library.cache_clear()
    library.kernel_library.cache_clear()


def test_flags_are_those_of_the_first_processor(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    text = "processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16\n\nflags\t\t: fpu\n"
    cpuinfo.write_text(text, encoding="utf-8")
    assert ORIGINAL_FLAGS(cpuinfo) == {"fpu", "avx2", "avx512_bf16"}
    assert ORIGINAL_FLAGS(tmp_path / "none") == set()


def test_a_processor_without_the_instructions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "processor_flags", lambda: {"avx2"})
    with pytest.raises(MindRLHFError, match="no avx512_bf16 instructions; leave it at float32"):
        library.product_library()


def test_without_a_compiler_the_remedy_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    message = "there is no C++ compiler no-such-compiler; install g++, or set CXX"
    with pytest.raises(MindRLHFError, match=re.escape(f"bfloat16: {message}; or leave it at float32")):
        library.product_library()
    assert library.kernel_library() is None
    assert f"MindSpore's own operations in place of our kernels, which is slower: {message}" in caplog.text
    assert not library.library_directory().exists()


@pytest.mark.parametrize(
    ("flags", "switch", "message"),
    [
        ({"avx2", "fma"}, "on", "has no avx512bw, avx512dq, avx512f, avx512vl"),
        (None, "off", "MINDRLHF_KERNELS is off"),
    ],
)
def test_other_machines_do_without_kernels(
    flags: set[str] | None,
    switch: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if flags is not None:
        monkeypatch.setattr(library, "processor_flags", lambda: flags)
    monkeypatch.setenv(library.SWITCH, switch)
    assert library.kernel_library() is None
    assert message in caplog.text


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'no space left' >&2\nexit 1\n", encoding="utf-8")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(MindRLHFError, match="no space left"):
        library.product_library()
    assert not list(library.library_directory().glob("*"))


def test_without_onednn_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MindRLHFError, match=r"no lib/libdnnl\.so\.3"):
        library.product_library()


@needs_bfloat16
def test_kernels_do_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ctypes.CDLL(str(library.product_library()))
    forget()
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)
    without = ctypes.CDLL(str(library.kernel_library()))
    assert hasattr(whole, "RowsProduct")
    assert not hasattr(without, "RowsProduct")
    assert hasattr(without, "AttentionStepRounded")


@needs_bfloat16
def test_compiled_once_and_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first = library.product_library()
    assert [first] == list(library.library_directory().iterdir())
    made = first.stat().st_mtime_ns
    forget()
    assert library.product_library() == first
    assert first.stat().st_mtime_ns == made
    monkeypatch.setattr(library, "_OPTIONS", (*library._OPTIONS, "-g0"))
    forget()
    assert library.product_library() != first


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({}, 8),
        ({"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "4"}, 2),
        ({"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "64"}, 1),
    ],
)
def test_threads_are_this_workers_share(
    environment: dict[str, str], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert library.thread_count() == threads
