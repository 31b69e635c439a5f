"""More columns for prompts or responses change nothing: from the scores to the updated weights.

The same texts are laid out for two ``max_prompt_length`` and ``max_response_length``, scored, turned into
experience and learnt from, by everything that a real iteration uses except the sampling
(test_generate.py has that: ``test_left_padded_rows_give_the_tokens_they_give_alone``), with a critic of its
own (test_ppo_update.py pads prompts for the shared one). What stands in the extra columns is junk.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import mindspore as ms
import numpy as np
import pytest

from mindrlhf.configs.keys import (
    ContextConfig,
    JobConfig,
    ModelConfig,
    ParallelConfig,
    PPOConfig,
    RunConfig,
)
from mindrlhf.models.networks import CriticModel, PPOModelTrain, RewardModel, SequenceModel
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Mesh
from mindrlhf.runtime.device import Runtime
from mindrlhf.runtime.host_exchange import HostExchange
from mindrlhf.trainer.builder import PPOModels
from mindrlhf.trainer.experience import Experience, Rollout, ScoredRollout, TokenRewards, make_experience
from mindrlhf.trainer.reward_shaping import RewardShaper
from mindrlhf.trainer.scoring import score_rollout
from mindrlhf.trainer.update import PPOUpdate, UpdateResult
from tests.probes import policy_logprobs

RELATIVE = 1e-5
GROUPS = Groups(Mesh(), 0)
EXCHANGE = HostExchange(Runtime(0, 1))
ROWS, KL_COEF, MAX_NORM = 8, 0.1, 0.5
PROMPT_LENGTHS = np.array([5, 3, 1, 5, 4, 2, 2, 5], np.int32)
RESPONSE_LENGTHS = np.array([2, 4, 1, 3, 4, 1, 4, 2], np.int32)
STOPPED = np.array([1, 0, 1, 1, 0, 1, 1, 1], np.int32)
MODEL = ModelConfig(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=20,
    num_layers=1,
    num_heads=4,
    n_kv_heads=2,
    seq_length=32,
)


class Columns(NamedTuple):
    """``max_prompt_length`` and ``max_response_length``."""

    prompt: int
    response: int


TIGHT = Columns(5, 4)  # the longest prompt and the longest response fill them
WIDE = Columns(9, 7)


@dataclass
class Iteration:
    """All that an iteration computes."""

    scored: ScoredRollout
    rewards: TokenRewards
    experience: Experience
    result: UpdateResult
    weights: dict[str, np.ndarray]

    @property
    def rollout(self) -> Rollout:
        return self.scored.rollout


def seeded(model: SequenceModel, seed: int) -> SequenceModel:
    """The model with random weights that depend on the seed and on the names only."""
    rng = np.random.default_rng(seed)
    model.load(
        {
            name: rng.normal(1.0 if "norm" in name else 0.0, 0.3, parameter.shape).astype(np.float32)
            for name, parameter in model.parameters.items()
        }
    )
    return model


def ppo_config(columns: Columns) -> PPOConfig:
    return PPOConfig(
        seed=7,
        total_iterations=1,
        rollout_batch_size=ROWS,
        ppo_epochs=2,
        num_minibatches=2,
        max_prompt_length=columns.prompt,
        max_response_length=columns.response,
        valid_vocab_size=22,
        temperature=0.8,
        missing_eos_penalty=0.5,
        whiten_rewards=True,
        critic="separate",
        kl_coef=KL_COEF,
        vf_coef=0.5,
        max_grad_norm=MAX_NORM,
    )


def build(columns: Columns, config: PPOConfig) -> PPOModels:
    def policy() -> PPOModelTrain:
        return PPOModelTrain(
            MODEL,
            GROUPS,
            prompt_length=columns.prompt,
            temperature=config.temperature,
            valid_vocab_size=config.valid_vocab_size,
        )

    return PPOModels(
        infer=None,  # type: ignore[arg-type]
        train=seeded(policy(), 1),
        ref=seeded(policy(), 2),
        reward=seeded(RewardModel(MODEL, GROUPS, prompt_length=columns.prompt), 3),
        critic=seeded(CriticModel(MODEL, GROUPS, prompt_length=columns.prompt), 4),
    )


def text_rollout(columns: Columns) -> Rollout:
    """The texts in their columns, every other place filled with junk ids; log-probs still to come."""
    real = np.random.default_rng(0).integers(0, 22, (ROWS, TIGHT.prompt + TIGHT.response))
    tokens = np.random.default_rng(sum(columns)).integers(0, 24, (ROWS, sum(columns)))
    for row, (prompt, response) in enumerate(zip(PROMPT_LENGTHS, RESPONSE_LENGTHS, strict=True)):
        text = real[row, TIGHT.prompt - prompt : TIGHT.prompt + response]
        tokens[row, columns.prompt - prompt : columns.prompt + response] = text
    return Rollout.of(
        tokens=tokens.astype(np.int32),
        prompt_lengths=PROMPT_LENGTHS,
        response_lengths=RESPONSE_LENGTHS,
        logprobs=np.zeros((ROWS, columns.response), np.float32),
        stopped=STOPPED,
        sample_ids=np.arange(ROWS),
    )


def iterate(columns: Columns) -> Iteration:
    config = ppo_config(columns)
    models = build(columns, config)
    run = RunConfig(
        path=Path("train.yaml"),
        context=ContextConfig(),
        parallel=ParallelConfig(),
        model=MODEL,
        optimizer={"type": "AdamW", "betas": [0.9, 0.95], "eps": 1e-5, "weight_decay": 0.1},
        lr_schedule={"type": "ConstantWarmUpLR", "learning_rate": 1e-3, "warmup_steps": 0, "total_steps": -1},
    )
    rollout = text_rollout(columns)
    logprobs = policy_logprobs(models.train, rollout, EXCHANGE, rows_per_pass=0)
    # As if sampled by a policy that is a little off, so that ratios are not 1 and some are clipped.
    off = np.random.default_rng(5).normal(0, 0.3, (ROWS, TIGHT.response))
    off = np.pad(off, [(0, 0), (0, columns.response - TIGHT.response)])
    rollout = rollout._replace(logprobs=np.where(logprobs == 0, 0, logprobs + off).astype(np.float32))
    scored = score_rollout(models, rollout, EXCHANGE, rows_per_pass=0)
    rewards = RewardShaper(config)(scored)
    experience = make_experience(scored, rewards, config)
    update = PPOUpdate(models, JobConfig(infer=run, train=run, reward=run, critic=run, ppo=config), EXCHANGE)
    result = update.run(experience, 0, lambda: None)
    weights = {f"policy/{name}": array for name, array in models.train.shards()}
    assert models.critic is not None
    weights |= {f"critic/{name}": array for name, array in models.critic.shards()}
    return Iteration(scored, rewards, experience, result, weights)


@pytest.fixture(scope="module")
def tight() -> Iteration:
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    return iterate(TIGHT)


def real(array: np.ndarray) -> np.ndarray:
    """Of (B, R) the entries of real response tokens."""
    return array[np.arange(array.shape[1]) < RESPONSE_LENGTHS[:, None]]


def test_the_iteration_is_not_trivial(tight: Iteration) -> None:
    result = tight.result
    for clipped in (result.policy["clipfrac"], result.value["value_clipfrac"]):
        assert 0.05 < clipped.sum() / result.tokens.sum() < 0.95
    assert min(result.grad_norm.min(), result.critic_grad_norm.min()) > 0.05
    assert max(result.grad_norm.max(), result.critic_grad_norm.max()) > MAX_NORM, "clipping must bite"
    assert np.std(tight.scored.scores) > 0.1
    models = build(TIGHT, ppo_config(TIGHT))
    for role, model in (("policy", models.train), ("critic", models.critic)):
        assert model is not None
        for name, array in model.shards():
            assert np.abs(tight.weights[f"{role}/{name}"] - array).max() > 1e-3, f"{name} must have moved"


def test_padding_columns_do_not_change_the_iteration(tight: Iteration) -> None:
    """Every number within 1e-5 of the size of its array, from the first log-prob to the last weight."""
    found = iterate(WIDE)

    def assert_close(name: str, ours: np.ndarray, theirs: np.ndarray) -> None:
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max(), err_msg=name)

    assert_close("ref_logprobs", real(found.scored.ref_logprobs), real(tight.scored.ref_logprobs))
    assert_close("values", real(found.scored.values), real(tight.scored.values))
    assert_close("scores", found.scored.scores, tight.scored.scores)
    for part, names in (
        ("rollout", ("mask", "logprobs")),
        ("rewards", ("kl", "rewards")),
        ("experience", ("old_values", "advantages", "returns")),
    ):
        for name in names:
            ours, theirs = (getattr(getattr(side, part), name) for side in (found, tight))
            assert_close(name, real(ours), real(theirs))
            assert np.count_nonzero(ours) == np.count_nonzero(real(ours)), f"{name} is not 0 behind the ends"
    np.testing.assert_array_equal(found.result.tokens, tight.result.tokens)
    for ours, theirs in (
        (found.result.policy, tight.result.policy),
        (found.result.value, tight.result.value),
    ):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_close(f"sums of {name}", ours[name], theirs[name])
    np.testing.assert_allclose(found.result.grad_norm, tight.result.grad_norm, rtol=1e-5)
    np.testing.assert_allclose(found.result.critic_grad_norm, tight.result.critic_grad_norm, rtol=1e-5)
    for name, array in tight.weights.items():
        assert_close(name, found.weights[name], array)
