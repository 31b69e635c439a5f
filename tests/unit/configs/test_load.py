"""What load_job makes of good files, and that one error lists every fault of bad ones."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mindrlhf.configs.fields import keys_of
from mindrlhf.configs.keys import ContextConfig, ModelConfig, ParallelConfig, PPOConfig, RunnerConfig
from mindrlhf.configs.load import load_ppo_config, load_run_config
from mindrlhf.utils.errors import ConfigError


def _faults_of(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run_config(path)
    return "\n".join(caught.value.faults)


def test_configurations_are_frozen(job: Any) -> None:
    loaded = job.load()
    for config in (loaded, loaded.infer, loaded.infer.model, loaded.infer.context, loaded.ppo):
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.seed = 2


def test_many_faults_are_reported_together_with_file_and_key_path(job: Any, delete: object) -> None:
    job.edit("infer", "model.model_config.num_head", 8)
    job.edit("infer", "parallel_config.model_parallel", 3)
    job.edit("train", "model.model_config.hidden_size", "64")
    job.edit("train", "optimizer", delete)
    job.edit("reward", "context.device_target", "TPU")
    job.edit("critic", "lr_schedule.type", "CosinWithWarmUpLR")
    job.edit("critic", "runner_cfg", {})
    job.edit("ppo", "gamma", 1.5)
    job.edit("ppo", "top_p", 0.0)
    faults = job.faults(overrides=["kl_coeff=1", "rollout_batch_size=7", "temperature"])
    expected = [
        "infer.yaml: model.model_config.num_head: unknown key - did you mean num_heads?",
        "infer.yaml: model.model_config.num_heads: 8 is not divisible by parallel_config.model_parallel (3)",
        "infer.yaml: model.model_config.n_kv_heads: 4 is not divisible by",
        "infer.yaml: model.model_config.vocab_size: 1024 is not divisible by",
        "infer.yaml: model.model_config.intermediate_size: 176 is not divisible by",
        "infer.yaml: parallel_config: data_parallel 1 x model_parallel 3 = 3 ranks, but there are 4",
        "train.yaml: model.model_config.hidden_size: wrong type ('64') - must be a whole number >= 1",
        "train.yaml: optimizer: missing",
        "reward.yaml: context.device_target: not allowed ('TPU') - must be one of CPU, Ascend, GPU",
        "critic.yaml: lr_schedule.type: not supported ('CosinWithWarmUpLR') - did you mean CosineWith",
        "critic.yaml: runner_cfg: unknown section - did you mean runner_config?",
        "ppo.yaml: gamma: out of range (1.5) - must be a number >= 0 and <= 1",
        "ppo.yaml: top_p: out of range (0.0) - must be a number > 0 and <= 1",
        "--set kl_coeff: unknown key - did you mean kl_coef?",
        "--set rollout_batch_size: 7 is not divisible by num_minibatches (2)",
        "--set rollout_batch_size: 7 is not divisible by data_parallel of",
        "--set 'temperature': not of the form key=value",
    ]
    for start in expected:
        assert any(fault.startswith(start) for fault in faults), (start, faults)
    assert len(faults) == len(expected) + 1, faults  # data_parallel of train.yaml and of critic.yaml


def test_the_message_counts_and_lists(job: Any) -> None:
    job.edit("ppo", "gamma", 2)
    job.edit("ppo", "lam", -1)
    with pytest.raises(ConfigError, match=r"^2 configuration errors:\n  - .*gamma.*\n  - .*lam") as caught:
        job.load()
    assert len(caught.value.faults) == 2


def test_one_file_in_two_roles_reports_each_fault_once(job: Any) -> None:
    job.edit("infer", "model.model_config.num_layers", 0)
    assert job.faults(reward_path=job.paths["infer"]) == [
        "infer.yaml: model.model_config.num_layers: out of range (0) - must be a whole number >= 1"
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "the root is empty"),
        ("- 1\n- 2\n", "the root is a list"),
        ("just text", "the root is a str"),
        ("a: [1, 2\nb: 3\n", "line 2, column 2"),
        ("context:\n\tmode: 0\n", "line 2, column 1"),
        (
            "context:\n  mode: 0\nseed: 1\ncontext:\n  mode: 1\n",
            "line 4, column 1: the key context is given twice",
        ),
        ("context:\n  mode: 0\n  mode: 0\n", "line 3, column 3: the key mode is given twice"),
        ("a: !!int ''\n", "a value YAML cannot make sense of"),
        ("a: 2024-13-45\n", "a value YAML cannot make sense of"),
        ("a: !!python/object:os.system x\n", "line 1, column 4"),
        ("a: *missing\n", "line 1, column 4"),
        ("? [1, 2]\n: 3\n", "line 1"),
        ("a: \x01\n", "not YAML"),
        ("a: " + "[" * 600 + "]" * 600, "line 1, column 53: nested more than 50 deep"),
        ("a: " + "9" * 5000, "a value YAML cannot make sense of"),
    ],
)
def test_unreadable_yaml(text: str, fault: str, yaml_file: Callable[[str], Path]) -> None:
    path = yaml_file(text)
    for load in (load_run_config, load_ppo_config):
        with pytest.raises(ConfigError) as caught:
            load(path)
        assert len(caught.value.faults) == 1
        assert caught.value.faults[0].startswith(f"{path}: {fault}")


def test_missing_file_directory_and_bytes(tmp_path: Path) -> None:
    assert "there is no such file" in _faults_of(tmp_path / "no.yaml")
    assert "cannot be read" in _faults_of(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff\xfe")
    assert "cannot be read" in _faults_of(tmp_path / "bytes.yaml")


def test_missing_files_of_a_job_are_reported_together(job: Any) -> None:
    job.paths["infer"].unlink()
    job.paths["ppo"].unlink()
    faults = job.faults(overrides=["gama=1", "lam=7"])
    assert [fault.split(":")[0] for fault in faults] == ["infer.yaml", "ppo.yaml", "--set gama", "--set lam"]


def test_sections_that_are_missing_empty_or_no_mappings(yaml_file: Callable[[str], Path]) -> None:
    faults = _faults_of(yaml_file("seed: 1\n"))
    for section in ("context", "parallel_config", "model"):
        assert f"{section}: missing - add this section" in faults
    faults = _faults_of(
        yaml_file("context: {}\nparallel_config: {}\nmodel: {}\noptimizer: {}\nlr_schedule: {}\n")
    )
    for key in (
        "context.device_target",
        "parallel_config.data_parallel",
        "parallel_config.model_parallel",
        "model.model_config",
        "optimizer.type",
        "lr_schedule.type",
    ):
        assert f"{key}: missing" in faults
    faults = _faults_of(
        yaml_file("context: 1\nparallel_config: [1]\nmodel: {model_config: x}\nrunner_config: 3\n")
    )
    for key in ("context", "parallel_config", "model.model_config", "runner_config"):
        assert f"{key}: wrong type" in faults
    faults = _faults_of(yaml_file("model: {model_config: {}}\n"))
    for key in (
        "vocab_size",
        "hidden_size",
        "num_layers",
        "num_heads",
        "theta",
        "rms_norm_eps",
        "eos_token_id",
    ):
        assert f"model.model_config.{key}: missing" in faults


def test_exponents_without_a_dot_are_numbers(job: Any) -> None:
    path = job.paths["train"]
    text = path.read_text().replace("rms_norm_eps: 1.e-6", "rms_norm_eps: 1e-6")
    path.write_text(text.replace("learning_rate: 1.e-4", "learning_rate: 2E-4"))
    loaded = job.load(overrides=["kl_coef=5e-2", "cliprange_value=1"])
    assert loaded.train.model.rms_norm_eps == 1e-6
    assert loaded.train.lr_schedule["learning_rate"] == 2e-4
    assert loaded.ppo.kl_coef == 0.05
    assert isinstance(loaded.ppo.cliprange_value, float)


def test_kv_heads_default_to_heads_and_one_eos_is_a_list_of_one(job: Any, delete: object) -> None:
    job.edit("reward", "model.model_config.n_kv_heads", delete)
    job.edit("reward", "model.model_config.eos_token_id", 1023)
    reward = job.load().reward.model
    assert reward.n_kv_heads == 8
    assert reward.eos_token_id == (1023,)


def test_unused_sections_are_named_in_one_line_per_file(job: Any, log: pytest.LogCaptureFixture) -> None:
    log.set_level(logging.DEBUG, logger="mindrlhf")
    loaded = job.load()
    lines = [record.getMessage() for record in log.records if "are not read" in record.getMessage()]
    assert len(lines) == 4
    assert lines[0].startswith(f"{job.paths['infer']}: sections that are not read: seed, output_dir")
    assert "callbacks" in loaded.infer.ignored
    assert "model" not in loaded.infer.ignored


def test_device_target_override(job: Any, log: pytest.LogCaptureFixture) -> None:
    for role in ("infer", "train", "reward", "critic"):
        job.edit(role, "context.device_target", "Ascend")
        job.edit(role, "model.model_config.compute_dtype", "bfloat16")
        job.edit(role, "model.model_config.use_flash_attention", True)
    assert job.load().infer.model.compute_dtype == "bfloat16"
    assert job.load().infer.model.use_flash_attention
    log.clear()
    infer = job.load(device_target="CPU").infer
    assert infer.context.device_target == "CPU"
    assert infer.model.compute_dtype == "float32"
    assert not infer.model.use_flash_attention
    lines = [record.getMessage() for record in log.records if "on CPU" in record.getMessage()]
    assert len(lines) == 4
    assert lines[0].endswith("model_config runs with compute_dtype float32, use_flash_attention False")
    gpu = job.load(device_target="GPU").infer
    assert (gpu.model.compute_dtype, gpu.model.use_flash_attention) == ("bfloat16", False)
    assert job.faults(device_target="cpu") == [
        "--device_target: not allowed ('cpu') - must be one of CPU, Ascend, GPU"
    ]


def test_products_of_every_model_round_on_cpu_alone(job: Any) -> None:
    loaded = job.load(cpu_matmul_dtype="bfloat16")
    runs = (loaded.infer, loaded.train, loaded.reward, loaded.critic)
    assert {(run.model.matmul_dtype, run.model.compute_dtype) for run in runs} == {("bfloat16", "float32")}
    assert job.load().train.model.matmul_dtype == "float32"
    job.edit("train", "context.device_target", "Ascend")
    assert (
        "--cpu_matmul_dtype: bfloat16, but train.yaml runs on Ascend - leave it out; there "
        "compute_dtype says it"
    ) in job.faults(cpu_matmul_dtype="bfloat16")


def test_single_process_replaces_every_split(job: Any) -> None:
    loaded = job.load(world_size=1, single_process=True)
    assert {
        run.parallel.world_size for run in (loaded.infer, loaded.train, loaded.reward, loaded.critic)
    } == {1}


def test_critic_without_optimizer_takes_that_of_train(job: Any, delete: object) -> None:
    job.edit("critic", "optimizer", delete)
    job.edit("critic", "lr_schedule.learning_rate", 0.5)
    loaded = job.load()
    assert loaded.critic.optimizer == loaded.train.optimizer
    assert loaded.critic.optimizer["type"] == "AdamW"
    assert loaded.critic.lr_schedule["learning_rate"] == 0.5
    assert loaded.infer.optimizer == {}


def test_a_learning_rate_is_that_of_policy_and_critic_and_keeps_the_shape(job: Any) -> None:
    job.edit("critic", "lr_schedule", {"type": "linear", "learning_rate": 0.0, "warmup_steps": 2})
    loaded = job.load(learning_rate=5e-4)
    schedule = loaded.train.lr_schedule
    assert (schedule["learning_rate"], schedule["lr_end"]) == (5e-4, pytest.approx(5e-5))
    assert loaded.critic.lr_schedule["learning_rate"] == 5e-4
    assert job.faults(learning_rate=0.0) == ["--learning_rate: out of range (0.0) - must be a number > 0"]


def test_reward_model_and_critic_are_by_default_as_the_policy_generates(job: Any) -> None:
    loaded = job.load(reward_path=None, critic_path=None)
    assert loaded.reward == loaded.infer
    assert loaded.critic.path == loaded.infer.path
    assert loaded.critic.optimizer == loaded.train.optimizer


def test_critic_may_be_a_generate_yaml(job: Any) -> None:
    assert job.load(critic_path=job.paths["infer"]).critic.lr_schedule["type"] == "CosineWithWarmUpLR"


def test_overrides_win_and_are_yaml(job: Any) -> None:
    ppo = job.load(
        overrides=["seed=7", "do_sample=no", "stop_token_ids=[3, 4]", "critic=shared", "gamma=0", "seed = 8"]
    ).ppo
    assert (ppo.seed, ppo.do_sample, ppo.stop_token_ids, ppo.critic) == (8, False, (3, 4), "shared")
    assert ppo.gamma == 0.0
    assert job.load(overrides=["stop_token_ids=5"]).ppo.stop_token_ids == (5,)


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("gama=1", "--set gama: unknown key - did you mean gamma?"),
        ("zzz=1", "--set zzz: unknown key - remove it"),
        (
            "learning_rate=1e-5",
            "--set learning_rate: unknown key - set it as --learning_rate, or as lr_sch",
        ),
        (
            "betas=1",
            "--set betas: unknown key - set it as optimizer.betas in the YAML of --sft_path_train",
        ),
        ("gamma", "--set 'gamma': not of the form key=value"),
        ("=1", "--set '=1': not of the form key=value"),
        ("gamma=[1", "--set gamma: line 1, column 3: "),
        ("gamma=", "--set gamma: wrong type (None)"),
        ("seed=True", "--set seed: wrong type (True) - must be a whole number >= 0"),
        ("seed=1.0", "--set seed: wrong type (1.0)"),
        ("seed=99999999999", "--set seed: out of range (more than 32 bits)"),
        ("lam=.nan", "--set lam: not finite (nan)"),
        ("lam=.inf", "--set lam: not finite (inf)"),
        ("lam=high", "--set lam: wrong type ('high')"),
        ("shuffle=1", "--set shuffle: wrong type (1) - must be True or False"),
        ("stop_token_ids=[]", "--set stop_token_ids: empty list ([])"),
        ("stop_token_ids=[1, 1]", "--set stop_token_ids: repeated ids ([1, 1])"),
        ("stop_token_ids=[1, x]", "--set stop_token_ids: wrong type ([1, 'x'])"),
        ("stop_token_ids={a: 1}", "--set stop_token_ids: wrong type ({'a': 1})"),
        ("critic=both", "--set critic: not allowed ('both') - must be one of separate, shared, none"),
    ],
)
def test_bad_overrides(override: str, fault: str, job: Any) -> None:
    faults = job.faults(overrides=[override])
    assert len(faults) == 1
    assert faults[0].startswith(fault)


def test_truncated_sampling_is_warned_of(job: Any, log: pytest.LogCaptureFixture) -> None:
    job.load()
    assert not [record for record in log.records if record.levelno >= logging.WARNING]
    job.load(overrides=["top_p=0.9"])
    warned = [record.getMessage() for record in log.records if record.levelno == logging.WARNING]
    assert len(warned) == 1
    assert "top_p 0.9" in warned[0]


def test_every_field_is_a_key() -> None:
    flags = {"matmul_dtype"}  # --cpu_matmul_dtype
    for declaration in (PPOConfig, ModelConfig, ParallelConfig, ContextConfig, RunnerConfig):
        assert {field.name for field in dataclasses.fields(declaration)} - flags == set(keys_of(declaration))


def test_derived_sizes() -> None:
    sizes: dict[str, Any] = {"vocab_size": 10, "num_layers": 1, "intermediate_size": 8}
    model = ModelConfig(hidden_size=24, num_heads=6, n_kv_heads=2, **sizes)
    assert (model.head_dim, model.queries_per_kv_head) == (4, 3)
    odd = ModelConfig(hidden_size=24, num_heads=5, n_kv_heads=2, **sizes)
    with pytest.raises(ValueError, match="24 is not divisible by 5"):
        odd.head_dim  # noqa: B018
