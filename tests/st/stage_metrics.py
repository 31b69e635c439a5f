"""Metrics of SFT and reward-model runs, as tests read and compare them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def assert_metrics_close(
    actual: list[dict[str, float]], expected: list[dict[str, float]], rel: float
) -> None:
    """Every line has the same metrics, but for those of the clock."""
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys()
        for key in other:
            if key.startswith(("time/", "tokens_per_second", "seconds")) or key == "held_out_digest":
                continue
            found, wanted = one[key], other[key]
            assert found == pytest.approx(wanted, rel=rel, abs=rel / 10), (other["step"], key, found, wanted)
