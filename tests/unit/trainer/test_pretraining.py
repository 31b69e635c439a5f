"""The texts of PPO-ptx; their loss is compared with torch in tests/parity."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindrlhf.configs.keys import JobConfig
from mindrlhf.data.columns import prompt_schema
from mindrlhf.data.mindrecord import Column, write_mindrecord
from mindrlhf.trainer.pretraining import PretrainStream, open_pretraining, pretrain_batches
from mindrlhf.utils.errors import DataError

ROWS, COLUMNS, VOCAB = 5, 40, 24


def write(path: Path, ids: np.ndarray, mask: np.ndarray) -> Path:
    schema = {name: Column("int32", ids.shape[1]) for name in ("pretrain_ids", "loss_mask")}
    write_mindrecord(path, schema, [{"pretrain_ids": ids, "loss_mask": mask}], overwrite=True)
    return path


def texts() -> tuple[np.ndarray, np.ndarray]:
    """Row i: 2 prompt tokens, i + 1 to be learnt, and rubbish behind; its first learnt token is i + 10."""
    ids = np.full((ROWS, COLUMNS), 99_999, np.int32)
    mask = np.zeros((ROWS, COLUMNS), np.int32)
    for row in range(ROWS):
        ids[row, : row + 3] = [1, 2, *range(row + 10, 2 * row + 11)]
        mask[row, 2 : row + 3] = 1
    return ids, mask


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "texts.mindrecord", *texts())


def stream(path: Path, **changes: Any) -> PretrainStream:
    settings = {"batch_size": 2, "max_length": 32, "vocab_size": VOCAB, "seed": 1}
    return PretrainStream(path, **{**settings, **changes})


def test_targets_are_the_next_tokens_and_only_masked_ones_count(path: Path) -> None:
    batch = stream(path, batch_size=ROWS).next_batch()
    order = np.argsort(batch.mask.sum(axis=1))
    np.testing.assert_array_equal(batch.mask.sum(axis=1)[order], np.arange(ROWS) + 1)
    assert batch.targets.shape == (ROWS, 16)
    row = order[2]  # 1 2 | 12 13 14
    np.testing.assert_array_equal(batch.inputs.tokens[row], [1, 2, 12, 13] + [0] * 12)
    np.testing.assert_array_equal(batch.targets[row], [2, 12, 13, 14] + [0] * 12)
    np.testing.assert_array_equal(batch.mask[row], [0, 1, 1, 1] + [0] * 12)
    np.testing.assert_array_equal(batch.inputs.valid[row], [1] * 4 + [0] * 12)
    np.testing.assert_array_equal(batch.inputs.position_ids[row][:4], range(4))


def drawn(texts_: PretrainStream, batches: int) -> list[int]:
    """Row numbers, from the first learnt token."""
    return [
        int(row[1]) - 10 for batch in (texts_.next_batch() for _ in range(batches)) for row in batch.targets
    ]


def test_every_row_comes_once_an_epoch_over_its_end_in_a_fresh_order(path: Path) -> None:
    numbers = drawn(stream(path), 10)
    epochs = [tuple(numbers[first : first + ROWS]) for first in range(0, 20, ROWS)]
    assert all(sorted(epoch) == list(range(ROWS)) for epoch in epochs)
    assert len(set(epochs)) > 1
    assert numbers != drawn(stream(path, seed=2), 10)


def test_a_batch_may_be_larger_than_the_data(path: Path) -> None:
    assert sorted(drawn(stream(path, batch_size=2 * ROWS), 1)) == sorted([*range(ROWS)] * 2)


def test_it_goes_on_where_it_was(path: Path) -> None:
    first = stream(path)
    drawn(first, 3)
    state = json.loads(json.dumps(first.state_dict()))
    wanted = drawn(first, 4)
    second = stream(path)
    second.load_state_dict(state)
    assert drawn(second, 4) == wanted
    with pytest.raises(DataError, match="seed was 1, is 2"):
        stream(path, seed=2).load_state_dict(state)


def test_columns_are_a_power_of_two_and_at_most_the_models(tmp_path: Path) -> None:
    ids, mask = np.full((2, COLUMNS), 3, np.int32), np.zeros((2, COLUMNS), np.int32)
    mask[0, 20], mask[1, 5:] = 1, 1
    path = write(tmp_path / "long.mindrecord", ids, mask)
    assert stream(path, max_length=64).next_batch().mask.shape == (2, 64)
    assert stream(path, max_length=48).next_batch().mask.shape == (2, 48)
    cut = stream(path, max_length=30).next_batch()
    assert cut.mask.shape == (2, 30)
    # Column t predicts token t + 1; tokens 5..30 of the longer text are left.
    assert sorted(cut.mask.sum(axis=1)) == [1, 26]
    with pytest.raises(DataError, match="row 0: no token to pre-train on among the first 20 "):
        stream(path, max_length=19)


def test_what_cannot_be_learnt_from_is_refused_with_the_remedy(tmp_path: Path) -> None:
    ids, mask = texts()
    nothing = mask.copy()
    nothing[3] = 0
    with pytest.raises(DataError, match=r"row 3: no token to pre-train on.*--ptx_dataset_dir"):
        stream(write(tmp_path / "nothing", ids, nothing))
    only_first = mask.copy()
    only_first[3] = np.eye(COLUMNS)[0]
    with pytest.raises(DataError, match="row 3: no token to pre-train on"):
        stream(write(tmp_path / "first", ids, only_first))
    with pytest.raises(DataError, match="row 1: loss_mask must be 0 or 1"):
        stream(write(tmp_path / "two", ids, np.where(np.arange(ROWS)[:, None] == 1, 2 * mask, mask)))
    with pytest.raises(DataError, match=r"row 4: token 18 is not below the model's vocab_size 18"):
        stream(write(tmp_path / "vocab", ids, mask), vocab_size=18)
    other = tmp_path / "other"
    write_mindrecord(other, {"x": Column("int32", 2)}, [{"x": np.zeros((2, 2), np.int32)}])
    with pytest.raises(DataError, match=r"no column pretrain_ids, loss_mask; make it with rlhf_data.py"):
        stream(other)


def test_a_job_without_ptx_opens_nothing(tiny_job: JobConfig, tmp_path: Path) -> None:
    assert open_pretraining(tmp_path / "not there", tiny_job) is None
    ids, mask = texts()
    data = tmp_path / "data.mindrecord"
    columns = {"prompt_ids": ids[:, :4], "pretrain_ids": ids, "loss_mask": mask}
    write_mindrecord(data, prompt_schema(4, COLUMNS), [columns])
    job = replace(tiny_job, ppo=replace(tiny_job.ppo, ptx_coef=0.1))
    found = open_pretraining(data, job)
    assert found is not None
    assert len(found.next_batch().mask) == job.ppo.minibatch_size == 2


def test_micro_batches_cover_this_replicas_rows_and_know_the_global_count(path: Path) -> None:
    batch = stream(path, batch_size=4).next_batch()
    for size, counts in ((0, [2]), (1, [1, 1])):
        parts = pretrain_batches(batch, slice(2, 4), size)
        assert [len(part.inputs[0]) for part in parts] == counts
        for number, field in enumerate((*batch.inputs, batch.targets, batch.mask)):
            found = [[*part.inputs, *part.targets][number] for part in parts]
            np.testing.assert_array_equal(np.concatenate(found), field[2:4])
        for part in parts:
            assert part.targets[-1] == pytest.approx(1 / batch.mask.sum())
