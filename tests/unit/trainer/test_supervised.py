"""SFT and reward modelling: what their flags refuse, and their arithmetic by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindrlhf.configs.flags import RewardOptions
from mindrlhf.configs.keys import JobConfig, StagePlan
from mindrlhf.configs.load import load_stage, with_peak
from mindrlhf.data.sequences import Sequences
from mindrlhf.models.networks import RewardModel
from mindrlhf.models.score_head import new_score_head
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Mesh
from mindrlhf.runtime.device import Runtime
from mindrlhf.runtime.host_exchange import HostExchange
from mindrlhf.trainer.experience import sequence_inputs
from mindrlhf.trainer.recipes.calibration import calibrate, fold, gain_and_bias
from mindrlhf.trainer.recipes.reward_model import PairLoss
from mindrlhf.trainer.recipes.sft import SFTLoss
from mindrlhf.trainer.recipes.supervised import over_rows
from mindrlhf.utils.errors import ConfigError


@pytest.fixture
def yaml(repo_root: Path) -> Path:
    return repo_root / "model_configs" / "qwen_ppo" / "finetune_qwen2_tiny.yaml"


def options(yaml: Path, tmp_path: Path, **changes: Any) -> RewardOptions:
    weights = tmp_path / "weights.ckpt"
    weights.touch()
    given: dict[str, Any] = {
        "config_path": yaml,
        "load_sft_checkpoint": weights,
        "mind_dataset_dir": tmp_path / "data",
        "save_ckpt_dir": tmp_path / "save",
        "use_parallel": False,
    }
    return RewardOptions(**given | changes)


def test_plan_from_the_yaml_and_from_flags(yaml: Path, tmp_path: Path) -> None:
    plan = load_stage(options(yaml, tmp_path), 1)
    assert (plan.epochs, plan.batch_size, plan.micro_batch_size) == (1, 2, 2)
    split = load_stage(options(yaml, tmp_path, use_parallel=True), 4)
    assert (split.batch_size, split.micro_batch_size) == (4, 2)  # 2 rows on each of 2 replicas
    flags = options(yaml, tmp_path, use_parallel=True, epochs=3, batch_size=12, micro_batch_size=3)
    plan = load_stage(flags, 4)
    assert (plan.epochs, plan.batch_size, plan.micro_batch_size) == (3, 12, 3)
    assert plan.total_steps(35) == 3 * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "--epochs: out of range .0. - must be a whole number >= 1"),
        ({"batch_size": 0}, "--batch_size: out of range .0. - must be a whole number >= 1"),
        ({"micro_batch_size": -1}, "--micro_batch_size: out of range"),
        ({"batch_size": 6, "micro_batch_size": 4}, "--micro_batch_size: 4 does not divide the 6 rows"),
        ({"eval_fraction": 1.0}, "--eval_fraction: out of range .1.0. - must be a number >= 0 and < 1"),
        ({"eval_fraction": math.nan}, "--eval_fraction: not finite"),
        ({"learning_rate": 0.0}, "--learning_rate: out of range"),
        ({"max_grad_norm": math.nan}, "--max_grad_norm: not finite"),
        ({"center_coef": -0.1}, "--center_coef: out of range"),
        ({"calibrate": "on"}, "--calibrate: not allowed .'on'. - must be one of sft, data, off"),
        ({"calibration_samples": 1}, "--calibration_samples: out of range"),
        ({"valid_vocab_size": 1025}, "--valid_vocab_size: 1025 is above the vocabulary"),
        ({"seed": -1}, "--seed: out of range"),
    ],
)
def test_flags_out_of_range(yaml: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_stage(options(yaml, tmp_path, **changes), 1)


def test_faults_of_flags_and_yaml_come_together(yaml: Path, tmp_path: Path) -> None:
    generate = yaml.with_name("generate_qwen2_tiny.yaml")
    wrong = options(generate, tmp_path, use_parallel=True, batch_size=3, epochs=0)
    with pytest.raises(ConfigError) as caught:
        load_stage(wrong, 2)
    message = str(caught.value)
    for fault in ("--epochs", "optimizer: missing", "lr_schedule: missing", "= 4 ranks, but there are 2"):
        assert fault in message
    with pytest.raises(ConfigError, match=r"--batch_size: 3 is not divisible by data_parallel \(2\)"):
        load_stage(options(yaml, tmp_path, use_parallel=True, batch_size=3), 4)


def test_steps(yaml: Path, tmp_path: Path) -> None:
    plan = load_stage(options(yaml, tmp_path, batch_size=8), 1)
    with pytest.raises(ConfigError, match="--batch_size: 8 rows, but there are only 7 to train on"):
        plan.total_steps(7)
    slow = {"type": "ConstantWarmUpLR", "learning_rate": 1.0, "warmup_steps": 9, "total_steps": -1}
    never = StagePlan(replace(plan.config, lr_schedule=slow), 1, 8, 8)
    with pytest.raises(ConfigError, match=r"warm-up never ends \(9 steps of warm-up, 8 optimizer steps"):
        never.total_steps(64)
    assert never.total_steps(72) == 9


def test_another_peak_keeps_the_shape(yaml: Path, tmp_path: Path) -> None:
    plan = load_stage(options(yaml, tmp_path, learning_rate=1e-3), 1)
    assert plan.config.lr_schedule["learning_rate"] == 1e-3
    assert plan.config.lr_schedule["lr_end"] == pytest.approx(1e-4)
    assert with_peak({"base_lr": 2.0, "eta_min": 1.0, "t_max": 3}, 4.0) == {
        "base_lr": 4.0,
        "eta_min": 2.0,
        "t_max": 3,
    }


def loss_and_slopes(
    loss: nn.Cell, outputs: np.ndarray, *targets: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """A loss of one output, its statistics, and its gradient."""
    arrays = [Tensor(array.astype(np.float32)) for array in (outputs, *targets)]
    (value, sums), slopes = ms.value_and_grad(loss, 0, None, has_aux=True)(*arrays)
    return float(value), sums.asnumpy(), slopes.asnumpy()


def test_sft_loss_by_hand() -> None:
    """-(-1 - 2 - 4) over 5 tokens of the whole step; what is masked may be anything."""
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    logprobs = np.array([[-1.0, -2.0, np.nan], [-4.0, -1e30, 3.0]])
    mask = Tensor(np.array([[1, 1, 0], [1, 0, 0]], np.float32))
    given = Tensor(logprobs.astype(np.float32))
    loss, sums = SFTLoss()(given, given, mask, Tensor([0.2], ms.float32))
    assert float(loss) == pytest.approx(7 / 5, rel=1e-6)
    assert sums.asnumpy().tolist() == pytest.approx([7.0])


@pytest.mark.parametrize("center_coef", [0.0, 0.5])
def test_pair_loss_against_a_loop(center_coef: float) -> None:
    """Scores far apart in both directions, and equal ones, where the derivative is -1/2."""
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    chosen, rejected = [0.5, -1.0, 60.0, -80.0, 2.0], [0.2, 1.5, -60.0, 80.0, 2.0]
    expected_loss = correct = margin_sum = center = derivative = 0.0
    for good, bad in zip(chosen, rejected, strict=True):
        margin = good - bad
        # log(1 + exp(-m)), whichever way does not overflow
        expected_loss += math.log1p(math.exp(-margin)) if margin > -50 else -margin
        correct += margin > 0
        margin_sum += margin
        center += (good + bad) ** 2
        derivative += -margin / (1 + math.exp(margin)) + center_coef * 2 * (good + bad) ** 2
    loss, sums, slopes = loss_and_slopes(PairLoss(center_coef), np.array(chosen + rejected), np.array([0.1]))
    slope = (slopes * np.array(chosen + rejected)).sum()  # of a factor of all scores
    assert loss == pytest.approx(0.1 * (expected_loss + center_coef * center), rel=1e-5)
    assert sums.tolist() == pytest.approx([expected_loss, correct, margin_sum], rel=1e-5)
    assert slope == pytest.approx(0.1 * derivative, rel=1e-5)


def test_equal_scores_pull_apart() -> None:
    """The gradient of -log sigmoid at 0 is -1/2 and not 0."""
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    _, _, slopes = loss_and_slopes(PairLoss(0.0), np.zeros(2), np.ones(1))
    assert slopes.tolist() == pytest.approx([-0.5, 0.5])


def test_gain_and_bias() -> None:
    scores = np.array([1.0, 3.0, 5.0, 11.0], np.float32)  # mean 5, variance 14
    gain, bias = gain_and_bias(scores)
    assert gain == pytest.approx(1 / math.sqrt(14))
    assert bias == pytest.approx(-5 / math.sqrt(14))
    scaled = gain * scores.astype(np.float64) + bias
    assert scaled.mean() == pytest.approx(0, abs=1e-12)
    assert scaled.std() == pytest.approx(1)
    assert gain_and_bias(np.full(4, 3.0, np.float32)) == (1.0, -3.0)


@pytest.fixture(scope="module")
def reward(tiny_job: JobConfig) -> RewardModel:
    model = RewardModel(tiny_job.train.model, Groups(Mesh(), 0), prompt_length=4)
    rng = np.random.default_rng(0)
    shards = {
        name: rng.normal(0, 0.3, layout.shape).astype(np.float32) for name, layout in model.layouts.items()
    }
    model.load(shards | new_score_head(16, 0, "reward") | {"score_head.bias": np.array([0.7], np.float32)})
    return model


def some_sequences(count: int) -> Sequences:
    rng = np.random.default_rng(1)
    return Sequences(
        rng.integers(2, 24, (count, 7)).astype(np.int32),
        rng.integers(1, 5, count).astype(np.int32),
        rng.integers(1, 4, count).astype(np.int32),
    )


def scores_of(model: RewardModel, part: Sequences) -> np.ndarray:
    inputs = (*sequence_inputs(*part, 4), part.response_lengths)
    exchange = HostExchange(Runtime(0, 1))
    forward = lambda *arrays: model(*arrays)[0]  # noqa: E731
    return over_rows(forward, inputs, Mesh(), exchange, rows_per_pass=4)


def test_folded_head_gives_mean_0_and_std_1(reward: RewardModel, yaml: Path, tmp_path: Path) -> None:
    """Also after the weights went through a file's float32; other sequences move by the same line."""
    responses, others = some_sequences(10), some_sequences(13)
    before, before_others = scores_of(reward, responses), scores_of(reward, others)
    assert abs(before.mean()) > 0.1
    result = calibrate(reward, lambda part: scores_of(reward, part), responses, options(yaml, tmp_path))
    after = scores_of(reward, responses)
    assert after.mean() == pytest.approx(0, abs=1e-5)
    assert after.std() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(
        scores_of(reward, others), result.gain * before_others + result.bias, atol=1e-5
    )
    assert (result.source, result.samples) == ("sft", 10)
    assert result.mean_before == pytest.approx(before.mean(), rel=1e-5)
    fold(reward, 1 / result.gain, -result.bias / result.gain)
    np.testing.assert_allclose(scores_of(reward, responses), before, atol=1e-5)


def test_rows_that_do_not_fill_a_pass_are_neither_lost_nor_counted_twice() -> None:
    seen: list[int] = []

    def forward(numbers: np.ndarray) -> np.ndarray:
        seen.append(len(numbers))
        return numbers * 2.0

    exchange = HostExchange(Runtime(0, 1))
    for count in (1, 3, 4, 9):
        result = over_rows(forward, (np.arange(count),), Mesh(), exchange, rows_per_pass=4)
        assert result.tolist() == [2.0 * i for i in range(count)]
    assert set(seen) == {4}


def test_positions_stay_inside_the_model(tiny_job: JobConfig) -> None:
    """A text of seq_length tokens has pads behind it, in rows as wide as the longest prompt and response."""
    part = Sequences(np.zeros((2, 7), np.int32), np.array([4, 1], np.int32), np.array([1, 3], np.int32))
    inputs = sequence_inputs(*part, 4)
    assert inputs.valid.tolist() == [[1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1]]
    assert inputs.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 0], [0, 0, 0, 0, 1, 2, 3]]
