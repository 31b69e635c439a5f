"""What SFT and reward modelling share: one optimizer step per step of the loop, over rows of a data set."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mindspore import nn

from mindrlhf.checkpoint.hf_config import CONFIG_NAME, write_json
from mindrlhf.checkpoint.shards import merge_shards, save_shard
from mindrlhf.configs.flags import StageOptions
from mindrlhf.configs.keys import StagePlan
from mindrlhf.data.sequences import SequenceData
from mindrlhf.data.stream import RowStream
from mindrlhf.models.networks import SequenceModel
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Mesh
from mindrlhf.runtime.host_exchange import HostExchange, local_rows, together
from mindrlhf.runtime.launching import scratch_directory
from mindrlhf.trainer.builder import sequence_groups
from mindrlhf.trainer.checkpoints import Stateful, Trained, TrainingCheckpoints, appearing, model_identity
from mindrlhf.trainer.optimizer import build_optimizer
from mindrlhf.trainer.output_paths import output_of
from mindrlhf.trainer.recipe import EvaluationResult, HeldOut, Schedule, StepResult
from mindrlhf.trainer.recorder import check_results
from mindrlhf.trainer.run import Observers, Run, open_run, start_worker
from mindrlhf.trainer.shown_metrics import ShownMetrics
from mindrlhf.trainer.skipped_updates import SkippedUpdates, not_finite
from mindrlhf.trainer.train_step import MicroBatch, Objective, Statistics, TrainStep
from mindrlhf.utils.errors import MindRLHFError
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.outputs import check_place
from mindrlhf.utils.provenance import fingerprints
from mindrlhf.utils.result_files import FINAL, checkpoint_numbers

logger = get_logger(__name__)

_LOG_LINES = 20  # of steps, in a whole run

Forward = Callable[..., np.ndarray]


@dataclass(frozen=True)
class StageRows:
    """The rows of a stage: those to train on, and those held out."""

    data: SequenceData
    train: np.ndarray
    held_out: np.ndarray


def prepare(
    recipe: str, options: StageOptions, plan: StagePlan, observers: Observers, *, pairs: bool
) -> tuple[Run, StageRows]:
    """Checks everything that needs no model, takes the device and joins the other workers.

    Args:
        recipe: ``sft`` or ``reward``.
        options, plan: of the job.
        observers: of the job.
        pairs: whether rejected responses are needed.

    Raises:
        MindRLHFError: paths, data or the number of rows do not fit; or the checkpoint to resume from.
    """
    scratch = scratch_directory()
    check_unfinished(options)
    config = plan.config
    data = SequenceData(
        options.mind_dataset_dir,
        pad_token_id=config.model.pad_token_id,
        vocab_size=options.valid_vocab_size or config.model.vocab_size,
        max_length=config.model.seq_length,
        pairs=pairs,
    )
    rows = StageRows(data, *data.split(options.eval_fraction, options.max_eval_prompts, options.seed))
    steps = plan.total_steps(len(rows.train))
    exchange = start_worker(config, scratch, options.save_ckpt_dir, observers)
    save = options.save_ckpt_dir
    check_results(save, "step", recipe, FINAL, continues=options.continues_in(save))
    data_paths = {"mind_dataset_dir": options.mind_dataset_dir}
    weights = {"load_sft_checkpoint": options.load_sft_checkpoint}
    counts = {"train": len(rows.train), "held_out": len(rows.held_out)}
    checkpoints = TrainingCheckpoints(
        options.save_ckpt_dir,
        "step",
        exchange,
        keep=options.keep_checkpoints,
        configuration={"stage": recipe, "options": options, "plan": plan, "rows": counts},
        # The place in the data refers to these rows in this split and order.
        fixed={
            "recipe": recipe,
            **model_identity(config),
            **{f"rows.{name}": count for name, count in counts.items()},
            "batch_size": plan.batch_size,
            **{key: getattr(options, key) for key in ("seed", "eval_fraction", "max_eval_prompts")},
        },
        inputs=fingerprints(data_paths, weights) if exchange.runtime.is_main else None,
    )
    logger.info(
        "%s: %d rows, %d to train on and %d held out; prompts up to %d, responses up to %d tokens; "
        "%d epoch(s) of %d rows per step: %d optimizer steps",
        data.path, len(data), len(rows.train), len(rows.held_out), data.prompt_columns,
        data.response_columns, plan.epochs, plan.batch_size, steps,
    )  # fmt: skip
    run = open_run(
        options,
        checkpoints,
        observers,
        computing=frozenset({"train", "evaluate"}),
        device_target=config.context.device_target,
    )
    return run, rows


class SupervisedTrainer(ABC):
    """A recipe whose step is one optimizer step on a batch of rows; every rank creates one.

    Args:
        options, plan: of the job.
        rows: of the data set.
        run: this rank's run.
        model: what is trained.
        loss: of the model's outputs; divided by the GLOBAL count of a step.

    Attributes:
        name: of what is trained, and of its directory in a checkpoint.
        shown: which of its metrics people see.
    """

    name: str
    shown: ShownMetrics

    def __init__(
        self,
        options: StageOptions,
        plan: StagePlan,
        rows: StageRows,
        run: Run,
        model: SequenceModel,
        loss: nn.Cell,
    ) -> None:
        self.options, self.plan, self.data, self.run, self.model = options, plan, rows.data, run, model
        self.exchange, self.held_out_rows = run.exchange, rows.held_out
        total = plan.total_steps(len(rows.train))
        optimizer = build_optimizer(plan.config, model, total)
        objective = Objective(model, loss)
        self.train_step = TrainStep(objective, optimizer, model.layouts, model.groups, options.max_grad_norm)
        self.skips = SkippedUpdates(options.max_skipped_updates)
        self.rows = RowStream(
            rows.train, purpose="stage", seed=options.seed, source=rows.data.path, drop_last=True
        )
        self.trained = [Trained(self.name, model, optimizer)]
        self.stateful: dict[str, Stateful] = {"rows": self.rows}
        self.held_out = _held_out(rows.held_out)
        self.schedule = Schedule(
            total=total,
            eval_interval=options.eval_interval,
            save_interval=options.save_interval,
            save_at_end=options.save_interval > 0,
            log_interval=max(1, total // _LOG_LINES),
        )

    def begin(self) -> None:  # noqa: B027
        """Nothing has to be done before the first step."""

    def step(self, step: int) -> StepResult:
        """One optimizer step on a global batch.

        A step whose loss or gradient is not finite is skipped, see :meth:`TrainStep.update`; metrics that are
        not finite are then left out.
        """
        mesh, size = self.model.groups.mesh, self.plan.micro_batch_size
        # 1. Draw a batch; this replica's part of it.
        rows = self.rows.draw(self.plan.batch_size)
        count = self.count(rows)
        inverse_count = np.array([1.0 / count], np.float32)
        mine = rows[local_rows(len(rows), mesh, self.exchange.runtime.rank)]
        micro = [self.micro_batch(mine[i : i + size], inverse_count) for i in range(0, len(mine), size)]
        # 2. Backward passes, and the optimizer step.
        with self.run.timer.phase("train"):
            sums = self.train_step.accumulate(micro)
            losses = self.train_step.losses
            norm, rate = self.train_step.update()
        # 3. What is recorded.
        totals = self.exchange.sum(np.array(list(sums.values())), mesh)
        metrics = {
            "epoch": (step + 1) * self.plan.epochs / self.schedule.total,
            **self.train_metrics(dict(zip(sums, totals, strict=True)), count),
            "lr": rate,
            "grad_norm": norm,
        }
        is_skipped = not np.isfinite(norm)
        if is_skipped:
            places = np.arange(len(rows))
            self.skips.add(
                not_finite(self.name, places, losses, norm, mesh, self.exchange, micro_batch_size=size)
            )
            metrics = {name: value for name, value in metrics.items() if np.isfinite(value)}
        self.skips.end_update(skipped=is_skipped)
        metrics["update/skipped"] = float(is_skipped)
        skipped, failure = self.skips.report(rows)
        return StepResult(metrics, self.tokens(rows), skipped=skipped, failure=failure)

    def evaluate(self) -> EvaluationResult:
        """Metrics on the held-out rows; collective."""
        return EvaluationResult(self.held_out_metrics(self.held_out_rows))

    @abstractmethod
    def count(self, rows: np.ndarray) -> int:
        """Number of tokens or pairs over which the loss of these rows is a mean."""

    @abstractmethod
    def tokens(self, rows: np.ndarray) -> int:
        """Real tokens that a forward pass over these rows goes through."""

    @abstractmethod
    def micro_batch(self, rows: np.ndarray, inverse_count: np.ndarray) -> MicroBatch:
        """Some rows of the data set for model and loss; ``inverse_count`` (1,) is 1 / global count."""

    @abstractmethod
    def train_metrics(self, sums: Statistics, count: int) -> dict[str, float]:
        """Metrics of a step from its statistics, summed over all ranks, and its count."""

    @abstractmethod
    def held_out_metrics(self, rows: np.ndarray) -> dict[str, float]:
        """Metrics on held-out rows; collective, equal on every rank."""

    def save_weights(self) -> Path:
        """Writes the weights as rank directories, and merged when ``--save_full_ckpt`` asks; collective."""
        with self.run.timer.phase("save"):
            final = save_ranks(self.model, self.run.directory / FINAL, self.exchange)
        full = self.options.save_full_ckpt
        if full is not None and self.exchange.runtime.is_main:
            # Checked at the start, too; but another job may have written it meanwhile.
            check_place(output_of("--save_full_ckpt", full, overwrite=self.run.replaces["--save_full_ckpt"]))
            merge_shards(final, self.model.layouts, full)
            logger.info("weights in one file, for any layout: %s", full)
        self.exchange.barrier()
        return final


def _held_out(rows: np.ndarray) -> HeldOut | None:
    digest = hashlib.sha256(np.ascontiguousarray(rows, np.int64).tobytes()).hexdigest()[:16]
    return HeldOut(digest, len(rows), "rows") if len(rows) else None


def stage_groups(run: Run, plan: StagePlan) -> Groups:
    """This rank's groups in the mesh of a stage's YAML."""
    return sequence_groups(plan.config, run.runtime.rank)


def over_rows(
    forward: Forward,
    arrays: tuple[np.ndarray, ...],
    mesh: Mesh,
    exchange: HostExchange,
    *,
    rows_per_pass: int,
    on_rows: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """One number per row, for any number of rows; each replica computes its part, every rank gets all.

    All passes have one size, so that one graph serves them: the last is filled up with the first rows.

    Args:
        forward: ``rows_per_pass`` rows of every array -> (rows_per_pass,) numbers.
        arrays: (n, ...) each, n at least 1.
        mesh: of the model behind ``forward``.
        exchange: gathers the replicas' numbers.
        rows_per_pass: rows of one call on a rank.
        on_rows: called with the number of further rows that all ranks have done, up to n.

    Returns:
        (n,) float32.
    """
    count = len(arrays[0])
    unit = mesh.dp * rows_per_pass
    order = np.arange(-(-count // unit) * unit) % count
    mine = order[local_rows(len(order), mesh, exchange.runtime.rank)]
    parts = []
    for first in range(0, len(mine), rows_per_pass):
        rows = mine[first : first + rows_per_pass]
        parts.append(forward(*(array[rows] for array in arrays)))
        done = first * mesh.dp
        on_rows(min(unit, count - done))
    return exchange.gather_rows({"x": np.concatenate(parts).astype(np.float32)}, mesh)["x"][:count]


def save_ranks(model: SequenceModel, directory: Path, exchange: HostExchange) -> Path:
    """``directory/rank_i/`` of every rank, and ``config.json``; appears when all have written; collective.

    Raises:
        CheckpointError: on every rank, when one cannot write its part; an older directory stays as it was.
    """
    with appearing(directory, exchange) as temporary, together(exchange, f"write {temporary}"):
        save_shard(temporary, exchange.runtime.rank, dict(model.shards()))
        if exchange.runtime.is_main:
            write_json(temporary / CONFIG_NAME, model.described())
    return directory


def check_unfinished(options: StageOptions) -> None:
    """Refuses to resume a run that has finished and left no checkpoint.

    Raises:
        MindRLHFError: names the flag and the path.
    """
    save = options.save_ckpt_dir
    if options.resume_training and (save / FINAL).exists() and not checkpoint_numbers(save, "step"):
        raise MindRLHFError(
            f"--save_ckpt_dir {save} holds the weights of a run that has finished ({FINAL}) and no "
            "checkpoint to resume from: there is nothing left to do; to train again, give another directory"
        )
