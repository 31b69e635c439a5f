"""The row stream: its orders are those of the runs before, batches wrap or drop, and it resumes exactly."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindrlhf.data.stream import RowStream
from mindrlhf.utils.errors import DataError
from mindrlhf.utils.seeds import random_stream


def stream(rows: int | np.ndarray = 11, **options: object) -> RowStream:
    return RowStream(rows, **({"purpose": "prompts", "seed": 3, "source": "data"} | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("purpose", ["prompts", "pretraining", "stage"])
@pytest.mark.parametrize("drop_last", [False, True])
def test_epochs_are_permutations_keyed_by_purpose_seed_and_epoch(purpose: str, drop_last: bool) -> None:
    numbers = np.array([5, 2, 9, 4, 7])
    source = stream(numbers, purpose=purpose, drop_last=drop_last)
    drawn = np.concatenate([source.draw(2) for _ in range(10)])
    orders = [random_stream(purpose, 3, epoch).permutation(numbers) for epoch in range(5)]
    expected = np.concatenate([order[: 4 if drop_last else 5] for order in orders])[:20]
    assert drawn.dtype == np.int64
    assert drawn.tolist() == expected.tolist()


def test_row_counts_and_row_numbers_give_the_same_order() -> None:
    assert stream(11).draw(30).tolist() == stream(np.arange(11)).draw(30).tolist()
    assert stream(11).draw(11).tolist() == random_stream("prompts", 3, 0).permutation(11).tolist()


@settings(deadline=None, max_examples=60)
@given(
    before=st.integers(0, 12),
    after=st.integers(1, 6),
    sizes=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    seed=st.integers(0, 5),
)
def test_resumes_exactly_with_another_batch_size(
    before: int, after: int, sizes: tuple[int, int], seed: int
) -> None:
    first, second = sizes
    source = stream(seed=seed)
    for _ in range(before):
        source.draw(first)
    state = json.loads(json.dumps(source.state_dict()))
    resumed = stream(seed=seed)
    resumed.draw(second)  # where it stood before must not matter
    resumed.load_state_dict(state)
    one_go = stream(seed=seed).draw(before * first + after * second)
    assert [i for _ in range(after) for i in resumed.draw(second)] == one_go[before * first :].tolist()
    assert resumed.epoch == (before * first + after * second - 1) // 11


@pytest.mark.parametrize("batches", range(7))
def test_resumes_exactly_where_the_end_of_an_epoch_is_dropped(batches: int) -> None:
    source, resumed = stream(5, drop_last=True), stream(5, drop_last=True)
    for _ in range(batches):
        source.draw(2)
    resumed.load_state_dict(source.state_dict())
    assert [resumed.draw(2).tolist() for _ in range(5)] == [source.draw(2).tolist() for _ in range(5)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 12}, "data: cannot resume the prompts stream: rows was 12, is 11"),
        ({"seed": 4, "shuffle": False}, "seed was 4, is 3; shuffle was False, is True"),
        ({"cursor": 12}, "cursor 12"),
        ({"epoch": -1}, "epoch -1"),
        ({"more": 1}, "'more'"),
    ],
)
def test_the_state_of_another_stream_is_refused(change: dict[str, object], message: str) -> None:
    source = stream()
    with pytest.raises(DataError, match=message):
        source.load_state_dict({**source.state_dict(), **change})  # type: ignore[dict-item]


def test_too_few_rows() -> None:
    with pytest.raises(DataError, match="data: no row"):
        stream(0)
    with pytest.raises(DataError, match="3 rows are fewer than one batch of 4"):
        stream(3, drop_last=True).draw(4)
