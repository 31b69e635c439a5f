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
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Layout, Mesh
from mindrlhf.trainer.gradients import GradientBuffers
from mindrlhf.trainer.optimizer import build_optimizer
from mindrlhf.trainer.train_step import Statistics, TrainStep
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


class Squares(nn.Cell):
    """Mean squared error of a linear map, divided by the GLOBAL row count."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics = ("error", "rows")
        self.weight = Parameter(Tensor(WEIGHT), name="weight")
        self.bias = Parameter(Tensor(BIAS), name="bias")

    def construct(self, x: Tensor, y: Tensor, inverse_rows: Tensor) -> tuple[Tensor, Tensor]:
        error = ops.square(ops.matmul(x, self.weight) + self.bias - y).sum()
        return (error * inverse_rows).sum(), ops.stop_gradient(ops.stack((error, error * 0 + x.shape[0])))


class Job:
    """The loss, its weights and the step; :meth:`restart` goes back to before the first step."""

    def __init__(self, config: RunConfig, buffers: GradientBuffers | None = None) -> None:
        self.loss = Squares()
        parameters = self.loss.trainable_params()
        layouts = {p.name: Layout(Mesh(), tuple(p.shape), (None,) * p.ndim) for p in parameters}
        self.optimizer = build_optimizer(config, parameters, TOTAL_STEPS)
        self.train_step = TrainStep(
            self.loss, self.optimizer, layouts, Groups(Mesh(), 0), MAX_NORM, buffers=buffers
        )

    def step(self, micro_batches: Sequence[tuple[np.ndarray, ...]]) -> tuple[Statistics, float, float]:
        """Statistics, gradient norm and learning rate."""
        return self.train_step.accumulate(micro_batches), *self.train_step.update()

    def restart(self) -> None:
        self.loss.weight.set_data(Tensor(WEIGHT))
        self.loss.bias.set_data(Tensor(BIAS))
        for state in (*self.optimizer.exp_avg, *self.optimizer.exp_avg_sq, self.optimizer.global_step):
            state.set_data(Tensor(np.zeros(state.shape), state.dtype))

    def weights(self) -> tuple[np.ndarray, np.ndarray]:
        return self.loss.weight.asnumpy().copy(), self.loss.bias.asnumpy().copy()


@pytest.fixture(scope="module")
def buffers() -> GradientBuffers:
    return GradientBuffers()


@pytest.fixture(scope="module")
def config(tiny_job: JobConfig) -> RunConfig:
    decay = {**tiny_job.train.optimizer, "weight_decay": 0.3}
    return replace(tiny_job.train, lr_schedule=SCHEDULE, optimizer=decay)


@pytest.fixture(scope="module")
def job(config: RunConfig, buffers: GradientBuffers) -> Job:
    return Job(config, buffers)


@pytest.fixture(scope="module")
def whole(job: Job) -> dict[str, Any]:
    """Five steps with each batch in one piece."""
    reports, weights = [], []
    for _ in range(STEPS):
        reports.append(job.step([(X, Y, INVERSE_ROWS)]))
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


def test_norms_and_biases_get_no_weight_decay(job: Job) -> None:
    optimizer = job.optimizer
    decays = dict(zip([p.name for p in optimizer.parameters], optimizer.get_weight_decay(), strict=True))
    assert float(decays["weight"]) == pytest.approx(0.3)
    assert float(decays["bias"]) == 0.0


def test_micro_batches_add_up_to_the_whole(job: Job, whole: dict[str, Any]) -> None:
    job.restart()
    parts = [(X[rows], Y[rows], INVERSE_ROWS) for rows in (slice(0, 2), slice(2, 4), slice(4, 6))]
    for (statistics, norm, _), weights in list(zip(whole["reports"], whole["weights"], strict=True))[:3]:
        found, found_norm, _ = job.step(parts)
        assert found == pytest.approx(statistics, rel=1e-5)
        assert found["rows"] == 6  # of all micro-batches
        assert found_norm == pytest.approx(norm, rel=1e-5)
        np.testing.assert_allclose(job.loss.weight.asnumpy(), weights[0], atol=1e-6)


def test_steps_that_take_turns_share_their_gradient_buffers(
    job: Job, whole: dict[str, Any], config: RunConfig, buffers: GradientBuffers
) -> None:
    """What one step left, or gave up, does not come into the other's."""
    other = Job(config, buffers)
    assert list(map(id, other.train_step._gradients)) == list(map(id, job.train_step._gradients))
    job.restart()
    for weights in whole["weights"][:3]:
        for one in (job, other):
            one.train_step.accumulate([(X, Y * np.float32("nan"), INVERSE_ROWS)])
            one.train_step.discard()
            one.step([(X, Y, INVERSE_ROWS)])
            for found, wanted in zip(one.weights(), weights, strict=True):
                np.testing.assert_array_equal(found, wanted)


