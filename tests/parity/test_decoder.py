"""The training-side networks against ``transformers`` and torch autograd in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindrlhf.algorithms.masks import attention_mask, policy_mask, position_ids
from mindrlhf.configs.keys import ModelConfig
from mindrlhf.models.networks import CriticModel, PPOModelTrain, RewardModel
from mindrlhf.models.pieces import Gradients
from mindrlhf.models.qwen2.weight_names import hf_to_canonical
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Mesh

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GROUPS = Groups(Mesh(), 0)
PROMPT, RESPONSE, VOCAB = 6, 5, 80
TEMPERATURE = 0.7
PROMPT_LENGTHS = np.array([6, 3, 1])
RESPONSE_LENGTHS = np.array([2, 5, 1])
VALID = attention_mask(PROMPT_LENGTHS, RESPONSE_LENGTHS, PROMPT, RESPONSE)
POSITIONS = position_ids(VALID)
RESPONSE_MASK = policy_mask(RESPONSE_LENGTHS, RESPONSE)
TOKENS = np.random.default_rng(0).integers(0, 60, VALID.shape).astype(np.int32)
INPUTS = tuple(array.astype(np.int32) for array in (TOKENS, VALID, POSITIONS))

# layers, heads, kv heads, tied, ids of the tokenizer
CASES = {
    "gqa 8/2, untied": (2, 8, 2, False, VOCAB),
    "mha 4/4, tied": (1, 4, 4, True, VOCAB),
    "mqa 4/1, untied, padded vocabulary": (1, 4, 1, False, 60),
}


@pytest.fixture(scope="module", autouse=True)
def _graph_mode(either_kernels: None) -> None:
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")


@dataclass
class Case:
    """One model in both libraries, and what each says of the same batch."""

    config: ModelConfig
    hf: Any
    logprobs: np.ndarray
    entropy: np.ndarray
    gradients: dict[str, np.ndarray]
    weights: tuple[np.ndarray, np.ndarray]
    valid_vocab_size: int


def model_config(layers: int, heads: int, kv_heads: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_layers=layers,
        num_heads=heads,
        n_kv_heads=kv_heads,
        tie_word_embeddings=tied,
        seq_length=32,
    )


def hugging_face(config: ModelConfig, seed: int) -> Any:
    """A float32 ``Qwen2ForCausalLM`` far from its initial state: no bias is 0 and no norm 1."""
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.n_kv_heads,
            tie_word_embeddings=config.tie_word_embeddings,
            rope_theta=config.theta,
            rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.seq_length,
            attn_implementation="eager",
        )
    ).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
            if name.endswith("bias"):
                parameter.mul_(3.0)
    return model.eval()


def canonical(hf: Any, arrays: dict[str, Any], *, lm_head: bool = True) -> dict[str, np.ndarray]:
    names = hf_to_canonical(hf.config.num_hidden_layers)
    return {
        names[name]: array.detach().numpy()
        for name, array in arrays.items()
        if lm_head or "lm_head" not in name
    }


def batch(array: np.ndarray) -> Any:
    return torch.from_numpy(array.astype(np.int64))


def reference(hf: Any, valid_vocab_size: int) -> tuple[Any, Any]:
    """Log-probs and entropy (B, R), with the graph for autograd."""
    logits = hf(batch(TOKENS), attention_mask=batch(VALID), position_ids=batch(POSITIONS)).logits
    logits = logits[:, PROMPT - 1 : -1, :valid_vocab_size] / TEMPERATURE
    distribution = torch.log_softmax(logits, -1)
    chosen = distribution.gather(-1, batch(TOKENS[:, PROMPT:])[..., None])[..., 0]
    return chosen, -(distribution.exp() * distribution).sum(-1)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, either_kernels: None) -> Case:
    layers, heads, kv_heads, tied, valid_vocab_size = CASES[request.param]
    config = model_config(layers, heads, kv_heads, tied)
    hf = hugging_face(config, seed=1)
    policy = PPOModelTrain(
        config, GROUPS, prompt_length=PROMPT, temperature=TEMPERATURE, valid_vocab_size=valid_vocab_size
    )
    policy.load(canonical(hf, dict(hf.named_parameters())))
    rng = np.random.default_rng(2)
    weights = tuple(
        rng.standard_normal(RESPONSE_MASK.shape).astype(np.float32) * RESPONSE_MASK for _ in range(2)
    )
    gradients = Gradients()
    (logprobs, entropy), tape = policy.forward(*INPUTS)
    policy.backward(tape, tuple(map(Tensor, weights)), gradients)
    return Case(
        config,
        hf,
        logprobs.asnumpy(),
        entropy.asnumpy(),
        gradients={name: gradients[name].asnumpy() for name in policy.parameters},
        weights=weights,
        valid_vocab_size=valid_vocab_size,
    )


def test_logprobs_and_entropy_equal_transformers(case: Case) -> None:
    with torch.no_grad():
        logprobs, entropy = reference(case.hf, case.valid_vocab_size)
    assert logprobs.numpy()[RESPONSE_MASK].std() > 1, "the distribution must be far from uniform"
    np.testing.assert_allclose(
        case.logprobs[RESPONSE_MASK], logprobs.numpy()[RESPONSE_MASK], atol=1e-4, rtol=0
    )
    np.testing.assert_allclose(case.entropy[RESPONSE_MASK], entropy.numpy()[RESPONSE_MASK], atol=1e-4, rtol=0)
    assert np.isfinite(case.logprobs).all(), "what stands at pads must not poison a sum"
    if case.valid_vocab_size < VOCAB:
        with torch.no_grad():
            unmasked, _ = reference(case.hf, VOCAB)
        assert (logprobs - unmasked).numpy()[RESPONSE_MASK].min() > 1e-2, "the padded ids must matter here"


def test_gradients_equal_torch_autograd(case: Case) -> None:
    case.hf.zero_grad()
    logprobs, entropy = reference(case.hf, case.valid_vocab_size)
    of_logprobs, of_entropy = map(torch.from_numpy, case.weights)
    (of_logprobs * logprobs + of_entropy * entropy).sum().backward()
    expected = canonical(case.hf, {name: p.grad for name, p in case.hf.named_parameters()})
    assert case.gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = np.abs(gradient).max()
        assert scale > 1e-3, f"{name}: no gradient to compare"
        np.testing.assert_allclose(case.gradients[name], gradient, atol=1e-4 * scale, rtol=0, err_msg=name)
    if case.valid_vocab_size < VOCAB:
        assert (case.gradients["lm_head.weight"][case.valid_vocab_size :] == 0).all()


@pytest.fixture(scope="module")
def scalar_models(either_kernels: None) -> tuple[ModelConfig, Any, dict[str, np.ndarray], Any]:
    """A backbone with a scalar head: config, transformers' model, canonical weights, values (B, T)."""
    config = model_config(1, 4, 2, True)
    hf = hugging_face(config, seed=3)
    rng = np.random.default_rng(4)
    head = {
        "score_head.weight": rng.standard_normal((1, config.hidden_size)).astype(np.float32),
        "score_head.bias": np.array([0.3], np.float32),
    }
    with torch.no_grad():
        hidden = hf.model(
            batch(TOKENS), attention_mask=batch(VALID), position_ids=batch(POSITIONS)
        ).last_hidden_state
    shards = canonical(hf, dict(hf.named_parameters()), lm_head=False) | head
    values = hidden.numpy() @ head["score_head.weight"][0] + head["score_head.bias"]
    return config, hf, shards, values


def test_critic_values_stand_before_each_response_token(scalar_models: Any) -> None:
    config, _, shards, values = scalar_models
    critic = CriticModel(config, GROUPS, prompt_length=PROMPT)
    critic.load(shards)
    (found,) = critic(*INPUTS)
    assert found.shape == RESPONSE_MASK.shape
    np.testing.assert_allclose(
        found[RESPONSE_MASK], values[:, PROMPT - 1 : -1][RESPONSE_MASK], atol=1e-4, rtol=0
    )


def test_reward_is_read_at_the_last_real_token(scalar_models: Any) -> None:
    config, _, shards, values = scalar_models
    reward = RewardModel(config, GROUPS, prompt_length=PROMPT)
    reward.load(shards)
    (found,) = reward(*INPUTS, RESPONSE_LENGTHS.astype(np.int32))
    expected = values[np.arange(3), PROMPT + RESPONSE_LENGTHS - 1]
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
