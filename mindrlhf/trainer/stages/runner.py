"""The loop of a stage: optimizer steps, evaluation on held-out rows, metrics and weights on disk."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.checkpoint.shards import merge_shards, save_shard
from mindrlhf.configs.options import StageOptions
from mindrlhf.configs.schema import StagePlan
from mindrlhf.data.sequences import SequenceData
from mindrlhf.models.qwen2.networks import SequenceModel
from mindrlhf.parallel.groups import Groups, create_groups
from mindrlhf.parallel.layout import mesh_of
from mindrlhf.runtime.device import check_device, check_matmul_dtype, start_runtime
from mindrlhf.runtime.host_exchange import HostExchange, local_rows
from mindrlhf.runtime.launching import scratch_directory
from mindrlhf.runtime.signals import StopRequest, stop_on_signals
from mindrlhf.runtime.watchdog import Watchdog, supervised, suspend_watchdog
from mindrlhf.trainer.checkpointing import Trained, TrainingCheckpoints, load_states
from mindrlhf.trainer.compatibility import Kind
from mindrlhf.trainer.console.state import Column
from mindrlhf.trainer.optimizer import build_optimizer
from mindrlhf.trainer.recording import start_records
from mindrlhf.trainer.resuming import choose_checkpoint
from mindrlhf.trainer.skipping import SkippedUpdates, not_finite
from mindrlhf.trainer.stages.batches import RowStream
from mindrlhf.trainer.stages.options import FINAL, check_paths
from mindrlhf.trainer.stages.records import StageRecords
from mindrlhf.trainer.stages.stage import Stage
from mindrlhf.trainer.stages.states import stage_configuration, stage_kind
from mindrlhf.trainer.train_step import TrainStep
from mindrlhf.trainer.watching import Watchers, watch_stage
from mindrlhf.utils.files import check_writable
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.timers import PhaseTimer

logger = get_logger(__name__)


@dataclass(frozen=True)
class Surroundings:
    """Who watches a stage, and who may stop it."""

    stop: StopRequest
    watchers: Watchers


@dataclass(frozen=True)
class Job:
    """What a stage starts from: checked plan and data, and this worker among the others.

    Attributes:
        timer: of the phases, heard by the console and the watchdog.
        configuration: of the run, for its ``config.json`` and its checkpoints.
        kind: of the checkpoints.
        checkpoint: to go on from; ``None`` for a fresh start.
    """

    options: StageOptions
    plan: StagePlan
    data: SequenceData
    train_rows: np.ndarray
    held_out_rows: np.ndarray
    exchange: HostExchange
    groups: Groups
    surroundings: Surroundings
    timer: PhaseTimer
    configuration: Mapping[str, Any]
    kind: Kind
    checkpoint: Path | None

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the job."""
        return self.plan.total_steps(len(self.train_rows))


@contextmanager
def surrounded(title: str, options: StageOptions) -> Iterator[Surroundings]:
    """Supervises the block, turns SIGTERM and SIGINT into requests to stop, opens console and trackers."""
    with (
        supervised(options.watchdog_timeout),
        stop_on_signals() as stop,
        watch_stage(title, options.trackers) as watchers,
    ):
        yield Surroundings(stop, watchers)


def start_job(
    stage: str, part: str, options: StageOptions, plan: StagePlan, surroundings: Surroundings, *, pairs: bool
) -> Job:
    """Checks all that can be checked without a model, then takes the device and joins the other workers.

    Args:
        stage: ``sft`` or ``reward``.
        part: name of what is trained.
        options, plan: of the job.
        surroundings: of the job.
        pairs: whether rejected responses are wanted.

    Raises:
        MindRLHFError: paths, data or the number of rows do not fit; or the checkpoint to go on from.
    """
    scratch = scratch_directory()
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
    check_matmul_dtype(config.model)
    runtime = start_runtime(config.context, use_parallel=config.parallel.world_size > 1, scratch_dir=scratch)
    check_writable(options.save_ckpt_dir, runtime.rank)
    logger.info(
        "%s: %d rows, %d to train on and %d held out; prompts up to %d, responses up to %d tokens; "
        "%d epoch(s) of %d rows a step: %d optimizer steps",
        data.path, len(data), len(train_rows), len(held_out_rows), data.prompt_columns,
        data.response_columns, plan.epochs, plan.batch_size, steps,
    )  # fmt: skip
    exchange, kind = HostExchange(runtime), stage_kind(part)
    configuration = stage_configuration(stage, options, plan, train_rows, held_out_rows)
    checkpoint = choose_checkpoint(
        options.save_ckpt_dir,
        options.resume_from,
        resume_training=options.resume_training,
        job=configuration,
        exchange=exchange,
        kind=kind,
    )
    groups = create_groups(mesh_of(config), runtime.rank)
    watchdog = Watchdog(
        options.watchdog_timeout,
        computing={"train", "evaluate"},
        device_target=config.context.device_target,
    )
    timer = PhaseTimer([surroundings.watchers.console, watchdog])
    return Job(
        options, plan, data, train_rows, held_out_rows, exchange, groups, surroundings, timer, configuration,
        kind, checkpoint,
    )  # fmt: skip


