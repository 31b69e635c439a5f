"""Minibatches, one optimizer step against torch, and the YAML's optimizer and schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops

from mindrlhf.configs.keys import JobConfig, PPOConfig, RunConfig
from mindrlhf.models.device_memory import ParameterStore
from mindrlhf.models.networks import Network
from mindrlhf.models.pieces import Gradients
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Layout, Mesh
from mindrlhf.trainer.optimizer import AdamW
from mindrlhf.trainer.train_step import MicroBatch, Objective, Statistics, TrainStep
from mindrlhf.trainer.update import minibatches
from mindrlhf.utils.errors import ConfigError

torch = pytest.importorskip("torch")

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((3, 2)).astype(np.float32)
BIAS = RNG.standard_normal(2).astype(np.float32)
X = RNG.standard_normal((6, 3)).astype(np.float32)
Y = 5 * RNG.standard_normal((6, 2)).astype(np.float32)
INVERSE_ROWS = np.array([1 / 6], np.float32)
MAX_NORM = 0.5
STEPS = 5
# Warm-up over 2 optimizer steps from half of the peak, then half a cosine over the other 8 down to 0.
SCHEDULE = {"type": "CosineWithWarmUpLR", "learning_rate": 0.1, "warmup_steps": 2, "total_steps": -1}
TOTAL_STEPS = 10
RATES = [0.05, 0.075, *(0.05 * (1 + np.cos(np.pi * step / 8)) for step in range(3))]


def minibatch_config(**changes: Any) -> PPOConfig:
    return PPOConfig(**{"seed": 5, "ppo_epochs": 3, "num_minibatches": 4, **changes})


def test_every_row_comes_once_an_epoch_in_a_fresh_order() -> None:
    rows = list(minibatches(16, minibatch_config(), iteration=0))
    assert [len(part) for part in rows] == [4] * 12
    epochs = [np.concatenate(rows[first : first + 4]) for first in (0, 4, 8)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(16))
    orders = [*epochs, np.concatenate(list(minibatches(16, minibatch_config(ppo_epochs=1), iteration=1)))]
    orders.append(np.concatenate(list(minibatches(16, minibatch_config(seed=6, ppo_epochs=1), iteration=0))))
    assert len({tuple(order) for order in orders}) == 5, "epochs, iterations and seeds have their own orders"


def test_minibatches_are_the_same_every_time() -> None:
    first, second = (list(minibatches(16, minibatch_config(), iteration=2)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


class Linear(Network):
    """A linear map."""

    def __init__(self) -> None:
        self.parameters = {
            "weight": Parameter(Tensor(WEIGHT), name="weight"),
            "bias": Parameter(Tensor(BIAS), name="bias"),
        }

    def rows(self, tokens: np.ndarray, *extra: np.ndarray) -> Any:
        raise NotImplementedError

    def to_device(self) -> None:
        """They are there."""

    def forward(self, x: np.ndarray) -> Any:  # type: ignore[override]
        y = ops.matmul(Tensor(x), Tensor(self.parameters["weight"])) + Tensor(self.parameters["bias"])
        return (y,), x

    def backward(self, tape: Any, d_outputs: Sequence[Tensor], gradients: Gradients) -> None:
        (dy,) = d_outputs
        gradients.add(("weight", "bias"), (ops.matmul(Tensor(tape.T.copy()), dy), dy.sum(axis=0)))


class Squares(nn.Cell):
    """Squared error, divided by the GLOBAL row count."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics = ("error", "rows")

    def construct(self, found: Tensor, y: Tensor, inverse_rows: Tensor) -> tuple[Tensor, Tensor]:
        error = ops.square(found - y).sum()
        return (error * inverse_rows).sum(), ops.stop_gradient(ops.stack((error, error * 0 + y.shape[0])))


def rows_of(x: np.ndarray, y: np.ndarray) -> MicroBatch:
    return MicroBatch((x,), (y, INVERSE_ROWS))


