"""Runs a script on several workers of this machine with MindSpore's ``msrun``.

    python scripts/msrun_launcher.py --workers 4 --log_dir logs script.py --flag value ...

What it adds to ``msrun``: a free port, this interpreter and this repository for the workers, the output
of one worker on the terminal, the logs of failed workers at the end, and no process left behind when
the job fails, runs out of time or is interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
TIMED_OUT = 124
"""Exit code of a job that ran out of time; the ``timeout`` command's."""

_POLL_SECONDS = 0.2
# After a worker is killed, the scheduler waits for its heartbeat (measured: 47 s), and msrun for it.
_SCHEDULER_GRACE_SECONDS = 2.0
_WORKER_FAILED = "exit with exception"
_TAIL_LINES = 60


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
) -> int:
    """Runs ``script`` on ``workers`` workers and waits for all of them.

    Args:
        script: Python script; every worker and msrun's scheduler run it.
        arguments: its arguments.
        workers: number of workers.
        log_dir: where ``worker_{rank}.log``, ``scheduler.log`` and ``msrun.log`` go; made when missing.
        timeout: seconds after which the job is killed.
        show_rank: worker whose output is copied to ``output`` while it runs.
        env: environment variables to add.
        cwd: working directory of the workers; this process's by default.
        output: stream to report to; standard output by default.

    Returns:
        0 when every worker succeeded, 124 after a timeout, msrun's exit code otherwise.
    """
    stream = output or sys.stdout
    script, log_dir = script.resolve(), log_dir.resolve()
    log_dir.mkdir(parents=True, exist_ok=True)
    logs = [log_dir / f"worker_{rank}.log" for rank in range(workers)]
    for log in logs:
        log.unlink(missing_ok=True)
    shown = logs[show_rank] if show_rank is not None else None
    msrun_path = log_dir / "msrun.log"
    with msrun_path.open("w") as msrun_log:
        process = subprocess.Popen(
            _command(script, arguments, workers, log_dir),
            env=_environment(env or {}),
            cwd=cwd,
            stdout=msrun_log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = _wait(process, msrun_path, timeout, shown, stream)
        finally:
            _kill_tree(process)
    if code:
        reason = f"ran out of time ({timeout:g} s)" if code == TIMED_OUT else f"failed with exit code {code}"
        stream.write(f"\nmsrun job {reason}; logs are in {log_dir}\n{failure_report(log_dir, workers)}")
    stream.flush()
    return code


def failure_report(log_dir: Path, workers: int) -> str:
    """The last lines of the workers that raised, of all workers when none did, else of msrun itself."""
    texts = {rank: _tail(log_dir / f"worker_{rank}.log") for rank in range(workers)}
    raised = {rank: text for rank, text in texts.items() if "Traceback (most recent call last)" in text}
    shown = {f"worker {rank}": text for rank, text in (raised or texts).items() if text}
    if not shown:
        shown = {"msrun": _tail(log_dir / "msrun.log")}
    return "".join(f"--- end of the log of {name} ---\n{text}\n" for name, text in shown.items())


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _command(script: Path, arguments: Sequence[str], workers: int, log_dir: Path) -> list[str]:
    count = str(workers)
    return [
        sys.executable,
        str(Path(sys.executable).parent / "msrun"),
        *("--worker_num", count, "--local_worker_num", count),
        *("--master_addr", "127.0.0.1", "--master_port", str(free_port())),
        *("--join", "True", "--log_dir", str(log_dir)),
        # A rank that does not exist: msrun's own tail loses the last lines, so the log is copied here.
        *("--tail_worker_log", count),
        str(script),
        *arguments,
    ]


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    env = {"GLOG_v": "3", **os.environ, **extra}
    # msrun starts "python": it must be this one.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), env.get("PYTHONPATH", "")]))
    return env


def _wait(
    process: subprocess.Popen[bytes],
    msrun_log: Path,
    timeout: float | None,
    shown: Path | None,
    stream: IO[str],
) -> int:
    """Waits for msrun and copies a worker's log; after a failure it ends a scheduler left alone."""
    start = time.monotonic()
    alone_since: float | None = None
    position = 0
    while True:
        code = process.poll()
        position = _copy(shown, position, stream)
        if code is not None:
            return code
        now = time.monotonic()
        if timeout is not None and now - start > timeout:
            return TIMED_OUT
        children = _children(process)
        alone = bool(children) and all(_is_scheduler(child) for child in children)
        alone_since = (alone_since or now) if alone and _WORKER_FAILED in _tail(msrun_log) else None
        if alone_since is not None and now - alone_since > _SCHEDULER_GRACE_SECONDS:
            for child in children:
                _kill(child)
        time.sleep(_POLL_SECONDS)


def _copy(log: Path | None, position: int, stream: IO[str]) -> int:
    """Copies what ``log`` has beyond ``position`` and returns the new position."""
    if log is None or not log.exists():
        return position
    with log.open("rb") as file:
        file.seek(position)
        content = file.read()
    if content:
        stream.write(content.decode(errors="replace"))
        stream.flush()
    return position + len(content)


def _children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        children = psutil.Process(process.pid).children()
    except psutil.NoSuchProcess:
        return []
    return [child for child in children if _is_alive(child)]


def _is_alive(process: psutil.Process) -> bool:
    """A process may end between any two looks at it; psutil then says so by an exception."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


def _is_scheduler(process: psutil.Process) -> bool:
    try:
        return process.environ().get("MS_ROLE") == "MS_SCHED"
    except psutil.Error:
        return False


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kills msrun and all it started; its workers lead sessions of their own, so a group is not enough."""
    try:
        started = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        started = []
    if process.poll() is None:
        process.kill()
    for child in started:
        _kill(child)
    psutil.wait_procs(started, timeout=10)
    process.wait()


def _tail(log: Path) -> str:
    if not log.exists():
        return ""
    return "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of the launcher; everything after the script belongs to the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=1, help="number of workers (default 1)")
    parser.add_argument("--log_dir", type=Path, default=Path("msrun_log"), help="directory of the logs")
    parser.add_argument("--timeout", type=float, help="seconds after which the job is killed")
    parser.add_argument("--show_rank", type=int, default=0, help="worker whose output is shown (default 0)")
    parser.add_argument("script", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    if not 0 <= args.show_rank < args.workers:
        parser.error(f"--show_rank {args.show_rank} is not one of the {args.workers} workers")
    if not args.script.is_file():
        parser.error(f"no such script: {args.script}")
    return args


def main() -> int:
    """Runs the launcher; a SIGTERM ends the workers too."""
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return launch(
            args.script,
            args.arguments,
            workers=args.workers,
            log_dir=args.log_dir,
            timeout=args.timeout,
            show_rank=args.show_rank,
        )
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
