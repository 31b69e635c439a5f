"""What is left of updates that were skipped, and when they are too many."""

from __future__ import annotations

import numpy as np

from mindrlhf.trainer.skipped_updates import SkippedUpdate, SkippedUpdates

IDS = np.arange(100, 120)


def test_what_was_skipped_is_reported_with_its_samples() -> None:
    skips = SkippedUpdates(limit=3)
    skips.add(SkippedUpdate("policy", "loss not finite", np.array([4, 2]), 5, float("nan")))
    skips.end_update(skipped=True)
    skips.add(SkippedUpdate("both", "reward", np.array([7])))
    skips.end_update(skipped=True)
    entries, failure = skips.report(IDS)
    assert failure == ""
    assert entries == [
        {
            "minibatch": 5,
            "model": "policy",
            "cause": "loss not finite",
            "grad_norm": "nan",
            "sample_ids": [104, 102],
            "whole_minibatch": False,
        },
        {
            "minibatch": 0,
            "model": "both",
            "cause": "reward",
            "grad_norm": None,
            "sample_ids": [107],
            "whole_minibatch": False,
        },
    ]
    assert skips.report(IDS) == ([], ""), "nothing new"


def test_too_many_in_a_row_are_a_failure() -> None:
    skips = SkippedUpdates(limit=2)

    def skip(row: int) -> str:
        skips.add(SkippedUpdate("both", "reward of 1 sample(s)", np.array([row])))
        skips.end_update(skipped=True)
        return skips.report(IDS)[1]

    assert skip(1) == ""
    skips.end_update(skipped=False)
    assert skip(3) == ""
    failure = skip(5)
    for part in ("2 updates in a row", "reward of 1 sample(s)", "samples 105", "skipped_updates.jsonl"):
        assert part in failure


def test_of_many_samples_the_first_are_named() -> None:
    skips = SkippedUpdates(limit=1)
    skips.add(SkippedUpdate("critic", "gradient", np.arange(20), 1, float("inf"), is_whole_minibatch=True))
    skips.end_update(skipped=True)
    assert "samples 100, 101, 102, 103, 104, and 15 more" in skips.report(IDS)[1]
