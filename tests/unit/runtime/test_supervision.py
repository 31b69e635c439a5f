"""A job of small processes, without msrun and MindSpore: one fails, and all of them end with one message."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from mindrlhf.runtime.failures import MESSAGE_START
from mindrlhf.runtime.heartbeat import ENDED, SCHEDULER, HeartbeatWriter
from mindrlhf.runtime.supervisor import Supervisor

WORKERS = 3
# What msrun does: a scheduler, then the workers, each with its log, all children of one process.
PARENT = """
import json, os, subprocess, sys, time
directory, workers = sys.argv[1], int(sys.argv[2])
started = {}
for name in ("scheduler", *range(workers)):
    env = os.environ | {"MS_WORKER_NUM": str(workers), "MS_SCHED_HOST": "127.0.0.1"}
    env |= {"MS_ROLE": "MS_SCHED", "RANK_ID": "0"} if name == "scheduler" else {
        "MS_ROLE": "MS_WORKER", "RANK_ID": str(name), "MS_NODE_ID": str(name)}
    log = open(f"{directory}/{name}.log", "w")
    started[name] = subprocess.Popen([sys.executable, f"{directory}/job.py"], env=env, stdout=log, stderr=log)
json.dump({name: process.pid for name, process in started.items()}, open(f"{directory}/pids", "w"))
time.sleep(float(os.environ.get("REAP_AFTER", "0")))
json.dump({name: process.wait() for name, process in started.items()}, open(f"{directory}/codes", "w"))
"""
HEAD = """
import os, signal, sys, time
from mindrlhf.runtime.watchdog import Watchdog
from mindrlhf.runtime.supervision import run_worker
from mindrlhf.utils.errors import MindRLHFError
from mindrlhf.utils.ranks import env_rank, is_scheduler
from mindrlhf.utils.timers import PhaseTimer

def wait_in_a_collective():
    time.sleep(120)

def work(timer, rank):
{body}

def main():
    if is_scheduler():
        time.sleep({scheduler})
        return
    watchdog = Watchdog({timeout})
    watchdog.follow(lambda: 3)
    timer = PhaseTimer([watchdog])
    with timer.phase("rollout"):
        pass
    work(timer, env_rank())

if not is_scheduler() and env_rank() == 2:
    time.sleep({late})
run_worker(main)
"""


@dataclass
class Ended:
    """A job that is over: exit codes and logs by rank."""

    codes: dict[str, int]
    logs: dict[str, str]
    seconds: float
    directory: Path

    @property
    def messages(self) -> list[str]:
        """What the scheduler's log has of the supervisor, which is what msrun and the launcher show."""
        lines = self.logs["scheduler"].splitlines()
        return [line.removeprefix(MESSAGE_START) for line in lines if line.startswith(MESSAGE_START)]


