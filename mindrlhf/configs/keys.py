"""The configuration of a run: frozen dataclasses, free of MindSpore; each key is declared once, here.

One :class:`RunConfig` per MindFormers YAML (sizes, split, optimizer of one model) and one
:class:`PPOConfig` per job (every PPO hyper-parameter). They are read by :mod:`mindrlhf.configs.load`,
which checks them; building one by hand checks nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Gt, Le, Lt

from mindrlhf.configs.fields import (
    Count,
    DeviceTarget,
    DType,
    Flag,
    Fraction,
    Natural,
    NotNegative,
    OneOf,
    OnOff,
    Positive,
    Temperature,
    Text,
    TokenIds,
    key,
    keys_of,
)
from mindrlhf.utils.errors import ConfigError
from mindrlhf.utils.sizes import exact_div

_weights_key = partial(key, of_weights=True)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and numerics of a Qwen2 model: section ``model.model_config`` (MindFormers' ``LlamaConfig``).

    A YAML must give every key whose MindFormers default is not Qwen2's value. ``matmul_dtype`` is
    ``--cpu_matmul_dtype``: the type to which products round their float32 operands on CPU.
    """

    type: Text = key(
        "LlamaConfig", "MindFormers' configuration class, which names the family of models", required=True
    )
    vocab_size: Count = _weights_key(..., "rows of the embedding, padding rows included")
    hidden_size: Count = _weights_key(..., "features of a token")
    num_layers: Count = _weights_key(..., "decoder layers")
    num_heads: Count = _weights_key(..., "query heads")
    n_kv_heads: Count = _weights_key(..., "key/value heads; null: as many as num_heads", nullable=True)
    intermediate_size: Count = _weights_key(..., "inner features of the feed-forward")
    seq_length: Count = key(
        2048, "maximum positions; at least max_prompt_length + max_response_length", required=True
    )
    rms_norm_eps: Annotated[Positive, Lt(1)] = _weights_key(1e-6, "epsilon of RMSNorm", required=True)
    theta: Annotated[Positive, Gt(1)] = _weights_key(
        1_000_000.0, "base of the rotary frequencies", required=True
    )
    initializer_range: Positive = key(0.02, "for exported configurations; initialises nothing")
    qkv_has_bias: Flag = _weights_key(
        True, "whether query, key and value have a bias (Qwen2: True)", required=True
    )
    tie_word_embeddings: Flag = _weights_key(False, "whether the output head is the embedding")
    use_flash_attention: Flag = key(False, "Ascend's fused attention; off elsewhere, with a log line")
    compute_dtype: DType = key(
        "float32", "type of products and activations; float32 on CPU, with a log line", required=True
    )
    param_init_type: DType = key(
        "float32",
        "type of stored weights; training keeps float32 copies of others; on CPU the generating policy's are "
        "float32, and those of other models become it when they are used",
        required=True,
    )
    layernorm_compute_type: DType = key("float32", "type inside RMSNorm")
    softmax_compute_type: DType = key("float32", "type inside the attention's softmax")
    rotary_dtype: DType = key("float32", "type of the rotation")
    matmul_dtype: str = "float32"
    pad_token_id: Natural = key(0, "fills empty columns", required=True)
    bos_token_id: Natural = key(0, "for exported configurations; null: none", nullable=True)
    eos_token_id: TokenIds = key(
        (0,),
        "for exported configurations, and where reward_model.py's samples end; PPO has stop_token_ids",
        required=True,
    )

    @property
    def head_dim(self) -> int:
        """Size of one attention head, ``hidden_size / num_heads``."""
        return exact_div(self.hidden_size, self.num_heads, "hidden_size by num_heads")

    @property
    def queries_per_kv_head(self) -> int:
        """Query heads that share one key/value head, ``num_heads / n_kv_heads``."""
        return exact_div(self.num_heads, self.n_kv_heads, "num_heads by n_kv_heads")


WEIGHTS_KEYS = tuple(name for name, one in keys_of(ModelConfig).items() if one.of_weights)
"""Sizes and numerics that models must agree on to share weights."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How one model is split: section ``parallel_config``."""

    data_parallel: Count = key(1, "replicas of the model", required=True)
    model_parallel: Count = key(
        1, "ranks that one replica is split over; must divide the key/value heads", required=True
    )

    @property
    def world_size(self) -> int:
        """Number of ranks the model needs."""
        return self.data_parallel * self.model_parallel


@dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """Device settings: section ``context``."""

    device_target: DeviceTarget = key(
        "CPU", "what the job runs on; --device_target overrides it", required=True
    )
    max_device_memory: Text | None = key(
        None, "bound of MindSpore's memory pool, such as 58GB; not used on CPU", nullable=True
    )
    memory_offload: OnOff = key(
        False,
        "ON: models of this YAML are in host memory while another one that has it ON is used; optimizer.swap "
        "does it for the optimizer's states",
    )
    max_call_depth: Count = key(10_000, "MindSpore's recursion limit when it compiles")


@dataclass(frozen=True, kw_only=True)
class RunnerConfig:
    """Section ``runner_config``; PPO's own counts are in :class:`PPOConfig`."""

    epochs: Count = key(1, "passes over the data of sft.py and reward_model.py")
    batch_size: Count = key(1, "rows of a replica's micro-batch in sft.py and reward_model.py")
    gradient_accumulation_steps: Count = key(
        1, "micro-batches whose gradients add up to an optimizer step; in PPO they cut a minibatch"
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One MindFormers YAML: a model, its split, device and optimizer.

    ``lr_schedule`` is passed unchanged to MindFormers' ``build_lr`` (it and ``optimizer`` are empty when the
    YAML has none). ``recompute`` of the layers, from the first on, compute their results anew in the backward
    pass (``recompute_config.recompute``), and the optimizer's state is shared out over the replicas when
    ``shards_optimizer`` (``parallel.enable_parallel_optimizer``). ``splits_rows`` is sequence parallelism
    (``parallel_config.use_seq_parallel``); ``ignored`` names the sections that are not read.
    ``micro_batches`` make up an optimizer step (``runner_config.gradient_accumulation_steps`` or
    ``parallel_config.micro_batch_num``).
    """

    path: Path
    context: ContextConfig
    parallel: ParallelConfig
    model: ModelConfig
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    lr_schedule: Mapping[str, Any] = field(default_factory=dict)
    runner: RunnerConfig = field(default_factory=RunnerConfig)
    recompute: int = 0
    shards_optimizer: bool = False
    splits_rows: bool = False
    micro_batches: int = 1
    ignored: tuple[str, ...] = ()

    @property
    def generator_model(self) -> ModelConfig:
        """The model as it generates: CPU's kernels for that take float32 weights alone."""
        on_cpu = self.context.device_target == "CPU"
        return replace(self.model, param_init_type="float32") if on_cpu else self.model


PPO_GROUPS = ("run", "batches", "sequences", "sampling", "reward", "advantages", "loss")
"""Headings in ``ppo_X.yaml``, in order."""

