"""Controllers of the KL coefficient against their published formulas, over 100 rollouts.

Sources, each an ``AdaptiveKLController``: [TRL] huggingface/trl of 0.11 and before; [OAI]
openai/lm-human-preferences (Ziegler et al., "Fine-Tuning Language Models from Human Preferences", 2019).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from mindrlhf.algorithms.kl import AdaptiveKLController, FixedKLController


class KLSeries(NamedTuple):
    """100 rollouts: KL of each, and the way the coefficient must go."""

    kls: list[float]
    sign: int


SERIES = {
    "always far above": KLSeries([60.0] * 100, 1),
    "always far below": KLSeries([0.01] * 100, -1),
    "negative": KLSeries([-3.0] * 100, -1),
    "a little above": KLSeries([6.0 + 0.01 * step for step in range(1, 101)], 1),
    "a little below": KLSeries([6.0 - 0.01 * step for step in range(1, 101)], -1),
    "on target": KLSeries([6.0] * 100, 0),
    "noise": KLSeries(np.random.default_rng(0).normal(6, 3, 100).tolist(), 0),
}


@pytest.mark.parametrize("name", SERIES)
@pytest.mark.parametrize("n", [64, 512])
def test_adaptive_controller_over_100_rollouts(name: str, n: int) -> None:
    """[TRL], [OAI]: ``value *= 1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon``, once a rollout."""
    kls, sign = SERIES[name]
    controller, expected = AdaptiveKLController(0.15, target=6.0, horizon=10_000), 0.15
    for kl in kls:
        before = controller.value
        controller.update(kl, n)
        error = kl / 6.0 - 1.0
        if error > 0.2:
            error = 0.2
        if error < -0.2:
            error = -0.2
        expected = expected * (1.0 + error * n / 10_000)
        assert controller.value == pytest.approx(expected, rel=1e-12)  # float64 throughout
        if name != "noise":
            assert np.sign(controller.value - before) == sign
    if name == "always far above":
        assert controller.value == pytest.approx(0.15 * (1 + 0.2 * n / 10_000) ** 100, rel=1e-12)
    if name in ("always far below", "negative"):
        assert controller.value == pytest.approx(0.15 * (1 - 0.2 * n / 10_000) ** 100, rel=1e-12)


def test_adaptive_controller_stays_at_0_where_trls_would_turn_negative() -> None:
    """With n > 5 horizon a clipped error of -0.2 makes the published factor negative: a KL that is paid."""
    controller = AdaptiveKLController(0.15, target=6.0, horizon=10)
    controller.update(0.0, 60)
    assert controller.value == 0.0


@pytest.mark.parametrize("name", SERIES)
def test_fixed_controller_over_100_rollouts(name: str) -> None:
    controller = FixedKLController(0.05)
    for kl in SERIES[name].kls:
        controller.update(kl, 512)
        assert controller.value == 0.05
