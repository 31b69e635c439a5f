"""advantages.py and metrics.py against hand-worked values; tests/parity/test_formulas.py has the formulas."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mindrlhf.algorithms.advantages import gae, reinforce, whiten
from mindrlhf.algorithms.masks import policy_mask
from mindrlhf.algorithms.statistics import explained_variance, masked_var

COLUMNS = 5
MATRIX = arrays(np.float32, (3, COLUMNS), elements=st.floats(-8, 8, width=32))
LENGTHS = st.lists(st.integers(1, COLUMNS), min_size=3, max_size=3).map(np.array)


def test_gae_by_hand() -> None:
    """gamma 0.9, lam 0.5. Row 0: delta = 1 + .9*2 - 1 = 1.8, then 2 - 2 = 0 at the end of a 2-token text."""
    rewards = np.array([[1.0, 2.0, 7.0], [0.0, 0.0, 1.0]], dtype=np.float32)
    values = np.array([[1.0, 2.0, 7.0], [0.5, 0.5, 0.5]], dtype=np.float32)
    advantages, returns = gae(rewards, values, policy_mask(np.array([2, 3]), 3), gamma=0.9, lam=0.5)
    # Row 1 backwards: 0.5; -0.05 + 0.45 * 0.5 = 0.175; -0.05 + 0.45 * 0.175 = 0.02875.
    np.testing.assert_allclose(advantages, [[1.8, 0.0, 0.0], [0.02875, 0.175, 0.5]], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(returns, [[2.8, 2.0, 0.0], [0.52875, 0.675, 1.0]], rtol=1e-6)
    assert advantages.dtype == returns.dtype == np.float32


def test_reinforce_by_hand() -> None:
    """gamma 0.5; what stands behind the end is not used."""
    rewards = np.array([[1.0, 2.0, np.nan], [0.0, -2.0, 4.0]], dtype=np.float32)
    advantages, returns = reinforce(rewards, None, policy_mask(np.array([2, 3]), 3), gamma=0.5, lam=0.95)
    # Row 0 backwards: 2; 1 + 0.5 * 2 = 2. Row 1: 4; -2 + 0.5 * 4 = 0; 0 + 0.5 * 0 = 0. Mean: 8 / 5.
    np.testing.assert_allclose(returns, [[2.0, 2.0, 0.0], [0.0, 0.0, 4.0]])
    np.testing.assert_allclose(advantages, [[0.4, 0.4, 0.0], [-1.6, -1.6, 2.4]], rtol=1e-6)
    assert advantages.dtype == returns.dtype == np.float32
    example, _ = reinforce(np.array([[1.0, 0.0, 2.0]]), None, np.ones((1, 3), bool), 1.0, 1.0)
    np.testing.assert_allclose(example, [[2 / 3, -1 / 3, -1 / 3]], rtol=1e-6)
    assert (reinforce(rewards, None, np.zeros((2, 3), bool), 1.0, 1.0)[0] == 0).all()


def test_gae_without_values_is_refused() -> None:
    with pytest.raises(ValueError, match="critic"):
        gae(np.zeros((1, 2)), None, np.ones((1, 2), bool), 1.0, 0.95)


@given(MATRIX, MATRIX, LENGTHS)
def test_lambda_one_gives_the_monte_carlo_return(
    rewards: np.ndarray, values: np.ndarray, lengths: np.ndarray
) -> None:
    mask = policy_mask(lengths, COLUMNS)
    _, returns = gae(rewards, values, mask, 1.0, 1.0)
    to_go = np.where(mask, rewards, 0.0).astype(float)[:, ::-1].cumsum(axis=1)[:, ::-1]
    np.testing.assert_allclose(returns, np.where(mask, to_go, 0.0), rtol=1e-5, atol=1e-5)


def test_gae_uses_nothing_outside_the_mask() -> None:
    mask = policy_mask(np.array([2]), 4)
    clean = np.array([[1.0, 2.0, 0.0, 0.0]], dtype=np.float32)
    dirty = np.array([[1.0, 2.0, np.nan, np.inf]], dtype=np.float32)
    for got, wanted in zip(
        gae(dirty, dirty, mask, 1.0, 0.95), gae(clean, clean, mask, 1.0, 0.95), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)


def test_whiten_by_hand() -> None:
    """Entries 1, 3: mean 2, population variance 1; the 100 is masked."""
    x = np.array([[1.0, 100.0], [3.0, np.nan]], dtype=np.float32)
    mask = np.array([[1, 0], [1, 0]], dtype=bool)
    np.testing.assert_allclose(whiten(x, mask), [[-1.0, 0.0], [1.0, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(whiten(x, mask, shift_mean=False), [[1.0, 0.0], [3.0, 0.0]], rtol=1e-6)
    assert whiten(x, mask).dtype == np.float32


def test_whiten_without_spread_or_entries() -> None:
    same = np.full((2, 2), 3.0, dtype=np.float32)
    np.testing.assert_array_equal(whiten(same, np.ones((2, 2), bool)), 0.0)
    np.testing.assert_array_equal(whiten(same, np.zeros((2, 2), bool)), 0.0)


def test_masked_variance() -> None:
    x = np.array([[1.0, np.nan], [4.0, 7.0]])
    mask = np.array([[1, 0], [1, 1]])
    assert masked_var(x, mask) == 6.0
    assert masked_var(x, np.zeros_like(mask)) == 0.0


def test_explained_variance_by_hand() -> None:
    returns = np.array([[1.0, 3.0, 99.0]])
    mask = np.array([[1, 1, 0]])
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(np.full((1, 3), 5.0), returns, mask) == 0.0
    # Errors 1 and 0: variance 0.25 of 1.
    assert explained_variance(np.array([[0.0, 3.0, np.nan]]), returns, mask) == 0.75
    assert explained_variance(np.array([[3.0, 1.0, 0.0]]), returns, mask) == -3.0
    assert explained_variance(returns, np.ones((1, 3)), mask) == 0.0