def run(
    tmp_path: Path, body: str, *, timeout: float = 0, scheduler: float = 120, reap: float = 0, late: float = 0
) -> Ended:
    """Runs a job whose workers do ``body`` (with ``timer`` and ``rank``); nothing of it may be left."""
    import json

    temporary = tmp_path / "tmp"
    temporary.mkdir()
    indented = "\n".join("    " + line for line in body.strip().splitlines())
    script = HEAD.format(body=indented, timeout=timeout, scheduler=scheduler, late=late)
    (tmp_path / "job.py").write_text(script)
    path = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": path, "REAP_AFTER": str(reap)}
    begin = time.monotonic()
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path), str(WORKERS)], env=environment, start_new_session=True
    )
    try:
        parent.wait(timeout=60)
    finally:
        for pid in json.loads((tmp_path / "pids").read_text()).values():
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
    seconds = time.monotonic() - begin
    deadline = time.monotonic() + 5
    while list(temporary.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(temporary.iterdir()) == [], "heartbeats left behind"
    left = [
        p for p in psutil.process_iter(["cmdline"]) if str(temporary) in " ".join(p.info["cmdline"] or [])
    ]
    psutil.wait_procs(left, timeout=3)
    assert [process for process in left if process.is_running()] == [], "supervisor left behind"
    logs = {log.stem: log.read_text() for log in tmp_path.glob("*.log")}
    return Ended(json.loads((tmp_path / "codes").read_text()), logs, seconds, tmp_path)


def test_an_exception_of_one_rank_ends_all(tmp_path: Path) -> None:
    ended = run(
        tmp_path,
        """
with timer.phase("train", 8, "minibatches"):
    timer.advance(5)
    if rank == 1:
        raise ValueError("weights are\\nbroken")
    wait_in_a_collective()
""",
    )
    assert ended.codes == {"scheduler": -9, "0": -9, "1": 1, "2": -9}
    assert ended.seconds < 15
    (message,) = ended.messages
    assert message == (
        "rank 1 of 3, in phase train (5 of 8 minibatches done) of iteration 3: "
        f"ValueError: weights are; its log: {tmp_path / '1.log'}"
    )
    assert "Traceback" in ended.logs["1"]
    assert "ValueError: weights are" in ended.logs["1"]
    assert "Traceback" not in ended.logs["0"] + ended.logs["2"] + ended.logs["scheduler"]


def test_a_silent_death_ends_all(tmp_path: Path) -> None:
    body = """
with timer.phase("rollout"):
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    wait_in_a_collective()
"""
    ended = run(tmp_path, body, reap=1.0)  # as slow as msrun to ask for the exit code
    assert ended.seconds < 15
    (message,) = ended.messages
    assert message.startswith(
        "rank 2 of 3, in phase rollout of iteration 3: the process was killed (SIGKILL)"
    )
    assert {ended.codes[rank] for rank in ("0", "1", "scheduler")} == {-9}


def test_a_hang_names_the_rank_that_did_not_come(tmp_path: Path) -> None:
    """All ranks make no progress; one is in another phase, and its Python stack is kept."""
    ended = run(
        tmp_path,
        """
def lose_the_way():
    time.sleep(120)

if rank == 0:
    with timer.phase("score"):
        lose_the_way()
with timer.phase("score"):
    pass
with timer.phase("train"):
    wait_in_a_collective()
""",
        timeout=2,
    )
    assert ended.seconds < 15
    (message,) = ended.messages
    assert message.startswith(
        "rank 0 of 3, in phase score of iteration 3: no progress for 2 s (--watchdog_timeout 2)"
    )
    assert "in lose_the_way; rank(s) 1, 2 wait for it, in phase train of iteration 3; " in message
    assert "in lose_the_way" in (tmp_path / "0.stacks").read_text()
    assert "in wait_in_a_collective" in (tmp_path / "2.stacks").read_text()
    assert {ended.codes[rank] for rank in ("0", "1", "2", "scheduler")} == {-9}


def test_a_users_error_is_one_message(tmp_path: Path) -> None:
    """All ranks find it, one reports it; exit code 2 on all. Which one, when they find it at different times,
    depends on the machine; that the lowest does when it is at once is tested without processes.
    """
    ended = run(tmp_path, 'raise MindRLHFError("prompts.mindrecord: no such file")')
    (message,) = ended.messages
    assert re.match(
        "rank [012] of 3, after phase rollout of iteration 3: prompts.mindrecord: no such file", message
    )
    assert [ended.codes[rank] for rank in "012"] == [2, 2, 2]


def test_a_job_that_ends_well_or_is_interrupted_is_left_alone(tmp_path: Path) -> None:
    """Ranks may end at different times, and be silent for longer than the supervisor's poll."""
    body = "time.sleep(0.7 * rank)\nif rank:\n    raise KeyboardInterrupt"
    ended = run(tmp_path, body, scheduler=2.5)
    assert ended.messages == []
    assert ended.codes == {"scheduler": 0, "0": 0, "1": 130, "2": 130}


def test_a_rank_that_starts_late_is_ended_too(tmp_path: Path) -> None:
    """Rank 2 joins when the failure of another is known, and the others are being ended."""
    ended = run(tmp_path, "if rank == 0:\n    raise ValueError('early')\nwait_in_a_collective()", late=2.5)
    assert ended.codes == {"scheduler": -9, "0": 1, "1": -9, "2": -9}
    assert ended.seconds < 15
    assert "other hosts" not in ended.messages[0]


def test_one_process_that_holds_the_interpreter_is_ended(tmp_path: Path) -> None:
    """A regular expression of the user's that takes for ever: no thread of that process can run."""
    script = """
import re, time
from mindrlhf.runtime.watchdog import Watchdog, supervised
with supervised(1.0):
    watchdog = Watchdog(1.0)
    watchdog.phase_started("score", None, "")
    re.match("(a*)*b", "a" * 40)
"""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    path = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    stacks, message = done.stderr.split(MESSAGE_START)
    assert "in match" in stacks
    assert message.startswith("rank 0, in phase score: no progress for 1 s (--watchdog_timeout 1), it is at ")
    assert list(temporary.iterdir()) == []


def test_when_only_the_scheduler_is_left_the_supervisor_removes_the_directory(tmp_path: Path) -> None:
    """msrun kills its scheduler now and then, before that can remove the directory itself."""
    directory = tmp_path / "mindrlhf_job_0_host_1_1"
    directory.mkdir()
    HeartbeatWriter(directory, 0, 1).update(state=ENDED)
    worker = directory / "rank_0.json"
    worker.write_text(worker.read_text().replace('"started": ', '"started": 9'))  # nobody has that any more
    HeartbeatWriter(directory, SCHEDULER, 1)
    Supervisor(directory).run()
    assert not directory.exists()
