"""``config.json`` of a Hugging Face Qwen2 model <-> :class:`ModelConfig`."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mindrlhf.checkpoint.element_types import DType
from mindrlhf.checkpoint.sources import bullet_list
from mindrlhf.configs.faults import shown
from mindrlhf.configs.fields import MAX_INT
from mindrlhf.configs.schema import ModelConfig
from mindrlhf.models.qwen2.layouts import LM_HEAD, SCORE_HEAD_WEIGHT
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

# Field of ModelConfig -> Hugging Face key and its default for Qwen2.
_VALUES: dict[str, tuple[str, Any]] = {
    "seq_length": ("max_position_embeddings", 32768),
    "rms_norm_eps": ("rms_norm_eps", 1e-6),
    "theta": ("rope_theta", 10_000.0),
    "initializer_range": ("initializer_range", 0.02),
    "tie_word_embeddings": ("tie_word_embeddings", False),
}

CAUSAL_LM = "Qwen2ForCausalLM"
SEQUENCE_CLASSIFICATION = "Qwen2ForSequenceClassification"


def read_hf_config(path: Path) -> dict[str, Any]:
    """The ``config.json`` at ``path``, or in the directory ``path``.

    Raises:
        CheckpointError: missing, not a JSON object, or not of a Qwen2 model.
    """
    file = path / CONFIG_NAME if path.is_dir() else path
    config = read_json(file)
    if config.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{file}: model_type is {shown(config.get('model_type'))}, only {MODEL_TYPE!r} is supported: "
            "give a Qwen2 model"
        )
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: missing or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}; copy it again from the model"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): fix it or copy it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: expected a JSON object, got {type(content).__name__}: copy it again from the model"
        )
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that occurs twice, Python would silently take the second value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {shown(next(key for key in keys if keys.count(key) > 1))} occurs twice")
    return found


def model_config_from_hf(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The sizes that a Hugging Face config states, with its own defaults for what it may leave out.

    Raises:
        CheckpointError: sizes are missing or do not fit; all of them at once.
    """
    sizes: dict[str, Any] = {field: config.get(key) for key, field in SIZE_KEYS.items()}
    faults = [
        f"{key}: expected a positive integer, got {shown(sizes[field])}"
        for key, field in SIZE_KEYS.items()
        if type(sizes[field]) is not int or not 0 < sizes[field] <= MAX_INT
    ]
    if not faults:
        faults = _misfits(config, sizes)
    values = {field: _value(config, field, faults) for field in _VALUES}
    ids = _token_ids(config, faults)
    if faults:
        raise CheckpointError(f"{where}: fix it, or take the model's own:" + bullet_list(faults))
    return ModelConfig(**sizes, **values, **ids, qkv_has_bias=True)


def _value(config: Mapping[str, Any], field: str, faults: list[str]) -> Any:
    """A value that may be left out, in the type of its default; adds a fault when it has another."""
    key, default = _VALUES[field]
    rope = config.get("rope_parameters")
    places = [config, rope] if field == "theta" and isinstance(rope, Mapping) else [config]
    value = next((place[key] for place in places if place.get(key) is not None), default)
    if isinstance(default, bool):
        wanted, good = "true or false", isinstance(value, bool)
    elif isinstance(default, int):
        wanted, good = "a positive integer", type(value) is int and 0 < value <= MAX_INT
    else:
        wanted, good = "a positive number", type(value) in (int, float) and 0 < value < 1e30
    if not good:
        faults.append(f"{key}: expected {wanted}, got {shown(value)}")
        return default
    return type(default)(value)


def _misfits(config: Mapping[str, Any], sizes: Mapping[str, Any]) -> list[str]:
    hidden, heads, kv_heads = sizes["hidden_size"], sizes["num_heads"], sizes["n_kv_heads"]
    faults = []
    if hidden % heads:
        faults.append(f"hidden_size {hidden} is not divisible by num_attention_heads {heads}")
    if heads % kv_heads:
        faults.append(f"num_attention_heads {heads} is not divisible by num_key_value_heads {kv_heads}")
    head_dim = config.get("head_dim")
    if head_dim is not None and (type(head_dim) is not int or head_dim * heads != hidden):
        wanted = f"hidden_size / num_attention_heads = {hidden}/{heads}"
        faults.append(f"head_dim {shown(head_dim)} is not {wanted}")
    return faults


def _token_ids(config: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    """Ids of the end (0 when none is stated), padding and begin (the end's) tokens."""
    found: dict[str, tuple[int, ...]] = {}
    for key in ("eos_token_id", "pad_token_id", "bos_token_id"):
        value = config.get(key)
        listed = value if isinstance(value, list) and key == "eos_token_id" else [value]
        ids = tuple(entry for entry in listed if type(entry) is int and 0 <= entry <= MAX_INT)
        if value is not None and (len(ids) < len(listed) or not ids):
            faults.append(f"{key}: expected a token id, got {shown(value)}")
        found[key] = ids
    eos = found["eos_token_id"] or (0,)
    pad, bos = found["pad_token_id"] or eos, found["bos_token_id"] or eos
    return {"eos_token_id": eos, "pad_token_id": pad[0], "bos_token_id": bos[0]}


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


def finish_hf_config(config: Mapping[str, Any], names: Collection[str], dtype: DType) -> dict[str, Any]:
    """``config`` with the architecture and dtype of the weights beside it.

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
