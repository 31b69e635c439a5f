"""Every YAML of the repository loads, and the shipped ones say what they should."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mindrlhf.configs.load import load_job, load_ppo_config, load_run_config

ROOT = Path(__file__).resolve().parents[3]
SKIPPED = {".git", ".venv", "build", "__pycache__"}
SIZES = ("7b", "0_5b", "tiny", "tiny_realvocab")


def _all_yamls() -> list[Path]:
    found = []
    for directory, names, files in os.walk(ROOT):
        names[:] = sorted(set(names) - SKIPPED)
        found += [Path(directory) / name for name in files if name.endswith((".yaml", ".yml"))]
    return sorted(found)


@pytest.mark.parametrize("path", _all_yamls(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_yaml_is_loaded(path: Path) -> None:
    if not path.is_relative_to(ROOT / "model_configs"):
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict | list)
    elif path.name.startswith("ppo_"):
        load_ppo_config(path)
    else:
        config = load_run_config(path)
        assert path.name.startswith("generate_") != bool(config.optimizer)
        assert path.name.startswith("generate_") != bool(config.lr_schedule)


def test_every_shipped_yaml_belongs_to_a_known_model() -> None:
    models = [f"qwen2_{size}" for size in SIZES] + ["smollm2_135m"]
    expected = {f"{kind}_{model}.yaml" for kind in ("generate", "finetune", "ppo") for model in models}
    expected |= {
        f"{kind}_qwen2_{size}_8p.yaml" for kind in ("generate", "finetune") for size in ("7b", "0_5b")
    }
    assert {path.name for path in (ROOT / "model_configs").rglob("*.yaml")} == expected


@pytest.mark.parametrize("device_target", [None, "CPU"])
@pytest.mark.parametrize("size", SIZES)
def test_shipped_jobs(size: str, device_target: str | None, model_configs: Path) -> None:
    infer, train = (model_configs / f"{kind}_qwen2_{size}.yaml" for kind in ("generate", "finetune"))
    job = load_job(
        sft_path_infer=infer,
        sft_path_train=train,
        reward_path=infer,
        critic_path=train,
        ppo_config=model_configs / f"ppo_qwen2_{size}.yaml",
        world_size=4,
        device_target=device_target,
    )
    splits = [(run.parallel.data_parallel, run.parallel.model_parallel) for run in (job.infer, job.train)]
    assert splits == ([(2, 2), (4, 1)] if size == "0_5b" else [(1, 4), (2, 2)])
    assert job.reward == job.infer
    assert job.critic == job.train
    on_cpu = device_target == "CPU" or size.startswith("tiny")
    for run in (job.infer, job.train):
        assert run.context.device_target == ("CPU" if on_cpu else "Ascend")
        assert run.model.compute_dtype == ("float32" if on_cpu else "bfloat16")
        assert run.model.use_flash_attention == (not on_cpu)
        assert run.model.eos_token_id == job.ppo.stop_token_ids
        assert run.model.pad_token_id == job.ppo.pad_token_id
    assert job.infer.model.param_init_type == ("float32" if size.startswith("tiny") else "bfloat16")
    assert job.infer.generator_model.param_init_type == ("float32" if on_cpu else "bfloat16")
    assert job.train.model.param_init_type == ("bfloat16" if size == "7b" else "float32")


@pytest.mark.parametrize("size", ["7b", "0_5b"])
def test_pairs_for_eight_workers_take_the_settings_of_four(size: str, model_configs: Path) -> None:
    """They differ from the others in their splits, and in what need not go to host memory there."""
    job, four = (
        load_job(
            sft_path_infer=model_configs / f"generate_qwen2_{name}.yaml",
            sft_path_train=model_configs / f"finetune_qwen2_{name}.yaml",
            reward_path=model_configs / f"generate_qwen2_{name}.yaml",
            critic_path=model_configs / f"generate_qwen2_{name}.yaml",
            world_size=workers,
        )
        for name, workers in ((f"{size}_8p", 8), (size, 4))
    )
    assert job.ppo == four.ppo
    for run, other in ((job.infer, four.infer), (job.train, four.train)):
        assert run.parallel.world_size == 8
        same = replace(run, path=other.path, parallel=other.parallel, optimizer=other.optimizer)
        assert same == other
        assert {**run.optimizer, "swap": None} == {**other.optimizer, "swap": None}


def test_job_of_the_quick_start(model_configs: Path) -> None:
    infer, train = (model_configs / f"{kind}_smollm2_135m.yaml" for kind in ("generate", "finetune"))
    job = load_job(
        sft_path_infer=infer,
        sft_path_train=train,
        reward_path=infer,
        critic_path=infer,
        ppo_config=model_configs / "ppo_smollm2_135m.yaml",
        world_size=1,
    )
    model = job.train.model
    sizes = (model.hidden_size, model.num_layers, model.num_heads, model.n_kv_heads, model.intermediate_size)
    assert sizes == (576, 30, 9, 3, 1536)
    assert (model.vocab_size, model.theta, model.rms_norm_eps) == (49152, 1e5, 1e-5)
    assert job.infer.context.device_target == job.train.context.device_target == "CPU"
    assert model.eos_token_id == job.ppo.stop_token_ids == (2, 0)
    assert job.ppo.critic == "shared"


def test_ppo_settings_of_the_issue(model_configs: Path) -> None:
    big = load_ppo_config(model_configs / "ppo_qwen2_7b.yaml")
    assert (big.max_prompt_length, big.max_response_length) == (4096, 4096)
    tiny = load_ppo_config(model_configs / "ppo_qwen2_tiny.yaml")
    assert (tiny.max_prompt_length, tiny.max_response_length, tiny.rollout_batch_size) == (32, 32, 8)
    assert (tiny.num_minibatches, tiny.ppo_epochs, tiny.total_iterations) == (2, 2, 4)
    assert (tiny.minibatch_size, tiny.optimizer_steps, tiny.max_length) == (4, 16, 64)
    assert (tiny.stop_token_ids, tiny.pad_token_id) == ((1023, 1021), 1021)
    real = load_ppo_config(model_configs / "ppo_qwen2_tiny_realvocab.yaml")
    assert (real.valid_vocab_size, real.stop_token_ids, real.pad_token_id) == (
        151646,
        (151645, 151643),
        151643,
    )


@pytest.mark.parametrize(
    ("size", "published"), [("7b", "qwen2-7b-instruct"), ("0_5b", "qwen2-0.5b-instruct")]
)
@pytest.mark.parametrize("kind", ["generate", "finetune"])
def test_sizes_equal_the_published_ones(
    size: str, published: str, kind: str, model_configs: Path, shared_data: Path
) -> None:
    hf = json.loads((shared_data / "configs" / f"{published}.config.json").read_text())
    model = load_run_config(model_configs / f"{kind}_qwen2_{size}.yaml").model
    ours = {
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.n_kv_heads,
        "intermediate_size": model.intermediate_size,
        "vocab_size": model.vocab_size,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.theta,
        "initializer_range": model.initializer_range,
        "tie_word_embeddings": model.tie_word_embeddings,
        "bos_token_id": model.bos_token_id,
        "eos_token_id": model.eos_token_id[0],
    }
    assert ours == {key: hf[key] for key in ours}
    assert model.qkv_has_bias
    assert model.seq_length == 8192
