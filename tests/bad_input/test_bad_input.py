"""The table: every bad input ends a script with one error that says where, what and how to fix it."""

from __future__ import annotations

import contextlib
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.bad_input import harness, rows_data, rows_jobs, rows_stages, rows_weights
from tests.bad_input.harness import CONVERT, TRANSFORM, Bad, Case

ROWS: list[Bad] = [*rows_weights.ROWS, *rows_data.ROWS, *rows_jobs.ROWS, *rows_stages.ROWS]
_LIMIT_BYTES = 16 << 10


@contextlib.contextmanager
def full_disk(directory: Path) -> Iterator[None]:
    """A disk of 16 KB at ``directory``; where nothing may be mounted, files of more are refused."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(directory)]
    if shutil.which("mount") and subprocess.run(mount, capture_output=True, check=False).returncode == 0:
        try:
            yield
        finally:
            subprocess.run(["umount", str(directory)], check=True)
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LIMIT_BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_there_are_many_rows_and_each_once() -> None:
    assert len(ROWS) >= 60
    assert len({str(row) for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", [row for row in ROWS if "alone" not in row.also], ids=str)
def test_bad_input(
    row: Bad,
    make_case: Callable[[Path], Case],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    case = make_case(row.script)
    if row.script not in harness.NO_MINDSPORE:
        request.getfixturevalue("one_process")
    with contextlib.ExitStack() as stack:
        if "full_disk" in row.also:
            stack.enter_context(full_disk(case / "full"))
        stack.callback(lambda: [close() for close in case.closing])
        row.spoil(case)
        before = case.listing()
        end = harness.run_here(case, monkeypatch, capfd)
        after = case.listing()
    harness.judge(row, end, before, after)


@pytest.mark.parametrize("row", [row for row in ROWS if row.also & {"subprocess", "alone"}], ids=str)
def test_bad_input_as_a_command(row: Bad, make_case: Callable[[Path], Case]) -> None:
    case = make_case(row.script)
    try:
        row.spoil(case)
        before = case.listing()
        end = harness.run_alone(case)
    finally:
        for close in case.closing:
            close()
    harness.judge(row, end, before, case.listing())


@pytest.mark.parametrize("script", [CONVERT, TRANSFORM, harness.DATA], ids=lambda script: script.stem)
def test_without_a_fault_the_work_is_done(
    script: Path,
    make_case: Callable[[Path], Case],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Else a row could fail for another reason than the one it names."""
    case = make_case(script)
    before = case.listing()
    end = harness.run_here(case, monkeypatch, capfd)
    assert end.code == 0, end.output
    assert set(before) < set(case.listing())


@pytest.mark.parametrize("script", [harness.PPO, harness.SFT, harness.REWARD], ids=lambda script: script.stem)
def test_without_a_fault_training_would_begin(
    script: Path,
    make_case: Callable[[Path], Case],
    one_process: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from mindrlhf.trainer.recipes import ppo_job, reward_model, sft
    from mindrlhf.trainer.recipes.supervised import SupervisedTrainer
    from mindrlhf.trainer.run import Run

    begun = []
    for module in (ppo_job, reward_model, sft):
        monkeypatch.setattr(module, "train", lambda run, recipe: begun.append(type(recipe)) or True)
    monkeypatch.setattr(SupervisedTrainer, "save_weights", lambda self: Path("done"))
    monkeypatch.setattr(Run, "last_checkpoint", Path("done"))
    case = make_case(script)
    if script == harness.REWARD:
        case.give(calibrate="off")
    end = harness.run_here(case, monkeypatch, capfd)
    assert end.code == 0, end.output
    assert begun
