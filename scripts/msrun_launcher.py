"""Runs a script on several workers of this machine with MindSpore's ``msrun``.

    python scripts/msrun_launcher.py --workers 4 --log_dir logs script.py --flag value ...

It adds to ``msrun``: a free port, this interpreter and this repository for the workers, the output of one
worker on the terminal, one message when the job fails, and no process left behind when the job fails, runs
out of time or is stopped. SIGTERM and Ctrl-C go to the workers, which may save; a second Ctrl-C kills them.

Exit code: 0; 2 for errors that you can fix; 124 out of time; 130 after Ctrl-C; 143 when SIGTERM ended the job
before it saved; else that of the worker that failed first, 128 + N when signal N killed it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
TIMED_OUT = 124
"""Exit code of a job that ran out of time, as of the ``timeout`` command."""
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
STOP_GRACE = 120.0

_POLL_SECONDS = 0.2
# After a worker was killed, the scheduler waits for its heartbeat (47 s, measured), and msrun for the
# scheduler.
_SCHEDULER_GRACE_SECONDS = 2.0
_WORKER_FAILED = re.compile(r"Worker process (\d+) exit with exception. Error code: (-?\d+)")
_STARTED = re.compile(r"Start worker process with rank id:(\d+)")
_SUPERVISOR = "mindrlhf.runtime.supervisor"
_SUPERVISOR_SAYS = "ERROR job failed: "  # mindrlhf/runtime/failures.py, in the scheduler's log


def launch(
    script: Path,
    arguments: Sequence[str] = (),
    *,
    workers: int,
    log_dir: Path,
    timeout: float | None = None,
    show_rank: int | None = 0,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    output: IO[str] | None = None,
    stop_grace: float = STOP_GRACE,
    master_port: int = 0,
) -> int:
    """Runs ``script`` on ``workers`` workers and waits for all of them.

    Args:
        script, arguments: the program of every worker and of msrun's scheduler.
        workers: number of workers.
        log_dir: directory for ``worker_{rank}.log``, ``scheduler.log`` and ``msrun.log``; made when missing.
        timeout: seconds after which the job is killed.
        show_rank: worker whose output is copied to ``output``, by default standard output, while it runs.
        env, cwd: environment variables to add, working directory of the workers.
        stop_grace: seconds that workers have to end after a signal before they are killed.
        master_port: of msrun's scheduler; 0 for any free port.

    Returns:
        the exit code, see the module.
    """
    stream, log_dir = output or sys.stdout, log_dir.resolve()
    log_dir.mkdir(parents=True, exist_ok=True)
    for old in (*log_dir.glob("worker_*.log"), *log_dir.glob("worker_*.stacks"), log_dir / "scheduler.log"):
        old.unlink(missing_ok=True)
    with (log_dir / "msrun.log").open("w") as msrun_log, _signals() as signals:
        process = subprocess.Popen(
            [*_msrun(workers, log_dir, master_port or free_port()), str(script.resolve()), *arguments],
            env=_environment(env or {}),
            cwd=cwd,
            stdout=msrun_log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        draws_itself = os.environ.get("MINDRLHF_CONSOLE", "").startswith("/dev/")  # rank 0, on a terminal
        shown = log_dir / f"worker_{show_rank}.log" if show_rank is not None and not draws_itself else None
        job = _Job(process, log_dir, signals, shown, stream)
        try:
            code = job.wait(timeout, stop_grace)
        finally:
            _kill_tree(process)
    job.copy()
    if code == TIMED_OUT:
        stream.write(f"\nmsrun job ran out of time ({timeout:g} s); logs are in {log_dir}\n")
    elif code and not signals:
        stream.write(f"\n{job.failure()}\nmsrun job failed with exit code {code}; logs are in {log_dir}\n")
    stream.flush()
    return code


class _Job:
    """A running msrun with its workers, its output, and the signals received."""

    def __init__(
        self, process: subprocess.Popen[bytes], log_dir: Path, signals: list[int], shown: Path | None,
        stream: IO[str],
    ) -> None:  # fmt: skip
        self.process, self.log_dir, self.signals = process, log_dir, signals
        self.shown, self.stream = shown, stream
        self.ranks: dict[int, int] = {}  # of the workers by process number
        self._sent = self._copied = 0

    def wait(self, timeout: float | None, stop_grace: float) -> int:
        """Waits for msrun, forwards signals, and ends a scheduler that a failure has left alone."""
        start = time.monotonic()
        alone_since: float | None = None
        kill_at = float("inf") if timeout is None else start + timeout
        while True:
            code = self.process.poll()
            self.copy()
            if code is not None:
                return self._exit_code(code)
            now = time.monotonic()
            if len(self.signals) > self._sent:
                if not self._forward_signals() or self.signals.count(signal.SIGINT) > 1:
                    return 128 + self.signals[-1]
                kill_at = min(kill_at, now + stop_grace)
            if now > kill_at:
                return 128 + self.signals[0] if self.signals else TIMED_OUT
            children = self._children()
            alone = bool(children) and not any(child.pid in self.ranks for child in children)
            alone_since = (alone_since or now) if alone and self._first_failure() else None
            if alone_since is not None and now - alone_since > _SCHEDULER_GRACE_SECONDS:
                for child in children:
                    _kill(child)
            time.sleep(_POLL_SECONDS)

    def copy(self) -> None:
        """Copies new output of the shown worker."""
        if self.shown is None or not self.shown.exists():
            return
        with self.shown.open("rb") as file:
            file.seek(self._copied)
            content = file.read()
        if content:
            self.stream.write(content.decode(errors="replace"))
            self.stream.flush()
            self._copied += len(content)

    def failure(self) -> str:
        """The one message: that of the supervisor, or what can be seen from outside."""
        for line in reversed(_lines(self.log_dir / "scheduler.log")):
            if line.startswith(_SUPERVISOR_SAYS):
                return line
        printed = _lines(self.log_dir / "msrun.log")
        pid, code = self._first_failure() or (0, 0)
        started = set(map(int, _STARTED.findall("\n".join(printed)))) - set(self.ranks.values())
        if pid not in self.ranks and len(started) != 1:
            return f"{_SUPERVISOR_SAYS}{_last(printed)}"
        rank = self.ranks[pid] if pid in self.ranks else started.pop()  # ended before it was inspected
        log = self.log_dir / f"worker_{rank}.log"
        cause = (
            f"exit code {code}: {_last(_lines(log))}"
            if code > 0
            else f"ended by {signal.Signals(-code).name}"
        )
        return f"{_SUPERVISOR_SAYS}rank {rank}: {cause}; its log: {log}"

    def _forward_signals(self) -> bool:
        """Sends new signals to the workers, not to msrun, which would kill them; False without workers."""
        workers = [child for child in self._children() if child.pid in self.ranks]
        for number in self.signals[self._sent :]:
            for worker in workers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.send_signal(number)
        self._sent = len(self.signals)
        return bool(workers)

    def _exit_code(self, code: int) -> int:
        _, failed = self._first_failure() or (0, code)
        if signal.SIGINT in self.signals:
            return INTERRUPTED
        if self.signals and failed in (-signal.SIGTERM, TERMINATED):
            return TERMINATED
        if code == 0:
            return 0
        return failed if failed > 0 else 128 - failed

    def _first_failure(self) -> tuple[int, int] | None:
        """Process number and exit code of the worker that msrun saw fail."""
        found = _WORKER_FAILED.search("\n".join(_lines(self.log_dir / "msrun.log")))
        return (int(found[1]), int(found[2])) if found else None

    def _children(self) -> list[psutil.Process]:
        """Live processes that msrun has started; records the ranks of the workers among them."""
        try:
            children = [c for c in psutil.Process(self.process.pid).children() if _is_alive(c)]
        except psutil.NoSuchProcess:
            return []
        for child in children:
            if child.pid not in self.ranks:
                with contextlib.suppress(psutil.Error, ValueError):
                    env = child.environ()
                    if env.get("MS_ROLE") == "MS_WORKER":
                        self.ranks[child.pid] = int(env["RANK_ID"])
        return children


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT while the block runs; does nothing outside the main thread."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda number, _: received.append(number)) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def free_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def is_free(port: int) -> bool:
    """Whether nothing listens on a port of this machine."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return True
    return False


