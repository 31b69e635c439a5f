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
from mindrlhf.planning.splits import part_rows

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
    shapes = {
        (12, 16): 2,
        (16,): 5,
        (8, 16): 2,
        (8,): 2,
        (4, 16): 4,
        (4,): 4,
        (16, 8): 2,
        (10, 16): 4,
        (16, 10): 2,
    }
    assert half.kinds(2) == {(shape, 2): count for shape, count in shapes.items()}
    scored = count_parameters(config, 2, lm_head=False, score_head=True).kinds(2)
    assert scored[(1, 16), 4] == scored[(1,), 4] == 1


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


def test_bfloat16_weights_keep_a_float32_head_and_a_float32_critic(tiny_job: MakeJob) -> None:
    job = tiny_job(device="Ascend")
    half = replace(job.infer, model=replace(job.infer.model, param_init_type="bfloat16"))
    models = by_name(replace(job, infer=half, reward=half, critic=half))
    assert models["policy infer"].weights == 2 * ((POLICY - 80) // 2 + 80)
    assert models["reward"].weights == 2 * ((CRITIC - 97) // 2 + 80) + 4 * 17
    assert models["critic"].weights == 4 * ((CRITIC - 97) // 2 + 97)
    assert models["critic"].moments == 8 * ((CRITIC - 97) // 2 + 97)


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
    work = Pass(rows=3, columns=10, responses=6, logits=True, entropy=True)
    graph = training_graph(sizes, work, count, CPU)
    # A token keeps in a layer: norms 4 x 16, query and mix 2 x 16, key and value 2 x 8, 4 heads x 10 weights,
    # feed-forward 3 x 20.
    layer = 64 + 32 + 16 + 40 + 60
    # Shared: 4 heads x 10 of the mask, cos and sin of 16 + 8 features. Last norm: 2 x 16.
    shared, last_norm = 40 + 48, 32
    # Head: 18 response tokens with 16 hidden states and 4 arrays of 24 logits; SwiGLU's backward pass is
    # wider: 30 tokens x (5 x 20 + 2 x 16).
    widest = max(18 * (16 + 4 * 24), 30 * (100 + 32))
    in_flight = LAYER + EMBEDDING  # gradients: a layer's, and the largest one
    assert graph.activations == 4 * (30 * (shared + 2 * layer + last_norm) + widest + in_flight)
    # Broadcast: the two masks, 16 bytes an element.
    assert graph.kernels == 16 * (10 * 10 + 3 * 10 * 10)


def test_a_scoring_pass_keeps_no_layers(tiny_job: MakeJob) -> None:
    sizes = rank_sizes(tiny_job().train.model, 1)
    work = Pass(rows=3, columns=10, responses=6, logits=True)
    graph = scoring_graph(sizes, work, CPU)
    attention = 16 + 32 + max(4 * 16 + 16, 3 * 40)
    feed_forward = 32 + 100
    head = 18 * (16 + 3 * 24)
    assert graph.activations == 4 * (30 * 88 + max(30 * max(attention, feed_forward), head))
    assert graph.kernels == 16 * (10 * 10 + 3 * 10 * 10)


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


@pytest.mark.parametrize("micro_batch_size", [0, 1])
@pytest.mark.parametrize("device", ["CPU", "Ascend"])
def test_policy_and_critic_add_their_gradients_up_in_the_same_buffers(
    tiny_job: MakeJob, device: str, micro_batch_size: int
) -> None:
    """The policy's shapes, with its head's 24 x 16, and the critic's scalar head of 16 + 1."""
    job = tiny_job(device=device, micro_batch_size=micro_batch_size)
    for phase in plan_memory(job).phases:
        assert phase.parts["gradients"] == 4 * (POLICY + 17)
    wider = replace(job, critic=replace(job.critic, model=replace(job.critic.model, intermediate_size=28)))
    # Other feed-forward weights, 3 of 28 x 16 in 2 layers.
    assert plan_memory(wider).peak.parts["gradients"] == 4 * (POLICY + 17 + 2 * 3 * 28 * 16)


def test_only_an_optimizer_that_is_not_fused_makes_a_set(tiny_job: MakeJob) -> None:
    assert by_name(tiny_job())["critic"].step_sets == 0  # the fused kernel clips one at a time
    assert by_name(tiny_job(device="Ascend"))["critic"].step_sets == 1
    short = tiny_job(device="Ascend", micro_batch_size=1, max_prompt_length=1, max_response_length=2)
    phases = {phase.name: phase for phase in plan_memory(short).phases}
    assert phases["training"].parts["activations"] == 4 * POLICY


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


def test_swapped_moments_are_on_the_host(tiny_job: MakeJob) -> None:
    job = tiny_job(device="Ascend")
    swapped = replace(job, train=replace(job.train, optimizer={"type": "AdamW", "swap": True}))
    before, after = plan_memory(job), plan_memory(swapped)
    assert before.peak.total - after.peak.total == 8 * POLICY
    assert by_name(swapped)["policy train"].host_moments == 8 * POLICY
    assert after.host > before.host - 8 * POLICY


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


def test_float32_training_state_of_7b_is_sixteen_bytes_a_parameter(shipped_job: MakeJob) -> None:
    """The figure of the tutorial: 60.9 GB at mp2."""
    job = shipped_job("qwen2_7b")
    policy = next(
        model for model in job_models(job, CPU, with_reward_model=True) if model.name == "policy train"
    )
    total = policy.weights + policy.moments + policy.gradients
    assert total == 16 * policy.parameters
    assert total / 1e9 == pytest.approx(60.9, abs=0.05)
