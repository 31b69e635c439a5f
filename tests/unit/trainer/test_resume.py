"""Which checkpoint is taken: the newest whole one, by all ranks, and never a damaged one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindrlhf.checkpoint.manifest import digest_file, write_manifest
from mindrlhf.configs.keys import JobConfig, ParallelConfig
from mindrlhf.runtime.device import Runtime
from mindrlhf.runtime.host_exchange import HostExchange, together
from mindrlhf.trainer.checkpoints import TrainingCheckpoints, appearing, check_fixed, read_state
from mindrlhf.trainer.recipes.ppo_job import fixed_settings
from mindrlhf.trainer.resume import (
    choose_checkpoint,
    find_faults,
    newest_whole,
    report_changes,
    tidy,
)
from mindrlhf.utils.errors import CheckpointError
from mindrlhf.utils.provenance import plain

ALONE = HostExchange(Runtime(0, 1))
FILES = ("policy/rank_0/checkpoint_0.ckpt", "policy/rank_1/checkpoint_1.ckpt")


class ThreadExchange:
    """The exchange of one rank among several that are threads."""

    def __init__(self, rank: int, packets: dict[int, Any], barrier: threading.Barrier) -> None:
        self.runtime = Runtime(rank, barrier.parties)
        self._packets, self._barrier = packets, barrier

    def every_rank(self, array: np.ndarray) -> np.ndarray:
        self._packets[self.runtime.rank] = array
        self._barrier.wait(timeout=10)
        packets = [self._packets[rank] for rank in range(self.runtime.world_size)]
        assert len({packet.shape for packet in packets}) == 1, "the collective would hang or garble"
        self._barrier.wait(timeout=10)
        return np.stack(packets)

    def barrier(self) -> None:
        self.every_rank(np.zeros(1, np.int32))


def on_ranks(size: int, work: Callable[[Any], Any]) -> list[Any]:
    """What ``work`` returns on each of ``size`` ranks."""
    barrier = threading.Barrier(size)
    packets: dict[int, Any] = {}
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: work(ThreadExchange(rank, packets, barrier)), range(size)))


def make(save: Path, iteration: int, job: JobConfig) -> Path:
    directory = save / f"iteration_{iteration:06d}"
    for name in FILES:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(f"{name} after {iteration}".encode() * 100)
    (directory / "config.json").write_text(json.dumps({"configuration": plain(job)}))
    layouts = {"policy": {"data_parallel": 1, "model_parallel": 1}}
    state = {"format": 2, "step": iteration, "layouts": layouts, "fixed": fixed_settings(job), "parts": {}}
    (directory / "state.json").write_text(json.dumps(state))
    names = (*FILES, "state.json", "config.json")
    write_manifest(directory, {name: digest_file(directory / name) for name in names})
    return directory


def choose(save: Path, job: JobConfig, resume_from: Path | None = None) -> Path | None:
    """The checkpoint that a job resumes from: that of ``resume_from``, or the newest of ``save``."""
    checkpoints = TrainingCheckpoints(
        save, "iteration", ALONE, keep=0, configuration=job, fixed=fixed_settings(job)
    )
    return choose_checkpoint(checkpoints, resume_from, resume_training=resume_from is None)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "no manifest.json"),
    "damaged manifest": (lambda d: (d / "manifest.json").write_text("{"), "manifest.json: damaged"),
    "truncated": (lambda d: (d / FILES[1]).write_bytes(b"x"), f"{FILES[1]} has 1 bytes, the manifest says"),
    "flipped bit": (lambda d: flip(d / FILES[1]), f"{FILES[1]} is damaged (its SHA-256"),
    "missing rank": (lambda d: (d / FILES[1]).unlink(), f"{FILES[1]} is missing"),
    "flipped state": (lambda d: flip(d / "state.json"), "state.json is damaged (its SHA-256"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_named(
    tmp_path: Path, tiny_job: JobConfig, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    spoil, says = DAMAGE[kind]
    make(tmp_path, 2, tiny_job)
    whole = make(tmp_path, 9, tiny_job)
    spoil(make(tmp_path, 10, tiny_job))
    assert newest_whole(tmp_path, ALONE, "iteration") == whole
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "iteration_000010 is damaged and skipped" in warning
    assert says in warning


@pytest.mark.parametrize("kind", DAMAGE)
def test_resume_from_a_damaged_checkpoint_is_refused(tmp_path: Path, tiny_job: JobConfig, kind: str) -> None:
    spoil, says = DAMAGE[kind]
    directory = make(tmp_path, 1, tiny_job)
    spoil(directory)
    with pytest.raises(CheckpointError) as caught:
        choose(tmp_path, tiny_job, directory)
    assert says in str(caught.value)
    assert "iteration_000001" in str(caught.value)


def test_resume_from_a_folder_of_checkpoints_takes_the_newest_whole_one(
    tmp_path: Path, tiny_job: JobConfig
) -> None:
    elsewhere = tmp_path / "elsewhere"
    whole = make(elsewhere, 3, tiny_job)
    flip(make(elsewhere, 4, tiny_job) / FILES[0])
    make(tmp_path, 9, tiny_job)
    for given in (elsewhere, whole):
        chosen = choose(tmp_path, tiny_job, given)
        assert chosen == whole


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("kind", DAMAGE)
def test_all_ranks_find_the_same(tmp_path: Path, tiny_job: JobConfig, kind: str, size: int) -> None:
    """More ranks than files, too; each hashes some of them."""
    spoil, says = DAMAGE[kind]
    directory = make(tmp_path, 1, tiny_job)
    assert on_ranks(size, lambda exchange: find_faults(directory, exchange)) == [[]] * size
    spoil(directory)
    first, *others = on_ranks(size, lambda exchange: find_faults(directory, exchange))
    assert says in first[0]
    assert others == [first] * (size - 1)


def test_ranks_follow_the_main_rank_and_one_that_sees_damage(tmp_path: Path, tiny_job: JobConfig) -> None:
    """Ranks with disks of their own: only one of them has a damaged file."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    for save in (good, bad):
        make(save, 4, tiny_job)
        make(save, 6, tiny_job)
    (bad / "iteration_000006" / FILES[0]).unlink()
    make(bad, 8, tiny_job)  # the main rank has no such one
    (good / "iteration_99999999999").mkdir()  # beyond an int32, and damaged

    found = on_ranks(
        3, lambda exchange: newest_whole((good, good, bad)[exchange.runtime.rank], exchange, "iteration")
    )
    assert [path.name for path in found] == ["iteration_000004"] * 3
    faults = on_ranks(
        2, lambda exchange: find_faults((good, bad)[exchange.runtime.rank] / "iteration_000006", exchange)
    )
    assert faults == [["rank 1 cannot see all of its files; its log names them"], [f"{FILES[0]} is missing"]]


