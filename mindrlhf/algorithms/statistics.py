"""Statistics that are only logged."""

from __future__ import annotations

import numpy as np


def masked_var(x: np.ndarray, mask: np.ndarray) -> float:
    """Population variance of the unmasked entries, 0 when there are none.

    Args:
        x: any shape, for instance (B, R).
        mask: same shape, True where an entry counts.
    """
    entries = np.asarray(x)[np.asarray(mask, dtype=bool)]
    return float(entries.var(dtype=np.float64)) if entries.size else 0.0


def explained_variance(values: np.ndarray, returns: np.ndarray, mask: np.ndarray) -> float:
    """``1 - Var(returns - values) / Var(returns)``: 1 is perfect, 0 no better than a constant.

    Args:
        values: (B, R) predicted values.
        returns: (B, R) returns.
        mask: (B, R) value mask.

    Returns:
        0 when the returns do not vary: there is nothing to explain, and a NaN would not be JSON.
    """
    variance = masked_var(returns, mask)
    if variance == 0.0:
        return 0.0
    keep = np.asarray(mask, dtype=bool)
    errors = np.asarray(returns)[keep].astype(np.float64) - np.asarray(values)[keep].astype(np.float64)
    return 1.0 - float(errors.var()) / variance