def _msrun(workers: int, log_dir: Path, port: int) -> list[str]:
    """The command msrun with its flags; the script and its flags follow."""
    count = str(workers)
    return [
        sys.executable,
        str(Path(sys.executable).parent / "msrun"),
        *("--worker_num", count, "--local_worker_num", count),
        *("--master_addr", "127.0.0.1", "--master_port", str(port)),
        *("--join", "True", "--log_dir", str(log_dir)),
        # No such rank: msrun's own tail loses the last lines, so this launcher copies the log.
        *("--tail_worker_log", count),
    ]


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    env = {"GLOG_v": "3", **os.environ, **extra}
    # msrun starts "python", which must be this interpreter.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), env.get("PYTHONPATH", "")]))
    return env


def _is_alive(process: psutil.Process) -> bool:
    """psutil raises when a process ends between two queries."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kills msrun and all its descendants; workers lead their own sessions, so a group is not enough."""
    try:
        started = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        started = []
    if process.poll() is None:
        process.kill()
    for child in started:
        with contextlib.suppress(psutil.Error):
            if _SUPERVISOR not in child.cmdline():  # it cleans up after the others and ends by itself
                child.kill()
    psutil.wait_procs(started, timeout=10)
    process.wait()


def _lines(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines() if log.exists() else []


def _last(lines: Sequence[str]) -> str:
    """The last line that names an exception, else the last that is not empty."""
    texts = [line for line in lines if line.strip()]
    raised = [text for text in texts if re.match(r"[\w.]*(Error|Exception)\b", text)]
    return ([*texts[-1:], *raised[-1:]] or ["it printed nothing"])[-1]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; everything after the script belongs to the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    job = parser.add_argument_group("job")
    job.add_argument("--workers", type=int, default=1, help="number of workers (default 1)")
    job.add_argument("--log_dir", type=Path, default=Path("msrun_log"), help="logs (default msrun_log)")
    job.add_argument("--timeout", type=float, help="seconds after which the job is killed")
    job.add_argument("--show_rank", type=int, default=0, help="worker whose output is shown (default 0)")
    job.add_argument("--master_port", type=int, default=0, help="scheduler's port (default: a free one)")
    grace = "seconds that workers may save after SIGTERM or Ctrl-C before they are killed (default 120)"
    job.add_argument("--stop_grace", type=float, default=STOP_GRACE, metavar="SECONDS", help=grace)
    program = parser.add_argument_group("program")
    program.add_argument("script", type=Path, help="Python script that every worker runs")
    program.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own flags")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    if not 0 <= args.show_rank < args.workers:
        parser.error(f"--show_rank {args.show_rank} is not one of the {args.workers} workers")
    if not args.script.is_file():
        parser.error(f"no such script: {args.script}; give the path of one")
    if args.log_dir.is_file():
        parser.error(f"--log_dir {args.log_dir} is a file; give a directory")
    if args.master_port and not 1024 <= args.master_port <= 65535:
        parser.error(f"--master_port must be from 1024 to 65535, got {args.master_port}")
    if args.master_port and not is_free(args.master_port):
        parser.error(f"--master_port {args.master_port} is in use; leave the choice to the launcher")
    return args


def main() -> int:
    """Runs the launcher."""
    args = vars(parse_args())
    return launch(args.pop("script"), args.pop("arguments"), **args)


if __name__ == "__main__":
    sys.exit(main())
