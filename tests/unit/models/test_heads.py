"""The scalar head's start, and reading one column."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor

from mindrlhf.models.heads import last_token, new_score_head


def test_a_fresh_score_head_is_normal_with_variance_1_over_h_plus_1_and_bias_0() -> None:
    head = new_score_head(9999, seed=1, purpose="reward")
    assert head["score_head.weight"].shape == (1, 9999)
    assert head["score_head.weight"].dtype == np.float32
    np.testing.assert_allclose(head["score_head.weight"].std(), 0.01, rtol=0.03)
    np.testing.assert_allclose(head["score_head.weight"].mean(), 0, atol=4e-4)
    np.testing.assert_array_equal(head["score_head.bias"], [0])


def test_heads_differ_by_seed_and_purpose_and_are_equal_on_every_rank() -> None:
    heads = [
        new_score_head(8, seed, purpose)["score_head.weight"]
        for seed, purpose in ((1, "reward"), (1, "critic"), (2, "reward"), (1, "reward"))
    ]
    assert len({head.tobytes() for head in heads}) == 3
    np.testing.assert_array_equal(heads[0], heads[3])


def test_last_token_picks_one_column_a_row_though_others_are_huge() -> None:
    hidden = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    hidden[1, 2] = 1e30
    found = last_token(Tensor(hidden), Tensor(np.array([2, 0], np.int32))).asnumpy()
    np.testing.assert_array_equal(found, [[4, 5], [6, 7]])
