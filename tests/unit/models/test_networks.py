"""Loading the networks over whole sequences: strict, in model order, bit-equal back."""

from __future__ import annotations

import numpy as np
import pytest

from mindrlhf.configs.keys import ModelConfig
from mindrlhf.models.networks import CriticModel, PPOModelTrain, RewardModel, SequenceModel
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Mesh

WHOLE = Groups(Mesh(), 0)


def config(*, tied: bool = False, bias: bool = True) -> ModelConfig:
    return ModelConfig(
        vocab_size=24,
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        n_kv_heads=2,
        intermediate_size=20,
        tie_word_embeddings=tied,
        qkv_has_bias=bias,
    )


def models(groups: Groups = WHOLE) -> list[SequenceModel]:
    def policy(model: ModelConfig, value_head: bool) -> PPOModelTrain:
        return PPOModelTrain(
            model, groups, prompt_length=4, temperature=1.0, valid_vocab_size=24, value_head=value_head
        )

    return [
        policy(config(), False),
        policy(config(tied=True), True),
        policy(config(bias=False), False),
        CriticModel(config(), groups, prompt_length=4),
        RewardModel(config(tied=True), groups, prompt_length=4),
    ]


@pytest.mark.parametrize("groups", [WHOLE, Groups(Mesh(1, 2), 1)], ids=["whole", "second of two"])
def test_shards_come_back_bit_equal_and_in_the_order_of_the_layouts(groups: Groups) -> None:
    rng = np.random.default_rng(0)
    for model in models(groups):
        assert list(model.parameters) == list(model.layouts)
        shards = {
            name: rng.standard_normal(layout.local_shape).astype(np.float32)
            for name, layout in model.layouts.items()
        }
        model.load(shards)
        found = list(model.shards())
        assert [name for name, _ in found] == list(model.layouts)
        for name, array in found:
            np.testing.assert_array_equal(array, shards[name], err_msg=name)
        assert [name for name, _ in model.shards(["model.norm_out.weight"])] == ["model.norm_out.weight"]


def test_every_fault_is_listed_and_nothing_is_loaded() -> None:
    model = models()[0]
    shards = {name: np.ones(layout.shape, np.float32) for name, layout in model.layouts.items()}
    del shards["lm_head.weight"]
    shards["score_head.weight"] = np.ones((1, 16), np.float32)
    shards["model.norm_out.weight"] = np.ones(17, np.float32)
    with pytest.raises(ValueError, match="do not fit") as caught:
        model.load(shards)
    for fault in (
        "lm_head.weight: not given",
        "score_head.weight: not in the model",
        "model.norm_out.weight: shape (17,), expected (16,)",
    ):
        assert fault in str(caught.value)
    assert all((array == 0).all() for _, array in model.shards())
