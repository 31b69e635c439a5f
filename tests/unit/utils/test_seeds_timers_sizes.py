"""seeds.py, timers.py and sizes.py."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindrlhf.utils import timers
from mindrlhf.utils.seeds import random_stream
from mindrlhf.utils.sizes import exact_div
from mindrlhf.utils.timers import PhaseTimer, Timer

KEYS = st.lists(st.one_of(st.integers(), st.text(max_size=5)), max_size=4).map(tuple)


def test_stream_is_fixed_for_all_time() -> None:
    """Resumed runs and other layouts rely on these very numbers."""
    assert random_stream("rollout", 1, 2).integers(0, 1000, 4).tolist() == [636, 270, 165, 788]


@given(KEYS)
def test_same_keys_same_stream(keys: tuple[int | str, ...]) -> None:
    np.testing.assert_array_equal(random_stream(*keys).random(4), random_stream(*keys).random(4))


@given(KEYS, KEYS)
def test_other_keys_other_stream(one: tuple[int | str, ...], other: tuple[int | str, ...]) -> None:
    same_bits = np.array_equal(random_stream(*one).random(4), random_stream(*other).random(4))
    typed = [[(type(key), key) for key in keys] for keys in (one, other)]
    assert same_bits == (typed[0] == typed[1])


@pytest.mark.parametrize(
    ("one", "other"), [((1,), ("1",)), (("ab", "c"), ("a", "bc")), ((1, 23), (12, 3)), ((0,), (0, 0))]
)
def test_keys_that_look_alike(one: tuple[int | str, ...], other: tuple[int | str, ...]) -> None:
    assert random_stream(*one).random() != random_stream(*other).random()


def test_numpy_integers_are_integers() -> None:
    assert random_stream(np.int64(7)).random() == random_stream(7).random()


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="float"):
        random_stream(1.5)  # type: ignore[arg-type]


def test_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([10.0, 11.0, 14.0, 20.0, 21.0])
    monkeypatch.setattr(timers.time, "perf_counter", lambda: next(ticks))
    timer = Timer()
    assert timer.seconds == 0.0
    with timer:
        assert timer.seconds == 1.0
    assert timer.seconds == 4.0
    with timer:
        pass
    assert timer.seconds == 1.0


def test_phases_add_up_even_when_they_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 2.0, 10.0, 13.0, 20.0, 21.0])
    monkeypatch.setattr(timers.time, "perf_counter", lambda: next(ticks))
    timer = PhaseTimer()
    with timer.phase("rollout"):
        pass
    with pytest.raises(RuntimeError), timer.phase("rollout"):
        raise RuntimeError
    with timer.phase("train"):
        pass
    assert timer.seconds == {"rollout": 5.0, "train": 1.0}
    timer.reset()
    assert timer.seconds == {}


def test_exact_div() -> None:
    assert exact_div(12, 4, "heads by mp") == 3
    with pytest.raises(ValueError, match="heads by mp: 14 is not divisible by 4"):
        exact_div(14, 4, "heads by mp")
    with pytest.raises(ValueError, match="3 is not divisible by 0"):
        exact_div(3, 0, "x")


def test_listeners_hear_of_phases_in_order_and_of_one_that_fails() -> None:
    heard: list[tuple[object, ...]] = []

    class Listener:
        def phase_started(self, name: str, total: int | None, unit: str) -> None:
            heard.append(("started", name, total, unit))

        def phase_advanced(self, done: int) -> None:
            heard.append(("advanced", done))

        def phase_ended(self, name: str) -> None:
            heard.append(("ended", name))

    timer = PhaseTimer([Listener()])
    with timer.phase("rollout", 64, "tokens"):
        timer.advance(8)
    timer.reset()
    with pytest.raises(RuntimeError), timer.phase("train"):
        raise RuntimeError
    assert heard == [
        ("started", "rollout", 64, "tokens"),
        ("advanced", 8),
        ("ended", "rollout"),
        ("started", "train", None, ""),
        ("ended", "train"),
    ]
