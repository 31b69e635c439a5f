"""PPO with training and inference in one job.

``PPOTrainer`` holds ``ppo_model_infer`` and ``ppo_model_train``, each on the mesh of its own YAML in the
same ranks, and follows InstructGPT (arXiv 2203.02155). How advantages are estimated, and whether there is a
critic, are keys of the configuration (:data:`mindrlhf.algorithms.advantages.ADVANTAGES`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.configs.options import PPOOptions
from mindrlhf.configs.schema import JobConfig
from mindrlhf.data.prompts import PromptBatch, PromptStream, prompts_digest
from mindrlhf.data.tokenizer import Tokenizer
from mindrlhf.runtime.compile_cache import open_compile_cache
from mindrlhf.runtime.host_exchange import HostExchange
from mindrlhf.runtime.launching import scratch_directory
from mindrlhf.runtime.watchdog import Watchdog
from mindrlhf.trainer.builder import PPOModels, build_models, valid_vocab_size
from mindrlhf.trainer.checkpoints import Stateful, Trained, TrainingCheckpoints, model_identity
from mindrlhf.trainer.evaluation import evaluate, evaluation_result, held_out_prompts
from mindrlhf.trainer.experience import Experience, Rollout, ScoredRollout, TokenRewards, make_experience
from mindrlhf.trainer.export import export_policy
from mindrlhf.trainer.loop import train
from mindrlhf.trainer.metrics import histograms, rollout_metrics, update_metrics
from mindrlhf.trainer.pretraining import open_pretraining
from mindrlhf.trainer.recipe import EvaluationResult, HeldOut, Schedule, StepResult
from mindrlhf.trainer.recorder import check_fresh
from mindrlhf.trainer.resume import choose_checkpoint
from mindrlhf.trainer.reward_function import (
    RewardFunction,
    function_scores,
    load_reward_function,
    reward_source,
)
from mindrlhf.trainer.reward_shaping import RewardShaper
from mindrlhf.trainer.rollout import generate_rollout
from mindrlhf.trainer.run import Observers, Run, observed, start_worker
from mindrlhf.trainer.samples import choose_rows, sample_texts
from mindrlhf.trainer.scoring import ExtraScores, count_passes, score_rollout
from mindrlhf.trainer.shown_metrics import ppo_metrics
from mindrlhf.trainer.tokenizer_checks import check_one_tokenizer, load_model_tokenizer
from mindrlhf.trainer.update import PPOUpdate, UpdateResult
from mindrlhf.trainer.weight_paths import WeightPaths
from mindrlhf.trainer.weight_sync import WeightSync
from mindrlhf.utils.errors import MindRLHFError, RewardError
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.provenance import fingerprints, plain

logger = get_logger(__name__)

_WITH_TOKENIZER = (
    "tokenizer_path", "load_sft_checkpoint_train", "load_sft_checkpoint_infer", "load_ref_checkpoint",
    "load_rm_checkpoint", "load_critic_checkpoint",
)  # fmt: skip
_IN_NO_GRAPH = (
    "seed", "save_interval", "keep_checkpoints", "log_samples", "eval_interval", "eval_prompts",
    "eval_samples", "shuffle",
)  # fmt: skip
_COMPUTING_PHASES = frozenset({"rollout", "score", "train", "sync", "evaluate"})


def fixed_settings(job: JobConfig) -> dict[str, Any]:
    """What must not change on resuming: with another value, the saved state would mean something else."""
    ppo = job.ppo
    trained = {"train": job.train} | ({"critic": job.critic} if ppo.critic == "separate" else {})
    fixed: dict[str, Any] = {"recipe": "ppo", "ppo.critic": ppo.critic}
    fixed |= {"ppo.seed": ppo.seed, "ppo.shuffle": ppo.shuffle}
    for role, config in trained.items():
        fixed |= {f"{role}.{key}": value for key, value in model_identity(config).items()}
    return fixed


def open_checkpoints(
    job: JobConfig, save: Path, exchange: HostExchange, inputs: Mapping[str, Any] | None = None
) -> TrainingCheckpoints:
    """The checkpoints of a job below ``save``; ``inputs`` as for :class:`TrainingCheckpoints`."""
    return TrainingCheckpoints(
        save,
        "iteration",
        exchange,
        keep=job.ppo.keep_checkpoints,
        configuration=job,
        fixed=fixed_settings(job),
        inputs=inputs,
    )


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
                    "--verify_sync: infer and train policy are equal; checked after each sync, said once"
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


def experience_columns(
    scored: ScoredRollout, rewards: TokenRewards, experience: Experience
) -> Iterator[tuple[str, np.ndarray]]:
    """Columns of ``--save_data_file``.

    ``tokens`` and ``valid`` (T,), ``prompt_length``, ``response_length``, ``sample_id`` and ``score`` (1,),
    and (R,) ``mask``, ``logprobs``, ``ref_logprobs``, ``values`` (with a critic), ``rewards``,
    ``advantages``, ``returns``.
    """
    rollout = scored.rollout
    yield "tokens", rollout.tokens
    yield "valid", rollout.valid
    yield "prompt_length", rollout.prompt_lengths[:, None].astype(np.int32)
    yield "response_length", rollout.response_lengths[:, None].astype(np.int32)
    yield "sample_id", rollout.sample_ids[:, None].astype(np.int64)
    yield "score", scored.scores[:, None]
    yield "mask", rollout.mask.astype(np.float32)
    yield "logprobs", rollout.logprobs
    yield "ref_logprobs", scored.ref_logprobs
    if experience.old_values is not None:
        yield "values", experience.old_values
    yield "rewards", rewards.rewards
    yield "advantages", experience.advantages
    yield "returns", experience.returns


def train_ppo(options: PPOOptions, job: JobConfig, data: Path, save: Path) -> Path:
    """Runs a whole PPO job on this worker and returns the directory of the last checkpoint.

    Args:
        options: the flags.
        job: their checked configuration.
        data: ``--mind_dataset_dir``.
        save: ``--save_ckpt_dir``.

    Raises:
        MindRLHFError: anything the user can fix; data and paths are checked before any model is built.
    """
    with observed("PPO", "iteration", options.watchdog_timeout, options.trackers) as observers:
        run, trainer = _prepare(options, job, data, save, observers)
        finished, last = train(run, trainer), run.last_checkpoint
        assert last is not None
        if finished and options.export_hf_dir is not None:
            export_policy(last / "policy", job.train.model, options, run.exchange)
    return last


def _prepare(
    options: PPOOptions, job: JobConfig, data: Path, save: Path, observers: Observers
) -> tuple[Run, PPOTrainer]:
    """Checks what the flags name, takes the device, joins the other workers, builds the models."""
    scratch = scratch_directory()
    weights = WeightPaths.of(options).checked()
    tokenizer = _tokenizer(options, job)
    check_one_tokenizer({flag: getattr(options, flag) for flag in _WITH_TOKENIZER})
    reward_function = _reward_function(options)
    if job.ppo.eval_interval and options.eval_dataset_dir is None:
        logger.warning("eval_interval is %d, but there is no --eval_dataset_dir", job.ppo.eval_interval)
    if options.ptx_dataset_dir is not None and not job.ppo.ptx_coef:
        logger.warning("--ptx_dataset_dir is not used: ptx_coef is 0")
    exchange = start_worker(job.train, scratch, save, observers)
    if not options.continues_in(save):
        check_fresh(save, "iteration")
    caches = []
    if options.enable_compile_cache:
        graphs = graph_configuration(job)
        caches.append(open_compile_cache(graphs, exchange.runtime, Path(scratch), last_phase="sync"))
    inputs = _inputs(options, weights, data, reward_function) if exchange.runtime.is_main else None
    checkpoints = open_checkpoints(job, save, exchange, inputs)
    # The user's reward function may wait for a server.
    waiting = frozenset({"score", "evaluate"}) if reward_function is not None else frozenset()
    run = Run(
        checkpoints,
        resume=choose_checkpoint(checkpoints, options.resume_from, resume_training=options.resume_training),
        rewinds=options.resume_training,
        observers=observers,
        listeners=[
            Watchdog(
                options.watchdog_timeout,
                computing=_COMPUTING_PHASES - waiting,
                device_target=job.train.context.device_target,
            ),
            *caches,
        ],
        experience_file=options.save_data_file,
    )
    trainer = PPOTrainer(
        job,
        weights,
        DataPaths(data, options.eval_dataset_dir, options.ptx_dataset_dir),
        run,
        tokenizer=tokenizer,
        verify_sync=options.verify_sync,
        reward_function=reward_function,
        keeps_experience=options.save_data_file is not None,
    )
    return run, trainer


def _inputs(
    options: PPOOptions, weights: WeightPaths, data: Path, reward_function: RewardFunction | None
) -> dict[str, Any]:
    """The record of what the run learns from: its data, the models' weights, the source of the reward."""
    paths: dict[str, Path | None] = {
        "mind_dataset_dir": data,
        "eval_dataset_dir": options.eval_dataset_dir,
        "ptx_dataset_dir": options.ptx_dataset_dir,
        **{f"weights.{role}": path for role, path in vars(weights).items()},
    }
    if reward_function is None:
        return fingerprints(paths)
    records = fingerprints(paths | {"reward_fn": reward_source(reward_function)})
    return records | {"reward_fn": {"function": options.reward_fn, **records.get("reward_fn", {})}}


