"""Names of Qwen2 weights: Hugging Face <-> canonical (MindFormers' ``LlamaForCausalLM``).

The tensors themselves are equal: both libraries store linear weights as (out, in) and rotate halves of
a head, so no row of q or k moves (tests/parity/test_convert_mindformers.py compares the logits).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from mindrlhf.models.qwen2.layouts import (
    EMBEDDING,
    FINAL_NORM,
    LM_HEAD,
    SCORE_HEAD_BIAS,
    SCORE_HEAD_WEIGHT,
    layer_prefix,
)

HF_EMBEDDING = "model.embed_tokens.weight"
HF_LM_HEAD = "lm_head.weight"

_OUTSIDE_LAYERS = {
    HF_EMBEDDING: EMBEDDING,
    "model.norm.weight": FINAL_NORM,
    HF_LM_HEAD: LM_HEAD,
    "score.weight": SCORE_HEAD_WEIGHT,
    # transformers' Qwen2ForSequenceClassification has no bias; ours is kept under the natural name.
    "score.bias": SCORE_HEAD_BIAS,
}

_IN_LAYER = {
    "input_layernorm.weight": "attention_norm.weight",
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.q_proj.bias": "attention.wq.bias",
    "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.k_proj.bias": "attention.wk.bias",
    "self_attn.v_proj.weight": "attention.wv.weight",
    "self_attn.v_proj.bias": "attention.wv.bias",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
}

# Buffers that old versions of transformers stored; they follow from the config.
_DERIVED_SUFFIX = ".rotary_emb.inv_freq"
_LAYER_NUMBER = re.compile(r"^model\.layers\.(\d+)\.")


def hf_to_canonical(num_layers: int) -> dict[str, str]:
    """Hugging Face name -> canonical name of every weight a model of ``num_layers`` layers may have."""
    names = dict(_OUTSIDE_LAYERS)
    for layer in range(num_layers):
        prefix = layer_prefix(layer)
        names.update({prefix + hf: prefix + canonical for hf, canonical in _IN_LAYER.items()})
    return names


def canonical_to_hf(num_layers: int) -> dict[str, str]:
    """The inverse of :func:`hf_to_canonical`."""
    return {canonical: hf for hf, canonical in hf_to_canonical(num_layers).items()}


def count_layers(names: Iterable[str]) -> int:
    """Number of decoder layers that occur in ``names`` (of either form)."""
    numbers = [int(match.group(1)) for name in names if (match := _LAYER_NUMBER.match(name))]
    return max(numbers, default=-1) + 1


def is_hf(names: Iterable[str]) -> bool:
    """Whether ``names`` are Hugging Face's rather than canonical."""
    return any(name == HF_EMBEDDING or ".self_attn." in name or ".mlp." in name for name in names)


def is_derived(name: str) -> bool:
    """Whether a Hugging Face tensor follows from the config and is not a weight."""
    return name.endswith(_DERIVED_SUFFIX)