_run, _batches, _sequences, _sampling, _reward, _advantages, _loss = (
    partial(key, group=group) for group in PPO_GROUPS
)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Keys of ``ppo_X.yaml`` that are also flags of ``sft.py`` and ``reward_model.py``.

    A step is an iteration in PPO and an optimizer step in the others.
    """

    seed: Natural = _run(1, "seed of everything random: data order, rollouts, new heads")
    save_interval: Natural = _run(
        0,
        "steps between checkpoints of the training state; 0: PPO only at the end, the others only when a "
        "signal stops them, and at the end once they have been resumed",
    )
    keep_checkpoints: Natural = _run(2, "number of newest checkpoints to keep; 0: all")
    eval_interval: Natural = _run(
        0, "steps between evaluations on held-out prompts; 0: before the first and after the last"
    )
    micro_batch_size: Natural = _batches(
        0, "rows of one rank per forward/backward; changes memory, not the result; 0: all of a step"
    )
    valid_vocab_size: Natural = _sequences(
        0, "length of the tokenizer: token ids from here on have probability 0; 0: the model's vocab_size"
    )
    max_grad_norm: NotNegative = _loss(1.0, "bound of the global gradient norm; 0: off")
    max_skipped_updates: Count = _loss(
        3, "number of updates in a row with a NaN or infinite loss, gradient or reward that stops the job"
    )


def _estimators() -> Iterable[str]:
    from mindrlhf.algorithms.advantages import ADVANTAGES  # numpy: only once a configuration is checked

    return ADVANTAGES


@dataclass(frozen=True, kw_only=True)
class PPOConfig(TrainingSettings):
    """Every PPO hyper-parameter of a job; "rows" are sequences of one data-parallel rank.

    Defaults follow InstructGPT (arXiv 2203.02155) and Ziegler et al. (arXiv 1909.08593). A YAML must give
    whatever depends on the tokenizer, and the size of the job.
    """

    total_iterations: Count = _run(100, "rollouts of the whole job", required=True)
    log_samples: Natural = _run(2, "sample texts per iteration")
    eval_prompts: Natural = _run(0, "held-out prompts that are used; 0: all")
    eval_samples: Natural = _run(
        4, "held-out prompts whose responses are kept as texts and shown before and after"
    )

    rollout_batch_size: Count = _batches(64, "prompts per iteration, over all ranks", required=True)
    generation_batch_size: Natural = _batches(0, "rows per generate call; 0: all at once")
    score_batch_size: Natural = _batches(
        0, "rows per forward of reward, reference and critic; 0: all at once"
    )
    ppo_epochs: Count = _batches(4, "passes over each rollout")
    num_minibatches: Count = _batches(4, "optimizer steps per pass")
    shuffle: Flag = _batches(True, "whether prompts are shuffled in each epoch of the data set")

    max_prompt_length: Count = _sequences(
        512, "columns of a left-padded prompt; longer prompts are refused", required=True
    )
    max_response_length: Count = _sequences(512, "maximum tokens of a response", required=True)
    stop_token_ids: TokenIds = _sequences((0,), "a response ends after the first of them", required=True)
    pad_token_id: Natural = _sequences(0, "fills empty columns", required=True)

    do_sample: Flag = _sampling(True, "whether tokens are sampled; False: the most likely one is taken")
    temperature: Temperature = _sampling(1.0, "divides the logits, in sampling and in all log-probs")
    top_k: Natural = _sampling(0, "sample from this many most likely tokens; biases ratio and KL; 0: off")
    top_p: Annotated[Positive, Le(1)] = _sampling(
        1.0, "sample from the most likely tokens with this total probability; biases ratio and KL; 1: off"
    )
    decode_steps_per_call: Count = _sampling(8, "tokens per call of a compiled graph")

    kl_controller: Literal["fixed", "adaptive"] = _reward("fixed", "whether kl_coef adapts")
    kl_coef: NotNegative = _reward(
        0.02, "factor of the KL to the reference, per token; adaptive: its initial value"
    )
    kl_target: Positive = _reward(6.0, "KL that the adaptive controller aims at")
    kl_horizon: Count = _reward(10_000, "responses over which the adaptive controller corrects")
    kl_estimator: Literal["k1", "k2", "k3"] = _reward("k1", "estimator of the KL per token")
    missing_eos_penalty: NotNegative = _reward(
        0.0, "subtracted from the score of a response without a stop token; 0: off"
    )
    scale_rewards: Flag = _reward(
        False, "whether scores are then divided by their running standard deviation"
    )
    center_rewards: Flag = _reward(False, "whether their running mean is then subtracted")
    score_clip: NotNegative = _reward(0.0, "finally scores are clipped to -score_clip..score_clip; 0: off")

    advantage: Annotated[Text, OneOf(_estimators)] = _advantages(
        "gae", "estimator; gae needs a critic, reinforce (returns minus the batch mean) takes critic: none"
    )
    critic: Literal["separate", "shared", "none"] = _advantages(
        "separate", "model of the values: its own, a head on the policy, or none"
    )
    gamma: Fraction = _advantages(1.0, "discount")
    lam: Fraction = _advantages(0.95, "lambda of GAE (arXiv 1506.02438)")
    whiten_advantages: Flag = _advantages(
        True, "whether advantages get mean 0 and variance 1 over the tokens of a rollout"
    )
    whiten_rewards: Flag = _advantages(False, "whether rewards are scaled to variance 1; their mean is kept")

    cliprange: Annotated[Positive, Lt(1)] = _loss(
        0.2, "bound of the ratio, epsilon of PPO (arXiv 1707.06347)"
    )
    cliprange_value: Positive = _loss(0.2, "bound of the values around the old ones")
    vf_coef: NotNegative = _loss(0.1, "factor of the value loss")
    value_head_init_scale: NotNegative = _loss(
        1.0, "scale of a fresh value head, N(0, 1/sqrt(H+1)); 0: values start at 0"
    )
    entropy_coef: NotNegative = _loss(0.0, "factor of the entropy bonus in the policy loss; 0: off")
    ptx_coef: NotNegative = _loss(
        0.0, "factor of the pre-training loss that is mixed in (InstructGPT's PPO-ptx); 0: off"
    )
    target_kl: NotNegative = _loss(
        0.0, "ends an iteration's optimizer steps once policy/approxkl is above 1.5 times it; 0: off"
    )
    critic_warmup_iterations: Natural = _loss(
        0, "first iterations that train the critic alone; critic: separate only"
    )
    log_ratio_clamp: Annotated[Positive, Le(80)] = _loss(  # exp(88.7) overflows float32
        20.0, "bound of the absolute log-ratio before it is exponentiated"
    )

    @property
    def max_length(self) -> int:
        """Columns of a whole sequence, ``max_prompt_length + max_response_length``."""
        return self.max_prompt_length + self.max_response_length

    @property
    def minibatch_size(self) -> int:
        """Global sequences per optimizer step, ``rollout_batch_size / num_minibatches``."""
        return exact_div(
            self.rollout_batch_size, self.num_minibatches, "rollout_batch_size by num_minibatches"
        )

    def micro_batch_rows(self, trained: RunConfig) -> int:
        """Rows per forward/backward of a rank of a model that is trained."""
        rows = self.minibatch_size // trained.parallel.data_parallel
        return rows // trained.micro_batches if trained.micro_batches > 1 else self.micro_batch_size or rows

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole job."""
        return self.total_iterations * self.ppo_epochs * self.num_minibatches

    @property
    def policy_optimizer_steps(self) -> int:
        """Optimizer steps of the policy: all except those of the critic's warm-up."""
        iterations = self.total_iterations - self.critic_warmup_iterations
        return iterations * self.ppo_epochs * self.num_minibatches


