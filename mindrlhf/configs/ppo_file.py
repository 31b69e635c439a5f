"""The PPO hyper-parameters: YAML and ``--set key=value`` -> checked values -> :class:`PPOConfig`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindrlhf.configs.faults import Faults, shown
from mindrlhf.configs.rules import Rule, join, read_section
from mindrlhf.configs.schema import PPOConfig
from mindrlhf.configs.yaml_file import parse_value, read_mapping

_COUNT = Rule(kind="int", at_least=1)
_REQUIRED_COUNT = Rule(kind="int", at_least=1, required=True)
_COUNT_OR_ZERO = Rule(kind="int", at_least=0)
_FLAG = Rule(kind="bool")
_FRACTION = Rule(kind="float", at_least=0, at_most=1)
_NOT_NEGATIVE = Rule(kind="float", at_least=0)
_POSITIVE = Rule(kind="float", above=0)

# Required: what depends on the tokenizer, and the size of the job.
PPO_RULES: dict[str, Rule] = {
    "seed": _COUNT_OR_ZERO,
    "total_iterations": _REQUIRED_COUNT,
    "save_interval": _COUNT_OR_ZERO,
    "keep_checkpoints": _COUNT,
    "log_samples": _COUNT_OR_ZERO,
    "eval_interval": _COUNT_OR_ZERO,
    "eval_prompts": _COUNT_OR_ZERO,
    "eval_samples": _COUNT_OR_ZERO,
    "rollout_batch_size": _REQUIRED_COUNT,
    "generation_batch_size": _COUNT_OR_ZERO,
    "score_batch_size": _COUNT_OR_ZERO,
    "ppo_epochs": _COUNT,
    "num_minibatches": _COUNT,
    "micro_batch_size": _COUNT_OR_ZERO,
    "shuffle": _FLAG,
    "max_prompt_length": _REQUIRED_COUNT,
    "max_response_length": _REQUIRED_COUNT,
    "stop_token_ids": Rule(kind="ids", at_least=0, required=True),
    "pad_token_id": Rule(kind="int", at_least=0, required=True),
    "valid_vocab_size": _COUNT_OR_ZERO,
    "do_sample": _FLAG,
    "temperature": _POSITIVE,
    "top_k": _COUNT_OR_ZERO,
    "top_p": Rule(kind="float", above=0, at_most=1),
    "decode_steps_per_call": _COUNT,
    "kl_controller": Rule(kind="str", choices=("fixed", "adaptive")),
    "kl_coef": _NOT_NEGATIVE,
    "kl_target": _POSITIVE,
    "kl_horizon": _COUNT,
    "kl_estimator": Rule(kind="str", choices=("k1", "k2", "k3")),
    "gamma": _FRACTION,
    "lam": _FRACTION,
    "whiten_advantages": _FLAG,
    "whiten_rewards": _FLAG,
    "missing_eos_penalty": _NOT_NEGATIVE,
    "scale_rewards": _FLAG,
    "center_rewards": _FLAG,
    "score_clip": _NOT_NEGATIVE,
    "critic": Rule(kind="str", choices=("shared", "separate")),
    "cliprange": Rule(kind="float", above=0, below=1),
    "cliprange_value": _POSITIVE,
    "vf_coef": _NOT_NEGATIVE,
    "value_head_init_scale": _NOT_NEGATIVE,
    "entropy_coef": _NOT_NEGATIVE,
    "ptx_coef": _NOT_NEGATIVE,
    "target_kl": _NOT_NEGATIVE,
    "critic_warmup_iterations": _COUNT_OR_ZERO,
    "log_ratio_clamp": Rule(kind="float", above=0, at_most=80),  # exp(88.7) overflows float32
    "max_grad_norm": _POSITIVE,
    "max_skipped_updates": _COUNT,
}


@dataclass
class PPODraft:
    """The valid values of the PPO YAML and overrides; keys with a fault are absent."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def where(self, key: str) -> str:
        """The place a fault of ``key`` is reported at."""
        return self.sources.get(key, join(str(self.path), key))

    def get(self, *names: str) -> tuple[Any, ...] | None:
        """Values of ``names``, defaults included; ``None`` when one of them has a fault."""
        if any(name not in self.values for name in names):
            return None
        return tuple(self.values[name] for name in names)

    def build(self) -> PPOConfig:
        """The configuration; only for a draft without faults."""
        return PPOConfig(**self.values)


def read_ppo(path: Path, overrides: Sequence[str], faults: Faults) -> PPODraft:
    """Reads the PPO YAML, puts the ``key=value`` overrides in its place, and checks each value by itself."""
    draft = PPODraft(path)
    root = read_mapping(path, faults)
    given: dict[Any, Any] = dict(root or {})
    broken: set[str] = set()
    for override in overrides:
        key, separator, text = override.partition("=")
        key = key.strip()
        if not separator or not key:
            faults.add(f"--set {shown(override)}", "not of the form key=value", "write --set key=value")
            continue
        draft.sources[key] = f"--set {key}"
        readable, given[key] = parse_value(text, draft.sources[key], faults)
        if not readable:
            broken.add(key)
    # Without a file the overrides are still checked, but what they leave out is not missing.
    rules = {
        key: rule
        for key, rule in PPO_RULES.items()
        if key not in broken and (root is not None or key in given)
    }
    draft.values = read_section(given, rules, faults, str(path), accepted=PPO_RULES, sources=draft.sources)
    if root is not None:
        defaults = PPOConfig()
        for key, rule in PPO_RULES.items():
            if key not in given and not rule.required:
                draft.values[key] = getattr(defaults, key)
    return draft
