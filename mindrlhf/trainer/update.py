"""PPO epochs over one rollout: permutations, minibatches, micro-batches, optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mindrlhf.configs.schema import JobConfig, PPOConfig, RunConfig
from mindrlhf.models.qwen2.networks import SequenceModel
from mindrlhf.parallel.layout import Mesh
from mindrlhf.runtime.host_exchange import HostExchange, local_rows
from mindrlhf.trainer.builder import PPOModels
from mindrlhf.trainer.experience import Experience
from mindrlhf.trainer.gradients import GradientBuffers
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
from mindrlhf.trainer.pretraining import PretrainLoss, PretrainStream, pretrain_inputs
from mindrlhf.trainer.skipping import SkippedUpdate, SkippedUpdates, not_finite
from mindrlhf.trainer.train_step import TrainStep
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.seeds import random_stream

logger = get_logger(__name__)

Inputs = Callable[[Experience, np.ndarray, np.ndarray], tuple[np.ndarray, ...]]


KL_MARGIN = 1.5
"""How far ``policy/approxkl`` may go above ``target_kl``."""


class UpdateResult(NamedTuple):
    """What the optimizer steps of one iteration report; one row a minibatch, sums over ALL ranks' tokens.

    A minibatch whose sums are not finite has no rows.
    """

    tokens: np.ndarray  # (minibatches,) real response tokens
    policy: np.ndarray  # (minibatches, len(POLICY_STATISTICS)), that which ended the iteration included
    value: np.ndarray  # (minibatches, len(VALUE_STATISTICS)), without that last one for a separate critic
    grad_norm: np.ndarray  # (policy steps,) of the policy, before clipping
    critic_grad_norm: np.ndarray  # (critic steps,) of a separate critic; zeros when shared
    learning_rate: float  # of the policy's last step; 0 when there was none
    pretrain_loss: np.ndarray = np.zeros(0)  # (policy steps,) mean over tokens; empty without ptx
    skipped: int = 0  # minibatches in which a step was skipped; 1 when all were, for the rollout's sake


@dataclass
class _Log:
    """What :class:`UpdateResult` is made of while steps are taken; sums over this replica's tokens."""

    tokens: list[float] = field(default_factory=list)
    policy: list[np.ndarray] = field(default_factory=list)
    value: list[np.ndarray] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    critic_norms: list[float] = field(default_factory=list)
    pretrain: list[np.ndarray] = field(default_factory=list)
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
        self.exchange = exchange
        self.pretraining = pretraining
        self.skips = SkippedUpdates(config.max_skipped_updates)
        self.policy_mesh = models.train.groups.mesh
        buffers = GradientBuffers()  # of both: the critic's turn comes when the policy has done its step
        self.policy_step = _train_step(
            PolicyLoss(models.train, config),
            job.train,
            config.policy_optimizer_steps,
            models.train,
            config.max_grad_norm,
            buffers,
            PretrainLoss(models.train, config.ptx_coef) if pretraining is not None else None,
        )
        self.critic_step: TrainStep | None = None
        if models.critic is not None:
            self.critic_mesh = models.critic.groups.mesh
            self.critic_step = _train_step(
                ValueLoss(models.critic, config),
                job.critic,
                config.optimizer_steps,
                models.critic,
                config.max_grad_norm,
                buffers,
            )

    def run(self, experience: Experience, iteration: int, on_step: Callable[[], None]) -> UpdateResult:
        """``ppo_epochs`` passes over the experience, a fresh permutation each (checklist 18).

        In the first ``critic_warmup_iterations`` the policy is only measured. With a ``target_kl`` the steps
        of policy and critic end before the first minibatch whose approxkl is above 1.5 times it, which is
        the rule of Spinning Up and Stable-Baselines3; the first minibatch of an iteration, where the policy
        has not moved yet, is always learnt from. The sum is over all ranks, so all end together.

        A step whose loss or gradient is not finite is skipped, see :meth:`TrainStep.update`; too many in a
        row (``skips``) end the iteration.

        Args:
            experience: the global batch, equal on every rank.
            iteration: counted from 0; keys the permutations.
            on_step: called after each minibatch.
        """
        log = _Log()
        is_warm_up = iteration < self.config.critic_warmup_iterations
        for number, rows in enumerate(minibatches(len(experience.mask), self.config, iteration), start=1):
            inverse_count = inverse_token_count(experience.mask[rows])
            log.tokens.append(float(experience.mask[rows].sum()))
            micro = self._micro_batches(experience, rows, inverse_count, self.policy_mesh, policy_inputs)
            statistics = self.policy_step.accumulate(micro)
            log.policy.append(statistics[: len(POLICY_STATISTICS)])
            if self.critic_step is None:
                log.value.append(statistics[len(POLICY_STATISTICS) :])
                log.critic_norms.append(0.0)
            skipped = False
            if is_warm_up:
                self.policy_step.discard()
            elif log.norms and self._has_moved_too_far(log):
                self.policy_step.discard()
                break
            else:
                skipped = not self._step_policy(log, number, rows)
            if self.critic_step is not None:
                micro = self._micro_batches(experience, rows, inverse_count, self.critic_mesh, value_inputs)
                log.value.append(self.critic_step.accumulate(micro))
                losses = self.critic_step.losses
                norm, _ = self.critic_step.update()
                if np.isfinite(norm):
                    log.critic_norms.append(norm)
                else:
                    self._skip("critic", number, rows, norm, losses, self.critic_mesh)
                    skipped = True
            on_step()
            log.skipped += skipped
            self.skips.end_update(skipped=skipped)
            if self.skips.are_too_many:
                break
        return self._result(log)

    def skip(self, fault: SkippedUpdate) -> UpdateResult:
        """No step at all in an iteration, whose rollout cannot be learnt from; that is one update skipped."""
        self.skips.add(fault)
        self.skips.end_update(skipped=True)
        nothing = np.zeros(0)
        policy, value = (np.zeros((0, len(names))) for names in (POLICY_STATISTICS, VALUE_STATISTICS))
        return UpdateResult(nothing, policy, value, nothing, nothing, 0.0, skipped=1)

    def _has_moved_too_far(self, log: _Log) -> bool:
        """Whether the last minibatch's approxkl, over all ranks, ends the iteration."""
        target = self.config.target_kl
        if not target:
            return False
        total = self.exchange.sum(log.policy[-1], self.policy_mesh)
        approxkl = float(total[POLICY_STATISTICS.index("approxkl")]) / log.tokens[-1]
        if not approxkl > KL_MARGIN * target:  # NaN is for the update to skip
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
            micro = pretrain_inputs(batch, mine, self.config.micro_batch_size)
            log.pretrain.append(self.policy_step.accumulate(micro, mixed_in=True))
            log.pretrain_tokens.append(float(batch.mask.sum(dtype=np.float64)))
        norm, rate = self.policy_step.update()
        if not np.isfinite(norm):
            self._skip("policy", number, rows, norm, losses, self.policy_mesh)
            return False
        log.norms.append(norm)
        log.rate = rate
        return True

    def _skip(
        self, model: str, number: int, rows: np.ndarray, norm: float, losses: Sequence[float], mesh: Mesh
    ) -> None:
        """Notes a step that was not taken; collective."""
        size = self.config.micro_batch_size
        update = not_finite(
            model, rows, losses, norm, mesh, self.exchange, micro_batch_size=size, minibatch=number
        )
        self.skips.add(update)

    def _result(self, log: _Log) -> UpdateResult:
        value_mesh = self.policy_mesh if self.critic_step is None else self.critic_mesh
        policy = self.exchange.sum(np.stack(log.policy), self.policy_mesh)
        value = self.exchange.sum(np.stack(log.value), value_mesh)
        # Sums over all ranks: what is left out is the same everywhere.
        finite = np.isfinite(policy).all(axis=1)
        finite[: len(value)] &= np.isfinite(value).all(axis=1)
        pretrain = np.zeros(0)
        if log.pretrain:
            pretrain = self.exchange.sum(np.concatenate(log.pretrain), self.policy_mesh) / log.pretrain_tokens
        return UpdateResult(
            tokens=np.array(log.tokens)[finite],
            policy=policy[finite],
            value=value[finite[: len(value)]],
            grad_norm=np.array(log.norms),
            critic_grad_norm=np.array(log.critic_norms),
            learning_rate=log.rate,
            pretrain_loss=pretrain[np.isfinite(pretrain)],
            skipped=log.skipped,
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


def _train_step(
    loss: PolicyLoss | ValueLoss,
    config: RunConfig,
    steps: int,
    model: SequenceModel,
    max_grad_norm: float,
    buffers: GradientBuffers,
    mixed_in: PretrainLoss | None = None,
) -> TrainStep:
    optimizer = build_optimizer(config, loss.trainable_params(), steps)
    return TrainStep(loss, optimizer, model.layouts, model.groups, max_grad_norm, mixed_in, buffers)


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
