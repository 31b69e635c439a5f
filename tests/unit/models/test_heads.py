"""The scalar head's start, rows that heads look at, chunks of logits, recomputed layers."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindrlhf.configs.keys import ModelConfig
from mindrlhf.models import chunks
from mindrlhf.models.chunks import chunk_rows
from mindrlhf.models.heads import ScoreHead, last_rows, response_rows
from mindrlhf.models.networks import PPOModelTrain
from mindrlhf.models.pieces import Gradients
from mindrlhf.models.score_head import new_score_head
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Mesh


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


def test_rows_of_responses_and_of_last_tokens() -> None:
    tokens = np.arange(10, dtype=np.int32).reshape(2, 5)
    rows = response_rows(tokens, 3)
    assert rows.numbers.tolist() == [2, 3, 7, 8]  # each predicts the next token
    assert rows.targets is not None
    assert (rows.targets.tolist(), rows.shape) == ([3, 4, 8, 9], (2, 2))
    last = last_rows(tokens, 3, np.array([2, 1], np.int32))
    assert (last.numbers.tolist(), last.targets, last.shape) == ([4, 8], None, (2,))


@pytest.mark.parametrize(("rows", "vocabulary", "size"), [(10, 100, 10), (10, 2**22, 4), (7, 2**30, 1)])
def test_chunks_are_as_few_as_the_bound_allows_and_even(rows: int, vocabulary: int, size: int) -> None:
    assert chunk_rows(rows, vocabulary) == size  # of 2^24 numbers at most, or one row


@pytest.mark.parametrize(
    ("layers", "sizes"), [(0, []), (1, [1]), (2, [2]), (3, [3]), (7, [3, 4]), (8, [4, 4]), (30, [3] * 10)]
)
def test_layers_that_share_a_graph_are_even_runs(layers: int, sizes: list[int]) -> None:
    runs = chunks.blocks(layers)
    assert [len(run) for run in runs] == sizes
    assert [layer for run in runs for layer in run] == list(range(layers))


@pytest.mark.parametrize("value_head", [False, True])
@pytest.mark.parametrize("rows_at_once", [1, 3])
def test_chunks_do_not_change_log_probs_or_gradients(
    value_head: bool, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last chunk is smaller than the others: 4 responses of 5 tokens are 20 rows."""
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 24, (4, 9)).astype(np.int32)
    inputs = (tokens, np.ones_like(tokens), np.tile(np.arange(9, dtype=np.int32), (4, 1)))
    weights = [Tensor(rng.normal(0, 1, (4, 5)).astype(np.float32)) for _ in range(3)]

    def run() -> list[np.ndarray]:
        model = small_policy(value_head=value_head)
        outputs, tape = model.forward(*inputs)
        gradients = Gradients()
        model.backward(tape, weights[: len(outputs)], gradients)
        return [x.asnumpy() for x in (*outputs, *(gradients[name] for name in model.parameters))]

    whole = run()
    monkeypatch.setattr(chunks, "LOGITS_BYTES", rows_at_once * 24 * 4)
    for found, wanted in zip(run(), whole, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("recompute", [1, 4, 7])
def test_recomputed_layers_give_the_same_gradients(recompute: int) -> None:
    """7 layers go through several graphs, cut where those begin that keep their results."""
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 24, (2, 9)).astype(np.int32)
    inputs = (tokens, np.ones_like(tokens), np.tile(np.arange(9, dtype=np.int32), (2, 1)))
    dout = [Tensor(rng.normal(0, 1, (2, 5)).astype(np.float32)) for _ in range(2)]
    found = []
    for layers in (0, recompute):
        model, gradients = small_policy(num_layers=7, recompute=layers), Gradients()
        _, tape = model.forward(*inputs)
        kept = sum(len(block) for _, block in tape.decoder.blocks)
        assert (kept == 0) == (layers == 7)
        model.backward(tape, dout, gradients)
        assert not tape.decoder.blocks
        found.append({name: gradients[name].asnumpy() for name in model.parameters})
    for name, wanted in found[0].items():
        np.testing.assert_allclose(
            found[1][name], wanted, rtol=0, atol=1e-6 * np.abs(wanted).max(), err_msg=name
        )
    assert min(np.abs(gradient).max() for gradient in found[0].values()) > 1e-4


def test_columns_that_are_added_to_split_the_rows_change_nothing() -> None:
    """18 tokens in 4 parts: 2 rows of 12 columns in place of 9."""
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 24, (2, 9)).astype(np.int32)
    inputs = (tokens, np.ones_like(tokens), np.tile(np.arange(9, dtype=np.int32), (2, 1)))
    dout = [Tensor(rng.normal(0, 1, (2, 5)).astype(np.float32)) for _ in range(2)]
    found = []
    for parts in (1, 4):
        model, gradients = small_policy(), Gradients()
        model.decoder.row_parts = parts
        outputs, tape = model.forward(*inputs)
        assert tape.decoder.tokens.shape == (2, 9 if parts == 1 else 12)
        model.backward(tape, dout, gradients)
        found.append([x.asnumpy() for x in (*outputs, *(gradients[name] for name in model.parameters))])
    for padded, wanted in zip(*reversed(found), strict=True):
        np.testing.assert_allclose(padded, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


def small_policy(*, num_layers: int = 1, value_head: bool = False, recompute: int = 0) -> PPOModelTrain:
    """Random weights, the same each time."""
    config = ModelConfig(
        vocab_size=24,
        hidden_size=16,
        num_layers=num_layers,
        num_heads=4,
        n_kv_heads=2,
        intermediate_size=20,
        seq_length=16,
    )
    model = PPOModelTrain(
        config,
        Groups(Mesh(), 0),
        prompt_length=4,
        temperature=0.8,
        valid_vocab_size=22,
        value_head=value_head,
        recompute=recompute,
    )
    rng = np.random.default_rng(1)
    model.load(
        {
            name: (("norm" in name) + rng.normal(0, 0.3, layout.shape)).astype(np.float32)
            for name, layout in model.layouts.items()
        }
    )
    return model


def test_a_score_is_linear_in_the_hidden_state_and_in_float32() -> None:
    weight, bias = Tensor(np.array([[1, -2, 0.5, 1000]], np.float32)), Tensor(np.array([-3], np.float32))
    hidden = np.array([[1, 1, 2, 0], [0, 0, 0, 100], [0, 4, 0, 0], [0, 0, 0, 0.001]], np.float32)
    # No sigmoid or other bound, and nothing that float16 would cut: 100,000 is beyond its range.
    found = ScoreHead()(Tensor(hidden), weight, bias).asnumpy()
    np.testing.assert_allclose(found, [-3, 99_997, -11, -2], rtol=1e-6)
