"""config.json of Hugging Face: the published ones, all faults at once, and what is written."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mindrlhf.checkpoint.element_types import BFLOAT16
from mindrlhf.checkpoint.hf_config import (
    check_described,
    finish_hf_config,
    hf_config_from_model,
    model_config_from_hf,
    read_hf_config,
)
from mindrlhf.utils.errors import CheckpointError
from mindrlhf.utils.provenance import provenance, write_provenance


def test_published_configs_are_read(shared_data):
    model = model_config_from_hf(read_hf_config(shared_data / "configs/qwen2-7b-instruct.config.json"), "7b")
    sizes = (model.hidden_size, model.num_layers, model.num_heads, model.n_kv_heads, model.intermediate_size)
    assert sizes == (3584, 28, 28, 4, 18944)
    assert (model.vocab_size, model.rms_norm_eps, model.theta) == (152064, 1e-6, 1e6)
    assert not model.tie_word_embeddings
    assert model.qkv_has_bias


def test_a_made_config_is_read_back_alike(hf):
    model = model_config_from_hf({**hf.config, "eos_token_id": [3, 4]}, "x")
    assert model_config_from_hf(hf_config_from_model(model), "y") == model


def test_all_config_faults_at_once(hf):
    config = {**hf.config, "hidden_size": None, "vocab_size": -1, "num_hidden_layers": "two"}
    with pytest.raises(CheckpointError, match=r"(?s)where/config.json.*vocab_size.*-1.*hidden_size.*'two'"):
        model_config_from_hf(config, "where/config.json")
    config = {**hf.config, "num_attention_heads": 3, "num_key_value_heads": 2, "head_dim": 8}
    with pytest.raises(CheckpointError, match=r"(?s)hidden_size 16 .* 3.*heads 3 .* 2.*head_dim 8"):
        model_config_from_hf(config, "x")


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_scaling", YARN),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "default", "type": "yarn", "factor": 4.0}),
        ("rope_scaling", {"factor": 4.0}),
        ("dual_chunk_attention_config", {"chunk_size": 8}),
        ("is_causal", False),
        ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e6}),
        ("rope_parameters", {"full_attention": {"rope_type": "yarn"}}),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("partial_rotary_factor", 0.5),
        ("use_mrope", True),
        ("use_sliding_window", True),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("hidden_act", "gelu"),
        ("attention_dropout", 0.1),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
    ],
)
def test_numerics_that_are_not_computed_here_are_refused(hf, key, value):
    with pytest.raises(CheckpointError, match=rf"config\.json: .*\n  - {key}: .* is not supported; \w"):
        model_config_from_hf({**hf.config, key: value}, "config.json")


def test_numerics_that_are_computed_here_pass(hf):
    """Keys that matter only beside another one; what transformers 5 writes."""
    neutral = {
        "rope_scaling": None, "use_sliding_window": False, "sliding_window": 32, "max_window_layers": 1,
        "attention_dropout": 0.0, "layer_types": ["full_attention"] * 2, "quantization_config": None,
    }  # fmt: skip
    assert model_config_from_hf({**hf.config, **neutral}, "x") == model_config_from_hf(hf.config, "x")
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}
    assert model_config_from_hf({**hf.config, "rope_theta": None, **rope}, "x").theta == 5e4
    with pytest.raises(CheckpointError, match=r"rope_theta: 1000000\.0, but 50000\.0 in rope_parameters"):
        model_config_from_hf({**hf.config, **rope}, "x")


def test_weights_beside_another_config_are_refused(tmp_path, hf):
    hf.make(tmp_path)
    model = model_config_from_hf(hf.config, "x")
    check_described(tmp_path, model)
    check_described(tmp_path / "model.safetensors", model)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(
            CheckpointError, match=r"json and the YAML .*\n  - theta: 1000000\.0 and 10000\.0"
        ):
            check_described(path, replace(model, theta=10000.0))
    # A file under a name of its own says nothing, nor does the record of a run.
    check_described(tmp_path / "policy.safetensors", replace(model, theta=10000.0))
    write_provenance(tmp_path, provenance({}))
    check_described(tmp_path / "model.safetensors", replace(model, theta=10000.0))


def test_other_models_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"config\.json: model_type is 'llama'"):
        read_hf_config(tmp_path)


@pytest.mark.parametrize(
    ("tied", "architectures", "names", "expected"),
    [
        (False, None, {"lm_head.weight"}, "Qwen2ForCausalLM"),
        (False, None, {"lm_head.weight", "score_head.weight"}, "Qwen2ForCausalLM"),
        (False, ["Qwen2ForCausalLM"], {"score_head.weight"}, "Qwen2ForSequenceClassification"),
        (True, None, set(), "Qwen2ForCausalLM"),
        (True, None, {"score_head.weight"}, "Qwen2ForSequenceClassification"),
        (True, ["Qwen2ForCausalLM"], {"score_head.weight"}, "Qwen2ForCausalLM"),
    ],
)
def test_the_architecture_follows_from_the_heads(tied, architectures, names, expected):
    base = {"model_type": "qwen2", "tie_word_embeddings": tied, "dtype": "float32"}
    if architectures:
        base["architectures"] = architectures
    written = finish_hf_config(base, names, BFLOAT16)
    assert written["architectures"] == [expected]
    assert written["torch_dtype"] == "bfloat16"
    assert "dtype" not in written
    assert ("id2label" in written) == (expected != "Qwen2ForCausalLM")