class Job:
    """The loss, its weights and the step; :meth:`restart` goes back to before the first step."""

    def __init__(self, config: RunConfig) -> None:
        self.network = Linear()
        parameters = self.network.parameters
        layouts = {name: Layout(Mesh(), tuple(p.shape), (None,) * p.ndim) for name, p in parameters.items()}
        self.optimizer = AdamW(config, ParameterStore(parameters), TOTAL_STEPS)
        objective = Objective(self.network, Squares())
        self.train_step = TrainStep(objective, self.optimizer, layouts, Groups(Mesh(), 0), MAX_NORM)

    def step(self, micro_batches: Sequence[MicroBatch]) -> tuple[Statistics, float, float]:
        """Statistics, gradient norm and learning rate."""
        return self.train_step.accumulate(micro_batches), *self.train_step.update()

    def restart(self) -> None:
        for name, array in (("weight", WEIGHT), ("bias", BIAS)):
            self.network.parameters[name].set_data(Tensor(array))
        self.optimizer.load({key: np.zeros(shape) for key, shape in self.optimizer.shapes().items()})

    def weights(self) -> tuple[np.ndarray, ...]:
        return tuple(parameter.asnumpy().copy() for parameter in self.network.parameters.values())


@pytest.fixture(scope="module")
def config(tiny_job: JobConfig) -> RunConfig:
    decay = {**tiny_job.train.optimizer, "weight_decay": 0.3}
    return replace(tiny_job.train, lr_schedule=SCHEDULE, optimizer=decay)


@pytest.fixture(scope="module")
def job(config: RunConfig) -> Job:
    return Job(config)


@pytest.fixture(scope="module")
def whole(job: Job) -> dict[str, Any]:
    """Five steps with each batch in one piece."""
    reports, weights = [], []
    for _ in range(STEPS):
        reports.append(job.step([rows_of(X, Y)]))
        weights.append(job.weights())
    return {"reports": reports, "weights": weights}


