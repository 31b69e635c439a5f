"""Reward modelling on pairs of responses (Bradley and Terry; InstructGPT, arXiv 2203.02155, equation 1)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from mindspore import Tensor, nn, ops

from mindrlhf.configs.flags import RewardOptions
from mindrlhf.configs.keys import StagePlan
from mindrlhf.data.sequences import Sequences
from mindrlhf.models.networks import RewardModel
from mindrlhf.trainer.builder import fill_model
from mindrlhf.trainer.experience import sequence_inputs
from mindrlhf.trainer.loop import train
from mindrlhf.trainer.recipes.calibration import calibrate, responses_to_calibrate, write_report
from mindrlhf.trainer.recipes.supervised import (
    StageRows,
    SupervisedTrainer,
    over_rows,
    prepare,
    stage_groups,
)
from mindrlhf.trainer.run import Run, observed
from mindrlhf.trainer.shown_metrics import REWARD_MODEL_METRICS
from mindrlhf.trainer.train_step import MicroBatch, Statistics
from mindrlhf.utils.logging import get_logger

logger = get_logger(__name__)

PAIR_STATISTICS = ("loss", "correct", "margin")
"""What a pair loss sums over its pairs, in the order of its statistics."""


class PairLoss(nn.Cell):
    """``-log sigmoid(r_chosen - r_rejected) + center_coef * (r_chosen + r_rejected)^2``, mean over pairs.

    The second term keeps scores around 0, which the first leaves free (Eisenstein et al., arXiv 2312.09244).
    """

    def __init__(self, center_coef: float) -> None:
        super().__init__(auto_prefix=False)
        self.statistics = PAIR_STATISTICS
        self.center_coef = center_coef
        self.softplus = ops.Softplus()

    def construct(self, scores: Tensor, inverse_count: Tensor) -> tuple[Tensor, Tensor]:
        """One micro-batch of b pairs; returns the loss and the sums named in PAIR_STATISTICS.

        Args:
            scores: (2 b,), first those of the chosen sequences, then of the rejected.
            inverse_count: (1,) 1 / pairs of the step, over all ranks and micro-batches.
        """
        pairs = scores.shape[0] // 2
        chosen, rejected = scores[:pairs], scores[pairs:]
        margin = chosen - rejected
        total = self.softplus(-margin).sum()  # -log sigmoid(x) = log(1 + exp(-x))
        statistics = (total, ops.cast(margin > 0, margin.dtype).sum(), margin.sum())
        if self.center_coef > 0:
            total = total + self.center_coef * ops.square(chosen + rejected).sum()
        return (total * inverse_count).sum(), ops.stop_gradient(ops.stack(statistics))


class RewardTrainer(SupervisedTrainer):
    """The reward model on this rank, and how well it tells chosen from rejected.

    Args:
        options, plan: of the job.
        rows: of pairs.
        run: this rank's run.
    """

    name = "reward"
    shown = REWARD_MODEL_METRICS

    def __init__(self, options: RewardOptions, plan: StagePlan, rows: StageRows, run: Run) -> None:
        groups = stage_groups(run, plan)
        self.reward = RewardModel(
            plan.config.model, groups, prompt_length=rows.data.prompt_columns, recompute=plan.config.recompute
        )
        fill_model(self.reward, options.load_sft_checkpoint, options.seed, "reward model", "reward")
        super().__init__(options, plan, rows, run, self.reward, PairLoss(options.center_coef))

    def count(self, rows: np.ndarray) -> int:
        """Pairs."""
        return len(rows)

    def tokens(self, rows: np.ndarray) -> int:
        """Tokens of both sequences of every pair."""
        assert self.data.rejected_lengths is not None
        prompts = 2 * int(self.data.prompt_lengths[rows].sum())
        responses = self.data.response_lengths[rows].sum() + self.data.rejected_lengths[rows].sum()
        return prompts + int(responses)

    def micro_batch(self, rows: np.ndarray, inverse_count: np.ndarray) -> MicroBatch:
        """For :class:`PairLoss`."""
        return MicroBatch(self._arrays(self.data.read_pairs(rows)), (inverse_count,))

    def train_metrics(self, sums: Statistics, count: int) -> dict[str, float]:
        """Loss without the centring term, accuracy and margin of a step."""
        loss, correct, margin = (float(sums[name]) / count for name in PAIR_STATISTICS)
        return {"loss/train": loss, "train/accuracy": correct, "train/margin": margin}

    def held_out_metrics(self, rows: np.ndarray) -> dict[str, float]:
        """Loss, accuracy and margin on held-out pairs, mean and standard deviation of their scores."""
        pairs = self.data.read_pairs(rows)
        scores = self.scores(pairs, lambda count: self.run.timer.advance(count // 2)).astype(np.float64)
        margin = scores[: len(rows)] - scores[len(rows) :]
        return {
            "eval/loss": float(np.logaddexp(0.0, -margin).mean()),
            "eval/accuracy": float((margin > 0).mean()),
            "eval/margin": float(margin.mean()),
            "eval/scores": float(scores.mean()),
            "eval/scores_std": float(scores.std()),
        }

    def scores(self, sequences: Sequences, on_rows: Callable[[int], None] = lambda count: None) -> np.ndarray:
        """(n,) float32 scores of any number of sequences; collective, equal on every rank."""
        return over_rows(
            lambda *arrays: self.reward(*arrays)[0],
            self._arrays(sequences),
            self.reward.groups.mesh,
            self.exchange,
            rows_per_pass=2 * self.plan.micro_batch_size,
            on_rows=on_rows,
        )

    def _arrays(self, sequences: Sequences) -> tuple[np.ndarray, ...]:
        return (*sequence_inputs(*sequences, self.data.prompt_columns), sequences.response_lengths)


def train_reward(options: RewardOptions, plan: StagePlan) -> Path:
    """Trains a reward model on this worker and returns the directory of its weights.

    When SIGTERM stops it, it returns the directory of the results, which holds the saved state.

    Args:
        options: the flags.
        plan: their checked configuration.

    Raises:
        MindRLHFError: anything the user can fix; data and paths are checked before any model is built.
    """
    with observed("reward model", "step", options.watchdog_timeout, options.trackers) as observers:
        run, rows = prepare("reward", options, plan, observers, pairs=True)
        # Before training, so that the generating model is freed before the reward model is trained.
        responses = responses_to_calibrate(options, plan, rows, run)
        with run.timer.phase("load"):
            trainer = RewardTrainer(options, plan, rows, run)
        if not train(run, trainer):
            return options.save_ckpt_dir
        calibration = None
        if responses is not None:
            with run.timer.phase("calibrate"):
                calibration = calibrate(trainer.reward, trainer.scores, responses, options)
        final = trainer.save_weights()
        if run.recorder is not None:
            write_report(run.directory, run.recorder.evaluations, calibration)
    logger.info("weights: %s (for --load_rm_checkpoint and --load_critic_checkpoint)", final)
    return final
