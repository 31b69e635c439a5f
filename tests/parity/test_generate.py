"""Generation against ``transformers``: same weights, same tokens, same log-probs."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
import pytest

from mindrlhf.configs.keys import ModelConfig
from mindrlhf.models.generator import GenerationConfig, GenerationOutput, PPOModelInfer
from mindrlhf.models.qwen2.layouts import parameter_layouts
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Mesh

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MESH = Mesh(1, 1)
VALID = 90
STOP = (88, 89)

# hidden, layers, heads, kv heads, intermediate, vocabulary, tied, biases
CONFIGS = {
    "mha": (32, 2, 4, 4, 48, 96, False, True),
    "gqa": (48, 2, 6, 2, 40, 96, True, True),
    "mqa": (64, 3, 4, 1, 96, 96, True, True),
    "no_bias": (32, 1, 4, 2, 64, 96, False, False),
}


@pytest.fixture(scope="module", autouse=True)
def _graph_mode(either_kernels: None) -> None:
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")


def model_config(name: str) -> ModelConfig:
    hidden, layers, heads, kv_heads, inter, vocab, tied, bias = CONFIGS[name]
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        n_kv_heads=kv_heads,
        intermediate_size=inter,
        seq_length=64,
        theta=10_000.0,
        tie_word_embeddings=tied,
        qkv_has_bias=bias,
    )


def random_weights(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Large enough that the distribution is far from uniform; norms and biases away from 1 and 0."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, layout in parameter_layouts(config, MESH).items():
        values = rng.standard_normal(layout.shape) * (1.0 if "embedding" in name else 0.2)
        weights[name] = (values + 1.0 if "norm" in name else values).astype(np.float32)
    return weights


def hugging_face(config: ModelConfig, weights: dict[str, np.ndarray]) -> Any:
    """``Qwen2ForCausalLM`` with these weights; written out here, apart from the project's own name map."""
    parts = {
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "tok_embeddings.embedding_weight": "embed_tokens.weight",
        "norm_out": "norm",
    }
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.n_kv_heads,
            intermediate_size=config.intermediate_size,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.theta,
            tie_word_embeddings=config.tie_word_embeddings,
            attn_implementation="eager",
        )
    ).eval()
    state = {}
    for name, value in weights.items():
        for ours, theirs in parts.items():
            name = name.replace(ours, theirs)
        state[name] = torch.tensor(value)
    for layer in range(config.num_layers):  # Qwen2 always has the biases
        for projection, heads in (
            ("q", config.num_heads),
            ("k", config.n_kv_heads),
            ("v", config.n_kv_heads),
        ):
            state.setdefault(
                f"model.layers.{layer}.self_attn.{projection}_proj.bias", torch.zeros(heads * config.head_dim)
            )
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.load_state_dict(state, strict=True)
    return model


