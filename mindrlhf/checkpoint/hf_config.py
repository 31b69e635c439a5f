"""``config.json`` of a Hugging Face Qwen2 model <-> :class:`ModelConfig`."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mindrlhf.checkpoint.dtypes import ElementType
from mindrlhf.checkpoint.views import bullet_list
from mindrlhf.configs.schema import ModelConfig
from mindrlhf.parallel.parameters import LM_HEAD, SCORE_HEAD_WEIGHT
from mindrlhf.utils.errors import CheckpointError

CONFIG_NAME = "config.json"
MODEL_TYPE = "qwen2"

# Hugging Face key -> field of ModelConfig.
SIZE_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "intermediate_size",
}

CAUSAL_LM = "Qwen2ForCausalLM"
SEQUENCE_CLASSIFICATION = "Qwen2ForSequenceClassification"


def read_hf_config(path: Path) -> dict[str, Any]:
    """The ``config.json`` at ``path``, or in the directory ``path``.

    Raises:
        CheckpointError: missing, no JSON object, or not of a Qwen2 model.
    """
    file = path / CONFIG_NAME if path.is_dir() else path
    config = read_json(file)
    if config.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{file}: model_type is {config.get('model_type')!r}, only {MODEL_TYPE!r} is supported"
        )
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: missing or no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def model_config_from_hf(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The sizes that a Hugging Face config states, with its own defaults for what it may leave out.

    Raises:
        CheckpointError: sizes are missing or do not fit; all of them at once.
    """
    sizes: dict[str, Any] = {field: config.get(key) for key, field in SIZE_KEYS.items()}
    faults = [
        f"{key}: expected a positive integer, got {sizes[field]!r}"
        for key, field in SIZE_KEYS.items()
        if not isinstance(sizes[field], int) or isinstance(sizes[field], bool) or sizes[field] < 1
    ]
    if not faults:
        faults = _misfits(config, sizes)
    if faults:
        raise CheckpointError(f"{where}:" + bullet_list(faults))
    rope = config.get("rope_parameters") or {}
    return ModelConfig(
        **sizes,
        seq_length=config.get("max_position_embeddings") or 32768,
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        theta=config.get("rope_theta", rope.get("rope_theta", 10_000.0)),
        initializer_range=config.get("initializer_range", 0.02),
        qkv_has_bias=True,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        **_token_ids(config),
    )


def _misfits(config: Mapping[str, Any], sizes: Mapping[str, Any]) -> list[str]:
    hidden, heads, kv_heads = sizes["hidden_size"], sizes["num_heads"], sizes["n_kv_heads"]
    faults = []
    if hidden % heads:
        faults.append(f"hidden_size {hidden} is not divisible by num_attention_heads {heads}")
    if heads % kv_heads:
        faults.append(f"num_attention_heads {heads} is not divisible by num_key_value_heads {kv_heads}")
    head_dim = config.get("head_dim")
    if head_dim is not None and head_dim * heads != hidden:
        faults.append(f"head_dim {head_dim} is not hidden_size / num_attention_heads = {hidden}/{heads}")
    return faults


def _token_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    eos = config.get("eos_token_id")
    eos_ids = tuple(eos) if isinstance(eos, list) else (eos if isinstance(eos, int) else 0,)
    pad, bos = config.get("pad_token_id"), config.get("bos_token_id")
    return {
        "eos_token_id": eos_ids,
        "pad_token_id": pad if isinstance(pad, int) else eos_ids[0],
        "bos_token_id": bos if isinstance(bos, int) else eos_ids[0],
    }


def hf_config_from_model(model: ModelConfig) -> dict[str, Any]:
    """A ``config.json`` for ``model``, with what only Hugging Face asks for at Qwen2's values."""
    eos = model.eos_token_id
    return {
        "model_type": MODEL_TYPE,
        "attention_dropout": 0.0,
        "bos_token_id": model.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos),
        "pad_token_id": model.pad_token_id,
        "hidden_act": "silu",
        **{key: getattr(model, field) for key, field in SIZE_KEYS.items()},
        "initializer_range": model.initializer_range,
        "max_position_embeddings": model.seq_length,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.theta,
        "tie_word_embeddings": model.tie_word_embeddings,
        "use_cache": True,
        "use_sliding_window": False,
    }


def finish_hf_config(config: Mapping[str, Any], names: Collection[str], dtype: ElementType) -> dict[str, Any]:
    """``config`` with the architecture and dtype of the weights that stand beside it.

    Args:
        config: a Hugging Face config.
        names: canonical names of the weights; a scalar head without language-model head makes a reward
            model, unless the config itself already says which of the two it is and both are possible.
        dtype: element type of the weights.
    """
    finished = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    finished["torch_dtype"] = dtype.name
    has_score = SCORE_HEAD_WEIGHT in names
    tied_lm = bool(config.get("tie_word_embeddings")) and config.get("architectures") == [CAUSAL_LM]
    if has_score and LM_HEAD not in names and not tied_lm:
        finished["architectures"] = [SEQUENCE_CLASSIFICATION]
        finished["id2label"] = {"0": "LABEL_0"}  # one label: a scalar score
        finished["label2id"] = {"LABEL_0": 0}
    else:
        finished["architectures"] = [CAUSAL_LM]
    return dict(sorted(finished.items()))