def test_nothing_there_is_a_fresh_start(
    tmp_path: Path, tiny_job: JobConfig, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / ".iteration_000001.tmp").mkdir()
    (tmp_path / "iteration_final").mkdir()
    caplog.set_level("INFO")
    for save in (tmp_path, tmp_path / "not_made"):
        assert choose(save, tiny_job) is None
        assert f"no checkpoint in {save} yet, a fresh start" in caplog.text
    assert not (tmp_path / "not_made").exists()
    never = TrainingCheckpoints(
        tmp_path, "iteration", ALONE, keep=0, configuration=tiny_job, fixed=fixed_settings(tiny_job)
    )
    make(tmp_path, 1, tiny_job)
    assert choose_checkpoint(never, None, resume_training=False) is None


def test_nothing_but_damaged_ones_is_an_error(tmp_path: Path, tiny_job: JobConfig) -> None:
    """Training anew over what was paid for would lose it without a word."""
    for iteration in (1, 2):
        flip(make(tmp_path, iteration, tiny_job) / FILES[0])
    with pytest.raises(
        CheckpointError, match=r"(?s)all 2 checkpoint.*iteration_000002: .*iteration_000001: "
    ):
        choose(tmp_path, tiny_job)


def test_a_directory_that_one_rank_cannot_write_appears_on_none(tmp_path: Path) -> None:
    final = tmp_path / "final"
    final.mkdir()
    (final / "older").touch()

    def write(exchange: Any) -> None:
        with appearing(final, exchange) as temporary, together(exchange, f"write {temporary}"):
            temporary.mkdir(exist_ok=True)
            if exchange.runtime.rank == 1:
                raise OSError(28, "No space left on device")

    place = tmp_path / ".final.tmp"
    others = f"rank 1 cannot write {place}; its log says why"
    cause = f"cannot write {place}: No space left on device; make it writable, or free space"
    assert on_ranks(3, lambda exchange: fault_of(write, exchange)) == [others, cause, others]
    assert [path.name for path in tmp_path.rglob("*")] == ["final", "older"]


