"""Distributions that trackers show, counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mindrlhf.trainer.loss_cells import POLICY_STATISTICS, RATIO_EDGES, RATIOS_ABOVE
from mindrlhf.trainer.metrics import ratio_histogram
from mindrlhf.trainer.trackers.tracker import Histogram
from mindrlhf.trainer.update import UpdateResult


def update() -> UpdateResult:
    """Two minibatches of 3 and 1 tokens; two ratios are above the edges from 0.7 on, one above the last."""
    above = np.zeros((2, len(RATIO_EDGES)))
    above[0] = [3, 2, 2, *[2] * (len(RATIO_EDGES) - 4), 1]
    above[1, :7] = 1
    policy = {"ratio": np.array([3.5, 1.0]), "ratio_squared": np.array([5.25, 1.0])}
    return UpdateResult(
        tokens=np.array([3.0, 1.0]),
        policy=policy | dict(zip(RATIOS_ABOVE, above.T, strict=True)),
        value={},
        grad_norm=np.ones(2),
        critic_grad_norm=np.zeros(0),
        learning_rate=1e-3,
    )


def test_ratios_are_counted_in_their_bins() -> None:
    found = ratio_histogram(update())
    assert found.edges.tolist() == [0, *RATIO_EDGES, 4]
    counts = dict(zip(found.edges[1:].tolist(), found.counts.tolist(), strict=True))
    # Of 3 tokens one is in 0.5 .. 0.7, one in 1.4 .. 2, one above 2; the other one in 0.99 .. 1.01.
    assert {edge: count for edge, count in counts.items() if count} == {0.7: 1, 1.01: 1, 2: 1, 4: 1}
    assert (found.sum, found.sum_squares) == (4.5, 6.25)
    nothing = update()._replace(tokens=np.zeros(0), policy={name: np.zeros(0) for name in POLICY_STATISTICS})
    assert ratio_histogram(nothing).counts.sum() == 0, "an update that was skipped"


def test_histogram_of_values() -> None:
    found = Histogram.of(np.array([1.0, 4.0, np.inf]))
    assert found.counts.sum() == 2, "what is not finite is left out"
    assert (found.sum, found.sum_squares) == (pytest.approx(5), pytest.approx(17))
    assert Histogram.of(np.full(3, np.nan)).counts.sum() == 0
