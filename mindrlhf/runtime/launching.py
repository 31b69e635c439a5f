"""How a job is launched: the number of its workers, msrun's scheduler, the scratch directory of a process."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import tempfile

from mindrlhf.runtime.supervision import membership
from mindrlhf.utils.errors import MindRLHFError
from mindrlhf.utils.ranks import env_world_size


def count_workers(*, use_parallel: bool) -> int:
    """How many workers msrun has started; 1 without msrun.

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
    """What msrun's scheduler does: it serves the workers, and returns when they have ended.

    Raises:
        MindRLHFError: something else listens on its port; the workers would wait for minutes.
    """
    _check_port(os.environ.get("MS_SCHED_HOST", "127.0.0.1"), os.environ.get("MS_SCHED_PORT", ""))
    from mindspore.communication import init

    init()


def _check_port(host: str, port: str) -> None:
    if not port.isdecimal():
        return  # MindSpore's own complaint names it
    try:
        with socket.socket() as listener:
            # As the scheduler itself does: connections of an earlier job that linger are no hindrance.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, int(port)))
    except (OSError, OverflowError) as error:
        raise MindRLHFError(
            f"the scheduler cannot listen on port {port} of {host} ({getattr(error, 'strerror', error)}); "
            "give msrun another --master_port, or end the job that has it"
        ) from error


def scratch_directory() -> str:
    """A temporary directory, removed at exit, for what MindSpore and MindFormers write unasked."""
    member = membership()  # its folder goes even when this process is killed
    directory = tempfile.mkdtemp(prefix="mindrlhf_", dir=None if member is None else member.directory)
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    os.environ.setdefault("LOCAL_DEFAULT_PATH", directory)  # MindFormers' log, made when it is imported
    os.environ.setdefault("MS_OM_PATH", directory)  # what a failed compilation leaves
    return directory
