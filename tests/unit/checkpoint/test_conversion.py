from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mindrlhf.checkpoint import sources as sources_module
from mindrlhf.checkpoint.conversion import export_hf, hf_to_mindspore, mindspore_to_hf, parse_size
from mindrlhf.checkpoint.element_types import parse_dtype
from mindrlhf.checkpoint.hf_config import model_config_from_hf
from mindrlhf.checkpoint.sources import ArraySource
from mindrlhf.checkpoint.weight_files import open_weights, write_weights
from mindrlhf.utils.errors import CheckpointError, MindRLHFError

STORED = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_there_and_back_is_bit_equal(tmp_path, hf, monkeypatch, dtype, shards, tied, suffix):
    monkeypatch.setattr(sources_module, "BLOCK_BYTES", 200)  # so that blocks matter at this size
    weights = hf.make(tmp_path / "hf", dtype=STORED[dtype], shards=shards, tie_word_embeddings=tied)
    file, back = tmp_path / f"m{suffix}", tmp_path / "back"
    report = hf_to_mindspore(tmp_path / "hf", file, dtype=parse_dtype(dtype))
    assert report.tensors == len(weights)
    assert report.parameters == sum(array.size for array in weights.values())
    mindspore_to_hf(file, back, config=tmp_path / "hf", max_shard_bytes=5000 if shards > 1 else 10**9)
    assert (back / "model.safetensors.index.json").exists() == (shards > 1)
    assert hf.read(back) == {
        name: (STORED[dtype], array.shape, array.tobytes()) for name, array in weights.items()
    }
    written = json.loads((back / "config.json").read_text())
    assert written["torch_dtype"] == {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[dtype]
    assert {key: written[key] for key in hf.config if key != "architectures"} == {
        **{key: value for key, value in hf.config.items() if key != "architectures"},
        "tie_word_embeddings": tied,
    }


def test_the_file_has_canonical_names_and_the_asked_dtype(tmp_path, hf):
    weights = hf.make(tmp_path / "hf", dtype="BF16")
    hf_to_mindspore(tmp_path / "hf", tmp_path / "m.ckpt", dtype=parse_dtype("fp32"))
    with open_weights(tmp_path / "m.ckpt") as source:
        gate = source.read("model.layers.1.feed_forward.w1.weight")
    expected = weights["model.layers.1.mlp.gate_proj.weight"].astype(np.uint32) << 16
    assert np.array_equal(gate.view(np.uint32), expected)


def test_all_faults_at_once_and_nothing_written(tmp_path, hf, left_overs):
    weights = hf.weights(hf.config, "F32", 0)
    del weights["model.layers.0.self_attn.k_proj.bias"], weights["lm_head.weight"]
    weights["model.layers.2.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"]
    weights["visual.proj"] = weights["model.norm.weight"]
    weights["model.layers.1.mlp.down_proj.weight"] = weights["model.layers.1.mlp.down_proj.weight"].T.copy()
    hf.make(tmp_path / "hf", tensors=weights)
    with pytest.raises(CheckpointError) as error:
        hf_to_mindspore(tmp_path / "hf", tmp_path / "out" / "m.ckpt")
    message = str(error.value)
    assert "5 fault(s)" in message
    assert "missing: model.layers.0.self_attn.k_proj.bias (8,)" in message
    assert "missing: lm_head.weight (24, 16)" in message
    assert "not in the model: model.layers.2.mlp.up_proj.weight" in message
    assert "not in the model: visual.proj" in message
    assert "wrong shape: model.layers.1.mlp.down_proj.weight is (20, 16), the model has (16, 20)" in message
    assert not (tmp_path / "out").exists()


def test_integers_are_no_weights(tmp_path, hf):
    weights = hf.weights(hf.config, "F32", 0)
    hf.make(tmp_path / "hf", tensors=weights)
    hf.write_safetensors(tmp_path / "hf" / "model.safetensors", weights, "I32")
    with pytest.raises(
        CheckpointError,
        match=r"(?s)27 fault\(s\).*wrong type: .* is int32.*and 17 more",
    ):
        hf_to_mindspore(tmp_path / "hf", tmp_path / "m.ckpt")


def test_fp16_overflow_names_every_tensor(tmp_path, hf, left_overs):
    weights = hf.weights(hf.config, "F32", 0)
    weights["model.norm.weight"][3] = 70000.0
    weights["model.layers.0.mlp.up_proj.weight"][1, 1] = -1e9
    hf.make(tmp_path / "hf", tensors=weights)
    with pytest.raises(CheckpointError) as error:
        hf_to_mindspore(tmp_path / "hf", tmp_path / "m.ckpt", dtype=parse_dtype("fp16"))
    assert "in 2 tensor(s); use bf16 or fp32" in str(error.value)
    assert "model.norm.weight: float32 -> float16" in str(error.value)
    assert "model.layers.0.mlp.up_proj.weight" in str(error.value)
    assert not (tmp_path / "m.ckpt").exists()
    assert left_overs() == []
    hf_to_mindspore(tmp_path / "hf", tmp_path / "m.ckpt")
    with pytest.raises(CheckpointError, match=r"in 2 tensor\(s\)"):
        mindspore_to_hf(
            tmp_path / "m.ckpt", tmp_path / "back", config=tmp_path / "hf", dtype=parse_dtype("fp16")
        )
    assert not (tmp_path / "back").exists()
    assert left_overs() == []


# --- tied embeddings ---


def with_head(hf, head):
    weights = hf.weights({**hf.config, "tie_word_embeddings": True}, "F32", 0)
    return {**weights, "lm_head.weight": head(weights["model.embed_tokens.weight"])}


def test_a_redundant_tied_head_is_dropped(tmp_path, hf, monkeypatch):
    monkeypatch.setattr(sources_module, "BLOCK_BYTES", 200)
    hf.make(tmp_path / "hf", tensors=with_head(hf, np.copy), tie_word_embeddings=True)
    hf_to_mindspore(tmp_path / "hf", tmp_path / "m.ckpt")
    with open_weights(tmp_path / "m.ckpt") as source:
        assert "lm_head.weight" not in source.tensors
        assert len(source.tensors) == 26


def test_a_tied_head_that_differs_is_an_error(tmp_path, hf):
    def changed(embedding):
        head = embedding.copy()
        head[-1, -1] += 1
        return head

    hf.make(tmp_path / "hf", tensors=with_head(hf, changed), tie_word_embeddings=True)
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight .*, which is not a copy of the embedding either"
    ):
        hf_to_mindspore(tmp_path / "hf", tmp_path / "m.ckpt")