def reference_logprobs(model: Any, tokens: list[int], temperature: float) -> np.ndarray:
    """Log-probs of every next token after ``tokens`` (n,), all columns, over the valid ids: (n, V)."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0] / temperature
    logits[:, VALID:] = -torch.inf
    return torch.log_softmax(logits.double(), -1).numpy()


def prompts(rng: np.random.Generator, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded prompts of all lengths; the padding is junk, which must not matter."""
    lengths = np.resize([columns, 1, 2, columns - 1, columns // 2], rows)
    ids = rng.integers(0, VALID, (rows, columns))
    return ids, lengths


def generate(
    config: ModelConfig, weights: dict[str, np.ndarray], ids: np.ndarray, lengths: np.ndarray, **options: Any
) -> GenerationOutput:
    options = {"max_response_length": 11, "valid_vocab_size": VALID, **options}
    batch_size = options.pop("batch_size", len(ids))
    steps = options.pop("steps", 2)
    uniforms = options.pop("uniforms", None)
    model = PPOModelInfer(
        config,
        Groups(MESH, 0),
        GenerationConfig(max_prompt_length=ids.shape[1], **options),
        batch_size=batch_size,
        decode_steps_per_call=steps,
    )
    model.load(weights)
    if uniforms is None:
        uniforms = np.zeros((len(ids), options["max_response_length"]), np.float32)
    return model.generate(ids, lengths, uniforms)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_and_logprobs_equal_recomputation_by_transformers(name: str) -> None:
    config = model_config(name)
    weights = random_weights(config, seed=3)
    model = hugging_face(config, weights)
    ids, lengths = prompts(np.random.default_rng(5), rows=5, columns=7)

    output = generate(config, weights, ids, lengths, do_sample=False)

    worst = 0.0
    for row, length in enumerate(lengths):
        tokens = ids[row, -length:].tolist()
        for step in range(11):
            logprobs = reference_logprobs(model, tokens, 1.0)[-1]
            assert output.response_ids[row, step] == logprobs.argmax(), (row, step)
            worst = max(worst, abs(output.logprobs[row, step] - logprobs.max()))
            tokens.append(int(logprobs.argmax()))
    assert worst < 1e-4
    assert output.lengths.tolist() == [11] * 5
    assert not output.stopped.any()


@pytest.mark.parametrize(("name", "temperature"), [("gqa", 1.0), ("mha", 0.6)])
def test_sampled_tokens_follow_the_inverse_cdf_and_logprobs_are_untruncated(
    name: str, temperature: float
) -> None:
    config = model_config(name)
    weights = random_weights(config, seed=4)
    model = hugging_face(config, weights)
    rng = np.random.default_rng(6)
    ids, lengths = prompts(rng, rows=5, columns=6)
    uniforms = rng.random((5, 11)).astype(np.float32)

    output = generate(config, weights, ids, lengths, temperature=temperature, uniforms=uniforms)

    for row, length in enumerate(lengths):
        tokens = np.concatenate([ids[row, -length:], output.response_ids[row]])
        logprobs = reference_logprobs(model, tokens.tolist(), temperature)[length - 1 : -1]
        cumulative = np.exp(logprobs).cumsum(-1)
        for step, token in enumerate(output.response_ids[row]):
            begin = cumulative[step, token] - np.exp(logprobs[step, token])
            assert begin - 1e-5 <= uniforms[row, step] <= cumulative[step, token] + 1e-5
        chosen = logprobs[np.arange(11), output.response_ids[row]]
        np.testing.assert_allclose(output.logprobs[row], chosen, atol=1e-4, rtol=0)


def test_left_padded_rows_give_the_tokens_they_give_alone() -> None:
    config = model_config("gqa")
    weights = random_weights(config, seed=8)
    ids, lengths = prompts(np.random.default_rng(9), rows=5, columns=7)
    together = generate(config, weights, ids, lengths, do_sample=False)
    alone = generate(config, weights, ids, lengths, do_sample=False, batch_size=1)
    np.testing.assert_array_equal(alone.response_ids, together.response_ids)
    np.testing.assert_allclose(alone.logprobs, together.logprobs, atol=1e-5, rtol=0)
    # Without its padding, a prompt shifts in the cache but not in its positions.
    row = int(np.flatnonzero(lengths == 2)[0])
    short = generate(config, weights, ids[row : row + 1, -2:], lengths[row : row + 1], do_sample=False)
    np.testing.assert_array_equal(short.response_ids[0], together.response_ids[row])
    np.testing.assert_allclose(short.logprobs[0], together.logprobs[row], atol=1e-5, rtol=0)


def test_long_prompts_go_through_attention_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    config = model_config("gqa")
    weights = random_weights(config, seed=10)
    ids, lengths = prompts(np.random.default_rng(11), rows=3, columns=13)
    whole = generate(config, weights, ids, lengths, do_sample=False)
    monkeypatch.setattr("mindrlhf.models.qwen2.generator_network.QUERY_BLOCK", 4)
    blocks = generate(config, weights, ids, lengths, do_sample=False)
    np.testing.assert_array_equal(blocks.response_ids, whole.response_ids)
    np.testing.assert_allclose(blocks.logprobs, whole.logprobs, atol=1e-5, rtol=0)


def test_stop_tokens_end_a_row_which_then_gives_pads() -> None:
    config = model_config("gqa")
    weights = random_weights(config, seed=8)
    ids, lengths = prompts(np.random.default_rng(9), rows=5, columns=7)
    free = generate(config, weights, ids, lengths, do_sample=False)
    # Make stop ids of tokens that greedy generation gives in the middle of a row, the pad among them.
    stops = (int(free.response_ids[0, 3]), int(free.response_ids[1, 9]))
    output = generate(
        config, weights, ids, lengths, do_sample=False, stop_token_ids=stops, pad_token_id=stops[0]
    )
    for row in range(5):
        hits = np.flatnonzero(np.isin(free.response_ids[row], stops))
        end = hits[0] + 1 if len(hits) else 11
        assert output.lengths[row] == end
        assert output.stopped[row] == bool(len(hits))
        np.testing.assert_array_equal(output.response_ids[row, :end], free.response_ids[row, :end])
        np.testing.assert_allclose(output.logprobs[row, :end], free.logprobs[row, :end], atol=1e-6, rtol=0)
        assert (output.response_ids[row, end:] == stops[0]).all()
        assert (output.logprobs[row, end:] == 0).all()
    assert output.lengths[0] <= 4
    assert output.stopped[:2].all()
