"""Whole PPO updates against an independent one: transformers' model, losses as published, torch's AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mindspore as ms
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from mindrlhf.trainer.loss_cells import POLICY_STATISTICS, RATIOS_ABOVE, VALUE_STATISTICS
from mindrlhf.trainer.update import UpdateResult
from tests.parity.ppo_update_case import EXTRAS, PPO, PROMPT, hugging_face, random_texts, rollout_of
from tests.parity.ppo_update_sides import Both, both_sides, our_side, schedule_rates


@pytest.fixture(scope="module", autouse=True)
def _graph_mode() -> None:
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")


@pytest.fixture(scope="module")
def separate() -> Both:
    return both_sides(separate=True)


@pytest.fixture(scope="module")
def shared() -> Both:
    return both_sides(separate=False)


@pytest.fixture(scope="module")
def extras() -> Both:
    """Entropy bonus and pre-training loss, on a backbone that is shared with the critic."""
    return both_sides(separate=False, texts=random_texts(), **EXTRAS)


@pytest.fixture(params=["separate", "shared", "extras"])
def both(request: pytest.FixtureRequest) -> Both:
    return request.getfixturevalue(request.param)


def test_losses_and_statistics_of_every_step_equal_torch(both: Both) -> None:
    result, expected = both.result, both.expected
    # The case must be one in which clipping matters, for policy and value alike.
    for name in ("clipfrac", "value_clipfrac"):
        assert 0 < sum(expected.sums[name]) < result.tokens.sum()
    # Nor may all ratios lie in one bin.
    assert len({result.policy[name].sum() for name in RATIOS_ABOVE}) > 4
    np.testing.assert_array_equal(result.tokens, expected.sums["tokens"])
    assert (tuple(result.policy), tuple(result.value)) == (POLICY_STATISTICS, VALUE_STATISTICS)
    same_statistics({**result.policy, **result.value}, expected.sums)


def test_gradient_norms_and_learning_rate_equal_torch(both: Both) -> None:
    ours, result, expected = both.ours, both.result, both.expected
    norms = np.array(expected.sums["norms"])
    assert norms.max() > PPO.max_grad_norm, "clipping must bite"
    np.testing.assert_allclose(result.grad_norm, norms[:, 0], rtol=1e-5)
    if ours.models.critic is not None:
        np.testing.assert_allclose(result.critic_grad_norm, norms[:, 1], rtol=1e-5)
    assert result.learning_rate == pytest.approx(schedule_rates(4)[-1], rel=1e-6)
    # By hand: step 3 of 8, warm-up of 2 steps, half a cosine over the other 6.
    assert result.learning_rate == pytest.approx(1e-4 + 1.9e-3 * 0.5 * (1 + np.cos(np.pi / 6)), rel=1e-5)


def test_updated_weights_equal_torch(both: Both) -> None:
    ours, weights, expected = both.ours, both.weights, both.expected
    before = {f"policy/{name}": array for name, array in ours.policy.items()}
    before |= {f"critic/{name}": array for name, array in ours.critic.items()}
    assert weights.keys() == expected.weights.keys()
    for name, wanted in expected.weights.items():
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(weights[name], wanted, atol=1e-5 * scale, rtol=0, err_msg=name)
        moved = np.abs(wanted - before[name]).max()
        assert moved > 1e-3, f"{name} must have moved"
        assert np.abs(weights[name] - wanted).max() < 1e-3 * moved, name


def test_pretraining_loss_of_every_step_equals_torch(extras: Both, shared: Both) -> None:
    np.testing.assert_allclose(extras.result.pretrain_loss, extras.expected.pretrain_loss, rtol=1e-5)
    assert extras.result.pretrain_loss.shape == (4,)
    assert shared.result.pretrain_loss.shape == (0,)
    # Both extras must have pulled at the weights.
    assert np.abs(extras.result.grad_norm - shared.result.grad_norm).min() > 1e-2


def same_statistics(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name, sums in found.items():
        assert len(sums) == 4
        np.testing.assert_allclose(sums, wanted[name], rtol=1e-5, atol=2e-5, err_msg=name)


def same_update(
    found: tuple[UpdateResult, dict[str, np.ndarray]], wanted: tuple[Any, dict[str, np.ndarray]]
) -> None:
    same_statistics(found[0].policy, wanted[0].policy)
    same_statistics(found[0].value, wanted[0].value)
    np.testing.assert_allclose(found[0].grad_norm, wanted[0].grad_norm, rtol=1e-5)
    np.testing.assert_allclose(found[0].pretrain_loss, wanted[0].pretrain_loss, rtol=1e-5)
    for name, array in wanted[1].items():
        np.testing.assert_allclose(
            found[1][name], array, atol=1e-5 * np.abs(array).max(), rtol=0, err_msg=name
        )


@pytest.mark.parametrize(("case", "size"), [("shared", 1), ("shared", 2), ("extras", 2)])
def test_micro_batches_do_not_change_the_update(case: str, size: int, request: pytest.FixtureRequest) -> None:
    whole = request.getfixturevalue(case)
    same_update(whole.ours.run(whole.experience, micro_batch_size=size), (whole.result, whole.weights))


def test_padding_columns_do_not_change_the_update(shared: Both) -> None:
    wide = our_side(hugging_face(seed=1), None, prompt_columns=PROMPT + 3)
    experience = shared.experience._replace(
        rollout=rollout_of(PROMPT + 3, shared.experience.rollout.logprobs)
    )
    same_update(wide.run(experience, max_prompt_length=PROMPT + 3), (shared.result, shared.weights))
