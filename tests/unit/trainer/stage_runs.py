"""Runs of the stages before PPO in this process: the smallest job, compiled once for all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
import yaml

from mindrlhf.checkpoint.sources import ArraySource
from mindrlhf.checkpoint.weight_files import write_weights
from mindrlhf.configs.flags import RewardOptions, SFTOptions
from mindrlhf.configs.load import load_run_config
from mindrlhf.data.columns import prompt_schema
from mindrlhf.data.mindrecord import write_mindrecord
from mindrlhf.models.qwen2.layouts import parameter_layouts
from mindrlhf.parallel.layout import Mesh
from mindrlhf.runtime.device import Runtime
from mindrlhf.trainer import run as run_module
from mindrlhf.trainer.optimizer import build_optimizer
from mindrlhf.trainer.programs import run_stage
from mindrlhf.trainer.recipes import reward_model, sft, supervised
from mindrlhf.trainer.train_step import TrainStep

VOCAB, PAD, ROWS = 32, 2, 20
MODEL = {
    "hidden_size": 16, "num_layers": 1, "num_heads": 4, "n_kv_heads": 2, "intermediate_size": 16,
    "seq_length": 12, "vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": PAD, "eos_token_id": [3],
}  # fmt: skip
STEPS = 12
"""3 epochs of 16 rows, 4 a step."""
Run = Callable[..., Path]


def write_files(directory: Path, repo_root: Path) -> Path:
    """YAML, weights and pairs of the smallest job."""
    shipped = repo_root / "model_configs" / "qwen_ppo" / "finetune_qwen2_tiny.yaml"
    content = yaml.safe_load(shipped.read_text(encoding="utf-8"))
    content["model"]["model_config"].update(MODEL)
    content["parallel_config"].update(data_parallel=1, model_parallel=1)
    (directory / "finetune.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    rng = np.random.default_rng(0)
    layouts = parameter_layouts(load_run_config(directory / "finetune.yaml").model, Mesh())
    arrays = {name: rng.normal(0, 0.2, layout.shape).astype("f4") for name, layout in layouts.items()}
    write_weights(directory / "weights.ckpt", ArraySource(arrays))
    schema = prompt_schema(6, 12, pairs=True)
    batch = {
        name: np.full((ROWS, column.length), 0 if "mask" in name else PAD, np.int32)
        for name, column in schema.items()
    }
    for row in range(ROWS):
        prompt = [4 + row, *rng.integers(4, VOCAB, row % 4)]
        n = len(prompt)
        batch["prompt_ids"][row, -n:] = prompt
        for ids, mask in (("pretrain_ids", "loss_mask"), ("rejected_ids", "rejected_mask")):
            length = n + int(rng.integers(2, 5))
            batch[ids][row, :length] = [*prompt, *rng.integers(4, VOCAB, length - n)]
            batch[mask][row, n:length] = 1
    write_mindrecord(directory / "pairs.mindrecord", schema, [batch])
    return directory


class Compiled:
    """Model, loss and optimizer step of each recipe, made once: compiling is most of what a tiny run takes.

    A run finds them as in a new process: weights from the file, moments 0. Only the length of the schedule is
    always that of the first run.
    """

    def __init__(self) -> None:
        self.made: dict[Any, Any] = {}

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module, name in ((sft, "PPOModelTrain"), (reward_model, "RewardModel")):
            monkeypatch.setattr(module, name, partial(self.once, name, getattr(module, name)))
        monkeypatch.setattr(supervised, "build_optimizer", self.optimizer)
        monkeypatch.setattr(supervised, "TrainStep", self.step)

    def once(self, key: Any, make: Any, *arguments: Any, **options: Any) -> Any:
        if key not in self.made:
            self.made[key] = make(*arguments, **options)
        return self.made[key]

    def optimizer(self, config: Any, model: Any, total_steps: int) -> Any:
        optimizer = self.once(("optimizer", id(model)), build_optimizer, config, model, total_steps)
        optimizer.load({key: np.zeros(shape) for key, shape in optimizer.shapes().items()})
        return optimizer

    def step(self, objective: Any, optimizer: Any, *arguments: Any) -> Any:
        step = self.once(("step", id(optimizer)), TrainStep, objective, optimizer, *arguments)
        step.discard()
        return step


def make_run(files: Path, compiled: Compiled, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a stage in this process, whose device was chosen by another test perhaps."""
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    monkeypatch.setattr(run_module, "start_runtime", lambda *arguments, **options: Runtime(0, 1))
    compiled.patch(monkeypatch)

    def start(stage: str, save: Path, **changes: Any) -> Path:
        given: dict[str, Any] = {
            "config_path": files / "finetune.yaml", "load_sft_checkpoint": files / "weights.ckpt",
            "mind_dataset_dir": files / "pairs.mindrecord", "save_ckpt_dir": save, "use_parallel": False,
            "epochs": 3, "batch_size": 4, "micro_batch_size": 2, "eval_fraction": 0.2, "eval_interval": 5,
            "learning_rate": 1e-2, "watchdog_timeout": 0, "trackers": (),
        }  # fmt: skip
        if stage == "reward":
            return run_stage(
                RewardOptions(**given | {"calibrate": "data", "calibration_samples": 8} | changes)
            )
        return run_stage(SFTOptions(**given | changes))

    return start


def lines(save: Path, name: str = "metrics") -> list[dict[str, Any]]:
    """The JSON lines of a run, without what depends on the clock."""
    text = (save / f"{name}.jsonl").read_text(encoding="utf-8")
    read = [json.loads(line) for line in text.splitlines()]
    clock = ("time/", "tokens_per_second", "seconds")
    return [{key: value for key, value in line.items() if not key.startswith(clock)} for line in read]


def evaluations(save: Path) -> list[dict[str, Any]]:
    return lines(save, "evaluations")