def test_an_untied_model_without_head_is_an_error(tmp_path, hf):
    weights = hf.weights(hf.config, "F32", 0)
    del weights["lm_head.weight"]
    hf.make(tmp_path / "hf", tensors=weights)
    with pytest.raises(CheckpointError, match=r"1 fault\(s\).*(?s:.*)missing: lm_head.weight"):
        hf_to_mindspore(tmp_path / "hf", tmp_path / "m.ckpt")


# --- reward models ---


def test_a_reward_model_gets_a_zero_bias_and_back(tmp_path, hf):
    weights = hf.weights(hf.config, "BF16", 0)
    del weights["lm_head.weight"]
    weights["score.weight"] = weights["model.norm.weight"].reshape(1, -1)
    hf.make(tmp_path / "hf", dtype="BF16", tensors=weights, architectures=["Qwen2ForSequenceClassification"])
    hf_to_mindspore(tmp_path / "hf", tmp_path / "m.safetensors")
    with open_weights(tmp_path / "m.safetensors") as source:
        assert source.read("score_head.bias").tolist() == [0]
        assert source.tensors["score_head.bias"].dtype.name == "bfloat16"
        assert source.read("score_head.weight").tobytes() == weights["score.weight"].tobytes()
    mindspore_to_hf(tmp_path / "m.safetensors", tmp_path / "back", config=tmp_path / "hf")
    assert set(hf.read(tmp_path / "back")) == {*weights, "score.bias"}
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (written["architectures"], written["id2label"]) == (
        ["Qwen2ForSequenceClassification"],
        {"0": "LABEL_0"},
    )


# --- reversed: config and tokenizer ---


@pytest.fixture
def converted(tmp_path, hf) -> Path:
    hf.make(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"a": 1}')
    (tmp_path / "hf" / "vocab.json").write_text("{}")
    (tmp_path / "hf" / "README.md").write_text("not copied")
    hf_to_mindspore(tmp_path / "hf", tmp_path / "m.ckpt")
    return tmp_path / "m.ckpt"


def test_tokenizer_files_come_along(tmp_path, converted):
    mindspore_to_hf(converted, tmp_path / "back", config=tmp_path / "hf")
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer_config.json",
        "vocab.json",
    ]


def test_a_generation_config_is_copied_or_made(tmp_path, converted, hf):
    """A model YAML has a pad_token_id, too; of a config.json that states none the end token is it."""
    source, written = tmp_path / "hf" / "generation_config.json", tmp_path / "back" / "generation_config.json"
    model = replace(model_config_from_hf(hf.config, "x"), eos_token_id=(3, 5), pad_token_id=4)
    export_hf(converted, tmp_path / "back", model)
    assert json.loads(written.read_text()) == {"bos_token_id": 3, "eos_token_id": [3, 5], "pad_token_id": 4}
    mindspore_to_hf(converted, tmp_path / "back", config=tmp_path / "hf" / "config.json", overwrite=True)
    assert json.loads(written.read_text()) == {"eos_token_id": 3, "pad_token_id": 3}
    source.write_text('{"eos_token_id": [3, 1], "temperature": 0.7}')
    for config in (tmp_path / "hf", tmp_path / "hf" / "config.json"):
        mindspore_to_hf(converted, tmp_path / "back", config=config, overwrite=True)
        assert json.loads(written.read_text()) == json.loads(source.read_text())


def test_config_beside_the_tokenizer_is_used(tmp_path, converted, hf):
    mindspore_to_hf(converted, tmp_path / "back", tokenizer_dir=tmp_path / "hf")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_attention_heads"] == 4


