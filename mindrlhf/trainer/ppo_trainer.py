"""PPO with training and inference in one job.

``PPOTrainer`` holds ``ppo_model_infer`` and ``ppo_model_train``, each on the mesh of its own YAML in the
same ranks, and runs the loop of InstructGPT (arXiv 2203.02155).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.algorithms.kl import AdaptiveKLController, FixedKLController, KLController, sequence_kl
from mindrlhf.configs.schema import JobConfig, PPOConfig
from mindrlhf.data.prompts import PromptBatch, PromptStream
from mindrlhf.data.tokenizers import Tokenizer
from mindrlhf.parallel.groups import create_groups
from mindrlhf.trainer.builder import PPOModels, WeightPaths, build_models, valid_vocab_size
from mindrlhf.trainer.checkpointing import Stateful, TrainingCheckpoints, load_states
from mindrlhf.trainer.evaluation import HeldOutEvaluation, held_out_prompts
from mindrlhf.trainer.experience import Experience, Rollout, Scores, make_experience
from mindrlhf.trainer.layouts import job_layouts
from mindrlhf.trainer.metrics import rollout_metrics, time_metrics, update_metrics
from mindrlhf.trainer.pretraining import open_pretraining
from mindrlhf.trainer.records import RunRecords, choose_rows, sample_texts, save_experience, summary_line
from mindrlhf.trainer.reward_function import RewardFunction, function_scores
from mindrlhf.trainer.reward_scale import RewardShaping
from mindrlhf.trainer.rollout import generate_rollout
from mindrlhf.trainer.runtime import HostExchange, Runtime
from mindrlhf.trainer.scoring import score_rollout
from mindrlhf.trainer.update import PPOUpdate, UpdateResult
from mindrlhf.trainer.weight_sync import WeightSync
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.memory import release_freed_memory
from mindrlhf.utils.provenance import provenance, write_provenance
from mindrlhf.utils.timers import PhaseListener, PhaseTimer

logger = get_logger(__name__)


@dataclass(frozen=True)
class TrainerPaths:
    """Where a run reads its prompts and leaves its results."""

    data: Path
    """MindRecord of prompts."""
    save: Path
    """Checkpoints, metrics, samples and curves."""
    experience: Path | None = None
    """When given, each iteration's experience goes to a MindRecord named after it."""
    eval_data: Path | None = None
    """MindRecord of held-out prompts; ``None``: no evaluation."""
    ptx_data: Path | None = None
    """MindRecord of texts for ``ptx_coef``; ``None``: ``data``."""


