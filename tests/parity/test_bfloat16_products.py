"""``--cpu_matmul_dtype bfloat16`` against transformers' model whose linear layers round their operands.

Both sides round what differs in the last bits of float32, so here and there a number falls to the other side:
what is asked for is that they are much nearer to each other than either is to float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import ops

from mindrlhf.algorithms.masks import attention_mask, position_ids
from mindrlhf.models.networks import PPOModelTrain
from mindrlhf.models.pieces import Gradients
from mindrlhf.models.qwen2.layouts import parameter_layouts
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Mesh
from tests.parity.ppo_update_case import (
    MODEL,
    PPO,
    PROMPT,
    PROMPT_LENGTHS,
    RESPONSE,
    ROWS,
    canonical,
    hugging_face,
    outputs,
    rollout_of,
)
from tests.unit.kernels.rounding import needs_bfloat16

torch = pytest.importorskip("torch")
pytestmark = needs_bfloat16

INPUTS = rollout_of(PROMPT, np.zeros((ROWS, RESPONSE), np.float32)).inputs


@pytest.fixture(scope="module", autouse=True)
def _graph_mode() -> None:
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")


def _round(x: Any) -> Any:
    return x.to(torch.bfloat16).to(torch.float32)


class RoundedLinear(torch.autograd.Function):
    """A linear layer whose products have operands rounded to bfloat16, backward too."""

    @staticmethod
    def forward(context: Any, x: Any, weight: Any) -> Any:
        context.save_for_backward(_round(x), _round(weight))
        return _round(x) @ _round(weight).T

    @staticmethod
    def backward(context: Any, dy: Any) -> tuple[Any, Any]:
        x, weight = context.saved_tensors
        rows = _round(dy).reshape(-1, dy.shape[-1])
        return _round(dy) @ weight, rows.T @ x.reshape(-1, x.shape[-1])


def rounding(hf: Any) -> Any:
    """The model, with every linear layer but the scalar head rounding."""
    for name, module in hf.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "score":

            def forward(x: Any, module: Any = module) -> Any:
                y = RoundedLinear.apply(x, module.weight)
                return y if module.bias is None else y + module.bias

            module.forward = forward
    return hf


def ours(matmul_dtype: str) -> dict[str, np.ndarray]:
    """Log-probs, and the gradients by name."""
    model = PPOModelTrain(
        replace(MODEL, matmul_dtype=matmul_dtype),
        Groups(Mesh(), 0),
        prompt_length=PROMPT,
        temperature=PPO.temperature,
        valid_vocab_size=MODEL.vocab_size,
        value_head=True,
    )
    model.load(canonical(hugging_face(seed=1), model.layouts))
    gradients = Gradients()
    (logprobs, entropy, values), tape = model.forward(*INPUTS)
    model.backward(tape, (ops.ones_like(logprobs), ops.zeros_like(entropy), ops.ones_like(values)), gradients)
    return {"logprobs": logprobs.asnumpy()} | {name: gradients[name].asnumpy() for name in model.parameters}


@pytest.fixture(scope="module")
def rounded_ours() -> dict[str, np.ndarray]:
    return ours("bfloat16")


@pytest.fixture(scope="module")
def exact_ours() -> dict[str, np.ndarray]:
    return ours("float32")


@pytest.fixture(scope="module")
def rounded_torch(rounded_ours: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    hf = rounding(hugging_face(seed=1))
    logprobs, _, values = outputs(hf, INPUTS)
    (logprobs.sum() + values.sum()).backward()
    for parameter in hf.parameters():  # so that canonical() gives gradients
        parameter.data = parameter.grad
    names = rounded_ours.keys() - {"logprobs"}
    return {"logprobs": logprobs.detach().numpy()} | canonical(hf, names)


def test_log_probs_and_gradients_round_where_torch_rounds(
    rounded_ours: dict[str, np.ndarray],
    rounded_torch: dict[str, np.ndarray],
    exact_ours: dict[str, np.ndarray],
) -> None:
    assert rounded_ours.keys() == rounded_torch.keys()
    for name, wanted in rounded_torch.items():
        scale = np.linalg.norm(wanted)
        apart = np.linalg.norm(rounded_ours[name] - wanted) / scale
        effect = np.linalg.norm(exact_ours[name] - wanted) / scale
        assert apart < 2e-3, name
        if name not in ("score_head.weight", "score_head.bias"):
            assert apart < 0.25 * effect, f"{name}: {apart:.1e} apart, {effect:.1e} from float32"


def test_rounding_costs_little(
    rounded_ours: dict[str, np.ndarray], exact_ours: dict[str, np.ndarray]
) -> None:
    difference = np.abs(rounded_ours["logprobs"] - exact_ours["logprobs"])
    assert 1e-4 < difference.max() < 0.1


def test_log_probs_of_a_rollout_are_those_of_the_trained_network() -> None:
    """Generation must round what training rounds: else the ratio is not 1 before the first update."""
    from mindrlhf.models.generator import GenerationConfig, PPOModelInfer

    groups = Groups(Mesh(), 0)
    weights = hugging_face(seed=1)
    inputs = INPUTS
    settings = GenerationConfig(
        max_prompt_length=PROMPT,
        max_response_length=RESPONSE,
        stop_token_ids=(),
        temperature=PPO.temperature,
        valid_vocab_size=MODEL.vocab_size,
    )
    uniforms = np.random.default_rng(3).random((ROWS, RESPONSE)).astype(np.float32)

    def train_logprobs(tokens: np.ndarray) -> np.ndarray:
        model = PPOModelTrain(
            replace(MODEL, matmul_dtype="bfloat16"),
            groups,
            prompt_length=PROMPT,
            temperature=PPO.temperature,
            valid_vocab_size=MODEL.vocab_size,
        )
        model.load(canonical(weights, model.layouts))
        valid = attention_mask(PROMPT_LENGTHS, np.full(ROWS, RESPONSE), PROMPT, RESPONSE)
        arrays = (tokens, valid, position_ids(valid))
        return model(*(array.astype(np.int32) for array in arrays))[0]

    def apart(matmul_dtype: str) -> np.ndarray:
        config = replace(MODEL, matmul_dtype=matmul_dtype)
        infer = PPOModelInfer(config, groups, settings, batch_size=ROWS, decode_steps_per_call=2)
        infer.load(canonical(weights, parameter_layouts(config, Mesh())))
        prompts = inputs.tokens[:, :PROMPT]
        output = infer.generate(prompts, PROMPT_LENGTHS.astype(np.int32), uniforms)
        tokens = np.concatenate([prompts, output.response_ids], axis=1)
        return np.abs(output.logprobs - train_logprobs(tokens))

    rounded, exact = apart("bfloat16"), apart("float32")
    assert np.median(rounded) < 1e-5
    assert np.median(exact) > 1e-3, "float32 generation must differ, or the test shows nothing"
    assert rounded.mean() < 0.2 * exact.mean()
