"""The loop of a stage: optimizer steps, evaluation on held-out rows, metrics and weights on disk."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindrlhf.checkpoint.save import merge_shards, save_shard
from mindrlhf.data.sequences import SequenceData
from mindrlhf.models.train import SequenceModel
from mindrlhf.parallel.groups import Groups, create_groups
from mindrlhf.parallel.parameters import mesh_of
from mindrlhf.trainer.console.state import Column
from mindrlhf.trainer.optimizer import build_optimizer
from mindrlhf.trainer.recording import start_records
from mindrlhf.trainer.runtime import HostExchange, check_device, local_rows, start_runtime
from mindrlhf.trainer.stages.options import FINAL, StageOptions, StagePlan, check_paths
from mindrlhf.trainer.stages.records import StageRecords
from mindrlhf.trainer.stages.stage import Stage
from mindrlhf.trainer.start import check_writable, litter_directory
from mindrlhf.trainer.train_step import TrainStep
from mindrlhf.trainer.watchdog import DEFAULT_TIMEOUT, rest, watchdog_of
from mindrlhf.trainer.watching import Watchers
from mindrlhf.utils.errors import MindRLHFError
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.seeds import random_stream
from mindrlhf.utils.timers import PhaseTimer

logger = get_logger(__name__)

KEPT_STEPS = 2
"""How many weights of ``--save_interval`` stay."""


@dataclass(frozen=True)
class Job:
    """What a stage starts from: checked plan and data, and this worker among the others."""

    options: StageOptions
    plan: StagePlan
    data: SequenceData
    train_rows: np.ndarray
    held_out_rows: np.ndarray
    exchange: HostExchange
    groups: Groups

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the job."""
        return self.plan.total_steps(len(self.train_rows))


def start_job(options: StageOptions, plan: StagePlan, *, pairs: bool) -> Job:
    """Checks all that can be checked without a model, then takes the device and joins the other workers.

    Raises:
        MindRLHFError: paths, data or the number of rows do not fit.
    """
    litter = litter_directory()
    check_paths(options)
    config = plan.config
    data = SequenceData(
        options.mind_dataset_dir,
        pad_token_id=config.model.pad_token_id,
        vocab_size=options.valid_vocab_size or config.model.vocab_size,
        max_length=config.model.seq_length,
        pairs=pairs,
    )
    train_rows, held_out_rows = data.split(options.eval_fraction, options.max_eval_prompts, options.seed)
    steps = plan.total_steps(len(train_rows))
    check_device(config.context)
    runtime = start_runtime(config.context, use_parallel=config.parallel.world_size > 1, litter_dir=litter)
    check_writable(options.save_ckpt_dir, runtime.rank)
    logger.info(
        "%s: %d rows, %d to train on and %d held out; prompts up to %d, responses up to %d tokens; "
        "%d epoch(s) of %d rows a step: %d optimizer steps",
        data.path, len(data), len(train_rows), len(held_out_rows), data.prompt_columns,
        data.response_columns, plan.epochs, plan.batch_size, steps,
    )  # fmt: skip
    groups = create_groups(mesh_of(config), runtime.rank)
    return Job(options, plan, data, train_rows, held_out_rows, HostExchange(runtime), groups)


