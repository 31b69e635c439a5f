"""Four workers: generation with a split model gives what the whole model gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.msrun

CASES = ("greedy", "sampled", "truncated")
RUNS = [*(("dp1 mp4", case) for case in CASES), ("dp2 mp2", "sampled"), ("dp2 mp2", "greedy")]


@pytest.fixture(scope="module")
def reports(split_reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the 4 workers generated, one dictionary a rank."""
    return split_reports


@pytest.mark.parametrize(("mesh", "case"), RUNS)
def test_split_model_generates_what_the_whole_model_generates(
    reports: list[dict[str, Any]], mesh: str, case: str
) -> None:
    dp, mp = int(mesh[2]), int(mesh[-1])
    whole = reports[0][f"whole {case}"]
    rows = len(whole["tokens"]) // dp
    for rank in range(dp * mp):
        part = reports[rank][f"{mesh} {case}"]
        mine = slice(rank // mp * rows, (rank // mp + 1) * rows)
        assert part["tokens"] == whole["tokens"][mine], f"rank {rank}"
        assert part["lengths"] == whole["lengths"][mine], f"rank {rank}"
        np.testing.assert_allclose(part["logprobs"], whole["logprobs"][mine], atol=2e-5, rtol=0)
        assert part["shards_equal"], f"rank {rank}"


def test_the_cases_are_not_trivial(reports: list[dict[str, Any]]) -> None:
    whole = {case: reports[0][f"whole {case}"] for case in CASES}
    tokens = {case: np.array(result["tokens"]) for case, result in whole.items()}
    assert (tokens["greedy"] != tokens["truncated"]).any()
    assert all(len(np.unique(ids)) > 5 for ids in tokens.values())
    assert all(ids.max() < 47 for ids in tokens.values())
    assert len(set(whole["sampled"]["lengths"])) > 1


def test_all_workers_speak_as_one(reports: list[dict[str, Any]]) -> None:
    """Two messages of a chat, asked by rank 0 and answered by all."""
    assert len(reports[0]["chat"]) == 12
    assert reports[0]["chat"] == reports[0]["whole chat"]
    assert len(set(reports[0]["chat"])) > 5
    assert [reports[rank]["chat"] for rank in (1, 2, 3)] == [[], [], []]
