"""Weights and prompts for the smallest job there is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mindrlhf.checkpoint.sources import ArraySource
from mindrlhf.checkpoint.weight_files import write_weights
from mindrlhf.configs.keys import JobConfig
from mindrlhf.data.columns import prompt_schema
from mindrlhf.data.mindrecord import write_mindrecord
from mindrlhf.models.qwen2.layouts import parameter_layouts
from mindrlhf.parallel.layout import Mesh


def write_prompts(path: Path, prompts: Sequence[Sequence[int]], job: JobConfig) -> Path:
    """A data set without responses, which PPO without ``ptx_coef`` does not read."""
    columns = job.ppo.max_prompt_length
    left, right = (np.full((len(prompts), size), job.ppo.pad_token_id, np.int32) for size in (columns, 9))
    for row, prompt in enumerate(prompts):
        left[row, columns - len(prompt) :] = prompt
        right[row, : len(prompt)] = prompt
    batch = {"prompt_ids": left, "pretrain_ids": right, "loss_mask": np.zeros_like(right)}
    write_mindrecord(path, prompt_schema(columns, 9), [batch])
    return path


def write_model(path: Path, job: JobConfig, seed: int, scale: float = 0.5, **heads: bool) -> Path:
    """Random weights; norms are around 1."""
    rng = np.random.default_rng(seed)
    arrays = {
        name: (("norm" in name) + scale * rng.standard_normal(layout.shape)).astype(np.float32)
        for name, layout in parameter_layouts(job.train.model, Mesh(1, 1), **heads).items()
    }
    write_weights(path, ArraySource(arrays))
    return path