def fault_of(work: Callable[[Any], None], exchange: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        work(exchange)
    return str(caught.value)


def test_a_checkpoint_that_cannot_be_restored_ends_all_ranks(
    tmp_path: Path, tiny_job: JobConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, 2, tiny_job).rename(tmp_path / ".iteration_000002.old")

    def read_only(path: Path, target: Path) -> Path:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "rename", read_only)

    assert on_ranks(2, lambda exchange: fault_of(partial(tidy, tmp_path), exchange)) == [
        f"cannot tidy {tmp_path}: Read-only file system; make it writable, or free space",
        f"rank 0 cannot tidy {tmp_path}; its log says why",
    ]


def test_what_a_killed_run_leaves_is_tidied(tmp_path: Path, tiny_job: JobConfig) -> None:
    for name in (".iteration_000003.tmp", ".iteration_000001.old"):
        make(tmp_path, 1, tiny_job).rename(tmp_path / name)
    make(tmp_path, 2, tiny_job).rename(tmp_path / ".iteration_000002.old")
    make(tmp_path, 2, tiny_job)
    (tmp_path / ".iteration_000004.tmp").symlink_to(tmp_path / "iteration_000002")
    for name in (".metrics.jsonl.tmp-123", "metrics.jsonl", ".hidden", ".tmp-notes"):
        (tmp_path / name).touch()
    tidy(tmp_path, ALONE)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("iteration_000001", "iteration_000002", "metrics.jsonl", ".hidden", ".tmp-notes")
    }
    assert find_faults(tmp_path / "iteration_000001", ALONE) == [], "it was being replaced, and is whole"


def changed(job: JobConfig, role: str, part: str, **values: Any) -> JobConfig:
    run = getattr(job, role)
    section = getattr(run, part)
    new = section | values if isinstance(section, dict) else replace(section, **values)
    return replace(job, **{role: replace(run, **{part: new})})


REFUSED = [
    ("train", "model", {"hidden_size": 32}, "train.model.hidden_size: 16 in the checkpoint, 32 now"),
    ("critic", "model", {"num_layers": 2}, "critic.model.num_layers: 1 in the checkpoint, 2 now"),
    ("train", "model", {"theta": 1e4}, "train.model.theta: 1000000.0 in the checkpoint, 10000.0 now"),
    ("train", "optimizer", {"type": "Adam"}, "train.optimizer.type: AdamW in the checkpoint, Adam now"),
]


@pytest.mark.parametrize(("role", "part", "values", "says"), REFUSED)
def test_another_model_or_optimizer_is_refused(
    tmp_path: Path, tiny_job: JobConfig, role: str, part: str, values: dict[str, Any], says: str
) -> None:
    directory = make(tmp_path, 1, tiny_job)
    job = changed(tiny_job, role, part, **values)
    with pytest.raises(CheckpointError) as caught:
        choose(tmp_path, job)
    assert str(caught.value).count("\n  - ") == 1
    assert f"{directory} cannot be resumed by this job, 1 difference(s)" in str(caught.value)
    assert f"- {says}" in str(caught.value)


def test_all_differences_come_in_one_error(tmp_path: Path, tiny_job: JobConfig) -> None:
    directory = make(tmp_path, 1, tiny_job)
    job = replace(tiny_job, ppo=replace(tiny_job.ppo, critic="shared", seed=4, total_iterations=9))
    job = changed(job, "train", "model", vocab_size=32)
    with pytest.raises(CheckpointError) as caught:
        check_fixed(directory, read_state(directory)["fixed"], fixed_settings(job))
    lines = str(caught.value).splitlines()[1:]
    assert lines == [  # that a shared critic has no YAML follows from the first of them
        "  - ppo.critic: separate in the checkpoint, shared now",
        "  - ppo.seed: 3 in the checkpoint, 4 now",
        "  - train.model.vocab_size: 24 in the checkpoint, 32 now",
    ]


