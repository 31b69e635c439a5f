"""How a job is launched: the number of its workers, msrun's scheduler, the scratch directory of a process."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import tempfile

from mindrlhf.runtime.supervision import current_process
from mindrlhf.utils.errors import MindRLHFError
from mindrlhf.utils.ranks import env_world_size


def count_workers(*, use_parallel: bool) -> int:
    """The number of workers that msrun has started; 1 without msrun.

    Raises:
        MindRLHFError: ``--use_parallel False`` under msrun.
    """
    world_size = env_world_size()
    if not use_parallel and world_size > 1:
        raise MindRLHFError(
            f"--use_parallel False, but msrun started {world_size} workers; pass --use_parallel True, or "
            "start the script without msrun"
        )
    return world_size


def serve_as_scheduler() -> None:
    """Serves the workers as msrun's scheduler; returns when they have ended.

    Raises:
        MindRLHFError: another program listens on its port, for which the workers would wait for minutes.
    """
    _check_port(os.environ.get("MS_SCHED_HOST", "127.0.0.1"), os.environ.get("MS_SCHED_PORT", ""))
    from mindspore.communication import init

    init()


def _check_port(host: str, port: str) -> None:
    if not port.isdecimal():
        return  # MindSpore's own error names it
    try:
        with socket.socket() as listener:
            # As the scheduler itself does: lingering connections of an earlier job do not matter.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, int(port)))
    except (OSError, OverflowError) as error:
        raise MindRLHFError(
            f"the scheduler cannot listen on port {port} of {host} ({getattr(error, 'strerror', error)}); "
            "give msrun another --master_port, or end the job that has it"
        ) from error


def scratch_directory() -> str:
    """A temporary directory, removed at exit, for files that MindSpore and MindFormers write unprompted."""
    process = current_process()  # its directory is removed even when this process is killed
    directory = tempfile.mkdtemp(prefix="mindrlhf_", dir=None if process is None else process.directory)
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    os.environ.setdefault("LOCAL_DEFAULT_PATH", directory)  # MindFormers' log, made when it is imported
    os.environ.setdefault("MS_OM_PATH", directory)  # what a failed compilation leaves
    return directory
