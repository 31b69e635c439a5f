"""Signals become a request that all ranks agree on; a second Ctrl-C ends the process at once."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mindrlhf.runtime.device import Runtime
from mindrlhf.runtime.host_exchange import HostExchange
from mindrlhf.runtime.signals import StopRequest, stop_on_signals

ALONE = HostExchange(Runtime(0, 1))


def wait_for(number: int, stop: StopRequest) -> None:
    end = time.monotonic() + 5
    while stop.signal != number and time.monotonic() < end:
        time.sleep(0.005)
    assert stop.signal == number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_becomes_a_request_and_handlers_come_back(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    threads = threading.active_count()
    with stop_on_signals() as stop:
        assert not stop.is_agreed(ALONE)
        os.kill(os.getpid(), number)
        wait_for(number, stop)
        assert stop.agreed == 0, "nobody has agreed yet"
        assert stop.is_agreed(ALONE)
        assert stop.agreed == number
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    assert threading.active_count() == threads


def test_sigterm_may_come_often_and_wins_over_sigint() -> None:
    heard: list[str] = []
    with stop_on_signals() as stop:
        stop.on_first = heard.append
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            time.sleep(0.05)
        wait_for(signal.SIGTERM, stop)
    assert heard == ["SIGTERM"]
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(signal.SIGINT, stop)
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(signal.SIGTERM, stop)


def test_sigint_is_taken_back_from_a_library_that_takes_it() -> None:
    """MindSpore sets a handler of its own while it compiles, behind Python's back."""
    with stop_on_signals() as stop:
        ctypes.CDLL(None).signal(int(signal.SIGINT), ctypes.c_void_p(1))  # SIG_IGN
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(signal.SIGINT, stop)


@pytest.mark.parametrize("heard", [(0, 15, 0), (15, 0, 2), (0, 0, 15)])
def test_one_signalled_rank_stops_all(heard: tuple[int, ...]) -> None:
    class Others:
        """An exchange in which rank r has heard ``heard[r]``."""

        def every_rank(self, array: np.ndarray) -> np.ndarray:
            assert array.dtype == np.int32
            return np.array(heard, np.int32)[:, None]

    stop = StopRequest()
    exchange: Any = Others()
    assert stop.is_agreed(exchange)
    assert stop.agreed == signal.SIGTERM


def test_leaving_after_sigint_is_an_interrupt_and_after_sigterm_is_none() -> None:
    stop = StopRequest()
    stop.agreed = signal.SIGTERM
    stop.leave(Path("iteration_000001"))
    stop.agreed = signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        stop.leave(Path("iteration_000001"))


def test_outside_the_main_thread_nothing_is_installed() -> None:
    found = SimpleNamespace()

    def work() -> None:
        with stop_on_signals() as stop:
            found.signal = stop.signal
            found.handler = signal.getsignal(signal.SIGTERM)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found.signal == 0
    assert found.handler == signal.getsignal(signal.SIGTERM)


BUSY = """
import hashlib, sys
from mindrlhf.runtime.signals import stop_on_signals
with stop_on_signals():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 1 << 30)  # minutes without a bytecode, as in a graph
"""


def test_sigint_twice_ends_a_process_that_runs_no_python(repo_root: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY],
        cwd=repo_root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None, "once is a request"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=5)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "another one ends it at once" in said
    assert "interrupted twice" in said


WORKER = """
import sys, time
from mindrlhf.runtime.signals import stop_on_signals
with stop_on_signals() as stop:
    print("ready", flush=True)
    while not stop.signal:
        time.sleep(0.01)
print(stop.signal, flush=True)
"""
# A parent that is there until it is killed, as msrun is for its workers.
PARENT = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]], env={**os.environ, "MS_ROLE": "MS_WORKER"})
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_worker_whose_msrun_is_killed_is_asked_to_stop(repo_root: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, WORKER], cwd=repo_root, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    parent.kill()
    assert parent.stdout.read() == f"{int(signal.SIGTERM)}\n", "the worker's own line, at its end"
    parent.wait()
