"""The id under which a service knows a run, kept with its results so that a resumed run goes on there."""

from __future__ import annotations

import secrets

from mindrlhf.trainer.trackers.base import RunStart
from mindrlhf.utils.files import atomic_file


def run_id(run: RunStart, service: str) -> str:
    """Id from ``{service}_run_id.txt`` of a resumed run, or a new one, which is written there."""
    path = run.directory / f"{service}_run_id.txt"
    if run.is_resumed and path.is_file() and (known := path.read_text(encoding="utf-8").strip()):
        return known
    new = secrets.token_hex(8)
    with atomic_file(path) as temporary:
        temporary.write_text(new + "\n", encoding="utf-8")
    return new
