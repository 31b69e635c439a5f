"""Tiny Qwen2 checkpoints, written here byte by byte so that our own writers are not their own witness."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 24,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 3,
    "hidden_act": "silu",
}


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inter, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, out in (("q", hidden), ("k", kv), ("v", kv)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (out, hidden)
            shapes[f"{prefix}self_attn.{name}_proj.bias"] = (out,)
        shapes[f"{prefix}self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{prefix}mlp.gate_proj.weight"] = (inter, hidden)
        shapes[f"{prefix}mlp.up_proj.weight"] = (inter, hidden)
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, inter)
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _weights(config: Mapping[str, Any], dtype: str, seed: int) -> dict[str, np.ndarray]:
    """Random weights as little-endian bits; bfloat16 as uint16."""
    rng = np.random.default_rng(seed)
    numbers = {name: rng.normal(size=shape).astype("<f4") for name, shape in _shapes(config).items()}
    if dtype == "BF16":
        return {name: (array.view("<u4") >> 16).astype("<u2") for name, array in numbers.items()}
    return {name: array.astype({"F32": "<f4", "F16": "<f2"}[dtype]) for name, array in numbers.items()}


def _write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], dtype: str) -> None:
    header, position = {}, 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(a.tobytes() for a in tensors.values()))


def _read_safetensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    data = content[8 + length :]
    return {
        name: (entry["dtype"], tuple(entry["shape"]), data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


def _read_hf(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a directory, by the index when there is one."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return _read_safetensors(directory / "model.safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    files = {file: _read_safetensors(directory / file) for file in set(weight_map.values())}
    return {name: files[file][name] for name, file in weight_map.items()}


def _make_hf(
    directory: Path,
    *,
    dtype: str = "F32",
    shards: int = 1,
    seed: int = 0,
    tensors: Mapping[str, np.ndarray] | None = None,
    **config_changes: Any,
) -> dict[str, np.ndarray]:
    """Writes a Hugging Face directory and returns its weights' bits."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **config_changes}
    (directory / "config.json").write_text(json.dumps(config))
    weights = _weights(config, dtype, seed) if tensors is None else dict(tensors)
    if shards == 1:
        _write_safetensors(directory / "model.safetensors", weights, dtype)
        return weights
    weight_map = {}
    for number, names in enumerate(np.array_split(list(weights), shards), start=1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        _write_safetensors(directory / file, {str(name): weights[str(name)] for name in names}, dtype)
        weight_map.update({str(name): file for name in names})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weights


@pytest.fixture(scope="session")
def hf() -> SimpleNamespace:
    """Makers and readers of Hugging Face directories that share no code with the library."""
    return SimpleNamespace(
        config=CONFIG,
        weights=_weights,
        make=_make_hf,
        read=_read_hf,
        write_safetensors=_write_safetensors,
    )


@pytest.fixture
def left_overs(tmp_path: Path) -> Callable[[], list[str]]:
    """Names of temporary files that a failure forgot below ``tmp_path``."""
    return lambda: [str(path) for path in tmp_path.rglob("*") if ".tmp-" in path.name or ".old-" in path.name]
