"""Supervised fine-tuning: the policy learns the preferred responses (InstructGPT, arXiv 2203.02155)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from mindspore import Tensor, nn, ops

from mindrlhf.algorithms.losses import cross_entropy_sum
from mindrlhf.algorithms.masks import policy_mask
from mindrlhf.checkpoint.conversion import check_hf_output, export_hf
from mindrlhf.configs.load import load_stage
from mindrlhf.configs.options import SFTOptions
from mindrlhf.models.qwen2.networks import PPOModelTrain
from mindrlhf.runtime.launching import count_workers, serve_as_scheduler
from mindrlhf.runtime.signals import ignore_signals
from mindrlhf.trainer.builder import fill_model
from mindrlhf.trainer.stages.runner import Job, StageTrainer, start_job, surrounded
from mindrlhf.trainer.stages.stage import Stage, network_inputs, over_rows
from mindrlhf.trainer.tokenizer_checks import load_model_tokenizer
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.ranks import is_scheduler

logger = get_logger(__name__)


class SFTLoss(nn.Cell):
    """Cross-entropy of the response tokens: ``-sum(log p(token)) / (global number of response tokens)``."""

    def __init__(self, policy: PPOModelTrain) -> None:
        super().__init__(auto_prefix=False)
        self.policy = policy

    def construct(
        self, tokens: Tensor, valid: Tensor, position_ids: Tensor, mask: Tensor, inverse_count: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One micro-batch; returns the loss and its sum before the division, (1,).

        Args:
            tokens, valid, position_ids: (B, T) int32.
            mask: (B, R) float32, 1 on real response tokens.
            inverse_count: (1,) 1 / response tokens of the step, over all ranks and micro-batches.
        """
        logprobs, _, _ = self.policy(tokens, valid, position_ids)
        total = cross_entropy_sum(logprobs, mask)
        return (total * inverse_count).sum(), ops.stop_gradient(total.reshape((1,)))


class SFTStage(Stage):
    """The policy on this rank, and its loss and perplexity."""

    curves = (
        ("loss/train", "training loss (nats per token)"),
        ("eval/loss", "held-out loss (nats per token)"),
        ("eval/perplexity", "held-out perplexity"),
        ("lr", "learning rate"),
        ("grad_norm", "gradient norm before clipping"),
        ("tokens_per_second", "tokens per second"),
    )
    shown = (
        ("loss/train", "loss"),
        ("eval/loss", "held-out loss"),
        ("eval/perplexity", "held-out perplexity"),
    )

    def __init__(self, job: Job) -> None:
        self.job, self.data = job, job.data
        config, options = job.plan.config, job.options
        self.model = PPOModelTrain(
            config.model,
            job.groups,
            prompt_length=job.data.prompt_columns,
            temperature=1.0,
            valid_vocab_size=options.valid_vocab_size or config.model.vocab_size,
            with_entropy=False,
        )
        fill_model(self.model, options.load_sft_checkpoint, options.seed, job.exchange.runtime.rank, "policy")
        self.loss = SFTLoss(self.model)

    def count(self, rows: np.ndarray) -> int:
        """Response tokens."""
        return int(self.data.response_lengths[rows].sum())

    def tokens(self, rows: np.ndarray) -> int:
        """Tokens of prompts and responses."""
        return self.count(rows) + int(self.data.prompt_lengths[rows].sum())

    def inputs(self, rows: np.ndarray, inverse_count: np.ndarray) -> tuple[np.ndarray, ...]:
        """The arguments of :meth:`SFTLoss.construct`."""
        return (*self._sequences(rows), inverse_count)

    def train_metrics(self, sums: np.ndarray, count: int) -> dict[str, float]:
        """``loss/train``, the mean over the response tokens of the step."""
        return {"loss/train": float(sums[0]) / count}

    def evaluate(self, rows: np.ndarray) -> dict[str, float]:
        """``eval/loss``, the mean over all held-out response tokens, and its exponential."""
        sums = over_rows(
            self._row_losses,
            self._sequences(rows),
            self.model.groups.mesh,
            self.job.exchange,
            rows_per_pass=self.job.plan.micro_batch_size,
        )
        loss = float(sums.sum(dtype=np.float64)) / self.count(rows)
        return {"eval/loss": loss, "eval/perplexity": float(np.exp(loss))}

    def _row_losses(self, *arrays: np.ndarray) -> np.ndarray:
        *inputs, mask = arrays
        logprobs = self.model(*map(Tensor, inputs))[0].asnumpy()
        return -np.where(mask > 0, logprobs, 0.0).sum(axis=1)

    def _sequences(self, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        sequences = self.data.read(rows)
        mask = policy_mask(sequences.response_lengths, self.data.response_columns).astype(np.float32)
        return (*network_inputs(sequences, self.data.prompt_columns), mask)


def run_sft(options: SFTOptions) -> Path:
    """Runs supervised fine-tuning on this worker and returns the directory of the last weights.

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
    if options.tokenizer_path is not None:
        load_model_tokenizer(options.tokenizer_path, plan.config)
    if options.export_hf_dir is not None:
        check_hf_output(options.export_hf_dir, overwrite=True)
    with surrounded("SFT", options) as surroundings:
        job = start_job("sft", "policy", options, plan, surroundings, pairs=False)
        with job.timer.phase("load"):
            trainer = StageTrainer(job, SFTStage(job))
        if not trainer.train():
            return options.save_ckpt_dir
        final = trainer.save()
        if options.export_hf_dir is not None:
            _export(options, trainer, final)
    logger.info("weights: %s (for --load_sft_checkpoint_train and the reward model)", final)
    return final


def _export(options: SFTOptions, trainer: StageTrainer, final: Path) -> None:
    """The policy in Hugging Face format, merged from all ranks' shards by the main rank."""
    assert options.export_hf_dir is not None
    if trainer.exchange.runtime.is_main:
        tokenizer_dir = options.tokenizer_path
        export_hf(
            final,
            options.export_hf_dir,
            trainer.job.plan.config.model,
            mesh=trainer.job.groups.mesh,
            tokenizer_dir=tokenizer_dir if tokenizer_dir and tokenizer_dir.is_dir() else None,
        )
        logger.info("policy in Hugging Face format: %s", options.export_hf_dir)
    trainer.exchange.barrier()
