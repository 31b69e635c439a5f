"""What the scoring models say of a rollout, and what becomes of numbers that are not finite."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mindrlhf.configs.keys import PPOConfig
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Mesh
from mindrlhf.runtime.device import Runtime
from mindrlhf.runtime.host_exchange import HostExchange
from mindrlhf.trainer.builder import PPOModels
from mindrlhf.trainer.experience import Rollout, ScoredRollout
from mindrlhf.trainer.scoring import count_passes, score_rollout

LENGTHS = np.array([3, 1, 2, 3], np.int32)
NAN = float("nan")


class Network:
    """Gives ``numbers[i]`` for the row whose first token is i."""

    groups = Groups(Mesh(), 0)
    value_head = False

    def __init__(self, numbers: np.ndarray) -> None:
        self.numbers = numbers

    def __call__(self, tokens: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
        return (self.numbers[tokens[:, 0]],)


class Case:
    """A rollout, and networks that know what they say of it."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        logprobs, self.ref_logprobs, self.values = rng.standard_normal((3, 4, 3)).astype(np.float32)
        self.scores = np.array([1, 2, 4, 8], np.float32)
        tokens = np.zeros((4, 5), np.int32)
        tokens[:, 0] = range(4)
        self.rollout = Rollout.of(
            tokens=tokens,
            prompt_lengths=np.full(4, 2, np.int32),
            response_lengths=LENGTHS,
            logprobs=logprobs,
            stopped=np.ones(4, np.int32),
            sample_ids=np.array([40, 41, 42, 43]),
        )

    def models(self, *, reward: bool = True, critic: bool = True) -> PPOModels:
        roles: dict[str, Any] = {
            "infer": None,
            "train": SimpleNamespace(value_head=False),
            "ref": Network(self.ref_logprobs),
            "reward": Network(self.scores) if reward else None,
            "critic": Network(self.values) if critic else None,
        }
        return PPOModels(**roles)

    def scored(self, models: PPOModels | None = None, **options: Any) -> ScoredRollout:
        options = {"rows_per_pass": 0, **options}
        return score_rollout(models or self.models(), self.rollout, HostExchange(Runtime(0, 1)), **options)


@pytest.fixture
def case() -> Case:
    return Case()


@pytest.mark.parametrize("size", [0, 1, 3])
@pytest.mark.parametrize(("reward", "critic"), [(True, True), (False, True), (True, False)])
def test_every_network_scores_every_row(case: Case, size: int, reward: bool, critic: bool) -> None:
    models, passes = case.models(reward=reward, critic=critic), []
    scored = case.scored(
        models,
        rows_per_pass=size,
        extra_scores=lambda rollout: rollout.response_lengths.astype(np.float32),
        on_pass=lambda: passes.append(1),
    )
    assert scored.rollout is case.rollout
    np.testing.assert_array_equal(scored.ref_logprobs, case.ref_logprobs)
    np.testing.assert_array_equal(scored.scores, (case.scores if reward else 0) + LENGTHS)
    if critic:
        np.testing.assert_array_equal(scored.values, case.values)
    else:
        assert scored.values is None
    assert len(passes) == count_passes(models, PPOConfig(rollout_batch_size=4, score_batch_size=size))


def test_what_stands_behind_the_end_of_a_response_is_no_fault(case: Case) -> None:
    case.values[1, 2] = case.ref_logprobs[1, 1] = case.rollout.logprobs[2, 2] = NAN
    scored = case.scored()
    assert scored.fault is None
    assert scored.rollout is case.rollout


@pytest.mark.parametrize("value", [NAN, np.inf, -np.inf])
def test_a_reward_that_is_not_finite(case: Case, value: float) -> None:
    case.scores[2] = value
    scored = case.scored()
    assert scored.fault is not None
    assert scored.fault.rows.tolist() == [2]
    assert (scored.fault.model, scored.fault.minibatch) == ("both", 0)
    assert scored.fault.cause == "not a finite number: reward of 1 sample(s)"
    np.testing.assert_allclose(scored.scores, [1, 2, 11 / 3, 8], rtol=1e-6)
    assert scored.values is not None
    np.testing.assert_array_equal(scored.values[[0, 1, 3]], case.values[[0, 1, 3]])


@pytest.mark.parametrize("critic", [True, False])
def test_everything_that_is_not_finite_is_named(case: Case, critic: bool) -> None:
    case.rollout.logprobs[0, 1] = NAN
    case.values[1, 0] = np.inf
    case.ref_logprobs[1, 0] = NAN
    case.scores[:] = NAN
    scored = case.scored(case.models(critic=critic))
    assert scored.fault is not None
    assert scored.fault.cause == (
        "not a finite number: reward of 4 sample(s), reference log-prob of 1 sample(s), "
        "log-prob of 1 sample(s)" + ", value of 1 sample(s)" * critic
    )
    for array in (scored.rollout.logprobs, scored.ref_logprobs, scored.scores, scored.values):
        assert array is None or np.isfinite(array).all()
