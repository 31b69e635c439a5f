"""Sampling on one rank against a sort-based numpy reference in float64."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindrlhf.models.inverse_cdf import smallest_divisor_from
from mindrlhf.models.sampling import VocabParallelSampler
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Mesh


@pytest.fixture(scope="module", autouse=True)
def _graph_mode(either_kernels: None) -> None:
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")


def sample(logits: np.ndarray, uniforms: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    options.setdefault("valid_vocab_size", logits.shape[1])
    sampler = VocabParallelSampler(logits.shape[1], Groups(Mesh(1, 1), 0), batch_size=len(logits), **options)
    tokens, logprobs = sampler(Tensor(logits.astype(np.float32)), Tensor(uniforms.astype(np.float32)))
    return tokens.asnumpy(), logprobs.asnumpy()


def distribution(logits: np.ndarray, temperature: float, valid: int) -> np.ndarray:
    scaled = logits.astype(np.float64) / temperature
    scaled[:, valid:] = -np.inf
    mass = np.exp(scaled - scaled.max(-1, keepdims=True))
    return mass / mass.sum(-1, keepdims=True)


def truncate(probs: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Hugging Face's order: top-k, then top-p on what is left; by sorting."""
    result = []
    for row in probs:
        descending = np.sort(row)[::-1]
        kept = np.where(row >= descending[top_k - 1], row, 0.0) if top_k else row
        if top_p < 1.0:
            descending = np.sort(kept)[::-1]
            cumulative = descending.cumsum() / kept.sum()
            assert np.abs(cumulative - top_p).min() > 1e-6, "the case lies on a border"
            kept = np.where(kept >= descending[(cumulative < top_p).sum()], kept, 0.0)
        result.append(kept / kept.sum())
    return np.array(result)


def check_tokens(tokens: np.ndarray, uniforms: np.ndarray, kept: np.ndarray) -> None:
    """Every token is the one in whose interval of the cumulative distribution the uniform falls."""
    ends = kept.cumsum(-1)
    rows = np.arange(len(tokens))
    assert (kept[rows, tokens] > 0).all()
    expected = np.array(
        [np.searchsorted(end, u, side="right") for end, u in zip(ends, uniforms, strict=True)]
    )
    border = np.abs(ends - uniforms[:, None]).min(-1) < 2e-6
    assert border.mean() < 0.02
    np.testing.assert_array_equal(tokens[~border], expected[~border])


@pytest.mark.parametrize(
    ("vocab", "valid", "temperature", "top_k", "top_p"),
    [
        (96, 96, 1.0, 0, 1.0),
        (97, 90, 0.7, 0, 1.0),  # a prime size: one block
        (4096, 4000, 1.3, 0, 1.0),
        (96, 90, 1.0, 5, 1.0),
        (96, 90, 1.5, 95, 1.0),  # more than there are valid ids
        (96, 90, 1.0, 0, 0.83),
        (4096, 4001, 0.8, 0, 0.7),
        (96, 90, 0.9, 7, 0.6),
    ],
)
def test_tokens_and_logprobs_equal_the_reference(
    vocab: int, valid: int, temperature: float, top_k: int, top_p: float
) -> None:
    rng = np.random.default_rng(vocab + top_k)
    logits = (3.0 * rng.standard_normal((64, vocab))).astype(np.float32)
    uniforms = rng.random(64).astype(np.float32)
    tokens, logprobs = sample(
        logits, uniforms, valid_vocab_size=valid, temperature=temperature, top_k=top_k, top_p=top_p
    )
    probs = distribution(logits, temperature, valid)
    check_tokens(tokens, uniforms, truncate(probs, min(top_k, valid), top_p))
    # The log-prob is that of the whole distribution, whatever was cut off for sampling.
    np.testing.assert_allclose(logprobs, np.log(probs[np.arange(64), tokens]), atol=2e-5, rtol=0)


def test_frequencies_follow_the_distribution() -> None:
    rng = np.random.default_rng(1)
    logits = np.tile(rng.standard_normal(40) * 2, (40_000, 1))
    uniforms = (np.arange(40_000) + 0.5) / 40_000
    tokens, _ = sample(logits, rng.permutation(uniforms))
    frequencies = np.bincount(tokens, minlength=40) / 40_000
    # Evenly spread uniforms: every frequency is right to one count at either end of its interval.
    np.testing.assert_allclose(frequencies, distribution(logits[:1], 1.0, 40)[0], atol=2.1 / 40_000, rtol=0)


