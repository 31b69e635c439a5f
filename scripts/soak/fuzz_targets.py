"""The targets of fuzzing: per reader, good files and a check of what it accepts.

A target's ``read`` raises :class:`~mindrlhf.utils.errors.MindRLHFError`, or AssertionError when the reader
accepted a file and read something other than its content; any other exception is a defect, too.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mindrlhf.checkpoint.ckpt_file import encode_ckpt
from mindrlhf.checkpoint.element_types import BY_SAFETENSORS
from mindrlhf.checkpoint.hf_config import model_config_from_hf, read_hf_config
from mindrlhf.checkpoint.manifest import (
    MANIFEST_FILE,
    digest_file,
    find_damaged,
    find_size_faults,
    read_manifest,
    write_manifest,
)
from mindrlhf.checkpoint.safetensors_file import encode_safetensors
from mindrlhf.checkpoint.sources import ArraySource, WeightSource
from mindrlhf.checkpoint.weight_files import open_weights
from mindrlhf.configs.load import load_ppo_config, load_run_config
from mindrlhf.data.jsonl import CValuesReader
from mindrlhf.data.tokenizer_loading import load_tokenizer
from mindrlhf.parallel.layout import Layout, Mesh
from mindrlhf.parallel.strategy import read_strategy, write_strategy

CONFIGS = Path(__file__).resolve().parents[2] / "model_configs" / "qwen_ppo"
ARRAYS: dict[str, np.ndarray] = {
    "model.tok_embeddings.embedding_weight": np.arange(12, dtype=np.float32).reshape(6, 2),
    "model.norm_out.weight": np.ones(2, np.float16),
    "step": np.array(3, np.int32),
}
_INDEX = "model.safetensors.index.json"
HF_CONFIG: dict[str, Any] = {
    "model_type": "qwen2", "vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 12,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "initializer_range": 0.02, "tie_word_embeddings": False, "eos_token_id": [3, 4],
    "pad_token_id": 3, "rope_parameters": {"rope_theta": 10000.0}, "head_dim": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        files: name -> content of the files that it reads.
        mutated: names of files that may be damaged, one per case.
        read: reads the directory with the files.
    """

    files: Mapping[str, bytes]
    mutated: tuple[str, ...]
    read: Callable[[Path], None]


def make_targets(directory: Path) -> dict[str, Target]:
    """All targets by name; ``directory`` is for files made by the library's own writers."""
    return {
        "yaml": _yaml_target(),
        "jsonl": _jsonl_target(),
        "safetensors": _weights_target("w.safetensors", _safetensors(ARRAYS), _check_safetensors),
        "ckpt": _weights_target("w.ckpt", _ckpt(ARRAYS), lambda path, source: None),
        "index": _index_target(),
        "config": Target({"config.json": json.dumps(HF_CONFIG).encode()}, ("config.json",), _read_config),
        "manifest": _manifest_target(directory),
        "strategy": _strategy_target(directory),
        "tokenizer": _tokenizer_target(),
    }


def _yaml_target() -> Target:
    names = ("finetune_qwen2_tiny.yaml", "generate_qwen2_tiny.yaml", "ppo_qwen2_tiny.yaml")
    files = {name: (CONFIGS / name).read_bytes() for name in names}

    def read(directory: Path) -> None:
        for name in names[:2]:
            run = load_run_config(directory / name)
            stated = yaml.safe_load((directory / name).read_bytes())["model"]["model_config"]
            model = run.model
            for key in ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size"):
                assert getattr(model, key) == stated[key], key
            assert model.hidden_size % model.num_heads == 0
            assert model.num_heads % run.parallel.model_parallel == 0
        ppo = load_ppo_config(directory / names[2])
        assert ppo.rollout_batch_size % ppo.num_minibatches == 0
        assert math.isfinite(ppo.kl_coef)

    return Target(files, names, read)


def _jsonl_target() -> Target:
    rows = [
        ("如何做饭？", "先洗米。", "不知道"),
        ("hello", "hi\u2028there", "no"),
        ("a" * 50, "b", "c\\n\\u4e2d"),
    ]
    lines = [json.dumps(dict(zip(("prompt", "pos_resp", "neg_resp"), row, strict=True))) for row in rows]

    def read(directory: Path) -> None:
        path = directory / "data.jsonl"
        good = list(CValuesReader(path, pairs=True, skip_bad_lines=True))
        lines = path.read_bytes().split(b"\n")
        for sample in good:
            row = json.loads(lines[sample.line - 1].decode("utf-8-sig"))
            assert (row["prompt"], row["pos_resp"], row["neg_resp"]) == (
                sample.prompt,
                sample.response,
                sample.rejected,
            )
        assert list(CValuesReader(path, pairs=True)) == good

    return Target({"data.jsonl": "\n".join(lines).encode()}, ("data.jsonl",), read)


def _weights_target(name: str, content: bytes, check: Callable[[Path, WeightSource], None]) -> Target:
    def read(directory: Path) -> None:
        with open_weights(directory / name) as source:
            _read_all(source, (directory / name).stat().st_size)
            check(directory / name, source)

    return Target({name: content}, (name,), read)


