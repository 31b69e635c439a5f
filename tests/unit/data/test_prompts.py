"""Prompts: every row once an epoch, exact resumption, held-out ones, and data that does not fit the job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mindrlhf.data.prompts as prompts_module
from mindrlhf.data.columns import prompt_schema
from mindrlhf.data.mindrecord import Column, write_mindrecord
from mindrlhf.data.prompts import PromptBatch, PromptStream, overlapping_rows, prompts_digest, read_held_out
from mindrlhf.utils.errors import DataError

PAD = 99
ROWS = 11


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_prompts: Callable[..., Path]) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "data.mindrecord", ROWS)


def stream(path: Path, batch_size: int = 4, **options: Any) -> PromptStream:
    settings: dict[str, Any] = {"max_prompt_length": 4, "pad_token_id": PAD, "seed": 3}
    return PromptStream(path, batch_size=batch_size, **(settings | options))


def draw(source: PromptStream, batches: int) -> list[int]:
    return [int(i) for _ in range(batches) for i in source.next_batch().sample_ids]


def test_batches_hold_the_rows_they_name(data: Path) -> None:
    source = stream(data)
    assert len(source) == ROWS
    for _ in range(4):
        batch = source.next_batch()
        assert (batch.prompt_ids.dtype, batch.prompt_ids.shape) == (np.int32, (4, 4))
        assert batch.prompt_lengths.dtype == np.int32
        assert batch.sample_ids.dtype == np.int64
        for prompt, length, row in zip(*batch, strict=True):
            assert length == row % 4 + 1
            assert prompt.tolist() == [PAD] * (4 - length) + [row + 1] * length


def test_every_epoch_is_another_whole_permutation(data: Path) -> None:
    drawn = draw(stream(data), ROWS)  # 4 epochs, batches over their ends
    epochs = [drawn[i : i + ROWS] for i in range(0, len(drawn), ROWS)]
    assert all(sorted(epoch) == list(range(ROWS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert list(range(ROWS)) not in epochs
    assert draw(stream(data), 3) == drawn[:12]
    assert draw(stream(data, seed=4), 3) != drawn[:12]


def test_order_does_not_depend_on_the_batch_size(data: Path) -> None:
    assert draw(stream(data, 4), 11) == draw(stream(data, 11), 4) == draw(stream(data, 1), 44)


def test_without_shuffling(data: Path) -> None:
    assert draw(stream(data, shuffle=False), 6) == [i % ROWS for i in range(24)]


def test_resuming_gives_the_same_batches(data: Path) -> None:
    source = stream(data)
    draw(source, 2)
    resumed = stream(data)
    resumed.load_state_dict(source.state_dict())
    assert resumed.drawn == source.drawn == 8
    for _ in range(3):
        for mine, theirs in zip(resumed.next_batch(), source.next_batch(), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_the_state_of_another_data_set_is_refused(data: Path) -> None:
    source = stream(data)
    with pytest.raises(DataError, match=r"data\.mindrecord: .* rows was 12, is 11"):
        source.load_state_dict({**source.state_dict(), "rows": 12})


def test_data_of_another_length(data: Path) -> None:
    with pytest.raises(DataError, match=r"max_prompt_length 4, but the job's is 2"):
        stream(data, max_prompt_length=2)


def test_columns_of_any_length_are_checked_when_read(
    tmp_path: Path, write_prompts: Callable[..., Path]
) -> None:
    """Files of other makers may leave the length open."""
    from mindspore.mindrecord import FileWriter

    path = tmp_path / "open.mindrecord"
    writer = FileWriter(str(path))
    writer.add_schema(
        {name: {"type": "int32", "shape": [-1]} for name in ("prompt_ids", "pretrain_ids", "loss_mask")}
    )
    row = {"prompt_ids": [PAD, 5], "pretrain_ids": [5, 6, PAD], "loss_mask": [0, 1, 0]}
    writer.write_raw_data([{name: np.array(values, np.int32) for name, values in row.items()}])
    writer.commit()
    assert stream(path, 1, max_prompt_length=2).next_batch().prompt_lengths.tolist() == [1]
    with pytest.raises(DataError, match=r"max_prompt_length 2, but the job's is 4"):
        stream(path, 1).next_batch()


def test_fewer_rows_than_a_batch(data: Path) -> None:
    with pytest.raises(DataError, match="11 rows are fewer than one batch of 12"):
        stream(data, 12)
    draw(stream(data, 11), 2)


def test_another_kind_of_file(tmp_path: Path) -> None:
    path = tmp_path / "other.mindrecord"
    schema = {"prompt_ids": Column("float32", 4), "loss_mask": Column("int32", 1)}
    write_mindrecord(path, schema, [{name: np.zeros((1, c.length), c.dtype) for name, c in schema.items()}])
    with pytest.raises(DataError, match=r"no column pretrain_ids; column prompt_ids is float32"):
        stream(path, 1)
    with pytest.raises(DataError, match="no such file"):
        stream(tmp_path / "none.mindrecord")


def assign(row: int, column: int, value: int) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array[row, column] = value

    return change


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"loss_mask": assign(1, 7, PAD)}, {}, "row 1: loss_mask must be 0 or 1"),
        ({"pretrain_ids": assign(1, 0, 50)}, {}, "row 1: prompt_ids does not end with the 2 tokens"),
        ({"loss_mask": assign(1, 0, 1)}, {}, "row 1: prompt_ids does not end with the 0 tokens"),
        ({}, {"pad_token_id": 98}, "row 0: padded with token 99, .* pad_token_id is 98"),
        ({"prompt_ids": assign(1, 0, 50)}, {}, "row 1: padded with token 50"),
        ({}, {"vocab_size": 2}, "row 1: token 2 is not below .* vocab_size 2"),
    ],
)
def test_rows_that_contradict_themselves(
    tmp_path: Path, write_prompts: Callable[..., Path], change: Any, options: dict[str, Any], message: str
) -> None:
    path = write_prompts(tmp_path / "data.mindrecord", 3, **change)
    with pytest.raises(DataError, match=rf"data\.mindrecord: {message}"):
        draw(stream(path, 3, shuffle=False, **options), 1)


def test_rows_without_a_response(tmp_path: Path, write_prompts: Callable[..., Path]) -> None:
    def none(array: np.ndarray) -> None:
        array[:] = 0

    path = write_prompts(tmp_path / "data.mindrecord", 4, loss_mask=none)
    assert stream(path, shuffle=False).next_batch().prompt_lengths.tolist() == [1, 2, 3, 4]


# --- held-out prompts ---


def write(path: Path, prompts: list[list[int]]) -> Path:
    left, right = (np.full((len(prompts), size), 0, np.int32) for size in (4, 6))
    for row, prompt in enumerate(prompts):
        left[row, 4 - len(prompt) :] = prompt
        right[row, : len(prompt)] = prompt
    batch = {"prompt_ids": left, "pretrain_ids": right, "loss_mask": np.zeros_like(right)}
    write_mindrecord(path, prompt_schema(4, 6), [batch])
    return path


def read(path: Path, count: int = 0) -> PromptBatch:
    return read_held_out(path, count=count, max_prompt_length=4, pad_token_id=0, vocab_size=20)


def test_all_rows_are_read_in_order_or_the_first_few(tmp_path: Path) -> None:
    path = write(tmp_path / "eval", [[5], [6, 7], [8, 9, 10]])
    prompts = read(path)
    np.testing.assert_array_equal(prompts.sample_ids, [0, 1, 2])
    np.testing.assert_array_equal(prompts.prompt_lengths, [1, 2, 3])
    np.testing.assert_array_equal(prompts.prompt_ids[1], [0, 0, 6, 7])
    np.testing.assert_array_equal(read(path, 2).prompt_ids, prompts.prompt_ids[:2])
    np.testing.assert_array_equal(read(path, 9).prompt_ids, prompts.prompt_ids)
    assert prompts_digest(read(path)) == prompts_digest(prompts)
    assert prompts_digest(read(path, 2)) != prompts_digest(prompts)


def test_prompts_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="another tokenizer"):
        read(write(tmp_path / "eval", [[5], [21]]))


def test_prompts_that_training_has_too_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts_module, "_ROWS_AT_ONCE", 2)
    train = write(tmp_path / "train", [[1], [6, 7], [3], [2, 2], [9]])
    # Twice the same, a part of another, the same tokens in another order.
    evaluation = read(write(tmp_path / "eval", [[9], [7], [6, 7], [7, 6], [9]]))
    np.testing.assert_array_equal(overlapping_rows(evaluation, train), [0, 2, 4])
    nothing = read(write(tmp_path / "other", [[11], [12]]))
    assert overlapping_rows(nothing, train).shape == (0,)
