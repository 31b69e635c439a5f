"""Supervised fine-tuning: the policy learns the preferred responses (InstructGPT, arXiv 2203.02155)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from mindspore import Tensor, nn, ops

from mindrlhf.algorithms.losses import cross_entropy_sum
from mindrlhf.algorithms.masks import policy_mask
from mindrlhf.configs.flags import SFTOptions
from mindrlhf.configs.keys import StagePlan
from mindrlhf.models.networks import PPOModelTrain
from mindrlhf.trainer.builder import fill_model
from mindrlhf.trainer.experience import sequence_inputs
from mindrlhf.trainer.export import export_policy
from mindrlhf.trainer.loop import train
from mindrlhf.trainer.recipes.supervised import (
    StageRows,
    SupervisedTrainer,
    over_rows,
    prepare,
    stage_groups,
)
from mindrlhf.trainer.run import Run, observed
from mindrlhf.trainer.shown_metrics import SFT_METRICS
from mindrlhf.trainer.tokenizer_checks import load_model_tokenizer
from mindrlhf.trainer.train_step import MicroBatch, Statistics
from mindrlhf.utils.logging import get_logger

logger = get_logger(__name__)


class SFTLoss(nn.Cell):
    """Cross-entropy of the response tokens: ``-sum(log p(token)) / (global number of response tokens)``."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.statistics = ("cross_entropy",)

    def construct(
        self, logprobs: Tensor, entropy: Tensor, mask: Tensor, inverse_count: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One micro-batch; returns the loss and its sum before the division, (1,).

        Args:
            logprobs, entropy: (B, R) of the policy.
            mask: (B, R) float32, 1 on real response tokens.
            inverse_count: (1,) 1 / response tokens of the step, over all ranks and micro-batches.
        """
        total = cross_entropy_sum(logprobs, mask)
        return (total * inverse_count).sum(), ops.stop_gradient(total.reshape((1,)))


class SFTTrainer(SupervisedTrainer):
    """The policy on this rank, and its loss and perplexity.

    Args:
        options, plan: of the job.
        rows: of the data set.
        run: this rank's run.
    """

    name = "policy"
    shown = SFT_METRICS

    def __init__(self, options: SFTOptions, plan: StagePlan, rows: StageRows, run: Run) -> None:
        config = plan.config.model
        self.policy = PPOModelTrain(
            config,
            stage_groups(run, plan),
            prompt_length=rows.data.prompt_columns,
            temperature=1.0,
            valid_vocab_size=options.valid_vocab_size or config.vocab_size,
            with_entropy=False,
            recompute=plan.config.recompute,
        )
        fill_model(self.policy, options.load_sft_checkpoint, options.seed, "policy")
        super().__init__(options, plan, rows, run, self.policy, SFTLoss())

    def count(self, rows: np.ndarray) -> int:
        """Response tokens."""
        return int(self.data.response_lengths[rows].sum())

    def tokens(self, rows: np.ndarray) -> int:
        """Tokens of prompts and responses."""
        return self.count(rows) + int(self.data.prompt_lengths[rows].sum())

    def micro_batch(self, rows: np.ndarray, inverse_count: np.ndarray) -> MicroBatch:
        """For :class:`SFTLoss`."""
        *inputs, mask = self._sequences(rows)
        return MicroBatch(tuple(inputs), (mask, inverse_count))

    def train_metrics(self, sums: Statistics, count: int) -> dict[str, float]:
        """``loss/train``, the mean over the response tokens of the step."""
        return {"loss/train": float(sums["cross_entropy"]) / count}

    def held_out_metrics(self, rows: np.ndarray) -> dict[str, float]:
        """``eval/loss``, the mean over all held-out response tokens, and its exponential."""
        sums = over_rows(
            self._row_losses,
            self._sequences(rows),
            self.policy.groups.mesh,
            self.exchange,
            rows_per_pass=self.plan.micro_batch_size,
            on_rows=self.run.timer.advance,
        )
        loss = float(sums.sum(dtype=np.float64)) / self.count(rows)
        return {"eval/loss": loss, "eval/perplexity": float(np.exp(loss))}

    def _row_losses(self, *arrays: np.ndarray) -> np.ndarray:
        *inputs, mask = arrays
        logprobs = self.policy(*inputs)[0]
        return -np.where(mask > 0, logprobs, 0.0).sum(axis=1)

    def _sequences(self, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        sequences = self.data.read(rows)
        mask = policy_mask(sequences.response_lengths, self.data.response_columns).astype(np.float32)
        return (*sequence_inputs(*sequences, self.data.prompt_columns), mask)


def train_sft(options: SFTOptions, plan: StagePlan) -> Path:
    """Runs supervised fine-tuning on this worker and returns the directory of the last weights.

    When SIGTERM stops it, it returns the directory of the results, which holds the saved state.

    Args:
        options: the flags.
        plan: their checked configuration.

    Raises:
        MindRLHFError: anything the user can fix; data and paths are checked before any model is built.
    """
    if options.tokenizer_path is not None:
        load_model_tokenizer(options.tokenizer_path, plan.config)
    with observed("SFT", "step", options.watchdog_timeout, options.trackers) as observers:
        run, rows = prepare("sft", options, plan, observers, pairs=False)
        with run.timer.phase("load"):
            trainer = SFTTrainer(options, plan, rows, run)
        if not train(run, trainer):
            return options.save_ckpt_dir
        final = trainer.save_weights()
        if options.export_hf_dir is not None:
            export_policy(final, plan.config.model, options, run)
    logger.info("weights: %s (for --load_sft_checkpoint_train and the reward model)", final)
    return final
