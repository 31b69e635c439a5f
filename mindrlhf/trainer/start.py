"""How every job starts: which worker this is, where MindSpore's litter goes, checks of what flags name."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from mindrlhf.configs.schema import RunConfig
from mindrlhf.data.tokenizers import Tokenizer, load_tokenizer
from mindrlhf.utils.errors import CheckpointError, MindRLHFError
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
    """What msrun's scheduler does: it serves the workers, and returns when they have ended."""
    from mindspore.communication import init

    init()


def litter_directory() -> str:
    """A temporary directory, removed at exit, for what MindSpore and MindFormers write unasked."""
    litter = tempfile.mkdtemp(prefix="mindrlhf_")
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


def check_writable(directory: Path, rank: int) -> None:
    """Makes the directory of ``--save_ckpt_dir`` and refuses one that ``rank`` cannot write in.

    Raises:
        CheckpointError: it cannot be made or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".write_test_{rank}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"--save_ckpt_dir {directory}: cannot be written ({error.strerror}); give a directory that can"
        ) from error
