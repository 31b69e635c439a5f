"""Evaluation on held-out prompts: how the policy scores on prompts it was not trained on, with samples.

All prompts are answered by ``ppo_model_infer`` with the settings of training. Each prompt has its own random
numbers, the same at every evaluation and in every run (common random numbers), so only the policy changes
from one evaluation to the next. They are not those of training, so training is the same with and without
evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mindrlhf.algorithms.kl import token_kl
from mindrlhf.configs.keys import JobConfig, PPOConfig
from mindrlhf.data.prompts import PromptBatch, overlapping_rows, read_held_out
from mindrlhf.data.tokenizer import Tokenizer
from mindrlhf.runtime.host_exchange import HostExchange
from mindrlhf.trainer.builder import PPOModels, valid_vocab_size
from mindrlhf.trainer.experience import Rollout
from mindrlhf.trainer.recipe import EvaluationResult
from mindrlhf.trainer.rollout import sample_responses
from mindrlhf.trainer.samples import choose_rows, sample_texts
from mindrlhf.trainer.scoring import ExtraScores, judge_rollout
from mindrlhf.utils.errors import MindRLHFError, inline_list
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.seeds import random_stream

logger = get_logger(__name__)


class Evaluation(NamedTuple):
    """Held-out prompts with their responses, global and equal on every rank."""

    rollout: Rollout  # N rows
    scores: np.ndarray  # (N,) float32, reward model and/or function, without penalties
    kl: np.ndarray  # (N,) float32, k1 estimate to the reference, summed over the response

    def metrics(self) -> dict[str, float]:
        """Means over the prompts, and the standard deviation of the scores."""
        return {
            "eval/scores": float(self.scores.mean(dtype=np.float64)),
            "eval/scores_std": float(self.scores.std(dtype=np.float64)),
            "eval/kl": float(self.kl.mean(dtype=np.float64)),
            "eval/length": float(self.rollout.response_lengths.mean()),
            "eval/eos_rate": float(self.rollout.stopped.mean()),
        }


def held_out_prompts(path: Path, train_path: Path, job: JobConfig, exchange: HostExchange) -> PromptBatch:
    """The held-out prompts of a job, checked against its training data; collective.

    Raises:
        DataError: the file does not fit the job.
        MindRLHFError: the training data has all of them. When it has some, a warning says which.
    """
    config = job.ppo
    prompts = read_held_out(
        path,
        count=config.eval_prompts,
        max_prompt_length=config.max_prompt_length,
        pad_token_id=config.pad_token_id,
        vocab_size=valid_vocab_size(job),
    )
    # One rank reads the training data; all must know when that ends the job.
    shared = overlapping_rows(prompts, train_path) if exchange.runtime.is_main else np.empty(0, np.int64)
    count = int(exchange.every_rank(np.array([len(shared)], np.int32))[0, 0])
    total = len(prompts.sample_ids)
    remedy = "split the jsonl with rlhf_data.py --eval_output_path"
    if count == total:
        raise MindRLHFError(
            f"--eval_dataset_dir {path}: all {total} prompts are in --mind_dataset_dir {train_path} too, so "
            f"none is held out; {remedy}"
        )
    if len(shared):
        logger.warning(
            "--eval_dataset_dir %s: %d of %d prompts are in --mind_dataset_dir %s too (rows %s), so scores "
            "are not of unseen prompts alone; %s",
            path, count, total, train_path, inline_list(shared), remedy,
        )  # fmt: skip
    return prompts


def evaluate(
    models: PPOModels,
    prompts: PromptBatch,
    exchange: HostExchange,
    config: PPOConfig,
    extra_scores: ExtraScores | None = None,
    on_prompts: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    """Answers and scores all prompts in batches of a rollout's size, so that nothing is compiled again.

    Args:
        models: of this rank.
        prompts: N held-out prompts, equal on every rank. The last batch is filled with prompts from the
            front, whose second answers are dropped.
        exchange: gathers the replicas' rows.
        config: batch sizes.
        extra_scores: gives (N,) float32, added to the reward model's, or used alone without one; called once.
        on_prompts: called with the number of prompts just done.
    """
    total, size = len(prompts.sample_ids), config.rollout_batch_size
    parts: list[Evaluation] = []
    for first in range(0, total, size):
        rows = np.arange(first, first + size) % total
        batch = PromptBatch(*(field[rows] for field in prompts))
        rollout = sample_responses(models.infer, batch, exchange, partial(_stream, batch))
        ref_logprobs, scores = judge_rollout(models, rollout, exchange, rows_per_pass=config.score_batch_size)
        kl = token_kl(rollout.logprobs, ref_logprobs, rollout.mask, "k1").sum(axis=1, dtype=np.float64)
        real = slice(0, min(size, total - first))
        parts.append(
            Evaluation(
                Rollout(*(field[real] for field in rollout)), scores[real], kl[real].astype(np.float32)
            )
        )
        on_prompts(real.stop)
    rollout = Rollout(*map(np.concatenate, zip(*(part.rollout for part in parts), strict=True)))
    scores = np.concatenate([part.scores for part in parts])
    if extra_scores is not None:
        scores = scores + extra_scores(rollout)
    return Evaluation(rollout, scores, np.concatenate([part.kl for part in parts]))


def _stream(batch: PromptBatch, row: int) -> np.random.Generator:
    """Keyed by the prompt's row in its file: neither batch size nor the job's seed matters."""
    return random_stream("evaluation", int(batch.sample_ids[row]))


def evaluation_result(
    evaluation: Evaluation, config: PPOConfig, tokenizer: Tokenizer | None
) -> EvaluationResult:
    """What is recorded of an evaluation.

    Args:
        evaluation: of all prompts.
        config: how many samples are kept.
        tokenizer: decodes samples; ids are kept without one.
    """
    rollout = evaluation.rollout
    samples = [
        {
            # The prompt with its markup, and its response without control tokens.
            **sample_texts(rollout, row, tokenizer, skip_special=True),
            "score": evaluation.scores[row],
            "kl": evaluation.kl[row],
            "length": rollout.response_lengths[row],
            "stopped": bool(rollout.stopped[row]),
        }
        for row in choose_rows(len(evaluation.scores), config.eval_samples)
    ]
    return EvaluationResult(evaluation.metrics(), samples)
