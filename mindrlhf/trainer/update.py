"""PPO epochs over one rollout: permutations, minibatches, micro-batches, optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from mindspore import nn

from mindrlhf.configs.keys import JobConfig, PPOConfig, RunConfig
from mindrlhf.models.networks import SequenceModel
from mindrlhf.parallel.layout import Mesh
from mindrlhf.runtime.host_exchange import HostExchange, local_rows
from mindrlhf.trainer.builder import PPOModels
from mindrlhf.trainer.experience import Experience
from mindrlhf.trainer.loss_cells import (
    POLICY_STATISTICS,
    VALUE_STATISTICS,
    PolicyLoss,
    ValueLoss,
    inverse_token_count,
    policy_batch,
    value_batch,
)
from mindrlhf.trainer.optimizer import build_optimizer
from mindrlhf.trainer.pretraining import PretrainStream, pretrain_batches, pretraining_objective
from mindrlhf.trainer.skipped_updates import SkippedUpdates, not_finite
from mindrlhf.trainer.train_step import MicroBatch, Objective, Statistics, TrainStep
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.seeds import random_stream

logger = get_logger(__name__)

KL_MARGIN = 1.5
"""Largest ratio of ``policy/approxkl`` to ``target_kl``."""


class UpdateResult(NamedTuple):
    """Results of the optimizer steps of one iteration; one entry per minibatch, sums over ALL ranks' tokens.

    A minibatch whose sums are not finite has no entry.
    """

    tokens: np.ndarray  # (minibatches,) real response tokens
    policy: Mapping[str, np.ndarray]  # POLICY_STATISTICS -> (minibatches,), the one that ended it included
    value: Mapping[
        str, np.ndarray
    ]  # VALUE_STATISTICS -> (minibatches,), without that last one for a separate
    # critic; empty without a critic
    grad_norm: np.ndarray  # (policy steps,) of the policy, before clipping
    critic_grad_norm: np.ndarray  # (critic steps,) of a separate critic; empty otherwise
    learning_rate: float  # of the policy's last step; 0 when there was none
    pretrain_loss: np.ndarray = np.zeros(0)  # (policy steps,) mean over tokens; empty without ptx
    skipped: int = 0  # minibatches in which a step was skipped; 1 when the whole rollout was


@dataclass
class _Log:
    """Collects what :class:`UpdateResult` is computed from; sums over this replica's tokens."""

    tokens: list[float] = field(default_factory=list)
    policy: list[Statistics] = field(default_factory=list)
    value: list[Statistics] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    critic_norms: list[float] = field(default_factory=list)
    pretrain: list[np.float32] = field(default_factory=list)
    pretrain_tokens: list[float] = field(default_factory=list)
    rate: float = 0.0
    skipped: int = 0


