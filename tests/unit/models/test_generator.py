"""The generation model's host side: weights in and out, stopping, micro-batches, no recompilation."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from mindspore.common.np_dtype import bfloat16

from mindrlhf.configs.keys import ModelConfig
from mindrlhf.models.generator import GenerationConfig, PPOModelInfer
from mindrlhf.models.qwen2.layouts import parameter_layouts
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Mesh
from mindrlhf.utils.errors import CheckpointError

WHOLE = Groups(Mesh(1, 1), 0)
PROMPT, RESPONSE = 4, 8


@pytest.fixture(scope="module", autouse=True)
def _graph_mode() -> None:
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")


def model_config(**changes: Any) -> ModelConfig:
    sizes = {
        "vocab_size": 24,
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 4,
        "n_kv_heads": 2,
        "intermediate_size": 20,
        "tie_word_embeddings": False,
    }
    return ModelConfig(**{**sizes, **changes})


def random_shards(
    config: ModelConfig, mesh: Mesh, rank: int, seed: int, dtype: Any = np.float32
) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        name: layout.take(rng.standard_normal(layout.shape).astype(np.float32), rank).astype(dtype)
        for name, layout in parameter_layouts(config, mesh).items()
    }


def build(
    config: ModelConfig, groups: Groups = WHOLE, *, batch_size: int = 2, **options: Any
) -> PPOModelInfer:
    generation = GenerationConfig(
        **{"max_prompt_length": PROMPT, "max_response_length": RESPONSE, "valid_vocab_size": 24, **options}
    )
    return PPOModelInfer(config, groups, generation, batch_size=batch_size, decode_steps_per_call=3)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("tied", "bias"), [(False, True), (True, False)])
@pytest.mark.parametrize("mp", [1, 2])
def test_shards_come_back_bit_equal_and_in_model_order(dtype: str, tied: bool, bias: bool, mp: int) -> None:
    config = model_config(
        tie_word_embeddings=tied,
        qkv_has_bias=bias,
        num_layers=2,
        param_init_type=dtype,
        hidden_size=24,
        num_heads=12,
    )
    mesh, rank = Mesh(1, mp), mp - 1
    # Building needs no communication when the group is left out; only generating would.
    model = build(config, Groups(mesh, rank))
    numpy_dtype = {"float32": np.float32, "float16": np.float16, "bfloat16": bfloat16}[dtype]
    shards = random_shards(config, mesh, rank, seed=1, dtype=numpy_dtype)
    assert any((array != 0).any() for array in shards.values())
    assert not any((array != 0).any() for _, array in model.shards()), "the fresh model must differ"
    model.load(shards)
    returned = dict(model.shards())
    assert list(returned) == list(shards)
    for name, array in shards.items():
        assert returned[name].dtype == array.dtype, name
        np.testing.assert_array_equal(returned[name].view(np.uint8), array.view(np.uint8), err_msg=name)


def test_loading_takes_pairs_and_tensors() -> None:
    config = model_config()
    model = build(config)
    shards = random_shards(config, WHOLE.mesh, 0, seed=2)
    model.load((name, Tensor(array)) for name, array in shards.items())
    for name, array in model.shards():
        np.testing.assert_array_equal(array, shards[name], err_msg=name)


@pytest.mark.parametrize("as_pairs", [False, True])
def test_loading_lists_every_fault(as_pairs: bool) -> None:
    config = model_config()
    model = build(config)
    shards = random_shards(config, WHOLE.mesh, 0, seed=3)
    missing = "model.layers.0.attention.wk.bias"
    misshaped = "model.layers.0.feed_forward.w2.weight"
    del shards[missing]
    shards[misshaped] = shards[misshaped].T
    shards["model.layers.1.ffn_norm.weight"] = shards["model.norm_out.weight"]
    with pytest.raises(CheckpointError) as error:
        model.load(iter(shards.items()) if as_pairs else shards)
    message = str(error.value)
    assert "3 fault(s)" in message
    assert f"{missing}: missing" in message
    assert f"{misshaped}: shape (20, 16), this rank holds (16, 20)" in message
    assert "model.layers.1.ffn_norm.weight: not a parameter of this model" in message
    if not as_pairs:
        assert not any((array != 0).any() for _, array in model.shards()), "nothing may be written"


def test_a_name_given_twice_is_a_fault() -> None:
    config = model_config()
    shards = random_shards(config, WHOLE.mesh, 0, seed=3)
    pairs = [*shards.items(), ("model.norm_out.weight", shards["model.norm_out.weight"])]
    with pytest.raises(CheckpointError, match=r"model\.norm_out\.weight: given more than once"):
        build(config).load(pairs)


class _Compilations:
    """Counts graph compilations."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from mindspore.graph.api import _CellGraphExecutor

        self.count = 0
        plain = _CellGraphExecutor.compile

        def counting(*args: Any, **kwargs: Any) -> Any:
            executor_result = plain(*args, **kwargs)
            self.count += bool(executor_result[1])
            return executor_result

        monkeypatch.setattr(_CellGraphExecutor, "compile", counting)


