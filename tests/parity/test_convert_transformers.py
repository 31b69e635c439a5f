"""transformers loads what we export, and computes exactly what the original did."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindrlhf.checkpoint.conversion import hf_to_mindspore, mindspore_to_hf

torch = pytest.importorskip("torch")


def small_config(**changes):
    from transformers import Qwen2Config

    sizes = {
        "vocab_size": 120,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 40,
        "max_position_embeddings": 64,
        "eos_token_id": 7,
    }
    return Qwen2Config(**{**sizes, **changes})


def randomized(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def there_and_back(directory: Path, model, suffix: str, **save) -> Path:
    model.save_pretrained(directory / "hf", **save)
    hf_to_mindspore(directory / "hf", directory / f"m{suffix}")
    mindspore_to_hf(
        directory / f"m{suffix}", directory / "back", config=directory / "hf", max_shard_bytes=20_000
    )
    return directory / "back"


@pytest.mark.parametrize(
    ("tied", "dtype", "suffix", "save"),
    [
        (False, torch.float32, ".ckpt", {}),
        (True, torch.float32, ".safetensors", {"max_shard_size": "30KB"}),
        (False, torch.bfloat16, ".safetensors", {"max_shard_size": "30KB"}),
        (True, torch.bfloat16, ".ckpt", {}),
        (False, torch.float16, ".ckpt", {"safe_serialization": False, "max_shard_size": "30KB"}),
        (True, torch.bfloat16, ".ckpt", {"safe_serialization": False}),
    ],
    ids=str,
)
def test_a_language_model_comes_back_identical(tmp_path, tied, dtype, suffix, save):
    from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = randomized(Qwen2ForCausalLM(small_config(tie_word_embeddings=tied))).to(dtype)
    back = there_and_back(tmp_path, model, suffix, **save)
    again, info = AutoModelForCausalLM.from_pretrained(back, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    assert type(again) is Qwen2ForCausalLM
    assert again.dtype == dtype
    assert GenerationConfig.from_pretrained(back).eos_token_id == 7
    expected, loaded = model.state_dict(), again.state_dict()
    assert set(expected) == set(loaded)
    assert all(torch.equal(expected[name], loaded[name]) for name in expected)
    # Loaded like the copy: .to(dtype) above also rounded the rotary frequencies, which loading does not.
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    tokens = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        assert torch.equal(original.eval()(tokens).logits, again.eval()(tokens).logits)


def test_a_reward_model_comes_back_identical(tmp_path):
    from transformers import AutoModelForSequenceClassification, Qwen2ForSequenceClassification

    torch.manual_seed(0)
    config = small_config(num_labels=1, pad_token_id=0)
    model = randomized(Qwen2ForSequenceClassification(config))
    back = there_and_back(tmp_path, model, ".ckpt")
    again, info = AutoModelForSequenceClassification.from_pretrained(back, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert list(info["unexpected_keys"]) in ([], ["score.bias"])
    tokens = torch.arange(1, 21).reshape(2, 10)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again.eval()(tokens).logits)
