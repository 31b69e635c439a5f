"""Running mean and variance, by hand and against NumPy on the whole stream."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindrlhf.algorithms.moments import RunningMoments


def moments_of(*batches: list[float]) -> RunningMoments:
    moments = RunningMoments()
    for batch in batches:
        moments.update(np.array(batch, np.float32))
    return moments


def test_two_batches_by_hand() -> None:
    moments = moments_of([1, 3])
    assert (moments.count, moments.mean, moments.m2) == (2, 2.0, 2.0)
    moments.update(np.array([8.0]))
    # mean 4; squared distances 9 + 1 + 16
    assert (moments.count, moments.mean, moments.m2) == (3, 4.0, 26.0)
    assert moments.std == pytest.approx(13**0.5)


@given(st.lists(st.lists(st.floats(-100, 100, width=32), max_size=5), min_size=1, max_size=6))
def test_batches_give_what_the_whole_stream_gives(batches: list[list[float]]) -> None:
    moments = moments_of(*batches)
    whole = np.concatenate([np.array(batch, np.float64) for batch in batches])
    assert moments.count == len(whole)
    if len(whole):
        assert moments.mean == pytest.approx(whole.mean(), abs=1e-9)
    std = whole.std(ddof=1) if len(whole) > 1 else 0.0
    assert moments.std == pytest.approx(std, abs=1e-7, rel=1e-9)


def test_a_large_mean_cancels_nothing() -> None:
    moments = RunningMoments()
    for value in (1e9, 1e9 + 1, 1e9 + 2):
        moments.update(np.array([value]))
    assert moments.std == pytest.approx(1.0, rel=1e-6)


def test_nothing_and_one_number_have_no_spread() -> None:
    assert RunningMoments().std == 0
    assert moments_of([5]).std == 0
    assert moments_of([5], []).count == 1


def test_state_goes_through_json() -> None:
    first = moments_of([1, 2, 4])
    second = RunningMoments()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for moments in (first, second):
        moments.update(np.array([7.0, -1.0]))
    assert second.state_dict() == first.state_dict()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_would_spoil_the_moments_is_refused_and_leaves_them(bad: float) -> None:
    moments = moments_of([1, 2])
    before = moments.state_dict()
    with pytest.raises(ValueError, match="finite"):
        moments.update(np.array([1.0, bad]))
    assert moments.state_dict() == before