def _read_all(source: WeightSource, file_bytes: int) -> None:
    assert source.nbytes <= file_bytes
    for name, info in source.tensors.items():
        assert source.read(name).nbytes == info.nbytes


def _check_safetensors(path: Path, source: WeightSource) -> None:
    """Compares every tensor with the header, which is read once more here."""
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    for name, info in source.tensors.items():
        entry = header[name]
        start, stop = entry["data_offsets"]
        assert (BY_SAFETENSORS[entry["dtype"]], tuple(entry["shape"])) == (info.dtype, info.shape)
        assert source.read(name).tobytes() == content[8 + length + start : 8 + length + stop]


def _index_target() -> Target:
    shards = {f"model-0000{i}-of-00002.safetensors": {f"t{i}": np.full(2, i, np.float32)} for i in (1, 2)}
    weight_map = {name: file for file, arrays in shards.items() for name in arrays}
    index = json.dumps({"metadata": {"total_size": 16}, "weight_map": weight_map}).encode()
    files = {file: _safetensors(arrays) for file, arrays in shards.items()}

    def read(directory: Path) -> None:
        with open_weights(directory) as source:
            stated = json.loads((directory / _INDEX).read_bytes())["weight_map"]
            assert set(source.tensors) == set(stated) <= {"t1", "t2"}
            for name in source.tensors:
                assert stated[name].startswith(f"model-0000{name[1]}")
                assert source.read(name).tolist() == [int(name[1])] * 2

    return Target({**files, _INDEX: index}, (_INDEX,), read)


def _read_config(directory: Path) -> None:
    model = model_config_from_hf(read_hf_config(directory), str(directory))
    sizes = (model.vocab_size, model.hidden_size, model.num_layers, model.seq_length, model.intermediate_size)
    assert all(type(size) is int and size > 0 for size in sizes)
    assert all(type(number) is float for number in (model.rms_norm_eps, model.theta, model.initializer_range))
    assert all(math.isfinite(number) for number in (model.rms_norm_eps, model.theta))
    ids = (*model.eos_token_id, model.pad_token_id, model.bos_token_id)
    assert all(type(number) is int and number >= 0 for number in ids)
    assert model.head_dim * model.num_heads == model.hidden_size


def _manifest_target(directory: Path) -> Target:
    files = {"state.json": b"{}", "w.ckpt": _ckpt(ARRAYS)}
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    records = {name: digest_file(directory / name) for name in files}
    content = write_manifest(directory, records).read_bytes()

    def read(directory: Path) -> None:
        found = read_manifest(directory)
        size_faults = find_size_faults(directory, found)
        damaged = find_damaged(directory, found, found)
        for name, record in found.items():
            is_right = records.get(name) == record
            assert is_right == (name not in damaged), name
            assert not (is_right and any(fault.startswith(f"{name} ") for fault in size_faults))

    return Target({**files, MANIFEST_FILE: content}, (MANIFEST_FILE,), read)


def _strategy_target(directory: Path) -> Target:
    mesh = Mesh(2, 2)
    layouts = {
        "model.tok_embeddings.embedding_weight": Layout(mesh, (8, 4), ("mp", None)),
        "model.layers.0.attention.wo.weight": Layout(mesh, (4, 8), (None, "mp")),
        "model.norm_out.weight": Layout(mesh, (4,), (None,)),
    }
    write_strategy(layouts, directory / "strategy_0.ckpt")

    def read(directory: Path) -> None:
        strategy = read_strategy(directory / "strategy_0.ckpt")
        assert strategy.mesh.size >= 1
        assert all(strategy.split_dims)
        assert all(dim is None or dim >= 0 for dim in strategy.split_dims.values())

    content = (directory / "strategy_0.ckpt").read_bytes()
    return Target({"strategy_0.ckpt": content}, ("strategy_0.ckpt",), read)


def _tokenizer_target() -> Target:
    alphabet = _byte_alphabet()
    vocab = {text: number for number, text in enumerate([*alphabet, "ab", "abc"])}
    special = {"<|endoftext|>": 258, "<|im_start|>": 259, "<|im_end|>": 260}
    config = {
        "added_tokens_decoder": {str(number): {"content": text} for text, number in special.items()},
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": None,
    }
    files = {
        "vocab.json": json.dumps(vocab).encode(),
        "merges.txt": b"#version: 0.2\na b\nab c\n",
        "tokenizer_config.json": json.dumps(config).encode(),
    }

    def read(directory: Path) -> None:
        tokenizer = load_tokenizer(directory)
        (ids,) = tokenizer.encode_batch(["abc <|im_end|> 中"])
        assert all(0 <= number < tokenizer.size for number in ids)
        assert all(0 <= number < tokenizer.size for number in tokenizer.special_tokens.values())

    return Target(files, tuple(files), read)


def _byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def _safetensors(arrays: Mapping[str, np.ndarray]) -> bytes:
    return b"".join(encode_safetensors(ArraySource(arrays), {"format": "pt"}))


def _ckpt(arrays: Mapping[str, np.ndarray]) -> bytes:
    return b"".join(encode_ckpt(ArraySource(arrays)))
