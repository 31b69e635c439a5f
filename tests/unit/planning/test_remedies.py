"""What must change to fit: the fewest and mildest settings, and an honest no."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from mindrlhf.configs.keys import JobConfig, ParallelConfig
from mindrlhf.planning.job_memory import MemoryPlan, plan_memory
from mindrlhf.planning.plan_report import make_report, memory_limit, parse_bytes
from mindrlhf.planning.remedies import Suggestion, lowest_peak, smallest_changes, smallest_world
from mindrlhf.planning.splits import (
    allowed_splits,
    common_splits,
    smaller_parts,
    with_splits,
    with_world_size,
)
from mindrlhf.utils.errors import ConfigError

MakeJob = Callable[..., JobConfig]


def suggestions(job: JobConfig, limit: int) -> list[Suggestion]:
    return smallest_changes(job, lambda plan: plan.peak.total <= limit, with_reward_model=True)


def peak(job: JobConfig) -> int:
    return plan_memory(job).peak.total


def splits(*pairs: tuple[int, int]) -> list[ParallelConfig]:
    return [ParallelConfig(data_parallel=dp, model_parallel=mp) for dp, mp in pairs]


def test_splits_divide_heads_vocabulary_and_rows(tiny_job: MakeJob) -> None:
    job = tiny_job()  # 2 key/value heads, rollout of 8, minibatches of 4
    assert allowed_splits(job, "infer", 4) == splits((4, 1), (2, 2))
    assert allowed_splits(job, "train", 8) == splits((4, 2))  # 8 replicas do not divide a minibatch
    assert allowed_splits(job, "infer", 8) == splits((8, 1), (4, 2))
    assert allowed_splits(job, "infer", 3) == []
    # One file for policy and critic, another for the rest.
    assert common_splits(job, job.train.path, 2) == splits((2, 1), (1, 2))


def test_another_number_of_workers_keeps_model_parallel(tiny_job: MakeJob) -> None:
    job = with_world_size(tiny_job(), 4)
    assert (job.infer.parallel, job.reward.parallel) == tuple(splits((2, 2), (2, 2)))
    assert (job.train.parallel, job.critic.parallel) == tuple(splits((4, 1), (4, 1)))
    one = with_world_size(tiny_job(), 1)
    assert {run.parallel for run in (one.infer, one.train, one.reward, one.critic)} == set(splits((1, 1)))
    with pytest.raises(ConfigError) as caught:
        with_world_size(tiny_job(), 3)
    assert len(caught.value.faults) == 4
    assert "--world_size 3: no data_parallel x model_parallel for infer (generate_x.yaml)" in str(
        caught.value
    )


def test_rows_of_a_pass_follow_the_split(tiny_job: MakeJob) -> None:
    job = tiny_job(score_batch_size=4, micro_batch_size=2)
    assert smaller_parts(job, "score_batch_size") == [2, 1]
    assert smaller_parts(tiny_job(), "generation_batch_size") == [4, 2, 1]
    moved = with_splits(job, {job.train.path: ParallelConfig(data_parallel=4, model_parallel=1)})
    assert (moved.ppo.score_batch_size, moved.ppo.micro_batch_size) == (2, 1)  # 8 and 4 rows over 4 ranks


def test_the_mildest_value_of_the_mildest_setting(tiny_job: MakeJob) -> None:
    job = tiny_job(device="Ascend", max_prompt_length=3000, rollout_batch_size=32)
    job = replace(job, ppo=replace(job.ppo, generation_batch_size=1, score_batch_size=1))
    enough = replace(job, ppo=replace(job.ppo, micro_batch_size=4))
    assert peak(enough) < peak(job)
    found = suggestions(job, peak(enough))
    assert found[0].changes == ("--set micro_batch_size=4",)
    assert found[0].plan.peak.total == peak(enough)
    assert all(len(suggestion.changes) == 1 for suggestion in found)


def test_two_settings_only_when_one_is_not_enough(tiny_job: MakeJob) -> None:
    job = tiny_job(device="Ascend", max_prompt_length=3000, max_response_length=1000, rollout_batch_size=32)
    ppo = replace(job.ppo, micro_batch_size=1, score_batch_size=1, generation_batch_size=1)
    found = suggestions(job, peak(replace(job, ppo=ppo)))
    assert found
    assert all(len(suggestion.changes) > 1 for suggestion in found)
    for suggestion in found:
        assert suggestion.plan.peak.total <= peak(replace(job, ppo=ppo))


def test_the_split_of_a_file_moves_all_its_models(tiny_job: MakeJob) -> None:
    job = tiny_job(device="Ascend")
    split = with_splits(job, {job.train.path: ParallelConfig(data_parallel=1, model_parallel=2)})
    assert split.critic.parallel.model_parallel == split.train.parallel.model_parallel == 2
    texts = {text for suggestion in suggestions(job, peak(split)) for text in suggestion.changes}
    assert "finetune_x.yaml: data_parallel 1, model_parallel 2" in texts


def test_nothing_fits(tiny_job: MakeJob) -> None:
    job = tiny_job()
    lowest = lowest_peak(job, with_reward_model=True)
    assert lowest.peak.total < peak(job)
    assert suggestions(job, lowest.peak.total)
    assert suggestions(job, lowest.peak.total - 1) == []
    assert smallest_world(job, lambda plan: False, with_reward_model=True) is None
    report = make_report(job, limit=1)
    assert report.fits is False
    assert report.suggestions == ()
    assert report.lowest is not None
    assert report.lowest.peak.total == lowest.peak.total


def test_more_workers_when_nothing_else_fits(tiny_job: MakeJob) -> None:
    job = tiny_job(device="Ascend", max_prompt_length=3000, max_response_length=1000)
    single = with_world_size(job, 1)

    def fits(plan: MemoryPlan) -> bool:
        return plan.job.infer.parallel.world_size >= 4

    found = smallest_world(single, fits, with_reward_model=True)
    assert found is not None
    assert found[0] == 4
    assert found[1].changes == (
        "generate_x.yaml: data_parallel 4, model_parallel 1",
        "finetune_x.yaml: data_parallel 4, model_parallel 1",
    )


def test_a_report_with_room_suggests_nothing(tiny_job: MakeJob) -> None:
    report = make_report(tiny_job(), limit=10**12)
    assert report.fits is True
    assert report.suggestions == ()
    assert make_report(tiny_job(), limit=None).fits is None
    present = [cost for cost in report.splits if cost.present]
    assert [(cost.file, cost.roles) for cost in present] == [
        ("generate_x.yaml", ("infer", "reward")),
        ("finetune_x.yaml", ("train", "critic")),
    ]
    assert {cost.peak for cost in present} == {report.plan.peak.total}


@pytest.mark.parametrize(
    ("text", "size"),
    [("64GB", 64 * 10**9), ("64 gib", 64 * 2**30), ("1.5TB", 15 * 10**11), ("7MB", 7 * 10**6)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "64", "GB", "-1GB", "0GB", "64 GBit", "1e3GB", "nanGB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--device_memory: not a size"):
        parse_bytes(text)


def test_max_device_memory_of_the_yaml_counts_too(shipped_job: MakeJob) -> None:
    job = shipped_job("qwen2_7b")  # 58GB, which MindSpore counts in 2^30, and 2 GiB beside its pool
    assert memory_limit(job, None) == 60 * 2**30
    assert memory_limit(job, 64 * 10**9) == 64 * 10**9
    assert memory_limit(job, 80 * 10**9) == 60 * 2**30
    assert memory_limit(shipped_job("qwen2_7b", device="CPU"), None) is None
