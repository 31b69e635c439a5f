"""PPO epochs over one rollout: permutations, minibatches, micro-batches, optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mindrlhf.configs.schema import JobConfig, PPOConfig
from mindrlhf.models.train import SequenceModel
from mindrlhf.parallel.layout import Mesh
from mindrlhf.trainer.builder import PPOModels
from mindrlhf.trainer.experience import Experience
from mindrlhf.trainer.losses import (
    POLICY_STATISTICS,
    VALUE_STATISTICS,
    PolicyLoss,
    ValueLoss,
    inverse_token_count,
    policy_inputs,
    value_inputs,
)
from mindrlhf.trainer.optimizer import build_optimizer
from mindrlhf.trainer.runtime import HostExchange, local_rows
from mindrlhf.trainer.train_step import TrainStep
from mindrlhf.utils.seeds import random_stream

Inputs = Callable[[Experience, np.ndarray, np.ndarray], tuple[np.ndarray, ...]]


class UpdateResult(NamedTuple):
    """What the optimizer steps of one iteration report; one row a step, sums over ALL ranks' tokens."""

    tokens: np.ndarray  # (steps,) real response tokens of each minibatch
    policy: np.ndarray  # (steps, len(POLICY_STATISTICS))
    value: np.ndarray  # (steps, len(VALUE_STATISTICS))
    grad_norm: np.ndarray  # (steps,) of the policy, before clipping
    critic_grad_norm: np.ndarray  # (steps,) of a separate critic; zeros when shared
    learning_rate: float  # of the last step


class PPOUpdate:
    """Trains the policy and the critic on experience.

    Args:
        models: of this rank.
        job: hyper-parameters, and the YAMLs whose optimizers are used.
        exchange: sums statistics over replicas.
    """

    def __init__(self, models: PPOModels, job: JobConfig, exchange: HostExchange) -> None:
        self.config = job.ppo
        self.exchange = exchange
        self.policy_mesh = models.train.groups.mesh
        steps = job.ppo.optimizer_steps

        def train_step(loss: PolicyLoss | ValueLoss, model: SequenceModel, optimizer_of: str) -> TrainStep:
            config = job.train if optimizer_of == "train" else job.critic
            optimizer = build_optimizer(config, loss.trainable_params(), steps)
            return TrainStep(loss, optimizer, model.layouts, model.groups, job.ppo.max_grad_norm)

        self.policy_step = train_step(PolicyLoss(models.train, job.ppo), models.train, "train")
        self.critic_step: TrainStep | None = None
        if models.critic is not None:
            self.critic_mesh = models.critic.groups.mesh
            self.critic_step = train_step(ValueLoss(models.critic, job.ppo), models.critic, "critic")

    def run(self, experience: Experience, iteration: int, on_step: Callable[[], None]) -> UpdateResult:
        """``ppo_epochs`` passes over the experience, a fresh permutation each (checklist 18).

        Args:
            experience: the global batch, equal on every rank.
            iteration: counted from 0; keys the permutations.
            on_step: called after each optimizer step.
        """
        tokens, policy, value, norms, critic_norms = [], [], [], [], []
        rate = 0.0
        for rows in minibatches(len(experience.mask), self.config, iteration):
            inverse_count = inverse_token_count(experience.mask[rows])
            tokens.append(float(experience.mask[rows].sum()))
            micro = self._micro_batches(experience, rows, inverse_count, self.policy_mesh, policy_inputs)
            statistics, norm, rate = self.policy_step.step(micro)
            policy.append(statistics[: len(POLICY_STATISTICS)])
            critic_norm, value_statistics = 0.0, statistics[len(POLICY_STATISTICS) :]
            if self.critic_step is not None:
                micro = self._micro_batches(experience, rows, inverse_count, self.critic_mesh, value_inputs)
                value_statistics, critic_norm, _ = self.critic_step.step(micro)
            value.append(value_statistics)
            norms.append(norm)
            critic_norms.append(critic_norm)
            on_step()
        value_mesh = self.policy_mesh if self.critic_step is None else self.critic_mesh
        return UpdateResult(
            tokens=np.array(tokens),
            policy=self.exchange.sum(np.stack(policy), self.policy_mesh),
            value=self.exchange.sum(np.stack(value), value_mesh),
            grad_norm=np.array(norms),
            critic_grad_norm=np.array(critic_norms),
            learning_rate=rate,
        )

    def _micro_batches(
        self, experience: Experience, rows: np.ndarray, inverse_count: np.ndarray, mesh: Mesh, inputs: Inputs
    ) -> Sequence[tuple[np.ndarray, ...]]:
        """This replica's part of a minibatch, cut into micro-batches."""
        mine = rows[local_rows(len(rows), mesh, self.exchange.runtime.rank)]
        size = self.config.micro_batch_size or len(mine)
        return [
            inputs(experience, mine[first : first + size], inverse_count)
            for first in range(0, len(mine), size)
        ]


def minibatches(count: int, config: PPOConfig, iteration: int) -> Iterator[np.ndarray]:
    """Global row numbers of each optimizer step of an iteration: every row once an epoch.

    Args:
        count: rows of the rollout.
        config: epochs, minibatches and seed.
        iteration: counted from 0.
    """
    size = count // config.num_minibatches
    for epoch in range(config.ppo_epochs):
        order = random_stream("minibatch", config.seed, iteration, epoch).permutation(count)
        for first in range(0, count, size):
            yield order[first : first + size]


__all__ = ["VALUE_STATISTICS", "PPOUpdate", "UpdateResult", "minibatches"]
