"""Reward modelling on pairs of responses (Bradley and Terry; InstructGPT, arXiv 2203.02155, equation 1)."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from mindspore import Tensor, nn, ops

from mindrlhf.configs.load import load_stage
from mindrlhf.configs.options import RewardOptions
from mindrlhf.data.sequences import Sequences
from mindrlhf.models.qwen2.networks import RewardModel
from mindrlhf.runtime.launching import count_workers, serve_as_scheduler
from mindrlhf.runtime.signals import ignore_signals
from mindrlhf.trainer.builder import fill_model
from mindrlhf.trainer.stages.calibration import (
    calibrate,
    check_sampling,
    data_responses,
    sft_responses,
    write_report,
)
from mindrlhf.trainer.stages.runner import Job, StageTrainer, start_job, surrounded
from mindrlhf.trainer.stages.stage import Stage, network_inputs, over_rows
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.ranks import is_scheduler
from mindrlhf.utils.timers import PhaseTimer

logger = get_logger(__name__)

PAIR_STATISTICS = ("loss", "correct", "margin")
"""What a pair loss sums over its pairs, in the order of its statistics."""


class PairLoss(nn.Cell):
    """``-log sigmoid(r_chosen - r_rejected) + center_coef * (r_chosen + r_rejected)^2``, mean over pairs.

    The second term keeps scores around 0, which the first leaves free (Eisenstein et al., arXiv 2312.09244).
    """

    def __init__(self, reward: RewardModel, center_coef: float) -> None:
        super().__init__(auto_prefix=False)
        self.reward = reward
        self.center_coef = center_coef
        self.softplus = ops.Softplus()

    def construct(
        self,
        tokens: Tensor,
        valid: Tensor,
        position_ids: Tensor,
        response_lengths: Tensor,
        inverse_count: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """One micro-batch of b pairs; returns the loss and the sums named in PAIR_STATISTICS.

        Args:
            tokens, valid, position_ids: (2 b, T) int32, first the chosen sequences, then the rejected.
            response_lengths: (2 b,) int32.
            inverse_count: (1,) 1 / pairs of the step, over all ranks and micro-batches.
        """
        scores = self.reward(tokens, valid, position_ids, response_lengths)
        pairs = scores.shape[0] // 2
        chosen, rejected = scores[:pairs], scores[pairs:]
        margin = chosen - rejected
        total = self.softplus(-margin).sum()  # -log sigmoid(x) = log(1 + exp(-x))
        statistics = (total, ops.cast(margin > 0, margin.dtype).sum(), margin.sum())
        if self.center_coef > 0:
            total = total + self.center_coef * ops.square(chosen + rejected).sum()
        return (total * inverse_count).sum(), ops.stop_gradient(ops.stack(statistics))


class RewardStage(Stage):
    """The reward model on this rank, and how well it tells chosen from rejected.

    Args:
        job: with pairs.
        response_columns: R, at least the data's.
    """

    curves = (
        ("loss/train", "training loss"),
        ("train/accuracy", "training accuracy"),
        ("train/margin", "training margin"),
        ("eval/loss", "held-out loss"),
        ("eval/accuracy", "held-out accuracy"),
        ("eval/margin", "held-out margin"),
    )
    shown = (
        ("loss/train", "loss"),
        ("train/accuracy", "accuracy"),
        ("eval/loss", "held-out loss"),
        ("eval/accuracy", "held-out accuracy"),
        ("eval/margin", "held-out margin"),
    )

    def __init__(self, job: Job, center_coef: float) -> None:
        self.job, self.data = job, job.data
        # Steps of a small learning rate would be lost in bfloat16's rounding; see build_models.
        model = replace(job.plan.config.model, param_init_type="float32")
        self.model = RewardModel(model, job.groups, prompt_length=job.data.prompt_columns)
        options = job.options
        fill_model(
            self.model,
            options.load_sft_checkpoint,
            options.seed,
            job.exchange.runtime.rank,
            "reward model",
            "reward",
        )
        self.loss = PairLoss(self.model, center_coef)

    def count(self, rows: np.ndarray) -> int:
        """Pairs."""
        return len(rows)

    def tokens(self, rows: np.ndarray) -> int:
        """Tokens of both sequences of every pair."""
        assert self.data.rejected_lengths is not None
        prompts = 2 * int(self.data.prompt_lengths[rows].sum())
        responses = self.data.response_lengths[rows].sum() + self.data.rejected_lengths[rows].sum()
        return prompts + int(responses)

    def inputs(self, rows: np.ndarray, inverse_count: np.ndarray) -> tuple[np.ndarray, ...]:
        """The arguments of :meth:`PairLoss.construct`."""
        return (*self._arrays(self.data.read_pairs(rows)), inverse_count)

    def train_metrics(self, sums: np.ndarray, count: int) -> dict[str, float]:
        """Loss without the centring term, accuracy and margin of a step."""
        loss, correct, margin = (float(value) / count for value in sums)
        return {"loss/train": loss, "train/accuracy": correct, "train/margin": margin}

    def evaluate(self, rows: np.ndarray) -> dict[str, float]:
        """Loss, accuracy and margin on held-out pairs, mean and standard deviation of their scores."""
        scores = self.scores(self.data.read_pairs(rows)).astype(np.float64)
        margin = scores[: len(rows)] - scores[len(rows) :]
        return {
            "eval/loss": float(np.logaddexp(0.0, -margin).mean()),
            "eval/accuracy": float((margin > 0).mean()),
            "eval/margin": float(margin.mean()),
            "eval/scores": float(scores.mean()),
            "eval/scores_std": float(scores.std()),
        }

    def scores(self, sequences: Sequences) -> np.ndarray:
        """(n,) float32 scores of any number of sequences; collective, equal on every rank."""
        return over_rows(
            lambda *arrays: self.model(*map(Tensor, arrays)).asnumpy(),
            self._arrays(sequences),
            self.model.groups.mesh,
            self.job.exchange,
            rows_per_pass=2 * self.job.plan.micro_batch_size,
        )

    def _arrays(self, sequences: Sequences) -> tuple[np.ndarray, ...]:
        return (*network_inputs(sequences, self.data.prompt_columns), sequences.response_lengths)


def run_reward(options: RewardOptions) -> Path:
    """Trains a reward model on this worker and returns the directory of its weights.

    Stopped by SIGTERM, it returns that of the results; the state is saved there.

    Raises:
        MindRLHFError: anything the user can mend; configuration, data and paths are checked before any
            model is built.
    """
    os.environ.setdefault("GLOG_v", "3")
    plan = load_stage(options, count_workers(use_parallel=options.use_parallel))
    if is_scheduler():
        ignore_signals()
        serve_as_scheduler()
        return options.save_ckpt_dir
    with surrounded("reward model", options) as surroundings:
        job = start_job("reward", "reward", options, plan, surroundings, pairs=True)
        final = _train(options, job)
    if final is None:
        return options.save_ckpt_dir
    logger.info("weights: %s (for --load_rm_checkpoint and --load_critic_checkpoint)", final)
    return final


def _train(options: RewardOptions, job: Job) -> Path | None:
    """Trains, calibrates, saves and reports; returns the directory of the weights, ``None`` when stopped."""
    responses = None
    if options.calibrate == "sft":
        check_sampling(options, job)
        # Before training, so that the generating model is gone when the reward model is trained.
        with job.timer.phase("calibrate"):
            responses = sft_responses(options, job)
    elif options.calibrate == "data":
        responses = data_responses(options, job)
    with job.timer.phase("load"):
        stage = RewardStage(job, options.center_coef)
        trainer = StageTrainer(job, stage)
    if not trainer.train():
        return None
    calibration = None
    if responses is not None:
        # The watchdog is at rest: nothing here tells of progress.
        with PhaseTimer([job.surroundings.watchers.console]).phase("calibrate"):
            calibration = calibrate(stage.model, stage.scores, responses, options)
    final = trainer.save()
    write_report(trainer, calibration)
    return final
