"""Decode steps and probabilities by kernels beside MindSpore's operations."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindrlhf.configs.keys import ModelConfig
from mindrlhf.models.generator import GenerationConfig, GenerationOutput, PPOModelInfer
from mindrlhf.models.inverse_cdf import PlainInverseCDF
from mindrlhf.models.qwen2.layouts import parameter_layouts
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Mesh
from tests.unit.kernels.rounding import needs_kernels

pytestmark = needs_kernels

# hidden, heads, kv heads, intermediate, vocabulary, batch, biases, tied: sizes that fill no vector or tile,
# more queries a head than a tile has rows, several tiles of rows.
CASES = {
    "odd sizes": (18, 3, 1, 7, 29, 1, True, False),
    "seven queries": (56, 7, 1, 40, 50, 3, True, True),
    "three tiles of rows": (64, 4, 2, 100, 300, 9, False, False),
    "whole vectors": (96, 6, 3, 64, 64, 4, True, True),
}
PROMPT, RESPONSE = 5, 9


@pytest.fixture(scope="module", autouse=True)
def _graph_mode() -> None:
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")


def generated(config: ModelConfig, batch: int, stop: tuple[int, ...]) -> GenerationOutput:
    generation = GenerationConfig(
        max_prompt_length=PROMPT,
        max_response_length=RESPONSE,
        stop_token_ids=stop,
        valid_vocab_size=config.vocab_size - 2,
    )
    mesh = Mesh(1, 1)
    model = PPOModelInfer(config, Groups(mesh, 0), generation, batch_size=batch, decode_steps_per_call=3)
    rng = np.random.default_rng(0)
    model.load(
        {
            name: (rng.standard_normal(layout.shape) * (1.0 if "embedding" in name else 0.3)).astype(
                np.float32
            )
            for name, layout in parameter_layouts(config, mesh).items()
        }
    )
    prompts = rng.integers(0, config.vocab_size, (batch, PROMPT))
    lengths = rng.integers(1, PROMPT + 1, batch)
    return model.generate(prompts, lengths, rng.random((batch, RESPONSE)).astype(np.float32))


@pytest.mark.parametrize("name", CASES)
def test_steps_generate_what_plain_operations_generate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, heads, kv_heads, intermediate, vocab, batch, bias, tied = CASES[name]
    config = ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=2,
        num_heads=heads,
        n_kv_heads=kv_heads,
        intermediate_size=intermediate,
        seq_length=32,
        qkv_has_bias=bias,
        tie_word_embeddings=tied,
    )
    stop = tuple(range(0, vocab, 6))  # so that some rows end early and the others go on without them
    found = generated(config, batch, stop)
    monkeypatch.setattr("mindrlhf.kernels.decoding.kernel_library", lambda: None)
    wanted = generated(config, batch, stop)
    np.testing.assert_array_equal(found.response_ids, wanted.response_ids)
    np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=2e-5)
    if batch > 2:
        assert len(set(wanted.lengths.tolist())) > 1, "rows should end at different steps"


class Masses(nn.Cell):
    def __init__(self, probabilities: nn.Cell) -> None:
        super().__init__()
        self.inverse_cdf = probabilities

    def construct(self, logits: Tensor, places: Tensor) -> tuple[Tensor, ...]:
        probabilities, best, largest, log_sum = self.inverse_cdf(logits)
        totals = self.inverse_cdf.totals(probabilities)
        ids, chosen = self.inverse_cdf.look_up(probabilities, logits, places * totals)
        return probabilities, best, largest, log_sum, totals, ids, chosen


def of_both(logits: np.ndarray, places: np.ndarray) -> list[list[np.ndarray]]:
    from mindrlhf.kernels.decoding import kernel_inverse_cdf

    inputs = Tensor(logits.astype(np.float32)), Tensor(places.astype(np.float32))
    cells: list[Any] = [kernel_inverse_cdf(), PlainInverseCDF(*logits.shape)]
    return [[output.asnumpy() for output in Masses(cell)(*inputs)] for cell in cells]


@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (5, 30), (7, 1000)])
def test_probabilities_are_those_of_plain_operations(rows: int, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    logits = 3.0 * rng.standard_normal((rows, vocab))
    logits[:, vocab // 3 : vocab // 2] = -1e9  # padding of the vocabulary: no mass at all
    logits[0] = 1.0  # equals: the first counts as the largest
    kernel, plain = of_both(logits, rng.random(rows))
    for found, wanted in zip(kernel, plain, strict=True):
        assert found.shape == wanted.shape
        assert found.dtype == wanted.dtype
        np.testing.assert_allclose(found, wanted, rtol=3e-6, atol=1e-7)
    assert (kernel[0][1:, vocab // 3 : vocab // 2] == 0.0).all()


def test_a_place_behind_all_mass_gives_the_last_id_that_has_some() -> None:
    logits = np.full((2, 600), -1e9)
    logits[0, 3], logits[1, 300] = 0.0, 0.0
    kernel, plain = of_both(logits, np.array([1.5, 1.0]))
    for outputs in (kernel, plain):
        np.testing.assert_array_equal(outputs[5], [3, 300])


def test_nan_stays_nan() -> None:
    logits = np.zeros((1, 40))
    logits[0, 7] = np.nan
    probabilities, best, _, log_sum, *_ = of_both(logits, np.array([0.5]))[0]
    assert np.isnan(probabilities).all()
    assert np.isnan(log_sum).all()
    assert 0 <= best[0] < 40
