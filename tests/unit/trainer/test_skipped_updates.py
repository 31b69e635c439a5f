"""Rollouts that cannot be learnt from, and what is left of updates that were skipped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mindrlhf.trainer.experience import Rollout, Scores
from mindrlhf.trainer.skipped_updates import SKIPPED_FILE, SkippedUpdate, SkippedUpdates, usable
from mindrlhf.utils.errors import MindRLHFError

LENGTHS = np.array([3, 1, 2, 3], np.int32)


def scored() -> tuple[Rollout, Scores]:
    rng = np.random.default_rng(0)

    def numbers(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    rollout = Rollout.of(
        tokens=np.zeros((4, 5), np.int32),
        prompt_lengths=np.full(4, 2, np.int32),
        response_lengths=LENGTHS,
        logprobs=numbers(4, 3),
        stopped=np.ones(4, np.int32),
        sample_ids=np.array([40, 41, 42, 43]),
    )
    return rollout, Scores(numbers(4, 3), numbers(4, 3), np.array([1, 2, 4, 8], np.float32))


def test_a_finite_rollout_is_used_as_it_is() -> None:
    rollout, scores = scored()
    scores.values[1, 2] = np.nan  # behind the end of the response: nobody looks there
    same, same_scores, fault = usable(rollout, scores)
    assert fault is None
    assert same is rollout
    assert same_scores is scores


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_reward_that_is_not_finite(value: float) -> None:
    rollout, scores = scored()
    scores.scores[2] = value
    _, cleaned, fault = usable(rollout, scores)
    assert fault is not None
    assert fault.rows.tolist() == [2]
    assert fault.cause == "not a finite number: reward of 1 sample(s)"
    np.testing.assert_allclose(cleaned.scores, [1, 2, 11 / 3, 8], rtol=1e-6)
    np.testing.assert_array_equal(cleaned.values[[0, 1, 3]], scores.values[[0, 1, 3]])


def test_everything_that_is_not_finite_is_named() -> None:
    rollout, scores = scored()
    rollout.logprobs[0, 1] = np.nan
    scores.values[1, 0] = np.inf
    scores.ref_logprobs[1, 0] = np.nan
    scores.scores[:] = np.nan
    cleaned_rollout, cleaned, fault = usable(rollout, scores)
    assert fault is not None
    assert fault.cause == (
        "not a finite number: reward of 4 sample(s), value of 1 sample(s), "
        "reference log-prob of 1 sample(s), log-prob of 1 sample(s)"
    )
    for array in (cleaned_rollout.logprobs, *cleaned):
        assert np.isfinite(array).all()


def no_save() -> Path:
    raise AssertionError("saved without need")


IDS = np.arange(100, 120)


def test_what_was_skipped_is_recorded_with_its_samples(tmp_path: Path) -> None:
    skips = SkippedUpdates(limit=3)
    skips.add(SkippedUpdate("policy", "loss not finite", np.array([4, 2]), 5, float("nan")))
    skips.end_update(skipped=True)
    skips.add(SkippedUpdate("both", "reward", np.array([7])))
    skips.end_update(skipped=True)
    skips.settle(6, IDS, tmp_path, no_save)
    skips.settle(7, IDS, tmp_path, no_save)  # nothing new
    lines = [json.loads(line) for line in (tmp_path / SKIPPED_FILE).read_text().splitlines()]
    assert lines == [
        {
            "iteration": 6,
            "minibatch": 5,
            "model": "policy",
            "cause": "loss not finite",
            "grad_norm": "nan",
            "sample_ids": [104, 102],
            "whole_minibatch": False,
        },
        {
            "iteration": 6,
            "minibatch": 0,
            "model": "both",
            "cause": "reward",
            "grad_norm": None,
            "sample_ids": [107],
            "whole_minibatch": False,
        },
    ]


def test_too_many_in_a_row_save_and_stop(tmp_path: Path) -> None:
    skips = SkippedUpdates(limit=2)
    saved: list[int] = []

    def save() -> Path:
        saved.append(1)
        return tmp_path / "iteration_000004"

    def skip(iteration: int) -> None:
        skips.add(SkippedUpdate("both", "reward of 1 sample(s)", np.array([iteration])))
        skips.end_update(skipped=True)
        skips.settle(iteration, IDS, tmp_path, save)

    skip(1)
    skips.end_update(skipped=False)
    skip(3)
    assert saved == []
    with pytest.raises(MindRLHFError) as stop:
        skip(5)
    assert saved == [1]
    for part in ("2 updates in a row", "iteration 5", "samples 105", SKIPPED_FILE, "iteration_000004"):
        assert part in str(stop.value)


def test_other_ranks_write_nothing_and_stop_too(tmp_path: Path) -> None:
    skips = SkippedUpdates(limit=1)
    skips.add(SkippedUpdate("critic", "gradient", np.arange(20), 1, float("inf"), is_whole_minibatch=True))
    skips.end_update(skipped=True)
    with pytest.raises(MindRLHFError, match=r"samples 100, .*, 107 and 12 more"):
        skips.settle(1, IDS, None, lambda: tmp_path)
    assert list(tmp_path.iterdir()) == []
