"""A tiny PPO job for the soak scripts: random weights, random prompts, and YAMLs for any split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mindrlhf.checkpoint.sources import ArraySource
from mindrlhf.checkpoint.weight_files import write_weights
from mindrlhf.configs.load import load_run_config
from mindrlhf.data.columns import LOSS_MASK, PRETRAIN_IDS, PROMPT_IDS, prompt_schema
from mindrlhf.data.mindrecord import write_mindrecord
from mindrlhf.models.qwen2.layouts import parameter_layouts
from mindrlhf.parallel.layout import Mesh

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "model_configs" / "qwen_ppo"

# Workers -> (dp, mp) of the generating and of the trained policy, which differ so that syncs reshard.
SPLITS = {2: ((1, 2), (2, 1)), 4: ((1, 4), (2, 2))}
VOCAB, PAD, PROMPT, RESPONSE, ROWS = 128, 2, 6, 8, 64
STOP_IDS = (2, 5, 11, 17, 23, 40, 58, 71, 99)
MODEL: dict[str, Any] = {
    "hidden_size": 32,
    "num_layers": 1,
    "num_heads": 8,
    "n_kv_heads": 4,
    "intermediate_size": 48,
    "seq_length": 16,
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "bos_token_id": PAD,
    "eos_token_id": list(STOP_IDS),
}
PPO: dict[str, Any] = {
    "rollout_batch_size": 8,
    "ppo_epochs": 1,
    "max_prompt_length": PROMPT,
    "max_response_length": RESPONSE,
    "stop_token_ids": list(STOP_IDS),
    "pad_token_id": PAD,
    "valid_vocab_size": VOCAB,
    "decode_steps_per_call": 2,
    # Has its own state, which a resumed run must restore.
    "kl_controller": "adaptive",
    "kl_target": 0.05,
    "kl_horizon": 200,
    "scale_rewards": True,
    "center_rewards": True,
}


@dataclass(frozen=True)
class JobInputs:
    """The files of a job for a number of workers.

    Args:
        directory: for the files.
        workers: of the job.
    """

    directory: Path
    workers: int

    def write(self) -> None:
        """Makes all files, the same every time."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for kind, (dp, mp) in zip(("generate", "finetune"), SPLITS[self.workers], strict=True):
            changes = {
                "parallel_config": {"data_parallel": dp, "model_parallel": mp},
                "model.model_config": MODEL,
            }
            _change_yaml(CONFIGS / f"{kind}_qwen2_tiny.yaml", self.directory / f"{kind}_soak.yaml", changes)
        _change_yaml(CONFIGS / "ppo_qwen2_tiny.yaml", self.directory / "ppo_soak.yaml", {"": PPO})
        self._write_weights()
        self._write_prompts()

    def flags(self, save: Path, overrides: Mapping[str, object]) -> list[str]:
        """Flags of a ``ppo_one_stage.py`` that saves to ``save``."""
        generate, finetune = (str(self.directory / f"{kind}_soak.yaml") for kind in ("generate", "finetune"))
        flags = ["--sft_path_infer", generate, "--sft_path_train", finetune]
        flags += ["--reward_path", generate, "--critic_path", finetune]
        flags += ["--load_sft_checkpoint_train", str(self.directory / "policy.safetensors")]
        flags += ["--mind_dataset_dir", str(self.directory / "prompts.mindrecord")]
        flags += ["--save_ckpt_dir", str(save), "--use_parallel", "True"]
        flags += ["--device_target", "CPU"]
        for key, value in overrides.items():
            flags += ["--set", f"{key}={value}"]
        return flags

    def _write_weights(self) -> None:
        """Weights so large that the distribution over tokens is far from uniform."""
        rng = np.random.default_rng(1)
        model = load_run_config(self.directory / "generate_soak.yaml").model
        arrays = {}
        for name, layout in parameter_layouts(model, Mesh()).items():
            draw = rng.standard_normal(layout.shape, np.float32)
            scale = np.float32(1.0 if "embedding" in name else 0.25)
            arrays[name] = 1 + np.float32(0.1) * draw if "norm" in name else scale * draw
        write_weights(self.directory / "policy.safetensors", ArraySource(arrays))

    def _write_prompts(self) -> None:
        path = self.directory / "prompts.mindrecord"
        rng = np.random.default_rng(2)
        prompts = np.full((ROWS, PROMPT), PAD, np.int32)
        sequences = np.full((ROWS, MODEL["seq_length"]), PAD, np.int32)
        for row in range(ROWS):
            ids = rng.integers(3, VOCAB, row % PROMPT + 1)
            prompts[row, PROMPT - len(ids) :] = sequences[row, : len(ids)] = ids
        batch = {PROMPT_IDS: prompts, PRETRAIN_IDS: sequences, LOSS_MASK: np.zeros_like(sequences)}
        write_mindrecord(path, prompt_schema(PROMPT, MODEL["seq_length"]), [batch], overwrite=True)


def _change_yaml(source: Path, target: Path, changes: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes a YAML of the repository with other values."""
    content = yaml.safe_load(source.read_text(encoding="utf-8"))
    for section, values in changes.items():
        part = content
        for key in filter(None, section.split(".")):
            part = part[key]
        part.update(values)
    target.write_text(yaml.safe_dump(content), encoding="utf-8")
