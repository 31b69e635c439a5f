"""Evaluation on held-out prompts: how the policy scores where it was not trained, and what it says there.

All prompts are answered by ``ppo_model_infer`` with the settings of training. Each prompt has random
numbers of its own, the same at every evaluation and in every run (common random numbers): what changes from
one evaluation to the next is the policy. They are not those of training, so training is the same with and
without evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mindrlhf.algorithms.kl import token_kl
from mindrlhf.algorithms.masks import policy_mask
from mindrlhf.configs.schema import JobConfig, PPOConfig
from mindrlhf.data.prompts import PromptBatch, overlapping_rows, prompts_digest, read_held_out
from mindrlhf.data.tokenizer import Tokenizer
from mindrlhf.parallel.layout import Mesh
from mindrlhf.runtime.host_exchange import HostExchange
from mindrlhf.trainer.before_after import summarize, summary_sentence, write_before_after
from mindrlhf.trainer.builder import PPOModels, valid_vocab_size
from mindrlhf.trainer.experience import Rollout
from mindrlhf.trainer.records import RunRecords, choose_rows, sample_texts
from mindrlhf.trainer.rollout import sample_responses
from mindrlhf.trainer.scoring import judge_rollout
from mindrlhf.utils.errors import MindRLHFError
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.seeds import random_stream
from mindrlhf.utils.timers import Timer

logger = get_logger(__name__)

ExtraScores = Callable[[Rollout], np.ndarray]

_NOT_DUE, _DUE, _OTHER_PROMPTS = range(3)


class Evaluation(NamedTuple):
    """Held-out prompts with their responses, global and equal on every rank."""

    rollout: Rollout  # N rows
    scores: np.ndarray  # (N,) float32, reward model and/or function, nothing taken off
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
    """The held-out prompts of a job, looked for in its training data; collective.

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
            path, count, total, train_path, _listed(shared), remedy,
        )  # fmt: skip
    return prompts