class StageTrainer:
    """Trains one stage. Every rank makes one and calls its methods in step.

    Args:
        job: see :func:`start_job`; when it has a checkpoint, training goes on from that.
        stage: model, loss and metrics.

    Attributes:
        steps: optimizer steps that are done, skipped ones included.
        evaluations: the first and the last evaluation at least, with their ``step``.

    Raises:
        CheckpointError: the job's checkpoint does not fit the model.
    """

    def __init__(self, job: Job, stage: Stage) -> None:
        self.job, self.stage, self.timer = job, stage, job.timer
        options, model, watchers = job.options, stage.model, job.surroundings.watchers
        watchers.console.status = [Column(metric, title, ".4f", 0) for metric, title in stage.shown]
        self.exchange, self.directory = job.exchange, options.save_ckpt_dir
        optimizer = build_optimizer(job.plan.config, stage.loss.trainable_params(), job.total_steps)
        self.train_step = TrainStep(stage.loss, optimizer, model.layouts, model.groups, options.max_grad_norm)
        self.skips = SkippedUpdates(options.max_skipped_updates, "step")
        runtime = job.exchange.runtime
        self.records = (
            StageRecords(self.directory, stage.curves, watchers.trackers) if runtime.is_main else None
        )
        self.steps = 0
        self.rows = RowStream(job.train_rows, job.plan.batch_size, options.seed)
        self.evaluations: list[dict[str, float]] = []
        (part,) = job.kind.parts
        self.trained = [Trained(part, model, optimizer)]
        self.checkpoints = TrainingCheckpoints(
            self.directory, runtime.rank, options.keep_checkpoints, job.configuration, job.kind
        )
        if job.checkpoint is not None:
            self._resume(job.checkpoint)
        elif options.resume_training and self.records is not None:
            self.records.rewind(-1)  # lines of a run that was cut short before its first checkpoint
        # MindSpore collects garbage before every compilation; what lives as long as the job is left out.
        gc.collect()
        gc.freeze()

    def train(self) -> bool:
        """The remaining optimizer steps, or those before a :class:`StopRequest`.

        Evaluates before the first, every ``eval_interval`` and after the last.

        Returns:
            whether all are done; else the state is saved.

        Raises:
            KeyboardInterrupt: a SIGINT has stopped it, the state is saved.
            MindRLHFError: too many updates in a row were skipped, the state is saved.
        """
        stop, total = self.job.surroundings.stop, self.job.total_steps
        if self.records is not None:
            start_records(self.records, self.job.configuration, self.steps)
        if self.job.checkpoint is None:
            self._evaluate_into({"step": 0, "epoch": 0.0})
        with self.timer.phase("train", total, "steps"):
            self.timer.advance(self.steps)
            while not stop.is_agreed(self.exchange) and self.steps < total:
                self._run_step(self.rows.next_batch(), total)
                self.timer.advance()
        suspend_watchdog("finish")
        if stop.agreed:
            stop.leave(self.checkpoints.find(self.steps) or self.save_state())
            return False
        if self.records is not None and (picture := self.records.plot()):
            logger.info("curves: %s", picture)
        return True

    def _run_step(self, rows: np.ndarray, total: int) -> None:
        """A step with all that follows it: its line of metrics, an evaluation, a checkpoint."""
        options = self.job.options
        measured = self.step(rows)
        self.steps += 1
        metrics = {"step": self.steps, "epoch": self.steps * self.job.plan.epochs / total} | measured
        if self.steps == total or (options.eval_interval and self.steps % options.eval_interval == 0):
            self._evaluate_into(metrics)
        elif self.records is not None:
            self.records.add_metrics(metrics)
            self.records.redraw()
        results = self.directory if self.records is not None else None
        self.skips.settle(self.steps, rows, results, self.save_state)
        if options.save_interval and (self.steps % options.save_interval == 0 or self.steps == total):
            self.save_state()

    def step(self, rows: np.ndarray) -> dict[str, float]:
        """One optimizer step on a global batch; returns its metrics.

        A step whose loss or gradient is not a finite number is skipped, see :meth:`TrainStep.update`; what
        is not finite is then left out of its metrics.
        """
        started = time.perf_counter()
        stage, mesh = self.stage, self.stage.model.groups.mesh
        count = stage.count(rows)
        inverse_count = np.array([1.0 / count], np.float32)
        mine = rows[local_rows(len(rows), mesh, self.exchange.runtime.rank)]
        size = self.job.plan.micro_batch_size
        sums = self.train_step.accumulate(
            [stage.inputs(mine[i : i + size], inverse_count) for i in range(0, len(mine), size)]
        )
        losses = self.train_step.losses
        norm, rate = self.train_step.update()
        metrics = stage.train_metrics(self.exchange.sum(sums, mesh), count)
        metrics |= {"lr": rate, "grad_norm": norm}
        skipped = not np.isfinite(norm)
        if skipped:
            (trained,) = self.trained
            places = np.arange(len(rows))
            self.skips.add(
                not_finite(trained.name, places, losses, norm, mesh, self.exchange, micro_batch_size=size)
            )
            metrics = {name: value for name, value in metrics.items() if np.isfinite(value)}
        self.skips.end_update(skipped=skipped)
        seconds = time.perf_counter() - started
        metrics |= {"update/skipped": float(skipped), "time/step": seconds}
        return metrics | {"tokens_per_second": stage.tokens(rows) / seconds}

    def save_state(self) -> Path:
        """Saves the whole training state; collective. Returns its directory."""
        state = {
            "step": self.steps,
            "rows": self.rows.state_dict(),
            "evaluations": self.evaluations[:1] + self.evaluations[1:][-1:],
        }
        with self.timer.phase("save"):
            directory = self.checkpoints.save(self.steps, self.trained, state, self.exchange)
        logger.info("checkpoint: %s", directory)
        return directory

    def save(self) -> Path:
        """Writes the weights as rank directories, and merged when asked for; collective."""
        with self.timer.phase("save"):
            final = save_ranks(self.stage.model, self.directory / FINAL, self.exchange)
        full = self.job.options.save_full_ckpt
        if full is not None and self.exchange.runtime.is_main:
            merge_shards(final, self.stage.model.layouts, full)
            logger.info("weights in one file, for any layout: %s", full)
        self.exchange.barrier()
        return final

    def _resume(self, directory: Path) -> None:
        """Goes on from a checkpoint, with this or another layout; collective."""
        state = self.checkpoints.load(directory, self.trained)
        self.steps = int(state["step"])
        self.evaluations = list(state["evaluations"])
        load_states({"rows": self.rows}, state, directory)
        if self.records is not None:
            self.records.rewind(self.steps)
        self.checkpoints.set_newer_aside(self.steps)
        logger.info("resumed from %s after step %d", directory, self.steps)

    def _evaluate_into(self, metrics: dict[str, float]) -> None:
        """Adds an evaluation, when there are held-out rows, to the metrics of a step and records them."""
        rows = self.job.held_out_rows
        if len(rows):
            with self.timer.phase("evaluate"):
                evaluation = self.stage.evaluate(rows)
            metrics |= evaluation
            self.evaluations.append({"step": metrics["step"]} | evaluation)
        elif metrics["step"] == 0:
            return
        if self.records is not None:
            self.records.add_metrics(metrics)
            logger.info("step %d/%d  %s", metrics["step"], self.job.total_steps, self.stage.summary(metrics))


def save_ranks(model: SequenceModel, directory: Path, exchange: HostExchange) -> Path:
    """``directory/rank_i/`` of every rank, which appears when all ranks have written; collective.

    PPO reads it as it is where its YAML splits the model alike; scripts/transform_checkpoint.py changes that.
    """
    temporary, replaced = (directory.with_name(f".{directory.name}.{end}") for end in ("tmp", "old"))
    if exchange.runtime.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
    exchange.barrier()
    save_shard(temporary, exchange.runtime.rank, dict(model.shards()))
    exchange.barrier()
    if exchange.runtime.is_main:
        shutil.rmtree(replaced, ignore_errors=True)
        if directory.exists():
            directory.rename(replaced)
        temporary.rename(directory)
        shutil.rmtree(replaced, ignore_errors=True)
    exchange.barrier()
    return directory
