"""SFT and reward losses, and their gradients, against transformers' models, row by row without padding."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

from mindrlhf.configs.keys import ModelConfig
from mindrlhf.data.sequences import Sequences
from mindrlhf.models.networks import PPOModelTrain, RewardModel, SequenceModel
from mindrlhf.models.pieces import Gradients
from mindrlhf.models.qwen2.weight_names import hf_to_canonical
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Mesh
from mindrlhf.trainer.experience import sequence_inputs
from mindrlhf.trainer.recipes.reward_model import PairLoss
from mindrlhf.trainer.recipes.sft import SFTLoss
from mindrlhf.trainer.train_step import MicroBatch, Objective

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GROUPS = Groups(Mesh(), 0)
MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=40,
    num_layers=1,
    num_heads=4,
    n_kv_heads=2,
    seq_length=10,
)
PROMPT, RESPONSE = 6, 5
PROMPT_LENGTHS = np.array([6, 3, 1, 5], np.int32)
CHOSEN_LENGTHS = np.array([2, 5, 1, 4], np.int32)
REJECTED_LENGTHS = np.array([4, 1, 5, 2], np.int32)
CENTER = 0.3


@pytest.fixture(scope="module", autouse=True)
def _graph_mode() -> None:
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")


@pytest.fixture(scope="module")
def hf() -> Any:
    """A float32 ``Qwen2ForCausalLM`` with a scalar head beside it."""
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=MODEL.vocab_size,
            hidden_size=MODEL.hidden_size,
            intermediate_size=MODEL.intermediate_size,
            num_hidden_layers=MODEL.num_layers,
            num_attention_heads=MODEL.num_heads,
            num_key_value_heads=MODEL.n_kv_heads,
            tie_word_embeddings=False,
            rope_theta=MODEL.theta,
            rms_norm_eps=MODEL.rms_norm_eps,
            attn_implementation="eager",
        )
    )
    model.score = torch.nn.Linear(MODEL.hidden_size, 1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
    return model.float().eval()


def sequences(response_lengths: np.ndarray, seed: int) -> Sequences:
    """Random tokens everywhere, pads included: what stands there must not matter."""
    prompts = np.random.default_rng(0).integers(0, MODEL.vocab_size, (4, PROMPT))
    responses = np.random.default_rng(seed).integers(0, MODEL.vocab_size, (4, RESPONSE))
    tokens = np.concatenate([prompts, responses], axis=1).astype(np.int32)
    return Sequences(tokens, PROMPT_LENGTHS, response_lengths)


def real_tokens(part: Sequences) -> list[tuple[Any, int]]:
    """Each row without its padding, and the length of its prompt."""
    return [
        (torch.from_numpy(row[PROMPT - n : PROMPT + length].astype(np.int64))[None], int(n))
        for row, n, length in zip(*part, strict=True)
    ]


def gradients_of(
    model: SequenceModel, loss: nn.Cell, micro_batches: list[MicroBatch]
) -> tuple[np.ndarray, dict[str, Any]]:
    """Statistics summed over micro-batches, and the accumulated gradient of every parameter."""
    gradients, objective = Gradients(), Objective(model, loss)
    sums = [objective.backward(batch, gradients)[1].asnumpy() for batch in micro_batches]
    return np.sum(sums, axis=0), {name: gradients[name].asnumpy() for name in model.parameters}


def assert_gradients_equal(actual: dict[str, np.ndarray], hf: Any) -> None:
    names = hf_to_canonical(MODEL.num_layers)
    expected = {names[name]: p.grad.numpy() for name, p in hf.named_parameters() if p.grad is not None}
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        np.testing.assert_allclose(actual[name], gradient, rtol=1e-4, atol=2e-6, err_msg=name)
    assert max(np.abs(g).max() for g in expected.values()) > 1e-2


def load(model: Any, hf: Any) -> None:
    names = hf_to_canonical(MODEL.num_layers)
    arrays = {names[name]: p.detach().numpy() for name, p in hf.named_parameters()}
    model.load({name: arrays[name] for name in model.layouts})


def test_sft_loss_and_gradient(hf: Any) -> None:
    """Transformers' own ``labels`` loss of each row, weighted by its tokens; two micro-batches here."""
    part = sequences(CHOSEN_LENGTHS, seed=1)
    hf.zero_grad()
    total = 0.0
    count = int(CHOSEN_LENGTHS.sum())
    for tokens, prompt in real_tokens(part):
        labels = tokens.clone()
        labels[:, :prompt] = -100
        total = total + hf(input_ids=tokens, labels=labels).loss * (tokens.shape[1] - prompt)
    (total / count).backward()

    policy = PPOModelTrain(
        MODEL, GROUPS, prompt_length=PROMPT, temperature=1.0, valid_vocab_size=64, with_entropy=False
    )
    load(policy, hf)
    mask = (np.arange(RESPONSE) < CHOSEN_LENGTHS[:, None]).astype(np.float32)
    inverse = np.array([1 / count], np.float32)
    inputs = sequence_inputs(*part, PROMPT)
    micro = [
        MicroBatch(tuple(array[rows] for array in inputs), (mask[rows], inverse))
        for rows in (slice(0, 2), slice(2, 4))
    ]
    sums, gradients = gradients_of(policy, SFTLoss(), micro)
    assert sums.shape == (1,)
    assert float(sums[0]) == pytest.approx(total.item(), rel=1e-5)
    assert_gradients_equal(gradients, hf)


def test_pair_loss_and_gradient(hf: Any) -> None:
    """``-log sigmoid`` of the score at the last real token, as Qwen2ForSequenceClassification reads it."""
    chosen, rejected = sequences(CHOSEN_LENGTHS, seed=1), sequences(REJECTED_LENGTHS, seed=2)
    hf.zero_grad()

    def scores(part: Sequences) -> Any:
        return torch.stack(
            [
                hf.score(hf.model(input_ids=tokens).last_hidden_state[0, -1])[0]
                for tokens, _ in real_tokens(part)
            ]
        )

    good, bad = scores(chosen), scores(rejected)
    terms = -torch.nn.functional.logsigmoid(good - bad)
    ((terms + CENTER * (good + bad) ** 2).mean()).backward()

    reward = RewardModel(MODEL, GROUPS, prompt_length=PROMPT)
    load(reward, hf)
    inverse = np.array([1 / 4], np.float32)
    micro = []
    for rows in (slice(0, 2), slice(2, 4)):
        both = Sequences(*(np.concatenate([a[rows], b[rows]]) for a, b in zip(chosen, rejected, strict=True)))
        micro.append(MicroBatch((*sequence_inputs(*both, PROMPT), both.response_lengths), (inverse,)))
    (loss, correct, margin), gradients = gradients_of(reward, PairLoss(CENTER), micro)
    assert loss == pytest.approx(float(terms.sum()), rel=1e-5)
    assert margin == pytest.approx(float((good - bad).sum()), rel=1e-4)
    assert correct == int((good > bad).sum())
    assert 0 < correct < 4, "both signs should occur"
    assert_gradients_equal(gradients, hf)
