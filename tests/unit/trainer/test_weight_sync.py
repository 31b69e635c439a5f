"""Train to infer on one worker: the sync brings every weight, and the check sees any that it did not."""

from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor

from mindrlhf.configs.keys import JobConfig
from mindrlhf.models.networks import PPOModelTrain
from mindrlhf.parallel.checksum import ReplicaMismatchError
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Mesh
from mindrlhf.runtime.device import Runtime
from mindrlhf.runtime.host_exchange import HostExchange
from mindrlhf.trainer.builder import build_infer
from mindrlhf.trainer.weight_sync import WeightSync
from mindrlhf.utils.errors import MindRLHFError

GROUPS = Groups(Mesh(), 0)
EXCHANGE = HostExchange(Runtime(0, 1))


@pytest.fixture(scope="module", params=[False, True], ids=["policy", "policy with a value head"])
def weight_sync(request: pytest.FixtureRequest, tiny_job: JobConfig) -> WeightSync:
    model = tiny_job.train.model
    train = PPOModelTrain(
        model,
        GROUPS,
        prompt_length=4,
        temperature=1.0,
        valid_vocab_size=model.vocab_size,
        value_head=request.param,
    )
    rng = np.random.default_rng(0)
    train.load({n: rng.standard_normal(a.shape).astype(np.float32) for n, a in train.shards()})
    return WeightSync(train, build_infer(tiny_job, GROUPS))


def test_sync_brings_every_weight(weight_sync: WeightSync) -> None:
    weight_sync.infer.load({name: np.zeros_like(array) for name, array in weight_sync.infer.shards()})
    assert set(weight_sync.differences()) == set(weight_sync.infer.layouts)
    weight_sync.sync()
    weight_sync.verify(EXCHANGE)
    trained = dict(weight_sync.train.shards())
    for name, array in weight_sync.infer.shards():
        np.testing.assert_array_equal(array, trained[name], err_msg=name)


def test_one_process_copies_straight_into_the_generating_model(
    weight_sync: WeightSync, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor is made, and the stored parameters stay where their graphs know them."""

    def addresses() -> list[int]:
        holders = weight_sync.infer._weights._holder.values()
        return [holder.parameter.asnumpy().ctypes.data for holder in holders]

    class NoTensor:
        def __init__(self, *args: object) -> None:
            raise AssertionError("a copy that is not needed")

    before = addresses()
    weight_sync.infer.load({name: np.zeros_like(array) for name, array in weight_sync.infer.shards()})
    monkeypatch.setattr("mindrlhf.models.qwen2.generator_weights.Tensor", NoTensor)
    weight_sync.sync()
    monkeypatch.undo()
    assert addresses() == before
    weight_sync.verify(EXCHANGE)


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.attention.wk.bias", "model.norm_out.weight", "model.tok_embeddings.embedding_weight"],
)
def test_verify_names_a_weight_that_differs_in_its_last_bit(weight_sync: WeightSync, name: str) -> None:
    weight_sync.sync()
    parameter = weight_sync.train.parameters[name]
    array = parameter.asnumpy().copy()
    array.flat[-1] = np.nextafter(array.flat[-1], np.float32(9))
    parameter.set_data(Tensor(array))
    with pytest.raises(MindRLHFError, match=name):
        weight_sync.verify(EXCHANGE)
    assert weight_sync.differences() == [name]
    weight_sync.sync()
    weight_sync.verify(EXCHANGE)


def test_unequal_copies_reach_the_exchange_that_the_other_ranks_wait_in(
    weight_sync: WeightSync, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group whose copies of a whole tensor differ must not raise before ``verify`` has told all ranks."""
    weight_sync.sync()

    def unequal(shards: object, layouts: object, groups: object) -> dict[str, int]:
        raise ReplicaMismatchError(["model.norm_out.weight"], "copies differ")

    monkeypatch.setattr("mindrlhf.trainer.weight_sync.checksums", unequal)
    told: list[int] = []

    class Exchange(HostExchange):
        def every_rank(self, array: np.ndarray) -> np.ndarray:
            told.append(int(array[0]))
            return super().every_rank(array)

    with pytest.raises(MindRLHFError, match=r"model\.norm_out\.weight"):
        weight_sync.verify(Exchange(Runtime(0, 1)))
    assert told == [1]
