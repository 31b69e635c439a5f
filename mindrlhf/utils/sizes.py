"""Division of sizes without remainder."""

from __future__ import annotations


def exact_div(a: int, b: int, name: str) -> int:
    """``a / b`` as a whole number.

    Raises:
        ValueError: ``b`` does not divide ``a``; the message names both, and ``name`` says what was divided.
    """
    if b == 0 or a % b:
        raise ValueError(f"{name}: {a} is not divisible by {b}")
    return a // b