class StageTrainer:
    """Trains one stage. Every rank makes one and calls its methods in step.

    Args:
        job: see :func:`start_job`.
        stage: model, loss and metrics.
        watchers: console and trackers.
    """

    def __init__(self, job: Job, stage: Stage, watchers: Watchers) -> None:
        self.job, self.stage = job, stage
        self.timer = PhaseTimer([watchers.console, watchdog_of(DEFAULT_TIMEOUT, job.plan.config)])
        watchers.console.status = [Column(metric, title, ".4f", 0) for metric, title in stage.shown]
        self.exchange, self.directory = job.exchange, job.options.save_ckpt_dir
        optimizer = build_optimizer(job.plan.config, stage.loss.trainable_params(), job.total_steps)
        model = stage.model
        self.train_step = TrainStep(
            stage.loss, optimizer, model.layouts, model.groups, job.options.max_grad_norm
        )
        is_main = job.exchange.runtime.is_main
        self.records = StageRecords(self.directory, stage.curves, watchers.trackers) if is_main else None
        self.evaluations: list[dict[str, float]] = []
        # MindSpore collects garbage before every compilation; what lives as long as the job is left out.
        gc.collect()
        gc.freeze()

    def train(self) -> None:
        """All optimizer steps; evaluates before the first, every ``eval_interval`` and after the last."""
        options, total = self.job.options, self.job.total_steps
        if self.records is not None:
            start_records(self.records, {"options": options, "plan": self.job.plan}, 0)
        self._evaluate_into({"step": 0, "epoch": 0.0})
        with self.timer.phase("train", total, "steps"):
            for step, rows in enumerate(self.batches(), start=1):
                metrics = {"step": step, "epoch": step * self.job.plan.epochs / total} | self.step(rows)
                if step == total or (options.eval_interval and step % options.eval_interval == 0):
                    self._evaluate_into(metrics)
                elif self.records is not None:
                    self.records.add_metrics(metrics)
                    self.records.redraw()
                if options.save_interval and step % options.save_interval == 0 and step < total:
                    self._save_step(step)
                self.timer.advance()
        rest("finish")
        if self.records is not None and (picture := self.records.plot()):
            logger.info("curves: %s", picture)

    def batches(self) -> Iterator[np.ndarray]:
        """Global row numbers of each step: every epoch a fresh permutation, fixed by the seed."""
        plan, rows = self.job.plan, self.job.train_rows
        for epoch in range(plan.epochs):
            order = random_stream("stage", self.job.options.seed, epoch).permutation(rows)
            for first in range(0, len(order) - plan.batch_size + 1, plan.batch_size):
                yield order[first : first + plan.batch_size]

    def step(self, rows: np.ndarray) -> dict[str, float]:
        """One optimizer step on a global batch; returns its metrics.

        Raises:
            MindRLHFError: the loss or the gradient is not a finite number.
        """
        started = time.perf_counter()
        stage, mesh = self.stage, self.stage.model.groups.mesh
        count = stage.count(rows)
        inverse_count = np.array([1.0 / count], np.float32)
        mine = rows[local_rows(len(rows), mesh, self.exchange.runtime.rank)]
        size = self.job.plan.micro_batch_size
        sums, norm, rate = self.train_step.step(
            [stage.inputs(mine[i : i + size], inverse_count) for i in range(0, len(mine), size)]
        )
        metrics = stage.train_metrics(self.exchange.sum(sums, mesh), count)
        if not np.isfinite([norm, *metrics.values()]).all():
            raise MindRLHFError(
                f"training fails: loss {metrics['loss/train']}, gradient norm {norm}; lower --learning_rate"
            )
        seconds = time.perf_counter() - started
        metrics |= {"lr": rate, "grad_norm": norm, "time/step": seconds}
        return metrics | {"tokens_per_second": stage.tokens(rows) / seconds}

    def save(self) -> Path:
        """Writes the weights as rank directories, and merged when asked for; collective."""
        final = self._save_ranks(FINAL)
        full = self.job.options.save_full_ckpt
        if full is not None and self.exchange.runtime.is_main:
            merge_shards(final, self.stage.model.layouts, full)
            logger.info("weights in one file, for any layout: %s", full)
        self.exchange.barrier()
        return final

    def _evaluate_into(self, metrics: dict[str, float]) -> None:
        """Adds an evaluation, when there are held-out rows, to the metrics of a step and records them."""
        rows = self.job.held_out_rows
        if len(rows):
            with self.timer.phase("evaluate"):
                metrics |= self.stage.evaluate(rows)
            self.evaluations.append(metrics)
        elif metrics["step"] == 0:
            return
        if self.records is not None:
            self.records.add_metrics(metrics)
            logger.info("step %d/%d  %s", metrics["step"], self.job.total_steps, self.stage.summary(metrics))

    def _save_step(self, step: int) -> None:
        directory = self._save_ranks(f"step_{step:06d}")
        if self.exchange.runtime.is_main:
            logger.info("weights after step %d: %s", step, directory)
            for old in sorted(self.directory.glob("step_[0-9]*"))[:-KEPT_STEPS]:
                shutil.rmtree(old)

    def _save_ranks(self, name: str) -> Path:
        with self.timer.phase("save"):
            return save_ranks(self.stage.model, self.directory / name, self.exchange)


def save_ranks(model: SequenceModel, directory: Path, exchange: HostExchange) -> Path:
    """``directory/rank_i/`` of every rank, which appears when all ranks have written; collective.

    PPO reads it as it is where its YAML splits the model alike; scripts/transform_checkpoint.py changes that.
    """
    temporary = directory.with_name(f".{directory.name}.tmp")
    if exchange.runtime.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
    exchange.barrier()
    save_shard(temporary, exchange.runtime.rank, dict(model.shards()))
    exchange.barrier()
    if exchange.runtime.is_main:
        temporary.rename(directory)
    exchange.barrier()
    return directory