def evaluate(
    models: PPOModels,
    prompts: PromptBatch,
    mesh: Mesh,
    exchange: HostExchange,
    config: PPOConfig,
    extra_scores: ExtraScores | None = None,
    on_prompts: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    """Answers and scores all prompts, as many at a time as a rollout has, so that nothing is compiled anew.

    Args:
        models: of this rank.
        prompts: N held-out prompts, equal on every rank. The last batch is filled with prompts from the
            front, whose second answers are dropped.
        mesh: of ``models.infer``.
        exchange: gathers the replicas' rows.
        config: batch sizes.
        extra_scores: gives (N,) float32, added to the reward model's, or alone without one; called once.
        on_prompts: told how many more are done.
    """
    total, size = len(prompts.sample_ids), config.rollout_batch_size
    parts: list[Evaluation] = []
    for first in range(0, total, size):
        rows = np.arange(first, first + size) % total
        batch = PromptBatch(*(field[rows] for field in prompts))
        rollout = sample_responses(models.infer, batch, mesh, exchange, partial(_stream, batch))
        ref_logprobs, scores = judge_rollout(models, rollout, exchange, rows_per_pass=config.score_batch_size)
        mask = policy_mask(rollout.response_lengths, rollout.logprobs.shape[1])
        kl = token_kl(rollout.logprobs, ref_logprobs, mask, "k1").sum(axis=1, dtype=np.float64)
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
    """Keyed by the prompt's row in its file: neither batch size nor the job's seed matter."""
    return random_stream("evaluation", int(batch.sample_ids[row]))


class HeldOutEvaluation:
    """Evaluates when it is time, and keeps what people read; every rank makes one.

    Args:
        prompts: held-out prompts.
        models, mesh, exchange: see :func:`evaluate`.
        config: when, and how many samples are kept.
        records: of the main rank, ``None`` elsewhere.
        tokenizer: makes samples readable; ids are kept without one.
        extra_scores: see :func:`evaluate`.
    """

    def __init__(
        self,
        prompts: PromptBatch,
        models: PPOModels,
        mesh: Mesh,
        exchange: HostExchange,
        config: PPOConfig,
        *,
        records: RunRecords | None,
        tokenizer: Tokenizer | None,
        extra_scores: ExtraScores | None,
    ) -> None:
        self.prompts, self.models, self.mesh, self.exchange = prompts, models, mesh, exchange
        self.config, self.records, self.tokenizer = config, records, tokenizer
        self.extra_scores = extra_scores
        self.digest = prompts_digest(prompts)

    def run_if_due(
        self, iteration: int, on_prompts: Callable[[int], None] = lambda count: None
    ) -> Evaluation | None:
        """Evaluates the policy after ``iteration`` when nothing is recorded yet, at the end, and between.

        What the records hold already is not repeated, so a resumed run goes on where it was. Collective.

        Raises:
            MindRLHFError: the records are of other prompts; or ``--reward_fn`` failed.
        """
        # The main rank alone has the records; all must do the same.
        answer = int(self.exchange.every_rank(np.array([self._answer(iteration)], np.int32))[0, 0])
        if answer == _OTHER_PROMPTS:
            raise MindRLHFError(
                "the evaluations in --save_ckpt_dir are of other held-out prompts; resume with their "
                "--eval_dataset_dir and eval_prompts, or without --eval_dataset_dir"
            )
        return self.run(iteration, on_prompts) if answer == _DUE else None

    def _answer(self, iteration: int) -> int:
        if self.records is None:
            return _NOT_DUE
        earlier = self.records.evaluations
        if any(line["prompts_digest"] != self.digest for line in earlier):
            return _OTHER_PROMPTS
        interval = self.config.eval_interval
        is_time = iteration == self.config.total_iterations or bool(interval and iteration % interval == 0)
        is_new = all(line["iteration"] != iteration for line in earlier)
        return _DUE if is_new and (is_time or not earlier) else _NOT_DUE

    def run(self, iteration: int, on_prompts: Callable[[int], None] = lambda count: None) -> Evaluation:
        """Evaluates the policy as it is after ``iteration`` and records it; collective."""
        with Timer() as timer:
            try:
                result = evaluate(
                    *(self.models, self.prompts, self.mesh, self.exchange, self.config, self.extra_scores),
                    on_prompts=on_prompts,
                )
            except MindRLHFError as error:
                raise MindRLHFError(f"evaluation on held-out prompts: {error}") from error
        if self.records is not None:
            line: dict[str, Any] = {"iteration": iteration, **result.metrics()}
            line |= {
                "prompts": len(result.scores),
                "prompts_digest": self.digest,
                "seconds": timer.seconds,
            }
            rows = choose_rows(len(result.scores), self.config.eval_samples)
            self.records.add_evaluation(line, [self._sample(iteration, result, row) for row in rows])
            logger.info(
                "held-out after iteration %d: score %+.4f (std %.4f)  kl %+.4f  length %.1f  stop rate %.2f  "
                "%d prompts  %.1f s",
                iteration, *result.metrics().values(), line["prompts"], timer.seconds,
            )  # fmt: skip
        return result

    def report(self) -> None:
        """Writes and logs the first evaluation against the last; nothing when there is none."""
        if self.records is None or not self.records.evaluations:
            return
        records = self.records
        table = write_before_after(records.directory, records.evaluations, records.eval_samples)
        if table:
            logger.info("held-out samples, scores in brackets:\n%s", table)
        logger.info("%s", summary_sentence(summarize(records.evaluations)))

    def _sample(self, iteration: int, result: Evaluation, row: int) -> dict[str, Any]:
        """One prompt with its markup, and its response without control tokens."""
        return {
            "iteration": iteration,
            **sample_texts(result.rollout, row, self.tokenizer, skip_special=True),
            "score": result.scores[row],
            "kl": result.kl[row],
            "length": result.rollout.response_lengths[row],
            "stopped": bool(result.rollout.stopped[row]),
        }


def _listed(rows: np.ndarray, shown: int = 5) -> str:
    return ", ".join(map(str, rows[:shown])) + (", ..." if len(rows) > shown else "")
