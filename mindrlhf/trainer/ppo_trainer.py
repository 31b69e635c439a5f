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

import numpy as np

from mindrlhf.algorithms.kl import sequence_kl
from mindrlhf.configs.schema import JobConfig
from mindrlhf.data.prompts import PromptBatch
from mindrlhf.data.tokenizer import Tokenizer
from mindrlhf.models.job_layouts import job_layouts
from mindrlhf.parallel.groups import create_groups
from mindrlhf.runtime.device import Runtime
from mindrlhf.runtime.host_exchange import HostExchange
from mindrlhf.runtime.host_memory import release_freed_memory
from mindrlhf.runtime.signals import StopRequest
from mindrlhf.trainer.builder import PPOModels, WeightPaths, build_models
from mindrlhf.trainer.checkpointing import Stateful, TrainingCheckpoints, load_states
from mindrlhf.trainer.evaluation import HeldOutEvaluation, held_out_prompts
from mindrlhf.trainer.experience import Experience, Rollout, Scores, make_experience
from mindrlhf.trainer.metrics import iteration_metrics, time_metrics
from mindrlhf.trainer.parts import make_kl_controller, open_prompts, trained_models
from mindrlhf.trainer.pretraining import open_pretraining
from mindrlhf.trainer.recording import IterationResults, record_iteration, start_records
from mindrlhf.trainer.records import RunRecords, save_experience
from mindrlhf.trainer.resuming import require_whole
from mindrlhf.trainer.reward_function import RewardFunction, function_scores
from mindrlhf.trainer.reward_scale import RewardShaping
from mindrlhf.trainer.rollout import generate_rollout
from mindrlhf.trainer.scoring import count_passes, score_rollout
from mindrlhf.trainer.skipping import usable
from mindrlhf.trainer.trackers.group import Trackers
from mindrlhf.trainer.update import PPOUpdate, UpdateResult
from mindrlhf.trainer.weight_sync import WeightSync
from mindrlhf.utils.logging import get_logger
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
        trackers: get metrics, histograms and samples of the main rank.
        stop: asked before each iteration whether to save and end.
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
        trackers: Trackers | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        self.job, self.config, self.paths, self.runtime = job, job.ppo, paths, runtime
        self.tokenizer, self.verify_sync = tokenizer, verify_sync
        self.timer = PhaseTimer(listeners)
        self.stop = stop or StopRequest()
        # Cheap and likely to fail, so before any model is built.
        self.prompts = open_prompts(paths.data, job)
        pretraining = open_pretraining(paths.ptx_data or paths.data, job)
        self.checkpoints = TrainingCheckpoints(paths.save, runtime.rank, self.config.keep_checkpoints, job)
        self.exchange = HostExchange(runtime)
        held_out = None
        if paths.eval_data is not None:
            held_out = held_out_prompts(paths.eval_data, paths.data, job, self.exchange)
        self.reward_function = reward_function
        with self.timer.phase("load"):
            with_reward = reward_function is None or weights.reward is not None
            self.models: PPOModels = build_models(job, weights, runtime.rank, with_reward_model=with_reward)
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
        self.trained = trained_models(self.models, self.ppo_update)
        self.kl_controller = make_kl_controller(self.config)
        self.reward_shaping = RewardShaping(self.config)
        self.stateful: dict[str, Stateful] = {
            "kl_controller": self.kl_controller,
            "prompts": self.prompts,
            "reward_shaping": self.reward_shaping,
        }
        if pretraining is not None:
            self.stateful["pretraining"] = pretraining
        self.iteration = 0
        self.records = RunRecords(paths.save, trackers) if runtime.is_main else None
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
        """Runs the remaining iterations, or those before a :class:`StopRequest`; returns the last checkpoint.

        1. draw prompts; 2. roll out on ``ppo_model_infer``; 3. score: reference, critic, reward model;
        4. rewards and advantages; 5. PPO epochs on ``ppo_model_train``; 6. sync weights to
        ``ppo_model_infer``; 7. adapt the KL coefficient, record, save; 8. evaluate on held-out prompts,
        before the first iteration too.
        """
        if self.records is not None:
            start_records(self.records, self.job, self.iteration)
        self.start_from_equal_policies()
        first = self.iteration
        while not self.stop.is_agreed(self.exchange):
            self._evaluate_if_due()
            if self.iteration >= self.config.total_iterations:
                self._report()
                break
            self.run_iteration(self.prompts.next_batch())
            if self.iteration == first + 1:
                release_freed_memory()  # all graphs are compiled now
            if self._is_save_due():
                self.save()
        return self.save_if_new()

    def _report(self) -> None:
        """What a run says when it has done all its iterations."""
        if self.evaluation is not None:
            self.evaluation.report()
        if self.records is not None and (picture := self.records.plot()):
            logger.info("curves: %s", picture)

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
        with self.timer.phase("rollout", self._tokens_to_draw, "tokens"):
            rollout = self.rollout(batch)
        with self.timer.phase("score", count_passes(self.models, self.config), "passes"):
            scores = self.score(rollout)
        rollout, scores, fault = usable(rollout, scores)
        kl_coef = self.kl_controller.value
        shaping = self.reward_shaping if fault is None else None
        experience = make_experience(rollout, scores, kl_coef, self.config, shaping)
        with self.timer.phase("train", self.config.ppo_epochs * self.config.num_minibatches, "minibatches"):
            result = self.update(experience) if fault is None else self.ppo_update.skip(fault)
        results_directory = self.paths.save if self.runtime.is_main else None
        self.ppo_update.skips.settle(self.iteration + 1, rollout.sample_ids, results_directory, self.save)
        with self.timer.phase("sync", len(self.weight_sync.infer_layouts), "parameters"):
            self.sync()
        if fault is None:
            self.kl_controller.update(sequence_kl(experience.kl), len(rollout.tokens))
        self.iteration += 1
        if self.paths.experience is not None and self.runtime.is_main:
            save_experience(self.paths.experience, self.iteration, rollout, scores, experience)
        episodes = self.iteration * len(rollout.tokens)
        metrics: dict[str, float] = {"iteration": self.iteration, "episode": episodes}
        metrics["epoch"] = self.prompts.epoch
        metrics |= iteration_metrics(rollout, scores, experience, result, kl_coef, self.config)
        drawn = int(rollout.response_lengths.sum())
        metrics |= time_metrics(self.timer.seconds, drawn, time.perf_counter() - started)
        if self.records is not None:
            made = IterationResults(rollout, scores, experience, result)
            record_iteration(self.records, metrics, made, self.config, self.tokenizer)
        return metrics

    @property
    def _tokens_to_draw(self) -> int:
        """Most tokens that this rank draws in a rollout."""
        return self.config.rollout_batch_size // self.infer_mesh.dp * self.config.max_response_length

    def rollout(self, batch: PromptBatch) -> Rollout:
        """Samples one response for each prompt of a global batch on ``ppo_model_infer``."""
        return generate_rollout(
            self.ppo_model_infer,
            batch,
            self.infer_mesh,
            self.exchange,
            seed=self.config.seed,
            iteration=self.iteration,
            on_tokens=self.timer.advance,
        )

    def score(self, rollout: Rollout) -> Scores:
        """Reference log-probs, values and scores of a rollout, each from its own model."""
        return score_rollout(
            self.models,
            rollout,
            self.exchange,
            rows_per_pass=self.config.score_batch_size,
            on_pass=self.timer.advance,
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
        self.weight_sync.sync(self.timer.advance)
        if self.verify_sync:
            self.weight_sync.verify(self.exchange)

    def save(self) -> Path:
        """Saves the whole training state; collective. Returns its directory."""
        state = {"iteration": self.iteration} | {
            name: part.state_dict() for name, part in self.stateful.items()
        }
        with self.timer.phase("save"):
            directory = self.checkpoints.save(self.iteration, self.trained, state, self.exchange)
        logger.info("checkpoint: %s", directory)
        return directory

    def save_if_new(self) -> Path:
        """The checkpoint of the present state, saved unless it is there; collective."""
        return self.checkpoints.find(self.iteration) or self.save()

    def resume(self, directory: Path, *, verified: bool = False) -> None:
        """Goes on from a directory that :meth:`save` wrote, with these or other layouts; collective.

        Args:
            directory: the checkpoint.
            verified: whether its files were held against its manifest already.

        Raises:
            CheckpointError: the directory is not a whole checkpoint of this job.
        """
        if not verified:
            require_whole(directory, self.exchange)
        state = self.checkpoints.load(directory, self.trained)
        self.iteration = int(state["iteration"])
        load_states(self.stateful, state, directory)
        if self.records is not None:
            self.records.rewind(self.iteration)
        self.sync()
        self.checkpoints.set_newer_aside(self.iteration)
        logger.info("resumed from %s after iteration %d", directory, self.iteration)

    def _evaluate_if_due(self) -> None:
        if self.evaluation is not None:
            with self.timer.phase("evaluate", len(self.evaluation.prompts.sample_ids), "prompts"):
                self.evaluation.run_if_due(self.iteration, self.timer.advance)

    def _is_save_due(self) -> bool:
        interval = self.config.save_interval
        return self.iteration == self.config.total_iterations or bool(
            interval and self.iteration % interval == 0
        )
