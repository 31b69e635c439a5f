"""Log-probs and entropy of logits, and their gradient, against the published formulas.

The references are written here from the formulas in Python's float64; the gradient is derived by hand, and
held against central differences of the same loops. What is tested runs in a compiled graph. Tolerances:
``formula_batches.py``.

Source: [TRL] huggingface/trl, ``trl/core.py`` (``entropy_from_logits``, ``logprobs_from_logits``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor

from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Mesh
from mindrlhf.parallel.tensor_parallel import VocabParallelLogProbs
from tests.parity.formula_batches import Texts, central_difference, exp_error, texts


@pytest.fixture(scope="module", autouse=True)
def _graph_mode(either_kernels: None) -> None:
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    compiled_logprobs.cache_clear()


class LogProbs(ms.nn.Cell):
    """Log-probs and entropy of given logits, and the gradient of ``sum(w logprobs) + sum(u entropy)``."""

    def __init__(self, vocab: int, valid: int) -> None:
        super().__init__()
        self.log_probs = VocabParallelLogProbs(vocab, Groups(Mesh(), 0), valid_vocab_size=valid)

    def construct(self, logits: Tensor, tokens: Tensor, w: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        return *self.log_probs(logits, tokens), self.log_probs.gradient(logits, tokens, w, u)


VOCABULARIES = {(1, 1): (5, 5), (1, 6): (8, 6), (3, 4): (16, 16), (4, 7): (12, 11)}
"""(B, R) -> rows of the vocabulary, and how many of them the tokenizer knows."""


@functools.cache
def compiled_logprobs(shape: tuple[int, int]) -> Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]]:
    graph = LogProbs(*VOCABULARIES[shape])

    def run(logits: np.ndarray, *arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = [
            Tensor(logits.reshape(-1, logits.shape[-1])),
            *(Tensor(array.reshape(-1)) for array in arrays),
        ]
        logprobs, entropy, gradient = (result.asnumpy() for result in graph(*rows))
        return logprobs.reshape(shape), entropy.reshape(shape), gradient.reshape(logits.shape)

    return run


def distribution(logits: Sequence[float]) -> list[float]:
    """Log-probs: ``z - logsumexp(z)``."""
    largest = max(logits)
    total = largest + math.log(math.fsum(math.exp(z - largest) for z in logits))
    return [z - total for z in logits]


def entropy_of(logits: Sequence[float]) -> float:
    """[TRL] ``entropy_from_logits``: ``logsumexp(z) - sum(softmax(z) z)``."""
    logprobs = distribution(logits)
    total = logits[0] - logprobs[0]
    return total - math.fsum(math.exp(logp) * z for logp, z in zip(logprobs, logits, strict=True))


def logits_slope(logits: Sequence[float], token: int, w: float, u: float) -> list[float]:
    """d (w logp_token + u H) / dz_j = w ([j = token] - p_j) - u p_j (log p_j + H)."""
    logprobs, entropy = distribution(logits), entropy_of(logits)
    return [
        w * (float(j == token) - math.exp(logp)) - u * math.exp(logp) * (logp + entropy)
        for j, logp in enumerate(logprobs)
    ]


@settings(deadline=None)
@given(batch=texts(), scale=st.sampled_from([0.0, 1.0, 5.0, 30.0]), offset=st.sampled_from([0.0, 300.0]))
def test_logprobs_entropy_and_their_gradient_equal_the_formula(
    batch: Texts, scale: float, offset: float
) -> None:
    """Uniform, ordinary and nearly certain distributions; logits far from 0; rows beyond the vocabulary."""
    vocab, valid = VOCABULARIES[batch.shape]
    rng = np.random.default_rng(batch.seed)
    logits = (offset + rng.normal(0, scale, (*batch.shape, vocab))).astype(np.float32)
    logits[..., valid:] += 50.0
    tokens = rng.integers(0, valid, batch.shape).astype(np.int32)
    w, u = (rng.normal(0, 1, batch.shape).astype(np.float32) for _ in range(2))
    logprobs, entropy, gradient = compiled_logprobs(batch.shape)(logits, tokens, w, u)
    assert (gradient[..., valid:] == 0).all()
    for place in np.ndindex(batch.shape):
        z = [float(x) for x in logits[place][:valid]]
        token, weights = int(tokens[place]), (float(w[place]), float(u[place]))
        # Logits less their maximum are the numbers that are subtracted from and summed over.
        tolerance = exp_error(0.0) * (1.0 + max(z) - min(z))
        assert logprobs[place] == pytest.approx(distribution(z)[token], rel=0, abs=tolerance)
        assert entropy[place] == pytest.approx(entropy_of(z), rel=0, abs=tolerance)
        slope = logits_slope(z, token, *weights)
        tolerance *= abs(weights[0]) + abs(weights[1])
        np.testing.assert_allclose(gradient[place][:valid], slope, rtol=0, atol=tolerance)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_gradient_of_the_reference_is_the_slope_of_the_loops(seed: int) -> None:
    """Which makes it the slope of what was compared with the loops above: nothing is taken from ours."""
    rng = np.random.default_rng(seed)
    logits, chosen = rng.normal(0, 2, 6).tolist(), int(rng.integers(6))
    for j, wanted in enumerate(logits_slope(logits, chosen, 0.7, -0.4)):

        def weighted(x: float, j: int = j) -> float:
            moved = [*logits[:j], x, *logits[j + 1 :]]
            return 0.7 * distribution(moved)[chosen] - 0.4 * entropy_of(moved)

        assert central_difference(weighted, logits[j]) == pytest.approx(wanted, rel=1e-7, abs=1e-7)
