"""Parameters on the device and in host memory, and whose turn it is."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor

from mindrlhf.models.device_memory import DeviceMemory, ParameterStore

VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


def store(dtype: ms.Type = ms.float32) -> ParameterStore:
    return ParameterStore({name: Parameter(Tensor(VALUES).astype(dtype), name=name) for name in ("a", "b")})


@pytest.mark.parametrize("dtype", [ms.float32, ms.bfloat16, ms.float16])
def test_values_and_types_survive_the_way_to_the_host_and_back(dtype: ms.Type) -> None:
    weights = store(dtype)
    whole = weights.device_bytes
    assert whole == 2 * VALUES.size * (4 if dtype == ms.float32 else 2)
    weights.to_host(["a"])
    assert weights.parameter("a").shape == (0,), "a graph that took it would fail"
    assert weights.device_bytes == whole / 2
    weights.to_host()
    assert weights.device_bytes == 0
    for name in weights:
        assert isinstance(weights[name], np.ndarray)
        assert weights[name].shape == VALUES.shape
        np.testing.assert_array_equal(weights.array(name).astype(np.float32), VALUES)
    weights.to_device()
    for name in weights:
        assert weights.parameter(name).dtype == dtype
        np.testing.assert_array_equal(weights.parameter(name).asnumpy().astype(np.float32), VALUES)


@pytest.mark.parametrize("on_host", [False, True])
def test_values_are_replaced_and_changed_wherever_they_are(on_host: bool) -> None:
    weights = store()
    if on_host:
        weights.to_host()
    weights.set("a", Tensor(VALUES + 1))
    weights.change("b", lambda array: np.multiply(array, 2, out=array))
    weights.to_device()
    np.testing.assert_array_equal(weights.parameter("a").asnumpy(), VALUES + 1)
    np.testing.assert_array_equal(weights.parameter("b").asnumpy(), 2 * VALUES)


def test_offloaded_models_take_turns_and_the_others_stay() -> None:
    memory, (stays, first, second) = DeviceMemory(), (store() for _ in range(3))
    one = stays.device_bytes
    memory.add(stays, offloaded=False)
    for weights in (first, second):
        memory.add(weights, offloaded=True)
    memory.watch("moments", lambda: 5)

    def present() -> list[bool]:
        return [weights.device_bytes > 0 for weights in (stays, first, second)]

    assert present() == [True, False, False]
    for used, expected in (
        (second, [True, False, True]),
        (stays, [True, False, True]),  # nobody has to go for it
        (first, [True, True, False]),
        (first, [True, True, False]),
        (second, [True, False, True]),
    ):
        memory.use(used)
        assert present() == expected
    assert memory.most == {"weights": 2 * one, "moments": 5, "gradients": 0, "kv_cache": 0}
    second.to_host()
    assert memory.measure()["weights"] == one
    assert memory.most["weights"] == 2 * one
