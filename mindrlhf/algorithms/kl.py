"""KL divergence from the reference policy: per-token estimators and controllers of its coefficient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

MAX_ADAPTIVE_ERROR = 0.2


def kl_k1(log_ratio: np.ndarray) -> np.ndarray:
    """``k1 = d``: unbiased, may be negative for a single token."""
    return log_ratio


def kl_k2(log_ratio: np.ndarray) -> np.ndarray:
    """``k2 = d^2 / 2``: never negative, low variance, biased."""
    return 0.5 * np.square(log_ratio)


def kl_k3(log_ratio: np.ndarray) -> np.ndarray:
    """``k3 = exp(-d) - 1 + d``: never negative, unbiased, low variance."""
    return np.expm1(-log_ratio) + log_ratio


KL_ESTIMATORS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def token_kl(
    logprobs: np.ndarray, ref_logprobs: np.ndarray, mask: np.ndarray, estimator: str = "k1"
) -> np.ndarray:
    """Estimate of KL(policy || reference) at every sampled token, with ``d = logprobs - ref_logprobs``.

    Reward, log and controller must all use this one tensor (TRL issue 1161).
    Source: J. Schulman, "Approximating KL Divergence", 2020.

    Args:
        logprobs: (B, R) log-probs under the policy that sampled the tokens.
        ref_logprobs: (B, R) log-probs of the same tokens under the reference.
        mask: (B, R) policy mask; values outside it, infinities included, are not used.
        estimator: "k1", "k2" or "k3".

    Returns:
        (B, R) float32, 0 outside the mask.

    Raises:
        ValueError: ``estimator`` is unknown.
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"unknown KL estimator {estimator!r}; choose one of {', '.join(KL_ESTIMATORS)}")
    keep = np.asarray(mask, dtype=bool)
    policy = np.where(keep, logprobs, 0.0).astype(np.float64)
    reference = np.where(keep, ref_logprobs, 0.0).astype(np.float64)
    return KL_ESTIMATORS[estimator](policy - reference).astype(np.float32)


def sequence_kl(kl: np.ndarray) -> float:
    """Sum over each response, mean over the batch: the KL that is logged and that controllers take.

    Args:
        kl: (B, R) from :func:`token_kl` (0 outside the mask), the whole global batch.
    """
    return float(np.asarray(kl, dtype=np.float64).sum(axis=1).mean())


class KLController(Protocol):
    """Gives the KL coefficient and adapts it once per rollout."""

    @property
    def value(self) -> float:
        """The coefficient to use now."""
        ...

    def update(self, kl: float, n: int) -> None:
        """Takes the batch's :func:`sequence_kl` and its number of episodes."""
        ...

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint must keep."""
        ...

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restores what :meth:`state_dict` returned."""
        ...


def _checked_coefficient(value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"kl_coef must be a finite number >= 0, got {value}")
    return float(value)


class FixedKLController:
    """A constant coefficient.

    Args:
        kl_coef: the coefficient, >= 0.
    """

    def __init__(self, kl_coef: float) -> None:
        self._value = _checked_coefficient(kl_coef)

    @property
    def value(self) -> float:
        """The coefficient."""
        return self._value

    def update(self, kl: float, n: int) -> None:
        """Does nothing."""

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint must keep."""
        return {"kl_coef": self._value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Accepts a saved state and keeps the configured coefficient: a fixed one is not training state."""


class AdaptiveKLController:
    """Steers the KL to a target: ``e = clip(KL / target - 1, -0.2, 0.2); kl_coef *= 1 + e * n / horizon``.

    Source: Ziegler et al., arXiv 1909.08593, section 2.2.

    Args:
        kl_coef: the first coefficient, >= 0.
        target: desired KL per sequence, > 0.
        horizon: episodes over which an error takes full effect, > 0.
    """

    def __init__(self, kl_coef: float, target: float, horizon: float) -> None:
        if not target > 0 or not horizon > 0:
            raise ValueError(f"adaptive KL needs target > 0 and horizon > 0, got {target} and {horizon}")
        self._value = _checked_coefficient(kl_coef)
        self.target = target
        self.horizon = horizon

    @property
    def value(self) -> float:
        """The coefficient to use now."""
        return self._value

    def update(self, kl: float, n: int) -> None:
        """Adapts the coefficient once per rollout.

        Args:
            kl: per-sequence sum, mean over the global batch.
            n: episodes in the global batch.

        Raises:
            ValueError: ``kl`` is not finite; it would corrupt the coefficient permanently.
        """
        if not math.isfinite(kl):
            raise ValueError(f"the KL given to the adaptive controller must be finite, got {kl}")
        error = min(max(kl / self.target - 1.0, -MAX_ADAPTIVE_ERROR), MAX_ADAPTIVE_ERROR)
        self._value = max(self._value * (1.0 + error * n / self.horizon), 0.0)

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint must keep."""
        return {"kl_coef": self._value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self._value = _checked_coefficient(state["kl_coef"])
