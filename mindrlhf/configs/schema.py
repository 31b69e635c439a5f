"""What a run is configured with: frozen dataclasses, free of MindSpore.

One :class:`RunConfig` per MindFormers YAML (sizes, split, optimizer of one model) and one
:class:`PPOConfig` per job (every PPO hyper-parameter). They are read by :mod:`mindrlhf.configs.load`,
which checks them; building one by hand checks nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindrlhf.utils.sizes import exact_div


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and numerics of a Qwen2 model: section ``model.model_config`` (MindFormers' ``LlamaConfig``).

    ``matmul_dtype`` is ``--cpu_matmul_dtype``: to what products round their float32 operands on CPU.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    n_kv_heads: int
    intermediate_size: int
    seq_length: int = 2048
    rms_norm_eps: float = 1e-6
    theta: float = 1_000_000.0
    initializer_range: float = 0.02
    qkv_has_bias: bool = True
    tie_word_embeddings: bool = False
    use_flash_attention: bool = False
    compute_dtype: str = "float32"
    param_init_type: str = "float32"
    layernorm_compute_type: str = "float32"
    softmax_compute_type: str = "float32"
    rotary_dtype: str = "float32"
    matmul_dtype: str = "float32"
    batch_size: int = 1
    pad_token_id: int = 0
    bos_token_id: int = 0
    eos_token_id: tuple[int, ...] = (0,)

    @property
    def head_dim(self) -> int:
        """Size of one attention head, ``hidden_size / num_heads``."""
        return exact_div(self.hidden_size, self.num_heads, "hidden_size by num_heads")

    @property
    def queries_per_kv_head(self) -> int:
        """Query heads that share one key/value head, ``num_heads / n_kv_heads``."""
        return exact_div(self.num_heads, self.n_kv_heads, "num_heads by n_kv_heads")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How one model is split: section ``parallel_config``."""

    data_parallel: int = 1
    model_parallel: int = 1

    @property
    def world_size(self) -> int:
        """Number of ranks the model needs."""
        return self.data_parallel * self.model_parallel


@dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """Device settings: section ``context``.

    ``extra`` holds the other keys of MindSpore's ``set_context`` that the YAML gives.
    """

    device_target: str = "CPU"
    mode: int = 0
    max_device_memory: str | None = None
    max_call_depth: int = 10_000
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunnerConfig:
    """Section ``runner_config``; PPO's own counts are in :class:`PPOConfig`."""

    epochs: int = 1
    batch_size: int = 1
    sink_mode: bool = False
    sink_size: int = 1
    gradient_accumulation_steps: int = 1


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One MindFormers YAML: a model, its split, device and optimizer.

    ``optimizer`` and ``lr_schedule`` are handed to MindFormers' ``build_optim`` and ``build_lr`` as they
    stand (empty when the YAML has none); ``ignored`` names the accepted keys that PPO does not use.
    """

    path: Path
    context: ContextConfig
    parallel: ParallelConfig
    model: ModelConfig
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    lr_schedule: Mapping[str, Any] = field(default_factory=dict)
    runner: RunnerConfig = field(default_factory=RunnerConfig)
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Every PPO hyper-parameter of a job; "rows" are sequences of one data-parallel rank.

    Defaults follow InstructGPT (arXiv 2203.02155) and Ziegler et al. (arXiv 1909.08593).
    """

    # run
    seed: int = 1
    total_iterations: int = 100
    save_interval: int = 0  # iterations between checkpoints; 0: only at the end
    keep_checkpoints: int = 2
    log_samples: int = 2  # sample texts an iteration
    eval_interval: int = 0  # iterations between evaluations; 0: only before the first and after the last
    eval_prompts: int = 0  # held-out prompts that are used; 0: all
    eval_samples: int = 4  # of them, kept as texts and shown before and after
    # batches
    rollout_batch_size: int = 64  # global prompts an iteration
    generation_batch_size: int = 0  # rows a generate call; 0: all at once
    score_batch_size: int = 0  # rows a scoring forward; 0: all at once
    ppo_epochs: int = 4
    num_minibatches: int = 4
    micro_batch_size: int = 0  # rows a forward/backward; 0: the whole minibatch
    shuffle: bool = True  # prompts, each epoch of the data set
    # sequences
    max_prompt_length: int = 512
    max_response_length: int = 512
    stop_token_ids: tuple[int, ...] = (0,)
    pad_token_id: int = 0
    valid_vocab_size: int = 0  # ids from here on are never sampled; 0: the model's vocab_size
    # sampling
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    decode_steps_per_call: int = 8
    # reward
    kl_controller: str = "fixed"  # "fixed" | "adaptive"
    kl_coef: float = 0.02
    kl_target: float = 6.0
    kl_horizon: int = 10_000
    kl_estimator: str = "k1"  # "k1" | "k2" | "k3"
    gamma: float = 1.0
    lam: float = 0.95
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    missing_eos_penalty: float = 0.0  # off the score of a response without a stop token
    scale_rewards: bool = False  # scores over their running standard deviation
    center_rewards: bool = False  # scores less their running mean
    score_clip: float = 0.0  # bound of the absolute score that is paid; 0: off
    # loss
    critic: str = "separate"  # "shared" | "separate"
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    value_head_init_scale: float = 1.0  # of a fresh value head, N(0, 1/sqrt(H+1)); 0: values start at 0
    entropy_coef: float = 0.0  # entropy bonus in the policy loss; 0: off
    ptx_coef: float = 0.0  # pre-training loss mixed in; 0: off
    target_kl: float = 0.0  # ends an iteration's steps when approxkl is 1.5 times it; 0: off
    critic_warmup_iterations: int = 0  # first iterations that train the critic alone
    log_ratio_clamp: float = 20.0
    max_grad_norm: float = 1.0
    max_skipped_updates: int = 3  # in a row, for a NaN or infinite loss, gradient or reward: the job stops

    @property
    def max_length(self) -> int:
        """Columns of a whole sequence, ``max_prompt_length + max_response_length``."""
        return self.max_prompt_length + self.max_response_length

    @property
    def minibatch_size(self) -> int:
        """Global sequences an optimizer step, ``rollout_batch_size / num_minibatches``."""
        return exact_div(
            self.rollout_batch_size, self.num_minibatches, "rollout_batch_size by num_minibatches"
        )

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole job."""
        return self.total_iterations * self.ppo_epochs * self.num_minibatches

    @property
    def policy_optimizer_steps(self) -> int:
        """Optimizer steps of the policy: all but those of the critic's warm-up."""
        iterations = self.total_iterations - self.critic_warmup_iterations
        return iterations * self.ppo_epochs * self.num_minibatches


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """A PPO job; the reference has the sizes and split of ``infer``.

    A critic YAML without ``optimizer`` or ``lr_schedule`` takes those of ``train``.
    """

    infer: RunConfig
    train: RunConfig
    reward: RunConfig
    critic: RunConfig
    ppo: PPOConfig
