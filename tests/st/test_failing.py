"""A rank that never comes to a collective, under raw ``msrun`` as a person starts it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

WORKERS = 3
SCRIPT = Path(__file__).with_name("worker_failing.py")


@pytest.mark.msrun
def test_a_hang_in_a_collective_ends_the_job_and_names_the_rank(tmp_path: Path) -> None:
    """Within seconds, with one message; Python's stacks say who was outside the collective."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    msrun = shutil.which("msrun")
    assert msrun is not None
    path = os.pathsep.join([str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")])
    log = tmp_path / "log"
    done = subprocess.run(
        [
            *(sys.executable, msrun, f"--worker_num={WORKERS}", f"--local_worker_num={WORKERS}"),
            *(f"--master_port={port}", "--join=True", f"--log_dir={log}", str(SCRIPT), "4"),
        ],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": path, "GLOG_v": "3"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    ended = time.time()
    assert done.returncode != 0
    (message,) = set(re.findall(r"ERROR job failed: .*", done.stdout))
    assert re.search(
        r"rank 1 of 3, in phase train of iteration 3: no progress for \d+ s \(--watchdog_timeout 4\), "
        r"it is at .*worker_failing\.py:\d+ in fall_asleep; rank\(s\) 0, 2 wait for it",
        message,
    )
    failed = re.search(r"fails at ([\d.]+)", (log / "worker_1.log").read_text())
    assert failed is not None
    assert ended - float(failed[1]) < 20
    assert "in fall_asleep" in (log / "worker_1.stacks").read_text()
    assert "/mindspore/" in (log / "worker_0.stacks").read_text()
    assert list(temporary.iterdir()) == [], "nothing is left, although all were killed"
