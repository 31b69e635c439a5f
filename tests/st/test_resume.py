"""A job that is killed, preempted, and finished in another layout, against one that was let be.

``ppo_one_stage.py --resume_training True`` each time: two workers until one of them gets SIGKILL, two workers
until SIGTERM, then one process to the end. Nobody touches anything in between. All but the one that was let
be use a compile cache, so that the second of them has its graphs from the first.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.st.ppo_cases import RELATIVE, assert_metrics_close

pytestmark = pytest.mark.msrun

REPO_ROOT = Path(__file__).resolve().parents[2]
SCRIPT = REPO_ROOT / "examples" / "qwen_ppo_tutorial" / "ppo_one_stage.py"
ITERATIONS = 4
SECONDS = 240
EXTRAS = ("scale_rewards=True", "center_rewards=True")
# Measured: 0, to the last digit, but MindSpore promises no such thing. Lost moments are off by 1e-2.
SAME_LAYOUT = 1e-6


@dataclass
class Job:
    """A started command; its output goes to a file."""

    process: subprocess.Popen[bytes]
    output: Path
    seconds_to_end: float = 0.0
    left: list[psutil.Process] = field(default_factory=list)

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def worker(self, rank: int) -> psutil.Process:
        """The process of a rank."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                env = process.environ()
                if env.get("MS_ROLE") == "MS_WORKER" and env.get("RANK_ID") == str(rank):
                    return process
        raise AssertionError(f"no worker {rank}\n{self.text[-3000:]}")

    def wait_for(self, what: Callable[[], bool]) -> None:
        """Returns as soon as ``what`` holds."""
        end = time.monotonic() + SECONDS
        while not what():
            assert self.process.poll() is None, f"it has ended\n{self.text[-3000:]}"
            assert time.monotonic() < end, f"ran out of time\n{self.text[-3000:]}"
            time.sleep(0.01)

    def finish(self) -> int:
        """Exit code; how long it took from here, and what was left behind, are noted."""
        started = time.monotonic()
        everyone = psutil.Process(self.process.pid).children(recursive=True)
        code = self.process.wait(timeout=SECONDS)
        self.seconds_to_end = time.monotonic() - started
        _, self.left = psutil.wait_procs(everyone, timeout=5)
        return code


@dataclass
class Story:
    """The jobs in order, and what they left."""

    killed: Job
    stopped: Job
    finished: Job
    codes: list[int]
    files_after: dict[str, list[str]]
    save: Path
    straight: list[dict[str, Any]]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.save / "metrics.jsonl")


def read_lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def checkpoints(save: Path) -> list[str]:
    return sorted(path.name for path in save.iterdir() if "iteration_" in path.name)


@pytest.fixture(scope="module")
def start(ppo_inputs: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Job]]:
    """Starts the job in a number of workers; whatever still runs at the end is killed."""
    directory = tmp_path_factory.mktemp("resume")
    started: list[Job] = []

    def run(name: str, save: str, workers: int, *overrides: str) -> Job:
        infer, train = ((1, 2), (2, 1)) if workers == 2 else ((1, 1), (1, 1))
        generate, finetune = ppo_inputs.yaml("generate", *infer), ppo_inputs.yaml("finetune", *train)
        flags = ["--sft_path_infer", generate, "--sft_path_train", finetune]
        flags += ["--reward_path", generate, "--critic_path", finetune, "--ppo_config", ppo_inputs.ppo]
        flags += ["--load_sft_checkpoint_train", ppo_inputs.policy, "--load_rm_checkpoint", ppo_inputs.reward]
        flags += ["--mind_dataset_dir", ppo_inputs.data, "--save_ckpt_dir", directory / save]
        flags += ["--resume_training", "True", "--use_parallel", str(workers > 1)]
        flags += ["--enable_compile_cache", str(name != "straight")]
        for override in (f"total_iterations={ITERATIONS}", *EXTRAS, *overrides):
            flags += ["--set", override]
        launcher = ["-u", REPO_ROOT / "scripts" / "msrun_launcher.py", "--workers", workers]
        launcher += ["--log_dir", directory / f"{name}_logs"]
        return _start(started, directory, name, [*(launcher if workers > 1 else []), SCRIPT, *flags])

    yield run
    for job in started:
        if job.process.poll() is None:
            for process in psutil.Process(job.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            job.process.kill()
            job.process.wait()


def _start(started: list[Job], directory: Path, name: str, command: Sequence[object]) -> Job:
    output = directory / f"{name}.log"
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env={**os.environ, "GLOG_v": "3", "MS_COMPILER_CACHE_PATH": str(directory / "graphs")},
        )
    started.append(Job(process, output))
    return started[-1]


