"""SIGTERM and SIGINT: all ranks of a job stop at the same safe point, with their state saved.

SIGTERM is how clusters preempt a job: it saves and ends with exit code 0. The first SIGINT (Ctrl-C) saves,
too, and ends with exit code 130; a second one ends the process at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mindrlhf.utils.command_line import EXIT_INTERRUPTED
from mindrlhf.utils.logging import get_logger

if TYPE_CHECKING:
    from mindrlhf.runtime.host_exchange import HostExchange

_PR_SET_PDEATHSIG = 1
_SIGACTION_BYTES = 256  # more than any struct sigaction has
_TAKE_BACK_SECONDS = 0.2

logger = get_logger(__name__)


class StopRequest:
    """Whether a signal has asked this worker, or any other, to stop.

    Attributes:
        signal: number of the signal that this worker has received, 0 if none.
        agreed: number of the signal for which all workers stop, 0 if none.
        on_first: called with the name of the first signal that this worker receives, in another thread.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.agreed = 0
        self.on_first: Callable[[str], object] = lambda name: None

    def receive(self, number: int) -> None:
        """Notes a signal; a second SIGINT ends the process."""
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            sys.stderr.write("interrupted twice: ending without saving\n")
            sys.stderr.flush()
            os._exit(EXIT_INTERRUPTED)
        if not self.signal:
            logger.warning(
                "%s: the job saves its state at the end of this iteration or step and stops%s",
                signal.Signals(number).name,
                "; another one ends it at once" if number == signal.SIGINT else "",
            )
            self.on_first(signal.Signals(number).name)
        self.signal = max(self.signal, number)  # SIGTERM wins over SIGINT

    def is_agreed(self, exchange: HostExchange) -> bool:
        """Whether any rank has received a signal; collective, with the same answer on every rank."""
        self.agreed = int(exchange.every_rank(np.array([self.signal], np.int32)).max())
        return bool(self.agreed)

    def leave(self, checkpoint: Path) -> None:
        """Logs how to resume.

        Raises:
            KeyboardInterrupt: the signal was SIGINT.
        """
        logger.info(
            "stopped by %s, the state is in %s; --resume_training True resumes from it",
            signal.Signals(self.agreed).name,
            checkpoint,
        )
        if self.agreed == signal.SIGINT:
            raise KeyboardInterrupt


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turns SIGTERM and SIGINT into a :class:`StopRequest` while the block runs.

    Python runs signal handlers between two bytecodes of the main thread, which may run a graph, or wait for a
    dead worker in a collective, for a long time. So another thread reads the signals' numbers from a socket,
    to which the interpreter writes them at once. That thread also takes SIGINT back from MindSpore, which
    turns it into SIGTERM from the start of a graph on: until 0.2 s later, Ctrl-C counts as SIGTERM.
    Outside the main thread nothing is installed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    _ask_for_sigterm_when_msrun_dies()
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, _leave_to_thread) for number in numbers}
    # Read here and not in the thread: before that first runs, MindSpore may have taken the signal.
    sigint = _Disposition(signal.SIGINT)
    thread = threading.Thread(target=_listen, args=(reader, request, sigint), name="signals", daemon=True)
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread.start()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()
        thread.join()
        reader.close()


def ignore_signals() -> None:
    """For msrun's scheduler: SIGTERM and SIGINT must not end it, because workers need it while they save."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _leave_to_thread(number: int, frame: object) -> None:
    """A handler that does nothing: without one, the signal would have its default effect."""


def _listen(reader: socket.socket, request: StopRequest, sigint: _Disposition) -> None:
    reader.settimeout(_TAKE_BACK_SECONDS)
    while True:
        try:
            numbers = reader.recv(64)
        except TimeoutError:
            sigint.restore()
            continue
        if not numbers:
            return
        for number in numbers:
            if number in (signal.SIGTERM, signal.SIGINT):
                request.receive(number)


class _Disposition:
    """The action of a signal in this process, as the C library holds it."""

    def __init__(self, number: int) -> None:
        self._library = ctypes.CDLL(None)
        self._number = number
        self._action = ctypes.create_string_buffer(_SIGACTION_BYTES)
        self._library.sigaction(number, None, self._action)

    def restore(self) -> None:
        self._library.sigaction(self._number, self._action, None)


def _ask_for_sigterm_when_msrun_dies() -> None:
    """Makes a worker whose msrun has died save and end instead of running on alone; Linux only."""
    if os.environ.get("MS_ROLE") == "MS_WORKER" and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