class PPOUpdate:
    """Trains the policy and the critic on experience.

    Args:
        models: of this rank.
        job: hyper-parameters, and the YAMLs whose optimizers are used.
        exchange: sums statistics over replicas.
        pretraining: texts of the loss that is mixed in; needed when ``ptx_coef`` is not 0.
    """

    def __init__(
        self,
        models: PPOModels,
        job: JobConfig,
        exchange: HostExchange,
        pretraining: PretrainStream | None = None,
    ) -> None:
        self.config = config = job.ppo
        self._runs = {"policy": job.train, "critic": job.critic}
        self.exchange = exchange
        self.pretraining = pretraining
        self.skips = SkippedUpdates(config.max_skipped_updates)
        self.policy_mesh = self.critic_mesh = models.train.groups.mesh
        self.shared_critic = models.train.value_head
        self.policy_step = _train_step(
            models.train,
            PolicyLoss(config),
            job.train,
            config.policy_optimizer_steps,
            config.max_grad_norm,
            pretraining_objective(models.train, config.ptx_coef) if pretraining is not None else None,
        )
        self.critic_step: TrainStep | None = None
        if models.critic is not None:
            self.critic_mesh = models.critic.groups.mesh
            self.critic_step = _train_step(
                models.critic, ValueLoss(config), job.critic, config.optimizer_steps, config.max_grad_norm
            )
        for step in (self.policy_step, self.critic_step):
            if step is not None:
                step.watch(models.device_memory)

    def run(self, experience: Experience, iteration: int, on_step: Callable[[], None]) -> UpdateResult:
        """``ppo_epochs`` passes over the experience, a fresh permutation each.

        In the first ``critic_warmup_iterations`` the policy is not updated. With a ``target_kl`` the steps of
        policy and critic end before the first minibatch whose approxkl is above 1.5 times it, which is
        the rule of Spinning Up and Stable-Baselines3; the first minibatch of an iteration, where the policy
        has not moved yet, is always learned from. The sum is over all ranks, so all end together.

        A step whose loss or gradient is not finite is skipped, see :meth:`TrainStep.update`; too many in a
        row (``skips``) end the iteration. Experience with a fault is one update skipped.

        Args:
            experience: the global batch, equal on every rank.
            iteration: counted from 0; keys the permutations.
            on_step: called after each minibatch.
        """
        log = _Log()
        if experience.fault is not None:
            self.skips.add(experience.fault)
            self.skips.end_update(skipped=True)
            log.skipped = 1
            return self._result(log)
        is_warm_up = iteration < self.config.critic_warmup_iterations
        count = len(experience.advantages)
        for number, rows in enumerate(minibatches(count, self.config, iteration), start=1):
            log.tokens.append(float(experience.rollout.mask[rows].sum()))
            statistics = self.policy_step.accumulate(self._policy_batches(experience, rows))
            log.policy.append({name: statistics[name] for name in POLICY_STATISTICS})
            if self.shared_critic:
                log.value.append({name: statistics[name] for name in VALUE_STATISTICS})
            taken = True
            if is_warm_up:
                self.policy_step.discard()
            elif log.norms and self._has_moved_too_far(log):
                self.policy_step.discard()
                break
            else:
                taken = self._step_policy(log, number, rows)
            if self.critic_step is not None:
                taken &= self._step_critic(self.critic_step, log, experience, number, rows)
            on_step()
            log.skipped += not taken
            self.skips.end_update(skipped=not taken)
            if self.skips.are_too_many:
                break
        return self._result(log)

    def _has_moved_too_far(self, log: _Log) -> bool:
        """Whether the last minibatch's approxkl, over all ranks, ends the iteration."""
        target = self.config.target_kl
        if not target:
            return False
        total = self.exchange.sum(np.array([log.policy[-1]["approxkl"]]), self.policy_mesh)
        approxkl = float(total[0]) / log.tokens[-1]
        if not approxkl > KL_MARGIN * target:  # the update itself skips NaN
            return False
        logger.info(
            "optimizer steps end after %d: approxkl %.4g is above %g x target_kl %g",
            *(len(log.norms), approxkl, KL_MARGIN, target),
        )
        return True

    def _step_policy(self, log: _Log, number: int, rows: np.ndarray) -> bool:
        """One optimizer step with the gradients so far, and those of a batch of texts when there are any.

        Returns:
            whether the step was taken.
        """
        losses = self.policy_step.losses
        if self.pretraining is not None:
            batch = self.pretraining.next_batch()
            mine = local_rows(len(batch.mask), self.policy_mesh, self.exchange.runtime.rank)
            micro = pretrain_batches(batch, mine, self.config.micro_batch_rows(self._runs["policy"]))
            log.pretrain.append(self.policy_step.accumulate(micro, mixed_in=True)["cross_entropy"])
            log.pretrain_tokens.append(float(batch.mask.sum(dtype=np.float64)))
        norm, rate = self.policy_step.update()
        if not np.isfinite(norm):
            self._skip("policy", number, rows, norm, losses, self.policy_mesh)
            return False
        log.norms.append(norm)
        log.rate = rate
        return True

    def _step_critic(
        self, step: TrainStep, log: _Log, experience: Experience, number: int, rows: np.ndarray
    ) -> bool:
        """One optimizer step of a separate critic; returns whether it was taken."""
        inverse_count = inverse_token_count(experience.rollout.mask[rows])
        micro = [
            value_batch(experience, part, inverse_count)
            for part in self._micro_rows(rows, self.critic_mesh, "critic")
        ]
        log.value.append(step.accumulate(micro))
        losses = step.losses
        norm, _ = step.update()
        if not np.isfinite(norm):
            self._skip("critic", number, rows, norm, losses, self.critic_mesh)
            return False
        log.critic_norms.append(norm)
        return True

    def _skip(
        self, model: str, number: int, rows: np.ndarray, norm: float, losses: Sequence[float], mesh: Mesh
    ) -> None:
        """Notes a step that was not taken; collective."""
        size = self.config.micro_batch_rows(self._runs[model])
        update = not_finite(
            model, rows, losses, norm, mesh, self.exchange, micro_batch_size=size, minibatch=number
        )
        self.skips.add(update)

    def _result(self, log: _Log) -> UpdateResult:
        policy = self._summed(log.policy, POLICY_STATISTICS, self.policy_mesh)
        value_names = VALUE_STATISTICS if self.shared_critic or self.critic_step else ()
        value = self._summed(log.value, value_names, self.critic_mesh)
        # Sums over all ranks: the same minibatches are left out everywhere.
        finite = np.isfinite(policy).all(axis=1)
        finite[: len(value)] &= np.isfinite(value).all(axis=1)
        pretrain = np.zeros(0)
        if log.pretrain:
            pretrain = self.exchange.sum(np.array(log.pretrain), self.policy_mesh) / log.pretrain_tokens
        return UpdateResult(
            tokens=np.array(log.tokens)[finite],
            policy=dict(zip(POLICY_STATISTICS, policy[finite].T.astype(np.float64), strict=True)),
            value=dict(zip(value_names, value[finite[: len(value)]].T.astype(np.float64), strict=True)),
            grad_norm=np.array(log.norms),
            critic_grad_norm=np.array(log.critic_norms),
            learning_rate=log.rate,
            pretrain_loss=pretrain[np.isfinite(pretrain)],
            skipped=log.skipped,
        )

    def _summed(self, statistics: Sequence[Statistics], names: Sequence[str], mesh: Mesh) -> np.ndarray:
        """(minibatches, len(names)), summed over the replicas of ``mesh``; collective when there are any."""
        if not statistics or not names:
            return np.zeros((len(statistics), len(names)))
        return self.exchange.sum(np.array([[row[name] for name in names] for row in statistics]), mesh)

    def _policy_batches(self, experience: Experience, rows: np.ndarray) -> list[MicroBatch]:
        """This replica's part of a minibatch for the policy, cut into micro-batches."""
        inverse_count = inverse_token_count(experience.rollout.mask[rows])
        return [
            policy_batch(experience, part, inverse_count, shared_critic=self.shared_critic)
            for part in self._micro_rows(rows, self.policy_mesh, "policy")
        ]

    def _micro_rows(self, rows: np.ndarray, mesh: Mesh, model: str) -> list[np.ndarray]:
        """This replica's part of a minibatch's rows, cut into micro-batches."""
        mine = rows[local_rows(len(rows), mesh, self.exchange.runtime.rank)]
        size = self.config.micro_batch_rows(self._runs[model])
        return [mine[first : first + size] for first in range(0, len(mine), size)]


def _train_step(
    model: SequenceModel,
    loss: nn.Cell,
    config: RunConfig,
    steps: int,
    max_grad_norm: float,
    mixed_in: Objective | None = None,
) -> TrainStep:
    optimizer = build_optimizer(config, model, steps)
    return TrainStep(Objective(model, loss), optimizer, model.layouts, model.groups, max_grad_norm, mixed_in)


def minibatches(count: int, config: PPOConfig, iteration: int) -> Iterator[np.ndarray]:
    """Global row numbers of each optimizer step of an iteration: every row once per epoch.

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
