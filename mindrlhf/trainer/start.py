"""How every job starts: which worker this is, where MindSpore's litter goes, checks of what flags name."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import tempfile
from pathlib import Path

from mindrlhf.configs.schema import RunConfig
from mindrlhf.data.tokenizer import Tokenizer
from mindrlhf.data.tokenizer_loading import load_tokenizer
from mindrlhf.utils.errors import CheckpointError, MindRLHFError
from mindrlhf.utils.files import probe_directory
from mindrlhf.utils.ranks import env_world_size
from mindrlhf.utils.supervision import membership


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


def litter_directory() -> str:
    """A temporary directory, removed at exit, for what MindSpore and MindFormers write unasked."""
    member = membership()  # its folder goes even when this process is killed
    litter = tempfile.mkdtemp(prefix="mindrlhf_", dir=None if member is None else member.directory)
    atexit.register(shutil.rmtree, litter, ignore_errors=True)
    os.environ.setdefault("LOCAL_DEFAULT_PATH", litter)  # MindFormers' log, made when it is imported
    os.environ.setdefault("MS_OM_PATH", litter)  # what a failed compilation leaves
    return litter


def load_model_tokenizer(path: Path, config: RunConfig) -> Tokenizer:
    """The tokenizer of ``--tokenizer_path``, checked against the model's vocabulary.

    Raises:
        MindRLHFError: it has more tokens than the model.
    """
    tokenizer = load_tokenizer(path)
    if tokenizer.size > config.model.vocab_size:
        raise MindRLHFError(
            f"--tokenizer_path {path} has {tokenizer.size} tokens, more than the "
            f"model.model_config.vocab_size {config.model.vocab_size} of {config.path}; give the "
            "model's own"
        )
    return tokenizer


def check_experience_place(path: Path | None) -> None:
    """Refuses a ``--save_data_file`` whose directory cannot be written; leaves nothing behind.

    Raises:
        CheckpointError: it cannot be made or written.
    """
    try:
        if path is not None:
            probe_directory(path.absolute().parent)
    except OSError as error:
        raise CheckpointError(
            f"--save_data_file {path}: cannot be written ({error.strerror}); give another path"
        ) from error


def check_writable(directory: Path, rank: int) -> None:
    """Refuses a directory of ``--save_ckpt_dir`` that ``rank`` cannot write in; leaves nothing behind.

    Raises:
        CheckpointError: it cannot be made or written.
    """
    try:
        probe_directory(directory)
    except OSError as error:
        raise CheckpointError(
            f"--save_ckpt_dir {directory}: cannot be written by rank {rank} ({error.strerror}); give a "
            "directory that can"
        ) from error