@pytest.fixture(scope="module")
def story(start: Callable[..., Job], tmp_path_factory: pytest.TempPathFactory) -> Story:
    straight = start("straight", "straight", 2, "save_interval=0")
    save = straight.output.parent / "save"
    codes, files = [straight.finish()], {}
    assert codes == [0], straight.text[-3000:]

    killed = start("killed", "save", 2, "save_interval=1")
    killed.wait_for((save / "iteration_000001").exists)
    killed.worker(1).kill()
    codes.append(killed.finish())
    files["killed"] = checkpoints(save)

    stopped = start("stopped", "save", 2, "save_interval=0")
    stopped.wait_for(lambda: len(read_lines(save / "metrics.jsonl")) == 2)
    stopped.process.send_signal(signal.SIGTERM)
    codes.append(stopped.finish())
    files["stopped"] = checkpoints(save)

    finished = start("finished", "save", 1, "save_interval=0")
    codes.append(finished.finish())
    files["finished"] = checkpoints(save)
    metrics = read_lines(straight.output.parent / "straight" / "metrics.jsonl")
    return Story(killed, stopped, finished, codes, files, save, metrics)


def test_kill_fails_the_job_and_sigterm_and_the_end_are_successes(story: Story) -> None:
    straight, killed, stopped, finished = story.codes
    assert killed not in (0, 2), story.killed.text[-3000:]
    assert (straight, stopped, finished) == (0, 0, 0), (
        story.stopped.text[-3000:] + story.finished.text[-3000:]
    )
    assert story.killed.seconds_to_end < 60
    for job in (story.killed, story.stopped, story.finished):
        assert job.left == []


def test_a_fresh_start_and_both_resumptions_are_said(story: Story) -> None:
    assert "a fresh start" in story.killed.text
    assert "resumed from" in story.stopped.text
    assert "ppo.save_interval: 1 in the checkpoint, 0 now" in story.stopped.text
    assert "stopped by SIGTERM, the state is in" in story.stopped.text
    assert "train.parallel.data_parallel: 2 in the checkpoint, 1 now" in story.finished.text
    assert "resumed from" in story.finished.text


def test_a_second_run_takes_its_graphs_from_the_cache_and_another_layout_its_own(story: Story) -> None:
    lines = {
        name: dict(re.findall(r"compile cache .*/graphs/(rank_\d_of_\d): (.*)", job.text))
        for name, job in (("killed", story.killed), ("stopped", story.stopped), ("finished", story.finished))
    }
    # Two cells of one run can have one graph, so that a run which fills the cache may take some, too.
    for name, place in (("killed", "rank_0_of_2"), ("finished", "rank_0_of_1")):
        [compiled] = re.findall(r"(\d+) compiled in", lines[name][place])
        assert int(compiled) >= 8
    said = lines["stopped"]["rank_0_of_2"]
    gain = r"(\d+) graph\(s\) taken in [\d.]+ s instead of [\d.]+ s to compile \([\d.]+ s gained\)"
    [taken] = re.findall(gain, said)
    assert int(taken) >= 15
    # Resuming exchanges what a start does not.
    assert sum(map(int, re.findall(r"(\d+) compiled in", said))) <= 3


def test_sigterm_saves_although_no_checkpoint_was_due(story: Story) -> None:
    last_of_killed = story.files_after["killed"][-1]
    newest = story.files_after["stopped"][-1]
    assert last_of_killed in ("iteration_000001", "iteration_000002")
    assert newest in ("iteration_000002", "iteration_000003")
    assert story.files_after["finished"][-1] == "iteration_000004"


def test_metrics_are_those_of_the_straight_run(story: Story) -> None:
    """Every iteration once, in order; the last ones are of another layout."""
    assert [line["iteration"] for line in story.metrics] == list(range(1, ITERATIONS + 1))
    same_layout = int(story.files_after["stopped"][-1][-1])
    for actual, expected in zip(story.metrics, story.straight, strict=True):
        clock = [name for name in expected if name.startswith(("time/", "tokens_per_second", "memory/"))]
        for line in (actual, expected):
            for name in clock:
                line.pop(name, None)
        is_same = expected["iteration"] <= same_layout
        assert_metrics_close(actual, expected, SAME_LAYOUT if is_same else RELATIVE)


def test_samples_are_not_repeated(story: Story) -> None:
    samples = [line["iteration"] for line in read_lines(story.save / "samples.jsonl")]
    assert samples == sorted(samples)
    assert {samples.count(iteration) for iteration in range(1, ITERATIONS + 1)} == {samples.count(1)}


def test_nothing_half_written_is_left(story: Story) -> None:
    assert [path.name for path in story.save.iterdir() if path.name.startswith(".")] == []
