"""Pieces of the generation network against plain numpy."""

from __future__ import annotations

import dataclasses

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

from mindrlhf.configs.keys import ModelConfig
from mindrlhf.models.qwen2.generator_layers import KVCache, LocalSizes, local_sizes, rotary_tables
from mindrlhf.models.qwen2.generator_network import PrefillAttention
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Mesh

CONFIG = ModelConfig(
    vocab_size=8, hidden_size=24, num_layers=1, num_heads=6, n_kv_heads=2, intermediate_size=8, theta=100.0
)


@pytest.fixture(scope="module", autouse=True)
def _graph_mode() -> None:
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")


def sizes(**changes: bool) -> LocalSizes:
    return dataclasses.replace(local_sizes(CONFIG, Groups(Mesh(1, 1), 0), 2, 5, 9), **changes)


def attention(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, starts: list[int]) -> np.ndarray:
    """One query, one head at a time: (B, N, G, P, D), (B, N, P, D) twice -> (B, P, N * G * D)."""
    rows, heads, group, columns, size = queries.shape
    result = np.zeros((rows, columns, heads, group, size))
    for row, head, query in np.ndindex(rows, heads, group):
        for column in range(starts[row], columns):
            seen = slice(starts[row], column + 1)
            scores = keys[row, head, seen] @ queries[row, head, query, column]
            weights = np.exp(scores - scores.max())
            result[row, column, head, query] = weights / weights.sum() @ values[row, head, seen]
    return result.reshape(rows, columns, -1)


def fake_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    attn_mask: Tensor,
    scalar_value: float,
    input_layout: str,
) -> Tensor:
    """What Ascend's documentation says the kernel does for BNSD: a mask that is True hides the key."""
    group = head_num // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = ops.BatchMatMul(transpose_b=True)(query, key) * scalar_value
    weights = ops.softmax(ops.masked_fill(scores, attn_mask, -1.0e30), -1)
    return ops.BatchMatMul()(weights, value)


@pytest.mark.parametrize("kind", ["whole", "blocks", "flash"])
def test_prefill_attention_equals_numpy(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "blocks":
        monkeypatch.setattr("mindrlhf.models.qwen2.generator_network.QUERY_BLOCK", 2)
    monkeypatch.setattr(ops, "flash_attention_score", fake_flash)
    attend = PrefillAttention(sizes(flash_attention=kind == "flash"))
    rng = np.random.default_rng(1)
    queries = rng.standard_normal((2, 2, 3, 5, 4)).astype(np.float32)
    keys, values = rng.standard_normal((2, 2, 2, 5, 4)).astype(np.float32)
    starts = [0, 3]
    real = np.arange(5) >= np.array(starts)[:, None]
    actual = attend(
        Tensor(queries.reshape(4, 3, 5, 4)),
        Tensor(keys.reshape(4, 5, 4)),
        Tensor(values.reshape(4, 5, 4)),
        attend.visible(Tensor(real)),
    ).asnumpy()
    assert np.isfinite(actual).all()  # padding gives numbers that nobody reads, but no NaN
    actual = actual.reshape(2, 5, 24) * real[:, :, None]
    np.testing.assert_allclose(actual, attention(queries, keys, values, starts), atol=1e-6, rtol=0)


def test_rotary_tables_hold_queries_keys_and_values() -> None:
    cos, sin = (table.reshape(9, 2, 5, 4) for table in rotary_tables(sizes(), theta=100.0))
    # D = 4: angles p * 100^0 and p * 100^(-1/2), for both halves of a head.
    angles = np.outer(np.arange(9), [1.0, 0.1, 1.0, 0.1])
    for head in range(2):
        for slot in range(3):  # queries carry the 1/sqrt(4) of the scores
            np.testing.assert_allclose(cos[:, head, slot], np.cos(angles) / 2, atol=1e-6)
            np.testing.assert_allclose(sin[:, head, slot], np.sin(angles) / 2, atol=1e-6)
        np.testing.assert_allclose(cos[:, head, 3], np.cos(angles), atol=1e-6)
        np.testing.assert_allclose(sin[:, head, 3], np.sin(angles), atol=1e-6)
        assert (cos[:, head, 4] == 1).all()
        assert (sin[:, head, 4] == 0).all()


def test_cache_entries_fill_and_write() -> None:
    cache = KVCache(2, 2, 3, 4, ms.float32, "cache")
    stale = np.full((4, 3, 4), np.nan, np.float32)
    cache.keys.set_data(Tensor(stale))
    cache.values.set_data(Tensor(stale))
    rng = np.random.default_rng(2)
    prompt = rng.standard_normal((2, 4, 2, 4)).astype(np.float32)
    cache.fill(Tensor(prompt[0]), Tensor(prompt[1]))
    new = rng.standard_normal((2, 4, 4)).astype(np.float32)
    expected = np.concatenate([prompt, np.zeros((2, 4, 1, 4), np.float32)], axis=2)
    np.testing.assert_array_equal(cache.keys.asnumpy(), expected[0])
    entries = cache.entries(Tensor(2, ms.int32))
    assert entries.asnumpy().tolist() == [[0, 2], [1, 2], [2, 2], [3, 2]]
    keys, values = cache.write(entries, Tensor(new[0]), Tensor(new[1]))
    expected[:, :, 2] = new
    for actual, parameter, wanted in zip((keys, values), (cache.keys, cache.values), expected, strict=True):
        np.testing.assert_array_equal(actual.asnumpy(), wanted)
        np.testing.assert_array_equal(parameter.asnumpy(), wanted)