def test_a_setting_that_only_one_job_has_is_named_when_there_is_no_other(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="2 difference") as caught:
        check_fixed(tmp_path, {"a": 1, "b": 2}, {"a": 1, "c": 3})
    assert str(caught.value).splitlines()[1:] == [
        "  - b: in the checkpoint, not now", "  - c: not in the checkpoint, now"
    ]  # fmt: skip


def test_harmless_changes_pass_and_are_said(
    tmp_path: Path, tiny_job: JobConfig, caplog: pytest.LogCaptureFixture
) -> None:
    directory = make(tmp_path, 1, tiny_job)
    job = replace(tiny_job, ppo=replace(tiny_job.ppo, total_iterations=9, save_interval=2))
    job = changed(job, "train", "optimizer", weight_decay=0.2)
    job = replace(
        job, train=replace(job.train, path=Path("moved.yaml"), parallel=ParallelConfig(data_parallel=2))
    )
    caplog.set_level("INFO")
    report_changes(directory, job)
    layout, others = [record.getMessage() for record in caplog.records]
    assert layout.endswith(
        "the checkpoint is resharded: train.parallel.data_parallel: 1 in the checkpoint, 2 now"
    )
    assert others.endswith(
        "ppo.save_interval: 0 in the checkpoint, 2 now; ppo.total_iterations: 4 in the checkpoint, 9 now; "
        "train.optimizer.weight_decay: 0.1 in the checkpoint, 0.2 now"
    )


def test_other_inputs_are_said_one_by_one_and_recorded(
    tmp_path: Path, tiny_job: JobConfig, caplog: pytest.LogCaptureFixture
) -> None:
    directory = make(tmp_path, 1, tiny_job)
    data, reward = ({"path": name, "bytes": 9, "digest": "ab"} for name in ("p.mindrecord", "r.py"))
    reward["function"] = "r:f"
    before = {"mind_dataset_dir": data, "reward_fn": reward, "weights.ref": data}
    record = {
        "configuration": plain(tiny_job),
        "inputs": before,
        "resumptions": [{"from": "x", "changes": []}],
    }
    (directory / "config.json").write_text(json.dumps(record))
    now = {
        "mind_dataset_dir": data | {"bytes": 10, "digest": "cd"},
        "reward_fn": reward | {"function": "r:g"},
        "weights.ref": data | {"path": "moved"},
    }
    changes = [
        "inputs.mind_dataset_dir.digest: ab in the checkpoint, cd now",
        "inputs.reward_fn.function: r:f in the checkpoint, r:g now",
    ]
    said = "what the run learns from has changed since the checkpoint: "
    resumptions = report_changes(directory, tiny_job, now)
    assert [record.getMessage() for record in caplog.records] == [said + change for change in changes]
    assert resumptions == [{"from": "x", "changes": []}, {"from": str(directory), "changes": changes}]
    caplog.clear()
    report_changes(directory, tiny_job)  # another rank
    report_changes(directory, tiny_job, before)
    report_changes(make(tmp_path, 2, tiny_job), tiny_job, now)  # of a version without a record
    assert caplog.records == []


def test_nothing_is_said_of_nothing(
    tmp_path: Path, tiny_job: JobConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    report_changes(make(tmp_path, 1, tiny_job), tiny_job)
    assert caplog.records == []


def test_the_critic_of_a_shared_backbone_does_not_matter(tmp_path: Path, tiny_job: JobConfig) -> None:
    shared = replace(tiny_job, ppo=replace(tiny_job.ppo, critic="shared"))
    directory = make(tmp_path, 1, shared)
    assert choose(tmp_path, changed(shared, "critic", "model", hidden_size=32)) == directory
    record = {"configuration": plain(shared), "inputs": {"weights.critic": {"digest": "ab"}}}
    (directory / "config.json").write_text(json.dumps(record))  # as earlier versions recorded
    (resumption,) = report_changes(directory, shared, {})
    assert resumption["changes"] == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"configuration": 3}'])
def test_a_configuration_that_cannot_be_read(tmp_path: Path, tiny_job: JobConfig, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        report_changes(tmp_path, tiny_job)