class PPOTrainer:
    """Runs PPO. Every rank makes one and calls :meth:`train`.

    Args:
        job: checked configuration.
        weights: where the models' weights come from.
        paths: data and results.
        runtime: this worker.
        tokenizer: makes sample texts readable; ids are stored without one.
        verify_sync: compare checksums of all parameters after each weight sync.
        reward_function: scores texts; needs a tokenizer. Added to the reward model's scores when
            ``weights.reward`` is given, else used alone, and no reward model is built.
        listeners: hear of the phases: load, rollout, score, train, sync, save, evaluate.
    """

    def __init__(
        self,
        job: JobConfig,
        weights: WeightPaths,
        paths: TrainerPaths,
        runtime: Runtime,
        *,
        tokenizer: Tokenizer | None = None,
        verify_sync: bool = False,
        reward_function: RewardFunction | None = None,
        listeners: Iterable[PhaseListener] = (),
    ) -> None:
        self.job, self.config, self.paths, self.runtime = job, job.ppo, paths, runtime
        self.tokenizer, self.verify_sync = tokenizer, verify_sync
        self.timer = PhaseTimer(listeners)
        # Cheap and likely to fail, so before any model is built.
        self.prompts = _prompt_stream(paths.data, job)
        pretraining = open_pretraining(paths.ptx_data or paths.data, job)
        self.checkpoints = TrainingCheckpoints(paths.save, runtime.rank, self.config.keep_checkpoints)
        self.exchange = HostExchange(runtime)
        held_out = None
        if paths.eval_data is not None:
            held_out = held_out_prompts(paths.eval_data, paths.data, job, self.exchange)
        self.reward_function = reward_function
        with self.timer.phase("load"):
            self.models: PPOModels = build_models(
                job,
                weights,
                runtime.rank,
                with_reward_model=reward_function is None or weights.reward is not None,
            )
        release_freed_memory()
        # MindSpore collects garbage before every compilation; what lives as long as the job is left out.
        gc.freeze()
        self.ppo_model_infer, self.ppo_model_train = self.models.infer, self.models.train
        infer_layouts = job_layouts(job)["infer_policy"]
        self.infer_mesh = next(iter(infer_layouts.values())).mesh
        self.weight_sync = WeightSync(
            self.ppo_model_train,
            self.ppo_model_infer,
            infer_layouts,
            create_groups(self.infer_mesh, runtime.rank),
        )
        self.ppo_update = PPOUpdate(self.models, job, self.exchange, pretraining)
        self.kl_controller = _kl_controller(self.config)
        self.reward_shaping = RewardShaping(self.config)
        self.stateful: dict[str, Stateful] = {
            "kl_controller": self.kl_controller,
            "prompts": self.prompts,
            "reward_shaping": self.reward_shaping,
        }
        if pretraining is not None:
            self.stateful["pretraining"] = pretraining
        self.iteration = 0
        self.records = RunRecords(paths.save) if runtime.is_main else None
        self.evaluation: HeldOutEvaluation | None = None
        if held_out is not None:
            self.evaluation = HeldOutEvaluation(
                held_out,
                self.models,
                self.infer_mesh,
                self.exchange,
                self.config,
                records=self.records,
                tokenizer=tokenizer,
                extra_scores=None if reward_function is None else self._function_scores,
            )

    def train(self) -> Path:
        """Runs the remaining iterations and returns the directory of the last checkpoint.

        1. draw prompts; 2. roll out on ``ppo_model_infer``; 3. score: reference, critic, reward model;
        4. rewards and advantages; 5. PPO epochs on ``ppo_model_train``; 6. sync weights to
        ``ppo_model_infer``; 7. adapt the KL coefficient, record, save; 8. evaluate on held-out prompts,
        before the first iteration too.
        """
        if self.records is not None:
            write_provenance(self.paths.save, provenance(self.job))
        self.start_from_equal_policies()
        self._evaluate_if_due()
        last = self.paths.save
        first = self.iteration
        while self.iteration < self.config.total_iterations:
            self.run_iteration(self.prompts.next_batch())
            if self.iteration == first + 1:
                release_freed_memory()  # all graphs are compiled now
            if self._is_save_due():
                last = self.save()
            self._evaluate_if_due()
        if self.evaluation is not None:
            self.evaluation.report()
        if self.records is not None and (picture := self.records.plot()):
            logger.info("curves: %s", picture)
        return last

    def start_from_equal_policies(self) -> None:
        """Makes the generating policy the trained one before the first rollout, so that the ratio is 1."""
        different = self.weight_sync.differences()
        if different:
            logger.warning(
                "%d parameter(s) of the infer checkpoint differ from the train checkpoint (first: %s); both "
                "policies take the train checkpoint's. The reference is --load_ref_checkpoint or, when that "
                "is not given, the infer checkpoint",
                len(different),
                different[0],
            )
        # All ranks take part whatever their own comparison said: the sync is collective.
        self.weight_sync.sync()
        if self.verify_sync:
            self.weight_sync.verify(self.exchange)

    def run_iteration(self, batch: PromptBatch) -> dict[str, float]:
        """One iteration of the loop of :meth:`train`, without the save; returns its metrics."""
        started = time.perf_counter()
        self.timer.reset()
        with self.timer.phase("rollout"):
            rollout = self.rollout(batch)
        with self.timer.phase("score"):
            scores = self.score(rollout)
        kl_coef = self.kl_controller.value
        experience = make_experience(rollout, scores, kl_coef, self.config, self.reward_shaping)
        with self.timer.phase("train", self.config.ppo_epochs * self.config.num_minibatches, "minibatches"):
            result = self.update(experience)
        with self.timer.phase("sync"):
            self.sync()
        self.kl_controller.update(sequence_kl(experience.kl), len(rollout.tokens))
        self.iteration += 1
        if self.paths.experience is not None and self.runtime.is_main:
            save_experience(self.paths.experience, self.iteration, rollout, scores, experience)
        metrics = self._metrics(rollout, scores, experience, result, kl_coef, time.perf_counter() - started)
        self._record(metrics, rollout, scores, experience)
        return metrics

    def rollout(self, batch: PromptBatch) -> Rollout:
        """Samples one response for each prompt of a global batch on ``ppo_model_infer``."""
        return generate_rollout(
            self.ppo_model_infer,
            batch,
            self.infer_mesh,
            self.exchange,
            seed=self.config.seed,
            iteration=self.iteration,
        )

    def score(self, rollout: Rollout) -> Scores:
        """Reference log-probs, values and scores of a rollout, each from its own model."""
        return score_rollout(
            self.models,
            rollout,
            self.exchange,
            rows_per_pass=self.config.score_batch_size,
            extra_scores=None if self.reward_function is None else self._function_scores,
        )

    def _function_scores(self, rollout: Rollout) -> np.ndarray:
        assert self.reward_function is not None
        assert self.tokenizer is not None
        return function_scores(self.reward_function, self.tokenizer, rollout, self.exchange)

    def update(self, experience: Experience) -> UpdateResult:
        """All optimizer steps of one iteration."""
        return self.ppo_update.run(experience, self.iteration, self.timer.advance)

    def sync(self) -> None:
        """Brings the trained weights to ``ppo_model_infer``."""
        self.weight_sync.sync()
        if self.verify_sync:
            self.weight_sync.verify(self.exchange)

    def save(self) -> Path:
        """Saves the whole training state; collective. Returns its directory."""
        state = {"iteration": self.iteration} | {
            name: part.state_dict() for name, part in self.stateful.items()
        }
        with self.timer.phase("save"):
            directory = self.checkpoints.save(
                self.iteration, self.models, self.ppo_update, state, self.exchange
            )
        logger.info("checkpoint: %s", directory)
        return directory

    def resume(self, directory: Path) -> None:
        """Goes on from a directory that :meth:`save` wrote with the same layouts.

        Raises:
            CheckpointError: the directory is not a whole checkpoint of this job.
        """
        state = self.checkpoints.load(directory, self.models, self.ppo_update)
        self.iteration = int(state["iteration"])
        load_states(self.stateful, state, directory)
        if self.records is not None:
            self.records.rewind(self.iteration)
        self.sync()
        logger.info("resumed from %s after iteration %d", directory, self.iteration)

    def _evaluate_if_due(self) -> None:
        if self.evaluation is not None:
            with self.timer.phase("evaluate"):
                self.evaluation.run_if_due(self.iteration)

    def _is_save_due(self) -> bool:
        interval = self.config.save_interval
        return self.iteration == self.config.total_iterations or bool(
            interval and self.iteration % interval == 0
        )

    def _metrics(
        self,
        rollout: Rollout,
        scores: Scores,
        experience: Experience,
        result: UpdateResult,
        kl_coef: float,
        seconds: float,
    ) -> dict[str, float]:
        metrics: dict[str, float] = {
            "iteration": self.iteration,
            "episode": self.iteration * len(rollout.tokens),
            "epoch": self.prompts.epoch,
        }
        metrics |= rollout_metrics(rollout, scores, experience, kl_coef)
        metrics |= update_metrics(result, self.config)
        metrics |= time_metrics(self.timer.seconds, int(rollout.response_lengths.sum()), seconds)
        return metrics

    def _record(
        self, metrics: dict[str, float], rollout: Rollout, scores: Scores, experience: Experience
    ) -> None:
        if self.records is None:
            return
        self.records.add_metrics(metrics)
        for row in choose_rows(len(rollout.tokens), self.config.log_samples):
            self.records.add_sample(self._sample(row, rollout, scores, experience))
        logger.info("%s", summary_line(metrics, self.config.total_iterations))

    def _sample(self, row: int, rollout: Rollout, scores: Scores, experience: Experience) -> dict[str, Any]:
        """One prompt and its response."""
        return {
            "iteration": self.iteration,
            **sample_texts(rollout, row, self.tokenizer),
            "score": scores.scores[row],
            "kl": experience.kl[row].sum(),
        }


def _prompt_stream(path: Path, job: JobConfig) -> PromptStream:
    config = job.ppo
    return PromptStream(
        path,
        batch_size=config.rollout_batch_size,
        max_prompt_length=config.max_prompt_length,
        pad_token_id=config.pad_token_id,
        seed=config.seed,
        shuffle=config.shuffle,
        vocab_size=valid_vocab_size(job),
    )


def _kl_controller(config: PPOConfig) -> KLController:
    if config.kl_controller == "fixed":
        return FixedKLController(config.kl_coef)
    return AdaptiveKLController(config.kl_coef, config.kl_target, config.kl_horizon)