UNUSED_WITH: Mapping[tuple[str, object], tuple[str, ...]] = {
    ("critic", "none"): (
        *("lam", "cliprange_value", "vf_coef", "value_head_init_scale", "critic_warmup_iterations"),
    ),
    ("kl_controller", "fixed"): ("kl_target", "kl_horizon"),
    ("do_sample", False): ("top_k", "top_p"),
}
"""A value of a key of :class:`PPOConfig` -> the keys that nothing reads then, which must not be set."""


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """A PPO job; the reference has the sizes and split of ``infer``.

    A critic YAML without ``optimizer`` or ``lr_schedule`` uses those of ``train``. With ``critic: none`` the
    critic YAML is not read, and ``critic`` is ``train``.
    """

    infer: RunConfig
    train: RunConfig
    reward: RunConfig
    critic: RunConfig
    ppo: PPOConfig


@dataclass(frozen=True)
class StagePlan:
    """What ``sft.py`` or ``reward_model.py`` trains, for how long and in which batches.

    Attributes:
        config: the YAML, with the peak learning rate of the flags.
        epochs: passes over the training rows.
        batch_size: rows per optimizer step, over all ranks.
        micro_batch_size: rows per forward/backward on one rank.
    """

    config: RunConfig
    epochs: int
    batch_size: int
    micro_batch_size: int

    def total_steps(self, rows: int) -> int:
        """Optimizer steps over ``rows`` training rows; an epoch leaves out rows that do not fill a batch.

        Raises:
            ConfigError: fewer rows than a batch, or a warm-up that never ends.
        """
        steps = self.epochs * (rows // self.batch_size)
        if steps == 0:
            raise ConfigError(
                [
                    f"--batch_size: {self.batch_size} rows, but there are only {rows} to train on - make it "
                    "smaller"
                ]
            )
        if fault := unfinished_warm_up(self.config.lr_schedule, steps):
            raise ConfigError([f"{self.config.path}: lr_schedule.warmup_steps: {' - '.join(fault)}"])
        return steps


def unfinished_warm_up(schedule: Mapping[str, Any], steps: int) -> tuple[str, str] | None:
    """Fault and remedy when the warm-up of a schedule does not end within ``steps`` optimizer steps."""
    warm_up = schedule.get("warmup_steps") or 0
    if warm_up <= steps or schedule.get("warmup_ratio") is not None:
        return None
    counts = f"{warm_up} steps of warm-up, {steps} optimizer steps in the job"
    return f"warm-up never ends ({counts})", "lower it or use warmup_ratio"
