"""Converted files in MindFormers' LlamaForCausalLM: every name matches, and so do the logits.

This is what shows that no row of q or k has to move between the two libraries.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mindrlhf.checkpoint.conversion import hf_to_mindspore

torch = pytest.importorskip("torch")

# (heads, kv heads, head size, layers, tied): grouped 4:1, not grouped, grouped 2:1 with odd sizes.
MODELS = [(8, 2, 8, 2, False), (4, 4, 8, 1, True), (6, 3, 10, 2, False)]
SEQUENCE = 12


def make_transformers_model(heads: int, kv_heads: int, head_dim: int, layers: int, tied: bool):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(heads)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=97,
            hidden_size=heads * head_dim,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            intermediate_size=44,
            rope_theta=10_000.0,
            rms_norm_eps=1e-6,
            tie_word_embeddings=tied,
            max_position_embeddings=64,
            attn_implementation="eager",
        )
    ).eval()
    with torch.no_grad():  # fresh biases are 0 and norms 1, which would hide a wrong map
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def make_mindformers_model(config):
    from mindformers import LlamaConfig, LlamaForCausalLM

    float32 = dict.fromkeys(
        (
            "compute_dtype",
            "param_init_type",
            "layernorm_compute_type",
            "softmax_compute_type",
            "rotary_dtype",
        ),
        "float32",
    )
    return LlamaForCausalLM(
        LlamaConfig(
            batch_size=2,
            seq_length=SEQUENCE,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            n_kv_heads=config.num_key_value_heads,
            intermediate_size=config.intermediate_size,
            theta=config.rope_theta,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=config.tie_word_embeddings,
            qkv_has_bias=True,
            qkv_concat=False,
            use_rope_slice=True,
            fused_rms_norm=False,
            use_flash_attention=False,
            pad_token_id=96,
            **float32,
        )
    )


@pytest.mark.parametrize("shape", MODELS, ids=lambda shape: f"heads{shape[0]}kv{shape[1]}tied{shape[4]}")
def test_mindformers_loads_the_file_and_gives_the_same_logits(tmp_path: Path, shape, monkeypatch):
    monkeypatch.chdir(tmp_path)
    import mindspore as ms

    reference = make_transformers_model(*shape)
    reference.save_pretrained(tmp_path / "hf")
    # One model in either format; both formats hold the same bits (tests/unit/checkpoint).
    suffix = "safetensors" if shape[4] else "ckpt"
    hf_to_mindspore(tmp_path / "hf", tmp_path / f"m.{suffix}")

    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    network = make_mindformers_model(reference.config).set_train(False)
    tokens = np.random.default_rng(1).integers(0, 96, (2, SEQUENCE))
    parameters = ms.load_checkpoint(str(tmp_path / f"m.{suffix}"), format=suffix)
    assert set(parameters) == {parameter.name for parameter in network.get_parameters()}
    param_not_load, ckpt_not_load = ms.load_param_into_net(network, parameters, strict_load=True)
    assert (param_not_load, ckpt_not_load) == ([], [])

    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens)).logits.numpy()
    logits = network(ms.Tensor(tokens, ms.int32))[0].asnumpy().reshape(expected.shape)
    assert np.abs(expected).max() > 1  # so that the tolerance means something
    assert np.abs(logits - expected).max() < 1e-4