def test_hand_worked_row() -> None:
    logits = np.log(np.array([[0.1, 0.2, 0.3, 0.4]] * 6))
    tokens, logprobs = sample(logits, np.array([0.0, 0.05, 0.2, 0.45, 0.7, 0.99]))
    assert tokens.tolist() == [0, 0, 1, 2, 3, 3]
    np.testing.assert_allclose(logprobs, np.log([0.1, 0.1, 0.2, 0.3, 0.4, 0.4]), atol=1e-6, rtol=0)
    tokens, logprobs = sample(logits, np.array([0.0, 0.3, 0.42, 0.44, 0.7, 0.99]), top_k=2)
    assert tokens.tolist() == [2, 2, 2, 3, 3, 3]  # 0.3 / 0.7 = 0.4286
    np.testing.assert_allclose(logprobs, np.log([0.3, 0.3, 0.3, 0.4, 0.4, 0.4]), atol=1e-6, rtol=0)
    tokens, _ = sample(logits, np.array([0.0, 0.2, 0.23, 0.5, 0.6, 0.99]), top_p=0.85)
    assert tokens.tolist() == [1, 1, 2, 2, 3, 3]  # ends 0.222, 0.556, 1


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.999}, {"temperature": 0.05}], ids=str)
def test_ids_without_probability_are_never_sampled(options: dict[str, Any]) -> None:
    vocab, valid = 60, 50
    rows = [(3, 20, 41), (0, 49), (49,), (0,), (7, 8), (30, 31, 32)]
    extremes = np.array([0.0, 1e-38, 0.5, 1.0 - 2.0**-23, 1.0 - 2.0**-24], np.float32)
    logits = np.full((len(rows), vocab), -400.0)
    logits[:, valid:] = 300.0  # padding of the vocabulary, most likely by far if it counted
    for row, ids in enumerate(rows):
        logits[row, list(ids)] = row
    logits = np.repeat(logits, len(extremes), axis=0)
    uniforms = np.tile(extremes, len(rows))
    tokens, logprobs = sample(logits, uniforms, valid_vocab_size=valid, **options)
    assert (logits[np.arange(len(logits)), tokens] >= 0).all()
    assert (tokens < valid).all()
    assert np.isfinite(logprobs).all()
    assert (logprobs <= 1e-6).all()


def test_greedy_takes_the_smallest_id_among_equals_and_no_padding() -> None:
    logits = np.zeros((3, 12))
    logits[:, 10:] = 9.0
    logits[1, [4, 7]] = 2.0
    logits[2, 9] = 1.0
    tokens, logprobs = sample(
        logits, np.full(3, 0.9), do_sample=False, valid_vocab_size=10, top_k=1, top_p=0.1
    )
    assert tokens.tolist() == [0, 4, 9]
    expected = np.log(distribution(logits, 1.0, 10)[np.arange(3), tokens])
    # MindSpore's logarithm is up to 1.2e-6 off.
    np.testing.assert_allclose(logprobs, expected, atol=2e-6, rtol=0)


def test_ties_at_the_border_are_kept() -> None:
    logits = np.tile([0.0, 2.0, 1.0, 1.0, 1.0, -1.0], (60, 1))
    uniforms = (np.arange(60) + 0.5) / 60
    tokens, _ = sample(logits, uniforms, top_k=2)
    assert set(tokens.tolist()) == {1, 2, 3, 4}
    tokens, _ = sample(logits, uniforms, top_p=0.5)  # the largest alone has 0.43
    assert set(tokens.tolist()) == {1, 2, 3, 4}
    tokens, _ = sample(logits, uniforms, top_p=0.4)
    assert set(tokens.tolist()) == {1}


def test_top_k_of_one_and_tiny_top_p_are_greedy() -> None:
    rng = np.random.default_rng(2)
    logits = rng.standard_normal((32, 50))
    uniforms = rng.random(32)
    assert sample(logits, uniforms, top_k=1)[0].tolist() == logits.argmax(-1).tolist()
    assert sample(logits, uniforms, top_p=1e-6)[0].tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("number", "least", "expected"), [(12, 3, 3), (12, 5, 6), (97, 9, 97), (8192, 90, 128)]
)
def test_block_sizes(number: int, least: int, expected: int) -> None:
    assert smallest_divisor_from(number, least) == expected