def graph_configuration(job: JobConfig) -> dict[str, Any]:
    """A configuration without the keys that certainly enter no compiled graph."""
    described: dict[str, Any] = plain(job)
    for role in ("infer", "train", "reward", "critic"):
        for key in ("path", "ignored"):
            described[role].pop(key, None)
    for key in _IN_NO_GRAPH:
        del described["ppo"][key]
    return described


def _tokenizer(options: PPOOptions, job: JobConfig) -> Tokenizer | None:
    """The tokenizer of ``--tokenizer_path``, checked against the model's vocabulary."""
    if options.tokenizer_path is None:
        return None
    tokenizer = load_model_tokenizer(options.tokenizer_path, job.infer)
    limit = job.ppo.valid_vocab_size
    if limit and limit > tokenizer.size:
        raise MindRLHFError(
            f"valid_vocab_size {limit} allows ids that the tokenizer {options.tokenizer_path} does not have "
            f"({tokenizer.size} tokens); set valid_vocab_size={tokenizer.size}"
        )
    return tokenizer


def _reward_function(options: PPOOptions) -> RewardFunction | None:
    """The function of ``--reward_fn``, which reads texts and so needs a tokenizer."""
    if options.reward_fn is None:
        return None
    if options.tokenizer_path is None:
        raise MindRLHFError("--reward_fn reads texts: pass --tokenizer_path too")
    return load_reward_function(options.reward_fn)
