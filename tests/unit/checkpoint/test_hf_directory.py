"""Weights in a Hugging Face directory: shards, indices, and what is refused."""

from __future__ import annotations

import json

import pytest

from mindrlhf.checkpoint.weight_files import open_hf_directory, open_weights
from mindrlhf.utils.errors import CheckpointError


def rewrite_index(directory, change):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_shards_read_like_one_file(tmp_path, hf):
    weights = hf.make(tmp_path / "sharded", shards=3)
    with open_hf_directory(tmp_path / "sharded") as source:
        assert set(source.tensors) == set(weights)
        assert all(source.read(name).tobytes() == weights[name].tobytes() for name in weights)


def test_names_are_mapped_when_opened_as_weights(tmp_path, hf):
    weights = hf.make(tmp_path / "m")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = weights["model.norm.weight"]
    hf.make(tmp_path / "m", tensors=weights)
    with open_weights(tmp_path / "m") as source:
        q = source.read("model.layers.1.attention.wq.weight")
        assert q.tobytes() == weights["model.layers.1.self_attn.q_proj.weight"].tobytes()
        assert not any("inv_freq" in name for name in source.tensors)


def test_missing_shards_are_all_named(tmp_path, hf):
    hf.make(tmp_path / "m", shards=3)
    for number in (1, 3):
        (tmp_path / "m" / f"model-0000{number}-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)00001-of-00003.*00003-of-00003"):
        open_hf_directory(tmp_path / "m")


def test_index_and_shards_must_agree(tmp_path, hf):
    hf.make(tmp_path / "m", shards=2)

    def change(weight_map):
        del weight_map["model.norm.weight"]
        weight_map["ghost"] = weight_map["lm_head.weight"]

    rewrite_index(tmp_path / "m", change)
    with pytest.raises(
        CheckpointError, match=r"(?s)ghost is not in model-00002.*model.norm.weight is stored but"
    ):
        open_hf_directory(tmp_path / "m")


def test_a_tensor_in_two_shards(tmp_path, hf):
    weights = hf.make(tmp_path / "m", shards=2)
    hf.write_safetensors(tmp_path / "m" / "model-00001-of-00002.safetensors", weights, "F32")
    with pytest.raises(CheckpointError, match=r"stored twice(?s:.*)q_proj.bias in .*00001.* and in .*00002"):
        open_hf_directory(tmp_path / "m")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 7}}'])
def test_broken_indices(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_hf_directory(tmp_path)


def test_torch_shards_with_an_index(tmp_path, hf):
    torch = pytest.importorskip("torch")
    weights = hf.weights(hf.config, "F32", 0)
    names = list(weights)
    shards = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for file, part in shards.items():
        torch.save({name: torch.from_numpy(weights[name]) for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with open_hf_directory(tmp_path) as source:
        for name in reversed(names):
            assert source.read(name).tobytes() == weights[name].tobytes()


def test_without_torch_the_error_says_so(tmp_path, monkeypatch):
    import sys

    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match=r"needs torch: pip install torch==2\.13\.0"):
        open_hf_directory(tmp_path)
