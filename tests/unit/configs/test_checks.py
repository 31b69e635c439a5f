"""Each check has a case that fails, and nothing else is reported with it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from mindrlhf.algorithms.advantages import ADVANTAGES, Advantage, reinforce
from mindrlhf.configs.fields import keys_of
from mindrlhf.configs.flags import PPOOptions, RewardOptions, SFTOptions
from mindrlhf.configs.keys import PPOConfig, TrainingSettings
from mindrlhf.configs.load import load_ppo_job
from mindrlhf.utils.errors import ConfigError

M = "model.model_config."

# (role, key, value, start of the only fault)
ONE_KEY_CASES = [
    # sizes of one file
    ("reward", M + "num_heads", 12, "hidden_size: 64 is not divisible by num_heads (12)"),
    ("reward", M + "n_kv_heads", 16, "num_heads: 8 is not divisible by n_kv_heads (16)"),
    ("reward", M + "num_heads", 64, "hidden_size: heads of odd size (1)"),
    ("reward", M + "n_kv_heads", 2, "n_kv_heads: 2 is not divisible by parallel_config.model_parallel (4)"),
    ("reward", M + "intermediate_size", 174, "intermediate_size: 174 is not divisible by parallel_config"),
    (
        "reward",
        M + "pad_token_id",
        1024,
        "pad_token_id: outside the vocabulary (1024) - ids must be below 1024",
    ),
    ("reward", M + "bos_token_id", 4096, "bos_token_id: outside the vocabulary (4096)"),
    ("reward", M + "eos_token_id", [1, 1024, 2000], "eos_token_id: outside the vocabulary (1024, 2000)"),
    # ranges and types
    ("reward", M + "seq_length", True, "seq_length: wrong type (True)"),
    ("reward", M + "num_layers", -1, "num_layers: out of range (-1)"),
    ("reward", M + "num_layers", 2.0, "num_layers: wrong type (2.0)"),
    ("reward", M + "rms_norm_eps", float("nan"), "rms_norm_eps: not finite (nan)"),
    ("reward", M + "rms_norm_eps", 0, "rms_norm_eps: out of range (0)"),
    ("reward", M + "theta", None, "theta: wrong type (None)"),
    ("reward", M + "qkv_has_bias", 1, "qkv_has_bias: wrong type (1)"),
    ("reward", M + "compute_dtype", "bf16", "compute_dtype: not allowed ('bf16')"),
    ("reward", M + "type", 3, "type: wrong type (3) - must be text"),
    # what PPO cannot honour
    ("reward", M + "emb_dropout_prob", 0.1, "emb_dropout_prob: not supported (0.1)"),
    ("reward", M + "attention_dropout_prob", 0.1, "attention_dropout_prob: not supported"),
    ("reward", M + "extend_method", "NTK", "extend_method: not supported ('NTK')"),
    ("reward", M + "scaling_factor", 2.0, "scaling_factor: not supported (2.0)"),
    ("reward", M + "repetition_penalty", 1.1, "repetition_penalty: not supported (1.1)"),
    ("reward", M + "qkv_concat", True, "qkv_concat: not supported (True)"),
    ("reward", M + "quant_config", {"a": 1}, "quant_config: not supported"),
    ("reward", "parallel_config.pipeline_stage", 2, "pipeline_stage: not supported (2)"),
    ("reward", "parallel_config.context_parallel", 2, "context_parallel: not supported (2)"),
    ("reward", "parallel_config.expert_parallel", 2, "expert_parallel: not supported (2)"),
    ("reward", "moe_config", {"expert_num": 8}, "moe_config.expert_num: not supported (8)"),
    ("reward", "recompute_config.recompute", "all", "recompute: wrong type ('all') - must be True or False"),
    (
        "reward",
        "recompute_config.recompute",
        [1, 0],
        "recompute: not supported ([1, 0]) - must be True, False",
    ),
    (
        "reward",
        "recompute_config.recompute",
        [9],
        "recompute: not supported ([9]) - must be True, False or [nu",
    ),
    ("reward", "recompute_config.select_recompute", {"a": 1}, "select_recompute: not supported"),
    ("reward", "recompute_config", True, "recompute_config: wrong type (True)"),
    ("reward", "swap_config", {"swap": True}, "swap_config.swap: not supported (True)"),
    (
        "reward",
        "parallel.enable_parallel_optimizer",
        1,
        "enable_parallel_optimizer: wrong type (1) - must be",
    ),
    (
        "reward",
        "parallel_config.use_seq_parallel",
        1,
        "use_seq_parallel: wrong type (1) - must be True or False",
    ),
    (
        "reward",
        "parallel_config.micro_batch_num",
        4,
        "gradient_accumulation_steps: not used (4): no model of this file is trained",
    ),
    ("reward", "parallel_config.optimizer_shard", 8, "optimizer_shard: not supported (8)"),
    ("reward", M + "parallel_optimizer", True, "parallel_optimizer: not supported (True)"),
    ("reward", M + "residual_dtype", "float16", "residual_dtype: not supported ('float16')"),
    ("reward", "context.mode", 1, "context.mode: not supported (1) - must be 0 (graph)"),
    ("reward", "context.deterministic", "ON", "context.deterministic: not supported ('ON')"),
    (
        "reward",
        "context.memory_offload",
        "yes",
        "context.memory_offload: wrong type ('yes') - must be ON or OFF",
    ),
    ("reward", "context.jit_config", {"jit_level": "O1"}, "context.jit_config: not supported ({'jit_level'"),
    ("reward", "context.device_id", 3, "context.device_id: not supported (3) - remove it: msrun gives"),
    ("reward", "context.ascend_config", {"precision_mode": "force_fp16"}, "ascend_config: not supported"),
    ("reward", "context.enable_compile_cache", True, "remove it; --enable_compile_cache True keeps graphs"),
    ("reward", "micro_batch_interleave_num", 2, "micro_batch_interleave_num: not supported (2)"),
    ("reward", M + "num_attention_heads", 8, "heads: unknown key - here it is called num_heads"),
    ("reward", "lr_scale", True, "lr_scale: not supported (True)"),
    (
        "reward",
        "runner_config.gradient_accumulation_steps",
        2,
        "gradient_accumulation_steps: not used (2): no model of this file is trained",
    ),
    (
        "train",
        "parallel_config.micro_batch_num",
        True,
        "micro_batch_num: wrong type (True) - must be a whole",
    ),
    (
        "train",
        "parallel_config.micro_batch_num",
        3,
        "accumulation_steps: 3 does not divide the minibatch rows",
    ),
    # unknown keys
    ("reward", M + "hiden_size", 64, "hiden_size: unknown key - did you mean hidden_size?"),
    ("reward", "parallel_config.data_paralel", 1, "data_paralel: unknown key - did you mean data_parallel?"),
    ("reward", "context.device", "CPU", "context.device: unknown key"),
    ("reward", "model.model_cfg", {}, "model.model_cfg: unknown key - did you mean model_config?"),
    ("reward", "runner_config.epoch", 1, "epoch: unknown key - did you mean epochs?"),
    ("reward", "qqqqqqqq", 1, "qqqqqqqq: unknown section - MindFormers has no such section"),
    ("reward", "context.mode", 2, "context.mode: not supported (2)"),
    # optimizer and schedule
    ("train", "optimizer.type", "AdamWeightDecay", "optimizer.type: not supported ('AdamWeightDecay')"),
    ("train", "optimizer.type", ["AdamW"], "optimizer.type: not supported (['AdamW'])"),
    ("train", "optimizer.bettas", [0.9, 0.9], "optimizer.bettas: unknown key - did you mean betas?"),
    ("train", "optimizer.betas", [0.9, 1.0], "optimizer.betas: out of range ([0.9, 1.0])"),
    ("train", "optimizer.betas", [0.9], "optimizer.betas: wrong length ([0.9])"),
    ("train", "optimizer.betas", 0.9, "optimizer.betas: wrong type (0.9)"),
    ("train", "optimizer.eps", 0, "optimizer.eps: out of range (0)"),
    ("train", "optimizer.weight_decay", -0.1, "optimizer.weight_decay: out of range (-0.1)"),
    ("train", "lr_schedule.learning_rate", None, "lr_schedule.learning_rate: wrong type (None)"),
    ("train", "lr_schedule.warmup_ratio", 1.5, "lr_schedule.warmup_ratio: out of range (1.5)"),
    ("train", "lr_schedule.lr_ende", 0.0, "lr_schedule.lr_ende: unknown key - did you mean lr_end?"),
    ("train", "lr_schedule.type", "ConstantWarmUpLR", "lr_schedule.lr_end: unknown key"),
    ("train", "lr_schedule", {"type": "linear", "learning_rate": 1.0}, "lr_schedule.warmup_steps: missing"),
    (
        "train",
        "lr_schedule",
        {"type": "polynomial", "learning_rate": 0.0, "warmup_steps": 0},
        "lr_schedule.learning_rate: not above lr_end (0 against 1e-07)",
    ),
    (
        "train",
        "lr_schedule",
        {"type": "linear", "learning_rate": 1.0, "warmup_steps": 3200},
        "lr_schedule.warmup_steps: warm-up never ends (3200 steps of warm-up, 16 optimizer steps in the job)",
    ),
    (
        "train",
        "optimizer.learning_rate",
        2e-4,
        "learning_rate: differs from lr_schedule (0.0002 against 0.0001)",
    ),
    (
        "critic",
        "optimizer.learning_rate",
        2e-4,
        "learning_rate: differs from lr_schedule (0.0002 against 0.0001)",
    ),
    # files against each other
    ("train", M + "num_layers", 3, "num_layers: differs from"),
    ("train", M + "rms_norm_eps", 1e-5, "rms_norm_eps: differs from"),
    ("train", M + "theta", 1e4, "theta: differs from"),
    ("train", M + "tie_word_embeddings", True, "tie_word_embeddings: differs from"),
    ("train", M + "qkv_has_bias", False, "qkv_has_bias: differs from"),
    ("train", M + "intermediate_size", 352, "intermediate_size: differs from"),
    ("reward", M + "vocab_size", 2048, "vocab_size: differs from"),
    ("critic", M + "vocab_size", 2048, "vocab_size: differs from"),
    ("critic", "context.device_target", "GPU", "context.device_target: differs from"),
    (
        "critic",
        M + "seq_length",
        63,
        "seq_length: 63 is below max_prompt_length 32 + max_response_length 32 = 64",
    ),
    (
        "reward",
        "parallel_config.data_parallel",
        2,
        "parallel_config: data_parallel 2 x model_parallel 4 = 8 ranks, but there are 4",
    ),
    # hyper-parameters
    ("ppo", "stop_token_ids", [1024], "(1024) - ids must be below"),
    ("ppo", "pad_token_id", 5000, "pad_token_id: outside the vocabulary (5000)"),
    ("ppo", "valid_vocab_size", 1025, "valid_vocab_size: above the vocabulary (1025) - must be at most 1024"),
    ("ppo", "valid_vocab_size", 1022, "stop_token_ids: never sampled (1023) - ids must be below"),
    ("ppo", "top_k", 1025, "top_k: above the vocabulary (1025)"),
    ("ppo", "rollout_batch_size", 9, "rollout_batch_size: 9 is not divisible by"),
    ("ppo", "num_minibatches", 3, "rollout_batch_size: 8 is not divisible by num_minibatches (3)"),
    (
        "ppo",
        "num_minibatches",
        8,
        "num_minibatches: a minibatch of 1 rows is not divisible by data_parallel of",
    ),
    ("ppo", "micro_batch_size", 3, "micro_batch_size: 3 does not divide the minibatch rows per rank of"),
    (
        "ppo",
        "generation_batch_size",
        3,
        "generation_batch_size: 3 does not divide the rollout rows per rank of",
    ),
    ("ppo", "score_batch_size", 3, "score_batch_size: 3 does not divide the rollout rows per rank of"),
]

RANGES = {
    "seed": [-1], "total_iterations": [0], "save_interval": [-1], "keep_checkpoints": [-1],
    "log_samples": [-1], "eval_interval": [-1], "eval_prompts": [-1], "eval_samples": [-1],
    "rollout_batch_size": [0], "generation_batch_size": [-1], "score_batch_size": [-1], "ppo_epochs": [0],
    "num_minibatches": [0], "micro_batch_size": [-1], "max_prompt_length": [0], "max_response_length": [0],
    "stop_token_ids": [[-1]], "pad_token_id": [-1], "valid_vocab_size": [-1], "temperature": [0, -1.0, 9e-7],
    "top_k": [-1], "top_p": [0, 1.01], "decode_steps_per_call": [0], "kl_coef": [-0.1], "kl_target": [0],
    "kl_horizon": [0], "gamma": [-0.01, 1.01], "lam": [-0.01, 1.01], "missing_eos_penalty": [-0.1],
    "score_clip": [-0.1], "entropy_coef": [-0.1], "ptx_coef": [-0.1], "target_kl": [-0.1],
    "critic_warmup_iterations": [-1], "cliprange": [0, 1], "cliprange_value": [0], "vf_coef": [-0.1],
    "value_head_init_scale": [-1.0], "log_ratio_clamp": [0, 81], "max_grad_norm": [-1.0],
    "max_skipped_updates": [0],
}  # fmt: skip
CHOICES = ("kl_controller", "kl_estimator", "critic", "advantage")
REQUIRED = (
    "total_iterations",
    "rollout_batch_size",
    "max_prompt_length",
    "max_response_length",
    "stop_token_ids",
    "pad_token_id",
)


@pytest.mark.parametrize(("role", "key", "value", "fault"), ONE_KEY_CASES)
def test_one_fault(role: str, key: str, value: Any, fault: str, job: Any) -> None:
    job.edit(role, key, value)
    faults = job.faults()
    assert all(line.startswith(f"{role}.yaml: ") and fault in line for line in faults), faults
    # One value can be at odds with each of three files (infer, train, critic), but with nothing more.
    assert len(faults) <= 3


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, bad in RANGES.items() for value in bad])
def test_ppo_ranges(key: str, value: Any, job: Any) -> None:
    job.edit("ppo", key, value)
    (fault,) = job.faults()
    assert fault.startswith(f"ppo.yaml: {key}: out of range (")


@pytest.mark.parametrize("key", CHOICES)
def test_ppo_choices(key: str, job: Any) -> None:
    job.edit("ppo", key, "other")
    (fault,) = job.faults()
    assert fault.startswith(f"ppo.yaml: {key}: not allowed ('other') - must be one of ")


@pytest.mark.parametrize("key", REQUIRED)
def test_ppo_required(key: str, job: Any, delete: object) -> None:
    job.edit("ppo", key, delete)
    (fault,) = job.faults()
    assert fault.startswith(f"ppo.yaml: {key}: missing - give ")


def test_every_ppo_key_has_a_bad_value() -> None:
    keys = keys_of(PPOConfig)
    flags = {name for name, key in keys.items() if key.base is bool}
    assert set(RANGES) | set(CHOICES) | flags == set(keys)
    assert {name for name, key in keys.items() if key.required} == set(REQUIRED)


@pytest.mark.parametrize(
    "key", ["do_sample", "shuffle", "whiten_advantages", "whiten_rewards", "scale_rewards", "center_rewards"]
)
def test_ppo_flags(key: str, job: Any) -> None:
    job.edit("ppo", key, "true")
    (fault,) = job.faults()
    assert fault.startswith(f"ppo.yaml: {key}: wrong type ('true') - must be True or False")


@pytest.mark.parametrize("section", ["optimizer", "lr_schedule"])
def test_train_needs_optimizer_and_schedule(section: str, job: Any, delete: object) -> None:
    job.edit("train", section, delete)
    assert job.faults() == [f"train.yaml: {section}: missing - the model that is trained needs this section"]
    job.edit("train", section, None)
    assert len(job.faults()) == 1


def test_world_size(job: Any) -> None:
    assert len(job.faults(world_size=8)) == 4
    assert len(job.faults(world_size=1)) == 4
    job.load(world_size=None)
    job.edit("train", "parallel_config.model_parallel", 4)
    (fault,) = job.faults(world_size=None)
    assert fault.startswith("train.yaml: parallel_config: data_parallel 2 x model_parallel 4 = 8 ranks, but ")


def test_critic_split_does_not_matter_when_it_is_shared(job: Any) -> None:
    job.edit("critic", "parallel_config.data_parallel", 4)
    job.edit("critic", "parallel_config.model_parallel", 1)
    job.edit("ppo", "num_minibatches", 4)  # 2 rows a minibatch: fits train (dp2), not critic (dp4)
    (fault,) = job.faults()
    assert "a minibatch of 2 rows is not divisible by data_parallel of critic.yaml (4)" in fault
    job.load(overrides=["critic=shared"])


def test_critic_warm_up_needs_a_critic_of_its_own_and_an_end(job: Any) -> None:
    assert job.load(overrides=["critic_warmup_iterations=1"]).ppo.critic_warmup_iterations == 1
    (fault,) = job.faults(overrides=["critic_warmup_iterations=1", "critic=shared"])
    assert fault.startswith("--set critic_warmup_iterations: not possible with critic: shared (1)")
    total = job.load().ppo.total_iterations
    (fault,) = job.faults(overrides=[f"critic_warmup_iterations={total}"])
    assert f"the policy never learns ({total} of {total} iterations)" in fault


def test_critic_warm_up_leaves_the_policy_fewer_optimizer_steps(job: Any) -> None:
    whole = job.load().ppo
    assert whole.policy_optimizer_steps == whole.optimizer_steps == 16
    assert job.load(overrides=["critic_warmup_iterations=1"]).ppo.policy_optimizer_steps == 12
    job.edit("train", "lr_schedule", {"type": "linear", "learning_rate": 1e-4, "warmup_steps": 13})
    job.load()
    (fault,) = job.faults(overrides=["critic_warmup_iterations=1"])
    assert "(13 steps of warm-up, 12 optimizer steps in the job)" in fault


def test_batch_sizes_that_divide_are_taken(job: Any) -> None:
    ppo = job.load(overrides=["generation_batch_size=4", "score_batch_size=2", "micro_batch_size=1"]).ppo
    assert (ppo.generation_batch_size, ppo.score_batch_size, ppo.micro_batch_size) == (4, 2, 1)
    # per rank: 8 rows on infer (dp1) but 4 on the critic (dp2)
    (fault,) = job.faults(overrides=["score_batch_size=8"])
    assert fault.startswith(
        "--set score_batch_size: 8 does not divide the rollout rows per rank of critic.yaml (4)"
    )


@pytest.mark.parametrize(
    "key", ["runner_config.gradient_accumulation_steps", "parallel_config.micro_batch_num"]
)
def test_accumulation_by_mindformers_names_cuts_the_minibatches_of_its_file(job: Any, key: str) -> None:
    before = job.load()
    rows = {role: before.ppo.micro_batch_rows(getattr(before, role)) for role in ("train", "critic")}
    assert rows["train"] == 2
    job.edit("train", key, 2)
    loaded = job.load()
    assert loaded.ppo.micro_batch_rows(loaded.train) == 1
    assert loaded.ppo.micro_batch_rows(loaded.critic) == rows["critic"]
    (fault,) = job.faults(overrides=["micro_batch_size=1"])
    assert fault.startswith("--set micro_batch_size: 1, but ")
    assert fault.endswith("has 2 gradient_accumulation_steps - both cut a minibatch: set one to 0 or 1")
    job.edit("train", "runner_config.gradient_accumulation_steps", 2)
    job.edit("train", "parallel_config.micro_batch_num", 4)
    (fault,) = job.faults()
    assert "micro_batch_num: differs from runner_config.gradient_accumulation_steps (4 against 2)" in fault


def test_one_process_has_one_context(job: Any) -> None:
    for role in ("infer", "train", "reward", "critic"):
        job.edit(role, "context.device_target", "Ascend")
        job.edit(role, "context.max_device_memory", "58GB")
    job.load()
    job.edit("reward", "context.max_device_memory", "30GB")
    job.edit("infer", "context.max_call_depth", 99)
    assert [fault.partition(" - ")[0] for fault in job.faults()] == [
        "infer.yaml: context.max_call_depth: differs from train.yaml (99 against 10000)",
        "reward.yaml: context.max_device_memory: differs from train.yaml (30GB against 58GB)",
    ]
    job.edit("infer", "context.max_call_depth", 10_000)
    job.edit("train", "context.max_device_memory", None)
    assert len(job.faults()) == 3  # 58GB, 30GB and 58GB against none
    assert job.load(device_target="CPU").reward.context.max_device_memory == "30GB"


def test_estimator_and_critic_go_together(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert job.load(overrides=["critic=none", "advantage=reinforce"]).ppo.critic == "none"
    (fault,) = job.faults(overrides=["critic=none"])
    assert fault.startswith("--set critic: advantage gae needs the values of a critic (none) - use critic: ")
    (fault,) = job.faults(overrides=["advantage=reinforce"])
    assert fault.startswith(
        "--set advantage: a critic would be trained and never used (reinforce with critic:"
    )
    assert fault.endswith("set critic: none")
    monkeypatch.setitem(ADVANTAGES, "mine", Advantage(reinforce, needs_critic=False))
    assert job.load(overrides=["critic=none", "advantage=mine"]).ppo.advantage == "mine"


def test_without_a_critic_its_file_is_not_read_and_its_settings_are_refused(job: Any, tmp_path: Path) -> None:
    none = ["critic=none", "advantage=reinforce"]
    job.paths["critic"].unlink()
    loaded = job.load(overrides=none)
    assert loaded.critic == loaded.train
    changed = {"lam": 1.0, "cliprange_value": 0.3, "vf_coef": 0.5, "critic_warmup_iterations": 1}
    job.edit("ppo", "value_head_init_scale", 0.0)
    faults = job.faults(overrides=[*none, *(f"{key}={value}" for key, value in changed.items())])
    places = [f"--set {key}" for key in changed] + ["ppo.yaml: value_head_init_scale"]
    assert sorted(faults) == sorted(
        f"{place}: without effect with critic: none ({value}) - remove it"
        for place, value in zip(places, [*changed.values(), 0.0], strict=True)
    )
    job.edit("ppo", "value_head_init_scale", 1.0)
    options = PPOOptions(
        sft_path_infer=job.paths["infer"],
        sft_path_train=job.paths["train"],
        reward_path=job.paths["reward"],
        critic_path=job.paths["critic"],
        ppo_config=job.paths["ppo"],
        overrides=none,
        load_critic_checkpoint=tmp_path,
    )
    with pytest.raises(ConfigError) as caught:
        load_ppo_job(options, 4)
    (fault,) = caught.value.faults
    assert fault.startswith(f"--load_critic_checkpoint: not used ({tmp_path}) - --set critic")
    assert fault.endswith(" is none, so no separate critic is built: remove the flag")


@pytest.mark.parametrize(
    ("chosen", "unused", "value"),
    [
        ("kl_controller: fixed", "kl_target", 3.0),
        ("kl_controller: fixed", "kl_horizon", 7),
        ("do_sample: False", "top_k", 5),
        ("do_sample: False", "top_p", 0.5),
    ],
)
def test_ppo_keys_that_nothing_would_read_are_refused(job: Any, chosen: str, unused: str, value: Any) -> None:
    overrides = [chosen.replace(": ", "="), f"{unused}={value}"]
    assert job.faults(overrides=overrides) == [
        f"--set {unused}: without effect with {chosen} ({value}) - remove it"
    ]


def test_a_single_response_has_no_baseline(job: Any) -> None:
    one = ["rollout_batch_size=1", "num_minibatches=1", "critic=none", "advantage=reinforce"]
    assert any(
        fault.startswith("--set rollout_batch_size: one response is its own baseline")
        for fault in job.faults(overrides=one)
    )


def test_another_architecture_is_refused(job: Any) -> None:
    job.edit("train", "model.arch", {"type": "GPT2LMHeadModel", "mine": 1})
    faults = job.faults()
    assert any(
        "model.arch.type: not supported ('GPT2LMHeadModel') - set it to Llama" in one for one in faults
    )
    assert any("model.arch.mine: unknown key" in one for one in faults)


def test_no_steps_at_all_are_refused_in_a_schedule(job: Any) -> None:
    job.edit("train", "lr_schedule.total_steps", 0)
    (fault,) = job.faults()
    assert "lr_schedule.total_steps: out of range (0) - must be -1 or a whole number >= 1" in fault


def test_what_is_harmless_is_named_in_one_warning_per_file(job: Any, log: pytest.LogCaptureFixture) -> None:
    job.load()
    assert [record for record in log.records if record.levelno >= logging.WARNING] == []
    job.edit("reward", M + "top_k", 5)
    job.edit("reward", "context.save_graphs", True)
    job.edit("reward", "load_checkpoint", "a.ckpt")
    job.load()
    (warning,) = (record.getMessage() for record in log.records if record.levelno >= logging.WARNING)
    assert warning == (
        f"{job.paths['reward']}: without effect here: load_checkpoint ('a.ckpt'), "
        "context.save_graphs (True), model.model_config.top_k (5)"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (M + "extend_method", None),
        (M + "scaling_factor", 1),
        (M + "emb_dropout_prob", 0),
        (M + "repetition_penalty", 1.0),
        (M + "moe_config", None),
        (M + "use_past", True),
        (M + "ffn_dim_multiplier", None),
        (M + "multiple_of", 256),
        (M + "embedding_init_type", "float32"),
        (M + "init_method_std", 0.02),
        ("context.mode", "GRAPH_MODE"),
        ("context.deterministic", "OFF"),
        ("context.ascend_config", {"precision_mode": "must_keep_origin_dtype"}),
        ("parallel_config.optimizer_shard", None),
        ("recompute_config", None),
        ("swap_config", {"swap": False, "default_prefetch": 10}),
    ],
)
def test_values_that_ask_for_nothing(key: str, value: Any, job: Any, log: pytest.LogCaptureFixture) -> None:
    job.edit("infer", key, value)
    job.load()
    assert [record for record in log.records if record.levelno >= logging.WARNING] == []


def test_zero_turns_off_alike_in_ppo_and_before_it(job: Any) -> None:
    assert job.load(overrides=["keep_checkpoints=0", "max_grad_norm=0"]).ppo.keep_checkpoints == 0
    shared = keys_of(TrainingSettings)
    for declaration in (PPOConfig, SFTOptions, RewardOptions):
        theirs = keys_of(declaration)
        assert all(theirs[name].annotation == key.annotation for name, key in shared.items())
