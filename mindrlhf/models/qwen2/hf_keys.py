"""Keys of a Hugging Face Qwen2 ``config.json`` <-> :class:`ModelConfig`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from mindrlhf.configs.faults import shown
from mindrlhf.configs.fields import MAX_INT
from mindrlhf.configs.keys import ModelConfig
from mindrlhf.configs.mindformers import Foreign
from mindrlhf.models.qwen2.layouts import LM_HEAD
from mindrlhf.models.score_head import SCORE_HEAD_WEIGHT
from mindrlhf.utils.errors import CheckpointError, bullet_list

# Hugging Face key -> field of ModelConfig.
_SIZE_KEYS = {
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
    "qkv_has_bias": ("attention_bias", True),
}

_ROPE = "remove it, unless the model was trained with it: positions are not scaled here"
# Hugging Face key that changes the logits -> the values with which they are what is computed here. A key that
# matters only beside another one, such as sliding_window beside use_sliding_window, is not listed.
_NUMERICS: dict[str, Foreign] = {
    "hidden_act": Foreign(("silu", "swish", None), "give a model whose activation is silu"),
    "rope_scaling": Foreign((None,), _ROPE),
    "rope_parameters": Foreign((None,), _ROPE),
    "partial_rotary_factor": Foreign((1, None), "give a model that rotates whole heads"),
    "use_mrope": Foreign((False, None), "give a model of texts alone"),
    "use_sliding_window": Foreign((False, None), "set it to false: every token attends to all before it"),
    "layer_types": Foreign((None,), "give a model whose layers are all of type full_attention"),
    "attention_dropout": Foreign((0, None), "set it to 0: dropout would make old and new log-probs differ"),
    "quantization_config": Foreign((None, {}), "give the model before it was quantized"),
    "compression_config": Foreign((None, {}), "give the model before it was compressed"),
    "dual_chunk_attention_config": Foreign((None, {}), "remove it: attention is of the whole context here"),
    "is_causal": Foreign((True, None), "give a model that generates: every token attends to those before it"),
}

CAUSAL_LM = "Qwen2ForCausalLM"
SEQUENCE_CLASSIFICATION = "Qwen2ForSequenceClassification"


def model_config_from_hf(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The sizes that a Hugging Face config states, with Hugging Face's defaults for what it may leave out.

    Raises:
        CheckpointError: sizes are missing or do not fit, or the numerics are not supported; all at once.
    """
    sizes: dict[str, Any] = {field: config.get(key) for key, field in _SIZE_KEYS.items()}
    faults = [
        f"{key}: expected a positive integer, got {shown(sizes[field])}"
        for key, field in _SIZE_KEYS.items()
        if type(sizes[field]) is not int or not 0 < sizes[field] <= MAX_INT
    ]
    if not faults:
        faults = _misfits(config, sizes)
    values = {field: _value(config, field, faults) for field in _VALUES}
    ids = _token_ids(config, faults)
    faults += [
        f"{key}: {shown(value)} is not supported; {foreign.instead}"
        for key, foreign in _NUMERICS.items()
        if not foreign.is_neutral(value := None if _is_default(key, config) else config[key], config)
    ]
    if faults:
        raise CheckpointError(f"{where}: fix it, or take the model's own:" + bullet_list(faults))
    return ModelConfig(**sizes, **values, **ids)


def _is_default(key: str, config: Mapping[str, Any]) -> bool:
    """Whether a config states nothing for a key of ``_NUMERICS``, or states the default in many words."""
    value = config.get(key)
    if key == "layer_types" and isinstance(value, list):
        return all(kind == "full_attention" for kind in value)
    if key.startswith("rope_") and isinstance(value, Mapping):  # transformers 5 always writes rope_parameters
        kinds = [value[name] for name in ("rope_type", "type") if value.get(name) is not None]
        nested = any(isinstance(entry, Mapping) for entry in value.values())
        scales = "factor" in value and not kinds
        whole = value.get("partial_rotary_factor") in (1, None)
        return whole and not nested and not scales and all(kind == "default" for kind in kinds)
    return value is None


def _value(config: Mapping[str, Any], field: str, faults: list[str]) -> Any:
    """A value that may be left out, in the type of its default; adds a fault when it has another."""
    key, default = _VALUES[field]
    rope = config.get("rope_parameters")
    places = [config, rope] if field == "theta" and isinstance(rope, Mapping) else [config]
    stated = [place[key] for place in places if place.get(key) is not None]
    value = stated[0] if stated else default
    if stated[1:] not in ([], [value]):  # transformers 4 would take the first, transformers 5 the second
        faults.append(f"{key}: {shown(value)}, but {shown(stated[1])} in rope_parameters: keep one of them")
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
    """A ``config.json`` for ``model``, with keys that only Hugging Face needs at Qwen2's values."""
    eos = model.eos_token_id
    return {
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "bos_token_id": model.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos),
        "pad_token_id": model.pad_token_id,
        "hidden_act": "silu",
        **{key: getattr(model, field) for key, field in _SIZE_KEYS.items()},
        "initializer_range": model.initializer_range,
        "max_position_embeddings": model.seq_length,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.theta,
        "tie_word_embeddings": model.tie_word_embeddings,
        "use_cache": True,
        "use_sliding_window": False,
        **({} if model.qkv_has_bias else {"attention_bias": False}),
    }


def finish_hf_config(config: Mapping[str, Any], names: Collection[str], dtype: str) -> dict[str, Any]:
    """``config`` with the architecture and dtype of the weights beside it.

    Args:
        config: a Hugging Face config.
        names: canonical names of the weights; a scalar head without language-model head makes a reward
            model, unless the config itself already says which of the two it is and both are possible.
        dtype: element type of the weights, by name.
    """
    finished = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    finished["torch_dtype"] = dtype
    has_score = SCORE_HEAD_WEIGHT in names
    tied_lm = bool(config.get("tie_word_embeddings")) and config.get("architectures") == [CAUSAL_LM]
    if has_score and LM_HEAD not in names and not tied_lm:
        finished["architectures"] = [SEQUENCE_CLASSIFICATION]
        finished["id2label"] = {"0": "LABEL_0"}  # one label: a scalar score
        finished["label2id"] = {"LABEL_0": 0}
    else:
        finished["architectures"] = [CAUSAL_LM]
    return dict(sorted(finished.items()))
