"""config.json of Hugging Face: the published ones, all faults at once, and what is written."""

from __future__ import annotations

import pytest

from mindrlhf.checkpoint.element_types import BFLOAT16
from mindrlhf.checkpoint.hf_config import (
    finish_hf_config,
    hf_config_from_model,
    model_config_from_hf,
    read_hf_config,
)
from mindrlhf.utils.errors import CheckpointError


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