def test_the_config_beside_the_tokenizer_is_used_only_if_it_is_the_models(tmp_path, converted, hf):
    """A tokenizer is often taken from the directory of a larger model."""
    same, other = (
        model_config_from_hf(hf.config, "x"),
        model_config_from_hf({**hf.config, "rope_theta": 5.0}, "x"),
    )
    for model, kept in ((same, True), (other, False)):
        path = tmp_path / "hf" / "config.json"
        path.write_text(json.dumps({**hf.config, "max_window_layers": 21}))
        export_hf(converted, tmp_path / "back", model, tokenizer_dir=tmp_path / "hf", overwrite=True)
        written = json.loads((tmp_path / "back" / "config.json").read_text())
        assert ("max_window_layers" in written) is kept
        assert written["rope_theta"] == model.theta
        assert (tmp_path / "back" / "vocab.json").exists()


def test_export_makes_a_config_from_the_sizes(tmp_path, converted, hf):
    model = model_config_from_hf(hf.config, "x")
    export_hf(converted, tmp_path / "back", model, dtype="bf16")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert model_config_from_hf(written, "y") == model
    assert written["architectures"] == ["Qwen2ForCausalLM"]
    assert {dtype for dtype, _, _ in hf.read(tmp_path / "back").values()} == {"BF16"}


def test_a_tokenizer_directory_without_tokenizer(tmp_path, converted):
    (tmp_path / "none").mkdir()
    with pytest.raises(CheckpointError, match="none of the tokenizer files"):
        mindspore_to_hf(converted, tmp_path / "back", config=tmp_path / "hf", tokenizer_dir=tmp_path / "none")


# --- what is there already ---


def test_outputs_are_replaced_only_when_told(tmp_path, converted, hf):
    with pytest.raises(MindRLHFError, match=r"m\.ckpt: exists; .*--overwrite"):
        hf_to_mindspore(tmp_path / "hf", converted)
    hf.make(tmp_path / "other", seed=1)
    hf_to_mindspore(tmp_path / "other", converted, overwrite=True)
    mindspore_to_hf(converted, tmp_path / "back", config=tmp_path / "hf")
    with pytest.raises(MindRLHFError, match=r"back: exists; .*--overwrite"):
        mindspore_to_hf(converted, tmp_path / "back", config=tmp_path / "hf")
    mindspore_to_hf(
        converted, tmp_path / "back", config=tmp_path / "hf", overwrite=True, max_shard_bytes=4000
    )
    assert not (
        tmp_path / "back" / "model.safetensors"
    ).exists()  # the old file is not left beside the shards
    first = hf.weights(hf.config, "F32", 1)["model.norm.weight"].tobytes()
    assert hf.read(tmp_path / "back")["model.norm.weight"][2] == first


def test_the_input_is_never_replaced(tmp_path, converted, hf):
    inside = tmp_path / "hf" / "model.safetensors"
    with pytest.raises(MindRLHFError, match=r"output .*model\.safetensors: is input .*model\.safetensors"):
        hf_to_mindspore(tmp_path / "hf", inside, overwrite=True)
    with pytest.raises(MindRLHFError, match=r"output .*new\.ckpt: lies in input .*hf;"):
        hf_to_mindspore(tmp_path / "hf", inside.with_name("new.ckpt"))
    (tmp_path / "dir").mkdir()
    file = converted.rename(tmp_path / "dir" / "model.safetensors")
    with pytest.raises(MindRLHFError, match=r"dir: holds input .*model\.safetensors"):
        mindspore_to_hf(file, tmp_path / "dir", config=tmp_path / "hf", overwrite=True)


def test_inputs_and_outputs_of_the_wrong_kind(tmp_path, converted, hf):
    (tmp_path / "d.ckpt").mkdir()
    with pytest.raises(MindRLHFError, match="is a directory, not a file of model weights"):
        hf_to_mindspore(tmp_path / "hf", tmp_path / "d.ckpt")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(MindRLHFError, match="is a file, not a Hugging Face model"):
        mindspore_to_hf(converted, file, config=tmp_path / "hf")
    with pytest.raises(MindRLHFError, match="is not a file of model weights"):
        hf_to_mindspore(tmp_path / "hf", file.rename(tmp_path / "file.ckpt"), overwrite=True)
    moments = tmp_path / "moments.ckpt"
    write_weights(moments, ArraySource({"adam_m.model.norm_out.weight": np.ones(2, np.float32)}))
    with pytest.raises(MindRLHFError, match="is not a file of model weights"):
        hf_to_mindspore(tmp_path / "hf", moments, overwrite=True)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.json").touch()
    with pytest.raises(MindRLHFError, match="is not a Hugging Face model"):
        mindspore_to_hf(converted, tmp_path / "tokenizer", config=tmp_path / "hf", overwrite=True)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("2GiB", 2 * 2**30), ("1.5kb", 1500), ("300", 300), ("7 MB", 7 * 10**6)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 apples", "1e9"])
def test_no_sizes(text):
    with pytest.raises(CheckpointError, match="is not a size"):
        parse_size(text)