def inputs(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    uniforms = rng.random((rows, RESPONSE)).astype(np.float32)
    return rng.integers(0, 24, (rows, PROMPT)), rng.integers(1, PROMPT + 1, rows), uniforms


def test_two_graphs_are_compiled_once_and_new_weights_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    compilations = _Compilations(monkeypatch)
    config = model_config()
    model = build(config)
    weights = [random_shards(config, WHOLE.mesh, 0, seed) for seed in (4, 5)]
    case = inputs(2, seed=6)
    outputs = []
    for shards in (weights[0], weights[1], weights[0]):
        model.load(shards)
        outputs.append(model.generate(*case))
    model.generate(*inputs(4, seed=7))
    assert compilations.count == 2
    np.testing.assert_array_equal(outputs[0].logprobs, outputs[2].logprobs)
    assert (outputs[0].logprobs != outputs[1].logprobs).any()
    fresh = build(config)
    fresh.load(weights[1])
    np.testing.assert_array_equal(fresh.generate(*case).logprobs, outputs[1].logprobs)


def test_micro_batches_give_what_one_batch_gives() -> None:
    config = model_config()
    shards = random_shards(config, WHOLE.mesh, 0, seed=8)
    case = inputs(6, seed=9)
    outputs = []
    for batch_size in (6, 2):
        model = build(config, batch_size=batch_size, stop_token_ids=(3, 11))
        model.load(shards)
        outputs.append(model.generate(*case))
    for whole, parts in zip(*outputs, strict=True):
        np.testing.assert_allclose(whole, parts, atol=1e-5, rtol=0)
    assert len(set(outputs[0].lengths.tolist())) > 1


@pytest.fixture
def looping_model() -> PPOModelInfer:
    """Without layers' influence: the embedding of id i points at the output row of id i + 1."""
    config = model_config(hidden_size=24, num_heads=4, n_kv_heads=4)
    shards = {name: array * 0 for name, array in random_shards(config, WHOLE.mesh, 0, seed=0).items()}
    shards["model.tok_embeddings.embedding_weight"] += 10 * np.eye(24, dtype=np.float32)
    shards["lm_head.weight"] += np.roll(np.eye(24, dtype=np.float32), 1, axis=0)
    shards["model.norm_out.weight"] += 1
    model = build(config, batch_size=3, do_sample=False, stop_token_ids=(7, 20), pad_token_id=20)
    model.load(shards)
    return model


def test_hand_worked_stops_and_early_end(
    looping_model: PPOModelInfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    decode = looping_model._decode

    def counting(*args: Any) -> Any:
        calls.append(1)
        return decode(*args)

    monkeypatch.setattr(looping_model, "_decode", counting)
    uniforms = np.zeros((3, RESPONSE), np.float32)
    # Stop tokens 7 and 20 (which is also the pad): after 6 comes 7 at once; 4 5 [6 7]; 0 1 2 .. 8 goes on.
    ids = np.array([[20, 20, 20, 6], [20, 3, 4, 5], [0, 1, 2, 8]])
    output = looping_model.generate(ids, np.array([1, 3, 4]), uniforms)
    pad = [20]
    assert output.response_ids.tolist() == [[7] + pad * 7, [6, 7] + pad * 6, list(range(9, 17))]
    assert output.lengths.tolist() == [1, 2, 8]
    assert output.stopped.tolist() == [True, True, False]
    # The norm makes the embedding sqrt(24) long, which is the logit of the next id; the others have 0.
    logprob = np.sqrt(24) - np.log(np.exp(np.sqrt(24)) + 23)
    expected = np.where(np.arange(8) < output.lengths[:, None], logprob, 0)
    np.testing.assert_allclose(output.logprobs, expected, atol=1e-5, rtol=0)
    assert len(calls) == 3  # 7 steps after the prefill, 3 a call

    calls.clear()
    ids[2] = [15, 16, 17, 18]
    output = looping_model.generate(ids, np.array([1, 3, 4]), uniforms)
    assert output.response_ids[2].tolist() == [19, 20] + pad * 6
    assert output.lengths.tolist() == [1, 2, 2]
    assert output.stopped.all()
    assert len(calls) == 1  # all rows had ended


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"top_p": 0.0}, "top_p must lie in"),
        ({"top_k": -1}, "top_k must not be negative"),
        ({"valid_vocab_size": 25}, "valid_vocab_size must lie in"),
        ({"max_response_length": 0}, "max_response_length must be positive"),
    ],
)
def test_numbers_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(model_config(), **changes)


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="key/value heads by mp: 2 is not divisible by 4"):
        build(model_config(), Groups(Mesh(1, 4), 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": np.zeros((3, PROMPT))}, "prompts by batch_size: 3 is not divisible by 2"),
        ({"ids": np.zeros((2, PROMPT + 1))}, "prompt_ids has shape"),
        ({"lengths": np.array([0, 1])}, "prompt lengths must lie in 1 .. 4, got 0 .. 1"),
        ({"lengths": np.array([1, 5])}, "prompt lengths must lie in 1 .. 4, got 1 .. 5"),
        ({"uniforms": np.ones((2, RESPONSE))}, "uniforms must lie in"),
        ({"uniforms": np.zeros((2, RESPONSE - 1))}, "uniforms has shape"),
    ],
)
def test_bad_inputs_are_refused(change: dict[str, np.ndarray], message: str) -> None:
    ids, lengths, uniforms = inputs(2, seed=1)
    case = {"ids": ids, "lengths": lengths, "uniforms": uniforms} | change
    with pytest.raises(ValueError, match=message):
        build(model_config()).generate(case["ids"], case["lengths"], case["uniforms"])