def torch_steps() -> tuple[list[float], list[tuple[np.ndarray, np.ndarray]]]:
    weight, bias = torch.tensor(WEIGHT, requires_grad=True), torch.tensor(BIAS, requires_grad=True)
    optimizer = torch.optim.AdamW(
        [{"params": [weight], "weight_decay": 0.3}, {"params": [bias], "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-5,
    )
    norms, weights = [], []
    for rate in RATES:
        optimizer.zero_grad()
        (((torch.tensor(X) @ weight + bias - torch.tensor(Y)) ** 2).sum() / 6).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_([weight, bias], MAX_NORM)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        weights.append((weight.detach().numpy().copy(), bias.detach().numpy().copy()))
    return norms, weights


def test_steps_equal_torch_with_clipping_decay_and_bias_correction(whole: dict[str, Any]) -> None:
    norms, weights = torch_steps()
    assert min(norms) > MAX_NORM, "clipping must bite"
    np.testing.assert_allclose([norm for _, norm, _ in whole["reports"]], norms, rtol=1e-5)
    for found, wanted in zip(whole["weights"], weights, strict=True):
        np.testing.assert_allclose(found[0], wanted[0], atol=1e-6)
        np.testing.assert_allclose(found[1], wanted[1], atol=1e-6)
    # With bias correction, a step moves a bias by about the rate.
    moved = np.abs(whole["weights"][1][1] - whole["weights"][0][1])
    np.testing.assert_allclose(moved, RATES[1], rtol=1e-2)


def test_warm_up_and_decay_count_optimizer_steps(whole: dict[str, Any]) -> None:
    np.testing.assert_allclose([rate for _, _, rate in whole["reports"]], RATES, rtol=1e-5, atol=1e-9)


def test_micro_batches_add_up_to_the_whole(job: Job, whole: dict[str, Any]) -> None:
    job.restart()
    parts = [rows_of(X[rows], Y[rows]) for rows in (slice(0, 2), slice(2, 4), slice(4, 6))]
    for (statistics, norm, _), weights in list(zip(whole["reports"], whole["weights"], strict=True))[:3]:
        found, found_norm, _ = job.step(parts)
        assert found == pytest.approx(statistics, rel=1e-5)
        assert found["rows"] == 6  # of all micro-batches
        assert found_norm == pytest.approx(norm, rel=1e-5)
        np.testing.assert_allclose(job.weights()[0], weights[0], atol=1e-6)


def test_gradients_that_are_given_up_do_not_come_into_the_next_step(job: Job, whole: dict[str, Any]) -> None:
    job.restart()
    for weights in whole["weights"][:3]:
        job.train_step.accumulate([rows_of(X, Y * np.float32("nan"))])
        job.train_step.discard()
        job.step([rows_of(X, Y)])
        for found, wanted in zip(job.weights(), weights, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_gradients_are_summed_by_name() -> None:
    gradients, one = Gradients(), np.array([1, 2], np.float32)
    for _ in range(3):
        gradients.add(("a", "b"), (Tensor(one), Tensor(10 * one)))
    gradients.add(("b",), (Tensor(one),))
    np.testing.assert_array_equal(gradients["a"].asnumpy(), 3 * one)
    np.testing.assert_array_equal(gradients["b"].asnumpy(), 31 * one)
    gradients.transform(lambda sums: [-one for one in sums])
    np.testing.assert_array_equal(gradients["a"].asnumpy(), -3 * one)
    gradients.clear()
    with pytest.raises(KeyError):
        gradients["a"]


def test_without_the_kernel_the_steps_are_the_same(config: RunConfig, whole: dict[str, Any]) -> None:
    plain = Job(config)
    plain.optimizer._kernel = None
    for (_, _, rate), weights in zip(whole["reports"], whole["weights"], strict=True):
        assert plain.step([rows_of(X, Y)])[2] == rate
        for found, wanted in zip(plain.weights(), weights, strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("dtype", [ms.bfloat16, ms.float16])
def test_weights_of_fewer_bits_follow_their_float32_masters(config: RunConfig, dtype: ms.Type) -> None:
    """A rate of which single steps are lost in the weights' rounding, which is why there are masters."""
    names, start = ("weight", "bias"), {"weight": WEIGHT, "bias": BIAS}
    slow = replace(config, lr_schedule={**SCHEDULE, "learning_rate": 1e-4})
    runs = []
    for kind in (ms.float32, dtype):
        parameters = {
            name: Parameter(Tensor(start[name]).astype(dtype).astype(kind), name=name) for name in names
        }
        optimizer = AdamW(slow, ParameterStore(parameters), TOTAL_STEPS)
        for _ in range(8):
            gradients = Gradients()
            gradients.add(names, [Tensor(np.sign(start[name])).astype(kind) for name in names])
            optimizer.step(gradients, 1.0)
        runs.append((parameters, optimizer))
    (exact, _), (rounded, optimizer) = runs
    again = AdamW(slow, ParameterStore(rounded), TOTAL_STEPS)
    again.load(optimizer.arrays())
    for name in names:
        wanted = exact[name].asnumpy()
        assert np.abs(wanted - Tensor(start[name]).astype(dtype).asnumpy().astype(np.float32)).max() > 2e-4
        np.testing.assert_array_equal(optimizer.state.array(f"master.{name}"), wanted)
        np.testing.assert_array_equal(again.state.array(f"master.{name}"), wanted)
        np.testing.assert_array_equal(rounded[name].asnumpy(), Tensor(wanted).astype(dtype).asnumpy())
    assert not [key for key in runs[0][1].state if key.startswith("master.")]


def test_a_schedule_mindformers_refuses_is_a_config_error(tiny_job: JobConfig) -> None:
    bad_schedule = replace(tiny_job.train, lr_schedule={**SCHEDULE, "learning_rate": "fast"})
    with pytest.raises(ConfigError, match=r"tiny\.yaml: lr_schedule"):
        AdamW(bad_schedule, ParameterStore({}), 10)


@pytest.mark.parametrize("fault", ["nan", "inf", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(job: Job, fault: str) -> None:
    """Weights, moments and step count stay bit for bit; the step after it is as if it had not been."""
    job.restart()
    job.step([rows_of(X, Y)])
    state = job.optimizer.state
    before = [*job.weights(), *(state.array(key).copy() for key in state)]
    x, y = X.copy(), Y.copy()
    if fault == "gradient":  # each loss, 4e37, is finite, the square sum of all gradients is not
        y[:] = 8e18
    else:
        y[4] = float(fault)
    parts = [rows_of(x[rows], y[rows]) for rows in (slice(0, 2), slice(2, 4), slice(4, 6))]
    job.train_step.accumulate(parts)
    assert np.isfinite(job.train_step.losses).tolist() == [True, True, fault == "gradient"]
    norm, rate = job.train_step.update()
    assert not np.isfinite(norm)
    assert rate == 0
    assert job.train_step.losses == []
    after = [*job.weights(), *(state.array(key) for key in state)]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)
    job.step([rows_of(X, Y)])
    found = job.weights()
    job.restart()
    for _ in range(2):
        job.step([rows_of(X, Y)])
    for one, other in zip(found, job.weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_loss_that_is_not_finite_is_seen_whatever_its_gradient(job: Job) -> None:
    job.restart()
    job.train_step.accumulate([rows_of(X, Y)])
    job.train_step._losses[0] = float("nan")  # as a loss whose gradient has been cut off
    before = job.weights()
    norm, _ = job.train_step.update()
    assert np.isnan(norm)
    for old, new in zip(before, job.weights(), strict=True):
        np.testing.assert_array_equal(old, new)
