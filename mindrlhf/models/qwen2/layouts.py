"""How every parameter of a Qwen2 model is split: canonical name -> :class:`Layout`.

Names are MindFormers' (``LlamaForCausalLM``), so one file serves both libraries. The split is
Megatron-LM's (arXiv 1909.08053): projections into heads and into the feed-forward by output rows,
projections back to the hidden size by input columns, embeddings by vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Mapping

from mindrlhf.configs.keys import ModelConfig
from mindrlhf.models.score_head import SCORE_HEAD_BIAS, SCORE_HEAD_WEIGHT
from mindrlhf.parallel.layout import AxisName, Layout, Mesh

EMBEDDING = "model.tok_embeddings.embedding_weight"
FINAL_NORM = "model.norm_out.weight"
LM_HEAD = "lm_head.weight"


def layer_prefix(layer: int) -> str:
    """Name prefix of decoder layer ``layer``, with the trailing dot."""
    return f"model.layers.{layer}."


def stored_model_parallel(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Over how many ranks one model with stored tensors of these shapes is split; 1 if they do not tell.

    The attention's output projection tells it without the model's sizes: each rank has (H, H / mp) of (H, H).
    """
    hidden, *rest = shapes.get(layer_prefix(0) + "attention.wo.weight", ()) or (1,)
    return max(hidden // max(*rest, 1), 1) if len(rest) == 1 else 1


def parameter_layouts(
    config: ModelConfig, mesh: Mesh, *, lm_head: bool = True, score_head: bool = False
) -> dict[str, Layout]:
    """Canonical name -> layout of every parameter, in model order.

    Args:
        config: model sizes.
        mesh: the grid of ranks that holds the model.
        lm_head: whether the model predicts tokens; a tied model has no separate ``lm_head.weight``.
        score_head: whether it has the scalar head of a reward model or critic.

    Raises:
        ValueError: a split dimension does not divide by ``mesh.mp``.
    """
    layouts: dict[str, Layout] = {}

    def add(name: str, shape: tuple[int, ...], split: int | None) -> None:
        axes: list[AxisName | None] = [None] * len(shape)
        if split is not None:
            axes[split] = "mp"
        layouts[name] = Layout(mesh, shape, tuple(axes))

    hidden, inter, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    heads_out = {
        "wq": config.num_heads * config.head_dim,
        "wk": config.n_kv_heads * config.head_dim,
        "wv": config.n_kv_heads * config.head_dim,
    }
    add(EMBEDDING, (vocab, hidden), 0)
    for layer in range(config.num_layers):
        prefix = layer_prefix(layer)
        add(prefix + "attention_norm.weight", (hidden,), None)
        for projection, out in heads_out.items():
            add(f"{prefix}attention.{projection}.weight", (out, hidden), 0)
            if config.qkv_has_bias:
                add(f"{prefix}attention.{projection}.bias", (out,), 0)
        add(prefix + "attention.wo.weight", (hidden, heads_out["wq"]), 1)
        add(prefix + "ffn_norm.weight", (hidden,), None)
        add(prefix + "feed_forward.w1.weight", (inter, hidden), 0)
        add(prefix + "feed_forward.w3.weight", (inter, hidden), 0)
        add(prefix + "feed_forward.w2.weight", (hidden, inter), 1)
    add(FINAL_NORM, (hidden,), None)
    if lm_head and not config.tie_word_embeddings:
        add(LM_HEAD, (vocab, hidden), 0)
    if score_head:
        add(SCORE_HEAD_WEIGHT, (1, hidden), None)
        add(SCORE_HEAD_BIAS, (1,), None)
    return layouts
