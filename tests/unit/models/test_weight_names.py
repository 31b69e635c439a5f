from __future__ import annotations

import json

import pytest

from mindrlhf.checkpoint.hf_config import model_config_from_hf, read_hf_config
from mindrlhf.models.qwen2.layouts import parameter_layouts
from mindrlhf.models.qwen2.weight_names import canonical_to_hf, count_layers, hf_to_canonical, is_hf
from mindrlhf.parallel.layout import Mesh


def test_one_layer_by_hand():
    names = hf_to_canonical(1)
    assert names == {
        "model.embed_tokens.weight": "model.tok_embeddings.embedding_weight",
        "model.norm.weight": "model.norm_out.weight",
        "lm_head.weight": "lm_head.weight",
        "score.weight": "score_head.weight",
        "score.bias": "score_head.bias",
        "model.layers.0.input_layernorm.weight": "model.layers.0.attention_norm.weight",
        "model.layers.0.self_attn.q_proj.weight": "model.layers.0.attention.wq.weight",
        "model.layers.0.self_attn.q_proj.bias": "model.layers.0.attention.wq.bias",
        "model.layers.0.self_attn.k_proj.weight": "model.layers.0.attention.wk.weight",
        "model.layers.0.self_attn.k_proj.bias": "model.layers.0.attention.wk.bias",
        "model.layers.0.self_attn.v_proj.weight": "model.layers.0.attention.wv.weight",
        "model.layers.0.self_attn.v_proj.bias": "model.layers.0.attention.wv.bias",
        "model.layers.0.self_attn.o_proj.weight": "model.layers.0.attention.wo.weight",
        "model.layers.0.post_attention_layernorm.weight": "model.layers.0.ffn_norm.weight",
        "model.layers.0.mlp.gate_proj.weight": "model.layers.0.feed_forward.w1.weight",
        "model.layers.0.mlp.up_proj.weight": "model.layers.0.feed_forward.w3.weight",
        "model.layers.0.mlp.down_proj.weight": "model.layers.0.feed_forward.w2.weight",
    }


def test_the_inverse_is_the_inverse():
    names, inverse = hf_to_canonical(12), canonical_to_hf(12)
    assert len(names) == len(inverse) == 5 + 12 * 12
    assert all(inverse[canonical] == hf for hf, canonical in names.items())


def test_counting_and_recognising():
    assert count_layers(hf_to_canonical(11)) == count_layers(canonical_to_hf(11)) == 11
    assert count_layers(["lm_head.weight"]) == 0
    assert is_hf(hf_to_canonical(1))
    assert not is_hf(canonical_to_hf(1))


@pytest.mark.parametrize("size", ["0.5b", "1.5b", "7b"])
def test_names_and_shapes_are_the_published_ones(size, shared_data):
    """The tensors.json files were derived from the published configs with transformers."""
    configs = shared_data / "configs"
    model = model_config_from_hf(read_hf_config(configs / f"qwen2.5-{size}-instruct.config.json"), size)
    published = json.loads((configs / f"qwen2.5-{size}-instruct.tensors.json").read_text())
    expected = {entry["name"]: tuple(entry["shape"]) for entry in published["tensors"]}
    inverse = canonical_to_hf(model.num_layers)
    ours = {inverse[name]: layout.shape for name, layout in parameter_layouts(model, Mesh()).items()}
    assert ours == expected
