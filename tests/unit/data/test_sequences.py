"""Whole sequences by hand: where tokens stand, which rows are held out, and what cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindrlhf.data.columns import prompt_schema
from mindrlhf.data.mindrecord import write_mindrecord
from mindrlhf.data.sequences import SequenceData
from mindrlhf.utils.errors import DataError

PAD, COLUMNS, LENGTH = 9, 4, 8
Edit = Callable[[dict[str, np.ndarray]], None]


def write(
    path: Path,
    rows: list[tuple[list[int], list[int], list[int]]],
    edit: Edit | None = None,
    *,
    pairs: bool = True,
) -> Path:
    """Rows of (prompt, preferred, rejected)."""
    batch = {
        name: np.full((len(rows), column.length), 0 if "mask" in name else PAD, np.int32)
        for name, column in prompt_schema(COLUMNS, LENGTH, pairs=pairs).items()
    }
    for i, (prompt, *answers) in enumerate(rows):
        n = len(prompt)
        batch["prompt_ids"][i, COLUMNS - n :] = prompt
        names = [("pretrain_ids", "loss_mask"), ("rejected_ids", "rejected_mask")]
        for (ids, mask), answer in zip(names[: 1 + pairs], answers, strict=False):
            batch[ids][i, : n + len(answer)] = prompt + answer
            batch[mask][i, n : n + len(answer)] = 1
    if edit is not None:
        edit(batch)
    write_mindrecord(path, prompt_schema(COLUMNS, LENGTH, pairs=pairs), [batch])
    return path


def read(path: Path, *, pairs: bool = True, max_length: int = LENGTH) -> SequenceData:
    return SequenceData(path, pad_token_id=PAD, vocab_size=60, max_length=max_length, pairs=pairs)


ROWS = [([1, 2], [21, 22, 7], [31, 7]), ([3], [23, 7], [32, 33, 34, 7]), ([4, PAD, 5], [24, 7], [7])]


def test_by_hand(tmp_path: Path) -> None:
    data = read(write(tmp_path / "d", ROWS))
    assert (len(data), data.prompt_columns, data.response_columns) == (3, 3, 4)
    chosen = data.read(np.array([2, 0]))
    assert chosen.tokens.tolist() == [[4, 9, 5, 24, 7, 9, 9], [9, 1, 2, 21, 22, 7, 9]]
    assert chosen.prompt_lengths.tolist() == [3, 2]
    assert chosen.response_lengths.tolist() == [2, 3]
    pairs = data.read_pairs(np.array([1, 2]))
    assert pairs.tokens.tolist() == [
        [9, 9, 3, 23, 7, 9, 9],
        [4, 9, 5, 24, 7, 9, 9],
        [9, 9, 3, 32, 33, 34, 7],
        [4, 9, 5, 7, 9, 9, 9],
    ]
    assert pairs.prompt_lengths.tolist() == [1, 3, 1, 3]
    assert pairs.response_lengths.tolist() == [2, 2, 4, 1]


def test_data_without_pairs_serves_fine_tuning_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "d", ROWS, pairs=False)
    assert read(path, pairs=False).response_columns == 3
    with pytest.raises(
        DataError, match=r"no column rejected_ids, rejected_mask; make it with rlhf_data\.py --pairs"
    ):
        read(path)


def test_one_token_more_than_the_model_reaches_is_cut(tmp_path: Path) -> None:
    rows = [([1, 2], [21, 22, 23, 24, 25, 26], [31, 7])]
    data = read(write(tmp_path / "d", rows), max_length=LENGTH - 1)
    assert data.response_lengths.tolist() == [5]
    assert data.read(np.array([0])).tokens.tolist() == [[1, 2, 21, 22, 23, 24, 25]]
    with pytest.raises(
        DataError, match=r"row 0: 8 tokens in pretrain_ids, more than the model's seq_length 6"
    ):
        read(tmp_path / "d", max_length=LENGTH - 2)


def change(name: str, row: int, column: int, value: int) -> Edit:
    def edit(batch: dict[str, np.ndarray]) -> None:
        batch[name][row, column] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda batch: batch["loss_mask"].__setitem__(1, 0), "row 1: there is no response"),
        (lambda batch: batch["rejected_mask"].__setitem__(2, 0), "row 2: there is no response"),
        (change("loss_mask", 0, 6, 1), "row 0: loss_mask must be 1 on one unbroken response"),
        (change("rejected_mask", 1, 2, 2), "row 1: rejected_mask must be 1 on one unbroken"),
        (change("prompt_ids", 0, 3, 8), "row 0: prompt_ids does not end with the 2 tokens"),
        (change("rejected_ids", 2, 0, 8), "row 2: prompt_ids does not end with the 3 tokens"),
        (change("pretrain_ids", 0, 7, 8), "row 0: padded with token 8, but the model's pad_token_id is 9"),
        (change("prompt_ids", 1, 0, 8), "row 1: padded with token 8, but the model's pad_token_id is 9"),
        (change("pretrain_ids", 0, 2, 60), "row 0: token 60 is not below the model's vocab_size 60"),
    ],
)
def test_faulty_rows(tmp_path: Path, edit: Edit, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "d", ROWS, edit))


def test_faulty_rows_come_together(tmp_path: Path) -> None:
    def edit(batch: dict[str, np.ndarray]) -> None:
        batch["loss_mask"][:] = 0

    with pytest.raises(DataError, match=r"(?s)^12 row\(s\).*row 0.*row 9.*and 2 more$"):
        read(write(tmp_path / "d", ROWS * 4, edit))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "none")


def many(count: int, per_prompt: int = 1) -> list[Any]:
    return [([1 + i // per_prompt], [20 + i % 30, 7], [31, 7]) for i in range(count)]


def test_split_is_disjoint_complete_and_always_the_same(tmp_path: Path) -> None:
    data = read(write(tmp_path / "d", many(40)))
    train, held_out = data.split(0.25, 0, seed=1)
    assert (len(train), len(held_out)) == (30, 10)
    assert sorted([*train, *held_out]) == list(range(40))
    again = read(tmp_path / "d").split(0.25, 0, seed=1)
    np.testing.assert_array_equal(again[1], held_out)
    assert set(data.split(0.25, 0, seed=2)[1]) != set(held_out)
    assert len(data.split(0.25, 3, seed=1)[1]) == 3
    assert len(data.split(0.001, 0, seed=1)[1]) == 1
    assert len(data.split(0.0, 0, seed=1)[1]) == 0


def test_split_is_by_prompt_and_not_by_place(tmp_path: Path) -> None:
    """Rows of one prompt stay together; another order of the file or other columns change nothing."""
    rows = many(40, per_prompt=4)
    first = read(write(tmp_path / "d", rows))
    train, held_out = first.split(0.3, 0, seed=1)
    prompts = [{rows[i][0][0] for i in part} for part in (train, held_out)]
    assert len(prompts[1]) == 3
    assert len(held_out) == 12
    assert prompts[0] & prompts[1] == set()
    other = read(write(tmp_path / "e", rows[::-1], pairs=False), pairs=False)
    assert {rows[::-1][i][0][0] for i in other.split(0.3, 0, seed=1)[1]} == prompts[1]


def test_split_that_leaves_nothing_to_train_on(tmp_path: Path) -> None:
    data = read(write(tmp_path / "d", many(4, per_prompt=4)))
    with pytest.raises(DataError, match=r"1 different prompt\(s\), of which 1 are to be held out"):
        data.split(0.1, 0, seed=1)
