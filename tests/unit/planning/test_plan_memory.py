"""Bytes of weights, moments, cache, graphs and phases, worked by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from mindrlhf.configs.keys import JobConfig
from mindrlhf.models.decode_schedule import decode_schedule
from mindrlhf.planning.graph_memory import (
    CPU,
    Pass,
    count_parameters,
    generation_graphs,
    kv_cache_bytes,
    rank_sizes,
    scoring_graph,
    training_graph,
)
from mindrlhf.planning.job_memory import ModelMemory, job_models, plan_memory
from mindrlhf.planning.plan_report import make_report, print_report, report_dict
from mindrlhf.planning.splits import part_rows, with_world_size

MakeJob = Callable[..., JobConfig]

# One layer of TINY (H 16, 4 heads and 2 key/value heads of size 4, I 20): norms 2 x 16; wq 16 x 16 + 16, wk
# and wv 8 x 16 + 8 each, wo 16 x 16; w1, w3 and w2 20 x 16 each.
LAYER = 32 + 272 + 2 * 136 + 256 + 3 * 320
EMBEDDING = 24 * 16
POLICY = 2 * EMBEDDING + 2 * LAYER + 16
CRITIC = EMBEDDING + 2 * LAYER + 16 + 17


def by_name(job: JobConfig, **options: bool) -> dict[str, ModelMemory]:
    plan = plan_memory(job, **options)
    return {model.name: model for model in plan.models}


def test_parameters_of_a_whole_model_and_of_half_of_it(tiny_job: MakeJob) -> None:
    config = tiny_job().infer.model
    assert count_parameters(config, 1, lm_head=True, score_head=False).total == POLICY == 4368
    assert count_parameters(config, 1, lm_head=False, score_head=True).total == CRITIC == 4001
    # All but the norms (2 x 32 + 16) is split.
    half = count_parameters(config, 2, lm_head=True, score_head=False)
    assert half.total == (POLICY - 80) // 2 + 80
    assert half.largest == 12 * 16
    assert half.embedding == 12 * 16
    assert half.layer == (LAYER - 32) // 2 + 32


def test_weights_moments_and_gradients(tiny_job: MakeJob) -> None:
    models = by_name(tiny_job())
    assert models["policy train"].weights == 4 * POLICY
    assert models["policy train"].moments == 8 * POLICY
    assert models["policy train"].gradients == 4 * POLICY
    assert models["critic"].weights == 4 * CRITIC
    assert models["policy infer"].weights == models["reference"].weights == 4 * ((POLICY - 80) // 2 + 80)
    assert models["reference"].moments == models["reference"].gradients == 0
    # 17 of the head and 80 of the norms are whole on each rank.
    assert models["reward"].weights == 4 * ((CRITIC - 97) // 2 + 97)


def test_bfloat16_weights_keep_a_float32_head_and_float32_masters(tiny_job: MakeJob) -> None:
    job = tiny_job(device="Ascend")
    half = replace(job.infer, model=replace(job.infer.model, param_init_type="bfloat16"))
    models = by_name(replace(job, infer=half, reward=half, critic=half))
    assert models["policy infer"].weights == 2 * ((POLICY - 80) // 2 + 80)
    assert models["reward"].weights == 2 * ((CRITIC - 97) // 2 + 80) + 4 * 17
    assert models["critic"].weights == models["reward"].weights
    assert models["critic"].moments == 8 * ((CRITIC - 97) // 2 + 97) + 4 * ((CRITIC - 97) // 2 + 80)


def test_a_cache_holds_whole_calls_of_the_decode_graph(tiny_job: MakeJob) -> None:
    # 1 token from the prefill, 5 from calls of 2: 3 calls, so 4 + 6 columns.
    assert decode_schedule(4, 6, 2) == (2, 3, 10)
    sizes = rank_sizes(tiny_job().infer.model, 2)
    # keys and values, 2 layers, 8 rows, 10 columns, 1 head of size 4, float32
    assert kv_cache_bytes(sizes, 8, 10) == 2 * 2 * 8 * 10 * 4 * 4
    assert by_name(tiny_job())["policy infer"].kv_cache == 2 * 2 * 8 * 10 * 4 * 4
    assert by_name(tiny_job(generation_batch_size=2))["policy infer"].kv_cache == 2 * 2 * 2 * 10 * 4 * 4


def test_activations_of_a_training_pass(tiny_job: MakeJob) -> None:
    sizes = rank_sizes(tiny_job().train.model, 1)
    count = count_parameters(tiny_job().train.model, 1, lm_head=True, score_head=False)
    work = Pass(rows=3, columns=10, responses=6, logits=True)
    # A token keeps in a layer: its output and the stream between the halves, 2 x 16; query and mix, 2 x 16;
    # key and value, 2 x 8; gate and up, 2 x 20.
    layer = 32 + 32 + 16 + 40
    # Shared: 4 heads x 10 of the mask, cos and sin of 16 + 8 features. The last layer's output: 16.
    shared, last_output = 40 + 48, 16
    # A layer's gradients: heads in order and their gradients, 2 x (2 x 16 + 2 x 8), and three of 4 x 10
    # scores; the stream and its gradient.
    widest = 96 + 3 * 40 + 2 * 16
    # The head: 18 response tokens with 2 x 16 hidden numbers, a chunk of 24 logits, the gradients of both and
    # of the table; that is less.
    head = 2 * 18 * (32 + 24) + EMBEDDING
    assert 30 * widest > head
    graph = training_graph(sizes, work, count, CPU)
    assert graph.activations == 4 * 30 * (shared + 2 * layer + last_output + widest)
    # Broadcast: the two masks, 16 bytes an element.
    assert graph.kernels == 16 * (10 * 10 + 3 * 10 * 10)
    # Gradients of an earlier micro-batch: those of both layers, one block, exist besides.
    repeated = training_graph(sizes, replace(work, repeated=True), count, CPU)
    assert repeated.activations - graph.activations == 4 * 2 * LAYER
    # Recomputed: the input of the block is kept, and its results are there in its turn.
    recomputed = training_graph(sizes, replace(work, recompute=2), count, CPU)
    assert recomputed.activations == 4 * 30 * (shared + 16 + last_output + 2 * layer + widest)


def test_split_rows_take_their_part_of_the_residual_stream(tiny_job: MakeJob) -> None:
    config = tiny_job().train.model
    whole, split = rank_sizes(config, 2), rank_sizes(config, 2, splits_rows=True)
    count = count_parameters(config, 2, lm_head=True, score_head=False)
    work = Pass(rows=3, columns=10, responses=6, logits=True)
    # Two layers keep 2 x 16 numbers of it for a token, and the last output has 16.
    plain, saved = (training_graph(sizes, work, count, CPU).activations for sizes in (whole, split))
    assert plain - saved == 4 * 30 * (2 * 32 + 16) // 2
    # Recomputed: the block's input, the layers' results in its turn, and the last output.
    work = replace(work, recompute=2)
    plain, saved = (training_graph(sizes, work, count, CPU).activations for sizes in (whole, split))
    assert plain - saved == 4 * 30 * (16 + 2 * 32 + 16) // 2


def test_deep_models_keep_little_when_they_recompute(tiny_job: MakeJob) -> None:
    """30 layers in blocks of 3: 10 inputs of 16 numbers a token and 3 layers' results in place of 30's."""
    config = replace(tiny_job().train.model, num_layers=30)
    sizes, count = rank_sizes(config, 1), count_parameters(config, 1, lm_head=True, score_head=False)
    work = Pass(rows=3, columns=10, responses=6, logits=True)
    kept, recomputed, half = (
        training_graph(sizes, replace(work, recompute=layers), count, CPU).activations
        for layers in (0, 30, 15)
    )
    assert kept - recomputed == 4 * 30 * (30 * 120 - 10 * 16 - 3 * 120)
    assert kept - half == 4 * 30 * (15 * 120 - 5 * 16 - 3 * 120)


def test_a_scoring_pass_keeps_no_layers(tiny_job: MakeJob) -> None:
    sizes = rank_sizes(tiny_job().train.model, 1)
    count = count_parameters(tiny_job().train.model, 1, lm_head=True, score_head=False)
    work = Pass(rows=3, columns=10, responses=6, logits=True)
    graph = scoring_graph(sizes, work, count, CPU)
    # Both layers' results, the input, and heads in order beside two of 4 x 10 scores.
    block = 2 * 120 + 16 + (48 + 2 * 40)
    assert graph.activations == 4 * 30 * (88 + block)
    assert graph.kernels == 16 * (10 * 10 + 3 * 10 * 10)
    # Weights in bfloat16 become float32 on CPU, a block at a time: both layers.
    narrow = scoring_graph(replace(sizes, param=2), work, count, CPU)
    assert narrow.activations - graph.activations == 4 * 2 * LAYER


def test_a_scoring_pass_runs_in_the_blocks_of_its_network(tiny_job: MakeJob) -> None:
    """7 layers in blocks of 3 and 4; with 5 of them recomputed in one of 5 and one of 2."""
    config = replace(tiny_job().train.model, num_layers=7)
    sizes, count = rank_sizes(config, 1), count_parameters(config, 1, lm_head=True, score_head=False)
    work = Pass(rows=3, columns=10, responses=6, logits=True)
    plain, cut = (
        scoring_graph(sizes, replace(work, recompute=layers), count, CPU).activations for layers in (0, 5)
    )
    assert cut - plain == 4 * 30 * 120


def test_logits_exist_by_the_chunk(tiny_job: MakeJob) -> None:
    config = replace(tiny_job().train.model, vocab_size=2**20)
    sizes, count = rank_sizes(config, 1), count_parameters(config, 1, lm_head=True, score_head=False)
    few, many = (
        scoring_graph(
            sizes, Pass(rows=1, columns=rows + 1, responses=rows, logits=True), count, CPU
        ).activations
        for rows in (16, 1024)
    )
    assert few > 4 * 2**20 * 16  # 16 rows are a chunk of 64 MiB
    assert many < few + 4 * 1024 * (88 + 4 * 1024 + 500)  # the mask alone grows with the square


def test_flash_attention_keeps_no_scores(tiny_job: MakeJob) -> None:
    count = count_parameters(tiny_job().train.model, 1, lm_head=True, score_head=False)
    plain = rank_sizes(tiny_job().train.model, 1)
    flash = replace(plain, flash=True)

    def activations(sizes: object, columns: int) -> int:
        work = Pass(rows=1, columns=columns, responses=1)
        return training_graph(sizes, work, count, CPU).activations  # type: ignore[arg-type]

    # Four times the columns: the scores grow sixteenfold, the rest fourfold (a mask of 5 bytes a pair stays).
    assert activations(plain, 4000) > 15 * activations(plain, 1000)
    assert activations(flash, 4000) < 4 * activations(flash, 1000) + 16 * 5 * 1000**2


def test_a_long_prompt_is_read_in_blocks(tiny_job: MakeJob) -> None:
    sizes = rank_sizes(tiny_job().train.model, 1)
    short, long = (
        generation_graphs(sizes, 1, prompt, decode_schedule(prompt, 2, 1), CPU).activations
        for prompt in (512, 4096)
    )
    assert long < 9 * short  # 64 times, were all scores of a prompt there at once


def test_gradients_exist_in_training_alone_and_of_one_model_at_a_time(tiny_job: MakeJob) -> None:
    phases = plan_memory(tiny_job(device="Ascend")).phases
    found = {phase.name: phase.parts["gradients"] for phase in phases if phase.parts["gradients"]}
    assert found == {"training": 4 * POLICY}


def test_replicas_share_out_the_state_of_the_optimizer(tiny_job: MakeJob) -> None:
    job = tiny_job(device="Ascend")
    train = replace(
        job.train,
        shards_optimizer=True,
        parallel=replace(job.train.parallel, data_parallel=2, model_parallel=1),
        model=replace(job.train.model, param_init_type="bfloat16"),
    )
    policy = by_name(replace(job, train=train))["policy train"]
    assert policy.weights == 2 * POLICY
    assert policy.moments == 12 * POLICY // 2  # two moments and the float32 master
    assert policy.gradients == 4 * POLICY
    alone = by_name(replace(job, train=replace(train, shards_optimizer=False)))["policy train"]
    assert alone.moments == 12 * POLICY


def test_phases_on_cpu_only_grow_and_on_a_device_give_back(tiny_job: MakeJob) -> None:
    totals = [phase.total for phase in plan_memory(tiny_job()).phases]
    assert totals == sorted(totals)
    phases = {phase.name: phase for phase in plan_memory(tiny_job(device="Ascend")).phases}
    assert phases["training"].total > phases["save"].total
    assert phases["save"].parts["activations"] == 0
    assert phases["rollout"].parts["moments"] == 8 * (POLICY + CRITIC)
    phases = {phase.name: phase for phase in plan_memory(tiny_job()).phases}
    assert phases["rollout"].parts["moments"] == 4 * POLICY  # what loading the largest model has left
    assert phases["training"].parts["moments"] == 8 * (POLICY + CRITIC)


def test_a_shared_critic_and_a_reward_function_build_fewer_models(tiny_job: MakeJob) -> None:
    assert list(by_name(tiny_job())) == ["policy infer", "policy train", "reference", "reward", "critic"]
    models = by_name(tiny_job(critic="shared"), with_reward_model=False)
    assert list(models) == ["policy infer", "policy train", "reference"]
    assert models["policy train"].parameters == POLICY + 17
    assert set(models["policy train"].graphs) == {"scoring", "training"}


def test_nothing_of_a_critic_is_planned_without_one(tiny_job: MakeJob) -> None:
    """The rest is as with a separate critic: the policy has no value head."""
    job, separate = tiny_job(critic="none"), tiny_job()
    without, models = by_name(job), by_name(separate)
    del models["critic"]
    assert without == models
    plan = plan_memory(job)
    assert not any("critic" in file for file in plan.strategy_files)
    assert len(plan_memory(separate).strategy_files) - len(plan.strategy_files) == 2
    report = make_report(job, limit=1)
    assert "critic" not in str(report_dict(report))
    assert part_rows(job, "score_batch_size") == [8, 8]
    console = Console(record=True, file=StringIO())
    print_report(report, console)
    assert "critic" not in console.export_text()


def test_training_state_of_7b_is_eighteen_bytes_a_parameter(shipped_job: MakeJob) -> None:
    """Weights 2, two moments and the master 12, gradients 4: the figure of the tutorial, 68.5 GB at mp2."""
    job = shipped_job("qwen2_7b")
    policy = next(
        model for model in job_models(job, CPU, with_reward_model=True) if model.name == "policy train"
    )
    replicas = policy.mesh.dp  # which share out the moments
    total = policy.weights + replicas * policy.moments + policy.gradients
    assert total == 18 * policy.parameters
    assert total / 1e9 == pytest.approx(68.5, abs=0.05)


GB = 10**9


@pytest.mark.parametrize(
    ("size", "workers", "limit"),
    [("7b", 4, 60), ("7b_8p", 8, 45), ("7b_8p", 32, 25), ("0_5b", 4, 30), ("0_5b_8p", 8, 30)],
)
def test_shipped_jobs_fit_their_devices(shipped_job: MakeJob, size: str, workers: int, limit: int) -> None:
    """With a separate critic and a reward model, 4096 + 4096 tokens."""
    job = shipped_job(f"qwen2_{size}")
    if job.infer.parallel.world_size != workers:
        job = with_world_size(job, workers)
    plan = plan_memory(job)
    assert len(plan.models) == 5
    assert plan.peak.total < limit * GB


def test_of_what_is_offloaded_one_model_at_a_time_counts(tiny_job: MakeJob) -> None:
    job = tiny_job(device="Ascend")
    context = replace(job.train.context, memory_offload=True)
    roles = ("infer", "train", "reward", "critic")
    moved = replace(job, **{role: replace(getattr(job, role), context=context) for role in roles})
    before, after = ({phase.name: phase.parts for phase in plan_memory(one).phases} for one in (job, moved))
    half = (POLICY - 80) // 2 + 80
    assert before["training"]["weights"] == 4 * (2 * half + POLICY + (CRITIC - 97) // 2 + 97 + CRITIC)
    found = {name: parts["weights"] for name, parts in after.items()}
    assert found["rollout"] == 4 * half
    assert found["scoring"] == 4 * half, "the reference, with its head, takes most"
    assert found["training"] == found["sync"] == 4 * POLICY
    assert after["training"]["moments"] == 8 * (POLICY + CRITIC)
    swap = {"optimizer": {"type": "AdamW", "swap": True}}
    swapped = replace(moved, **{role: replace(getattr(moved, role), **swap) for role in ("train", "critic")})
    plan = plan_memory(swapped)
    assert {phase.parts["moments"] for phase in plan.phases} == {0}
    # Moments in host memory are saved from there; others pass through it, most of all the policy's.
    assert plan.host - plan_memory(moved).host == 8 * (POLICY + CRITIC) - 8 * POLICY + 4 * POLICY


def test_the_cache_counts_while_responses_are_generated(tiny_job: MakeJob) -> None:
    phases = plan_memory(tiny_job(device="Ascend")).phases
    assert [phase.name for phase in phases if phase.parts["kv_cache"]] == ["rollout"]
