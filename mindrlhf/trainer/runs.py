"""Where a run goes on."""

from __future__ import annotations

from pathlib import Path

from mindrlhf.utils.errors import MindRLHFError


def check_resume_flags(resume_from: Path | None, *, resume_training: bool, checkpoint: str) -> None:
    """Refuses two answers to where the run goes on, and a directory that is not there.

    Raises:
        MindRLHFError: names both flags, or the path.
    """
    if resume_from is None:
        return
    if resume_training:
        raise MindRLHFError(
            "--resume_training True takes the newest whole checkpoint of --save_ckpt_dir, --resume_from "
            f"takes {resume_from}: give one of the two"
        )
    if not resume_from.is_dir():
        raise MindRLHFError(
            f"--resume_from {resume_from}: there is no such directory; name {checkpoint} directory"
        )
