"""PPO with training and inference in one job.

``PPOTrainer`` holds ``ppo_model_infer`` and ``ppo_model_train``, each on the mesh of its own YAML in the
same ranks, and follows InstructGPT (arXiv 2203.02155). How advantages are estimated, and whether there is a
critic, are keys of the configuration (:data:`mindrlhf.algorithms.advantages.ADVANTAGES`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mindrlhf.configs.keys import JobConfig
from mindrlhf.data.prompts import PromptBatch, PromptStream, prompts_digest
from mindrlhf.data.tokenizer import Tokenizer
from mindrlhf.trainer.builder import PPOModels, build_models, valid_vocab_size
from mindrlhf.trainer.checkpoints import Stateful, Trained
from mindrlhf.trainer.evaluation import evaluate, evaluation_result, held_out_prompts
from mindrlhf.trainer.experience import (
    Experience,
    Rollout,
    ScoredRollout,
    TokenRewards,
    experience_columns,
    make_experience,
)
from mindrlhf.trainer.metrics import histograms, rollout_metrics, update_metrics
from mindrlhf.trainer.pretraining import open_pretraining
from mindrlhf.trainer.recipe import EvaluationResult, HeldOut, Schedule, StepResult
from mindrlhf.trainer.reward_function import RewardFunction, function_scores
from mindrlhf.trainer.reward_shaping import RewardShaper
from mindrlhf.trainer.rollout import generate_rollout
from mindrlhf.trainer.run import Run
from mindrlhf.trainer.samples import choose_rows, sample_texts
from mindrlhf.trainer.scoring import ExtraScores, count_passes, score_rollout
from mindrlhf.trainer.shown_metrics import ppo_metrics
from mindrlhf.trainer.update import PPOUpdate, UpdateResult
from mindrlhf.trainer.weight_paths import WeightPaths
from mindrlhf.trainer.weight_sync import WeightSync
from mindrlhf.utils.errors import RewardError
from mindrlhf.utils.logging import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class DataPaths:
    """The MindRecord files that a run reads."""

    prompts: Path
    held_out: Path | None = None
    """Held-out prompts; ``None``: no evaluation."""
    pretraining: Path | None = None
    """Texts for ``ptx_coef``; ``None``: those of ``prompts``."""


class PPOTrainer:
    """The PPO recipe; every rank makes one and gives it to :func:`mindrlhf.trainer.loop.train`.

    Args:
        job: checked configuration.
        weights: where the models' weights come from.
        data: the files that are read.
        run: this rank's run.
        tokenizer: decodes samples; ids are stored without one.
        verify_sync: compare checksums of all parameters after each weight sync.
        reward_function: scores texts; needs a tokenizer. Added to the reward model's scores when
            ``weights.reward`` is given, else used alone, and no reward model is built.
        keeps_experience: whether steps return their experience for ``--save_data_file``.
    """

    def __init__(
        self,
        job: JobConfig,
        weights: WeightPaths,
        data: DataPaths,
        run: Run,
        *,
        tokenizer: Tokenizer | None = None,
        verify_sync: bool = False,
        reward_function: RewardFunction | None = None,
        keeps_experience: bool = False,
    ) -> None:
        self.job, self.config, self.run = job, job.ppo, run
        self.runtime, self.exchange, self.timer = run.runtime, run.exchange, run.timer
        self.tokenizer, self.verify_sync, self.reward_function = tokenizer, verify_sync, reward_function
        self.keeps_experience = keeps_experience
        self._sync_verified = False
        # Cheap and likely to fail, so before any model is built.
        self.prompts = open_prompts(data.prompts, job)
        pretraining = open_pretraining(data.pretraining or data.prompts, job)
        self.held_out_prompts: PromptBatch | None = None
        self.held_out: HeldOut | None = None
        if data.held_out is not None:
            prompts = held_out_prompts(data.held_out, data.prompts, job, self.exchange)
            self.held_out_prompts = prompts
            self.held_out = HeldOut(prompts_digest(prompts), len(prompts.sample_ids), "prompts")
        with self.timer.phase("load"):
            with_reward = reward_function is None or weights.reward is not None
            self.models: PPOModels = build_models(
                job, weights, self.runtime.rank, with_reward_model=with_reward
            )
        self.ppo_model_infer, self.ppo_model_train = self.models.infer, self.models.train
        self.weight_sync = WeightSync(self.ppo_model_train, self.ppo_model_infer)
        self.ppo_update = PPOUpdate(self.models, job, self.exchange, pretraining)
        self.reward_shaper = RewardShaper(self.config)
        self.trained = trained_models(self.models, self.ppo_update)
        self.stateful: dict[str, Stateful] = {"prompts": self.prompts, "rewards": self.reward_shaper}
        if pretraining is not None:
            self.stateful["pretraining"] = pretraining
        self.schedule = Schedule(
            total=self.config.total_iterations,
            eval_interval=self.config.eval_interval,
            save_interval=self.config.save_interval,
        )
        self.shown = ppo_metrics(self.config)

    def begin(self) -> None:
        """Copies the trained policy to the generating one before the first rollout: the ratio is then 1."""
        different = self.weight_sync.differences() if self.run.step == 0 else []
        if different:
            logger.warning(
                "%d parameter(s) of the infer checkpoint differ from the train checkpoint (first: %s); both "
                "policies take the train checkpoint's. The reference is --load_ref_checkpoint or, when that "
                "is not given, the infer checkpoint",
                len(different),
                different[0],
            )
        # All ranks take part whatever their own comparison found: the sync is collective.
        self.sync()

    def step(self, step: int) -> StepResult:
        """One iteration of PPO."""
        config, timer = self.config, self.timer
        # 1. Draw prompts.
        batch = self.prompts.next_batch()
        # 2. Sample responses on ppo_model_infer.
        with timer.phase("rollout", self._tokens_to_draw, "tokens"):
            rollout = self.rollout(batch, step)
        # 3. Score them: critic, reward model, reward function, reference.
        with timer.phase("score", count_passes(self.models, config), "passes"):
            scored = self.score(rollout)
        # 4. Shape the rewards: scores, and the KL penalty per token.
        rewards = self.reward_shaper(scored)
        # 5. Estimate advantages.
        experience = make_experience(scored, rewards, config)
        # 6. Update ppo_model_train, and a separate critic.
        with timer.phase("train", config.ppo_epochs * config.num_minibatches, "minibatches"):
            update = self.update(experience, step)
        # 7. Copy the trained weights to ppo_model_infer.
        with timer.phase("sync", len(self.ppo_model_infer.layouts), "parameters"):
            self.sync(self.timer.advance)
        return self._result(scored, rewards, experience, update)

    def evaluate(self) -> EvaluationResult:
        """Answers and scores the held-out prompts with the policy as it is; collective."""
        assert self.held_out_prompts is not None
        try:
            evaluation = evaluate(
                self.models,
                self.held_out_prompts,
                self.exchange,
                self.config,
                self._extra_scores,
                on_prompts=self.timer.advance,
            )
        except RewardError as error:
            raise RewardError(f"evaluation on held-out prompts: {error}") from error
        return evaluation_result(evaluation, self.config, self.tokenizer)

    def rollout(self, batch: PromptBatch, iteration: int) -> Rollout:
        """Samples one response for each prompt of a global batch on ``ppo_model_infer``."""
        return generate_rollout(
            self.ppo_model_infer,
            batch,
            self.exchange,
            seed=self.config.seed,
            iteration=iteration,
            on_tokens=self.timer.advance,
        )

    def score(self, rollout: Rollout) -> ScoredRollout:
        """Reference log-probs, values and scores of a rollout, each from its own model."""
        return score_rollout(
            self.models,
            rollout,
            self.exchange,
            rows_per_pass=self.config.score_batch_size,
            on_pass=self.timer.advance,
            extra_scores=self._extra_scores,
        )

    def update(self, experience: Experience, iteration: int) -> UpdateResult:
        """All optimizer steps of one iteration."""
        return self.ppo_update.run(experience, iteration, self.timer.advance)

    def sync(self, on_parameter: Callable[[], None] = lambda: None) -> None:
        """Copies the trained weights to ``ppo_model_infer``; collective."""
        self.weight_sync.sync(on_parameter)
        if self.verify_sync:
            self.weight_sync.verify(self.exchange)
            if not self._sync_verified:
                logger.info(
                    "--verify_sync: weights verified after the sync; later checks are logged only on failure"
                )
                self._sync_verified = True

    @property
    def _extra_scores(self) -> ExtraScores | None:
        if self.reward_function is None:
            return None
        assert self.tokenizer is not None
        function, tokenizer = self.reward_function, self.tokenizer
        return lambda rollout: function_scores(function, tokenizer, rollout, self.exchange)

    @property
    def _tokens_to_draw(self) -> int:
        """Maximum number of tokens that this rank draws in a rollout."""
        rows = self.config.rollout_batch_size // self.ppo_model_infer.groups.mesh.dp
        return rows * self.config.max_response_length

    def _result(
        self,
        scored: ScoredRollout,
        rewards: TokenRewards,
        experience: Experience,
        update: UpdateResult,
    ) -> StepResult:
        """What the run records about an iteration."""
        rollout, config = scored.rollout, self.config
        skipped, failure = self.ppo_update.skips.report(rollout.sample_ids)
        tokens = int(rollout.response_lengths.sum())
        metrics: dict[str, float] = {
            "episode": self.prompts.drawn,
            "epoch": self.prompts.epoch,
            **rollout_metrics(scored, rewards, experience),
            **update_metrics(update, config),
            "tokens_per_second/rollout": tokens / self.timer.seconds["rollout"],
        }
        samples = [
            {
                **sample_texts(rollout, row, self.tokenizer),
                "score": scored.scores[row],
                "kl": rewards.kl[row].sum(),
            }
            for row in (choose_rows(len(rollout.tokens), config.log_samples) if self.runtime.is_main else ())
        ]
        return StepResult(
            metrics,
            tokens,
            samples,
            histograms(scored, rewards, update),
            skipped,
            failure,
            dict(experience_columns(scored, rewards, experience)) if self.keeps_experience else None,
        )


def open_prompts(path: Path, job: JobConfig) -> PromptStream:
    """The prompts of ``--mind_dataset_dir``, drawn as the job's configuration says.

    Raises:
        DataError: the file does not fit the job.
    """
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


def trained_models(models: PPOModels, update: PPOUpdate) -> list[Trained]:
    """The policy and a separate critic, with their optimizers; a shared critic is in the policy."""
    trained = [Trained("policy", models.train, update.policy_step.optimizer)]
    if models.critic is not None and update.critic_step is not None:
        trained.append(Trained("critic", models.critic, update.critic_step.optimizer))
    return trained
