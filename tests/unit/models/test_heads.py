"""The scalar head's start, and reading one column."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor

from mindrlhf.configs.keys import ModelConfig
from mindrlhf.models.heads import ScoreHead, last_token
from mindrlhf.models.score_head import new_score_head


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


def test_scale_multiplies_the_weights_and_0_starts_at_0() -> None:
    whole, half, none = (new_score_head(8, 1, "critic", scale=scale) for scale in (1.0, 0.5, 0.0))
    np.testing.assert_allclose(half["score_head.weight"], whole["score_head.weight"] / 2, rtol=1e-7)
    assert not none["score_head.weight"].any()


def test_last_token_picks_one_column_a_row_though_others_are_huge() -> None:
    hidden = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    hidden[1, 2] = 1e30
    found = last_token(Tensor(hidden), Tensor(np.array([2, 0], np.int32))).asnumpy()
    np.testing.assert_array_equal(found, [[4, 5], [6, 7]])


def test_a_score_is_linear_in_the_hidden_state_and_in_float32() -> None:
    config = ModelConfig(
        vocab_size=8,
        hidden_size=4,
        num_layers=1,
        num_heads=1,
        n_kv_heads=1,
        intermediate_size=4,
        compute_dtype="float16",
    )
    head = ScoreHead(config)
    head.weight.set_data(Tensor(np.array([[1, -2, 0.5, 1000]], np.float32)))
    head.bias.set_data(Tensor(np.array([-3], np.float32)))
    hidden = np.array([[[1, 1, 2, 0], [0, 0, 0, 100]], [[0, 4, 0, 0], [0, 0, 0, 0.001]]], np.float32)
    # No sigmoid or other bound, and nothing that float16 would cut: 100,000 is beyond its range.
    np.testing.assert_allclose(head(Tensor(hidden)).asnumpy(), [[-3, 99_997], [-11, -2]], rtol=1e-6)