def test_a_buffer_for_each_parameter_of_a_shape_and_type() -> None:
    def parameters(*kinds: tuple[tuple[int, ...], type]) -> list[Parameter]:
        return [
            Parameter(Tensor(np.ones(shape, kind)), name=f"p{n}") for n, (shape, kind) in enumerate(kinds)
        ]

    buffers = GradientBuffers()
    first = buffers.matching(parameters(((2, 3), np.float32), ((2, 3), np.float32), ((3,), np.float32)))
    second = buffers.matching(parameters(((3,), np.float32), ((2, 3), np.float16), ((2, 3), np.float32)))
    assert len({buffer.name for buffer in (*first, *second)}) == len({id(b) for b in (*first, *second)}) == 4
    assert (second[0] is first[2], second[2] is first[0]) == (True, True)
    assert [(tuple(buffer.shape), buffer.dtype) for buffer in second] == [
        ((3,), ms.float32),
        ((2, 3), ms.float16),
        ((2, 3), ms.float32),
    ]
    assert not any(buffer.requires_grad or buffer.asnumpy().any() for buffer in (*first, *second))


def test_a_section_mindformers_refuses_is_a_config_error(tiny_job: JobConfig) -> None:
    parameters = [Parameter(Tensor(WEIGHT), name="weight")]
    bad_schedule = replace(tiny_job.train, lr_schedule={**SCHEDULE, "learning_rate": "fast"})
    with pytest.raises(ConfigError, match=r"tiny\.yaml: lr_schedule"):
        build_optimizer(bad_schedule, parameters, 10)
    bad_optimizer = replace(tiny_job.train, optimizer={"type": "AdamW", "eps": -1.0})
    with pytest.raises(ConfigError, match=r"tiny\.yaml: optimizer"):
        build_optimizer(bad_optimizer, parameters, 10)


@pytest.mark.parametrize("fault", ["nan", "inf", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(job: Job, fault: str) -> None:
    """Weights, moments and step count stay bit for bit; the step after it is as if it had not been."""
    job.restart()
    job.step([(X, Y, INVERSE_ROWS)])
    states = [*job.optimizer.exp_avg, *job.optimizer.exp_avg_sq, job.optimizer.global_step]
    before = [*job.weights(), *(state.asnumpy().copy() for state in states)]
    x, y = X.copy(), Y.copy()
    if fault == "gradient":  # each loss, 4e37, is finite, the square sum of all gradients is not
        y[:] = 8e18
    else:
        y[4] = float(fault)
    parts = [(x[rows], y[rows], INVERSE_ROWS) for rows in (slice(0, 2), slice(2, 4), slice(4, 6))]
    job.train_step.accumulate(parts)
    assert np.isfinite(job.train_step.losses).tolist() == [True, True, fault == "gradient"]
    norm, rate = job.train_step.update()
    assert not np.isfinite(norm)
    assert rate == 0
    assert job.train_step.losses == []
    after = [*job.weights(), *(state.asnumpy() for state in states)]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)
    job.step([(X, Y, INVERSE_ROWS)])
    found = job.weights()
    job.restart()
    for _ in range(2):
        job.step([(X, Y, INVERSE_ROWS)])
    for one, other in zip(found, job.weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_loss_that_is_not_finite_is_seen_whatever_its_gradient(job: Job) -> None:
    job.restart()
    job.train_step.accumulate([(X, Y, INVERSE_ROWS)])
    job.train_step._losses[0] = float("nan")  # as a loss whose gradient has been cut off
    before = job.weights()
    norm, _ = job.train_step.update()
    assert np.isnan(norm)
    for old, new in zip(before, job.weights(), strict=True):
        np.testing.assert_array_equal(old, new)
