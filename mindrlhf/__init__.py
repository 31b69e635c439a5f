"""Reinforcement learning from human feedback on MindSpore: weights in, data in, PPO, checkpoints out.

The public names below are imported when they are first used, so that ``import mindrlhf`` costs nothing and
no name costs more than its own module needs; none of them imports MindFormers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mindrlhf.algorithms.advantages import gae, whiten
    from mindrlhf.algorithms.kl import AdaptiveKLController, FixedKLController
    from mindrlhf.algorithms.token_rewards import token_rewards
    from mindrlhf.chat.session import run_chat
    from mindrlhf.checkpoint.conversion import export_hf, hf_to_mindspore, mindspore_to_hf
    from mindrlhf.checkpoint.shards import load_shard, merge_shards, save_shard
    from mindrlhf.checkpoint.transform import transform_checkpoint
    from mindrlhf.configs.flags import ChatOptions, PPOOptions, RewardOptions, SFTOptions
    from mindrlhf.configs.keys import JobConfig, ModelConfig, PPOConfig, RunConfig
    from mindrlhf.configs.load import load_job, load_ppo_config, load_run_config
    from mindrlhf.data.preprocess import PreprocessOptions, preprocess
    from mindrlhf.data.prompts import PromptBatch, PromptStream
    from mindrlhf.data.sequences import SequenceData
    from mindrlhf.data.tokenizer import Tokenizer
    from mindrlhf.data.tokenizer_loading import load_tokenizer
    from mindrlhf.models.generator import GenerationConfig, GenerationOutput, PPOModelInfer
    from mindrlhf.models.networks import CriticModel, PPOModelTrain, RewardModel
    from mindrlhf.models.qwen2.layouts import parameter_layouts
    from mindrlhf.parallel.groups import Groups, create_groups
    from mindrlhf.parallel.layout import Layout, Mesh
    from mindrlhf.parallel.reshard import Resharder
    from mindrlhf.parallel.strategy import write_strategies
    from mindrlhf.report.__main__ import write_report
    from mindrlhf.trainer.programs import run_ppo, run_stage
    from mindrlhf.trainer.recipes.rl import PPOTrainer
    from mindrlhf.utils.errors import CheckpointError, ConfigError, DataError, MindRLHFError

__version__ = "0.1.0"

__all__ = [
    "AdaptiveKLController",
    "ChatOptions",
    "CheckpointError",
    "ConfigError",
    "CriticModel",
    "DataError",
    "FixedKLController",
    "GenerationConfig",
    "GenerationOutput",
    "Groups",
    "JobConfig",
    "Layout",
    "Mesh",
    "MindRLHFError",
    "ModelConfig",
    "PPOConfig",
    "PPOModelInfer",
    "PPOModelTrain",
    "PPOOptions",
    "PPOTrainer",
    "PreprocessOptions",
    "PromptBatch",
    "PromptStream",
    "Resharder",
    "RewardModel",
    "RewardOptions",
    "RunConfig",
    "SFTOptions",
    "SequenceData",
    "Tokenizer",
    "__version__",
    "create_groups",
    "export_hf",
    "gae",
    "hf_to_mindspore",
    "load_job",
    "load_ppo_config",
    "load_run_config",
    "load_shard",
    "load_tokenizer",
    "merge_shards",
    "mindspore_to_hf",
    "parameter_layouts",
    "preprocess",
    "run_chat",
    "run_ppo",
    "run_stage",
    "save_shard",
    "token_rewards",
    "transform_checkpoint",
    "whiten",
    "write_report",
    "write_strategies",
]

# Where each name lives; test_public_names.py compares this with the imports above.
_MODULES = {
    "algorithms.advantages": "gae whiten",
    "algorithms.kl": "AdaptiveKLController FixedKLController",
    "algorithms.token_rewards": "token_rewards",
    "chat.session": "run_chat",
    "checkpoint.conversion": "export_hf hf_to_mindspore mindspore_to_hf",
    "checkpoint.shards": "load_shard merge_shards save_shard",
    "checkpoint.transform": "transform_checkpoint",
    "configs.load": "load_job load_ppo_config load_run_config",
    "configs.flags": "ChatOptions PPOOptions RewardOptions SFTOptions",
    "configs.keys": "JobConfig ModelConfig PPOConfig RunConfig",
    "data.preprocess": "PreprocessOptions preprocess",
    "data.prompts": "PromptBatch PromptStream",
    "data.sequences": "SequenceData",
    "data.tokenizer": "Tokenizer",
    "data.tokenizer_loading": "load_tokenizer",
    "models.generator": "GenerationConfig GenerationOutput PPOModelInfer",
    "models.qwen2.layouts": "parameter_layouts",
    "models.networks": "CriticModel PPOModelTrain RewardModel",
    "parallel.groups": "Groups create_groups",
    "parallel.layout": "Layout Mesh",
    "parallel.reshard": "Resharder",
    "parallel.strategy": "write_strategies",
    "report.__main__": "write_report",
    "trainer.programs": "run_ppo run_stage",
    "trainer.recipes.rl": "PPOTrainer",
    "utils.errors": "CheckpointError ConfigError DataError MindRLHFError",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    """Imports a public name at its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """What has been imported, and the public names that would be."""
    return sorted({*globals(), *__all__})
