"""SFT and reward model on several layouts: the same numbers, and checkpoints that go over."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.st.stage_metrics import assert_metrics_close, read_lines

REPO_ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.msrun
def test_layouts_do_not_change_the_stages(
    run_workers: Any, ppo_inputs: Any, pairs: Path, tmp_path: Path
) -> None:
    """dp2 mp2 with micro-batches equals one process: losses, accuracy, calibration, every step.

    The workers go on from a checkpoint of theirs to the last digit, one process from the same one resharded.
    """
    files = {}
    for name, mesh in {"one": (1, 1), "four": (2, 2)}.items():
        shared = {
            "config_path": str(ppo_inputs.yaml("finetune", *mesh)),
            "mind_dataset_dir": str(pairs),
            "batch_size": 8,
            "epochs": 1,
            "eval_interval": 4,
            "max_eval_prompts": 9,
            "learning_rate": 3e-3,
            "micro_batch_size": 2 if name == "four" else 0,
            "watchdog_timeout": 0,
        }
        stages = {
            "sft": {
                "stage": "sft",
                "save_interval": 4,
                "keep_checkpoints": 0,
                "load_sft_checkpoint": str(ppo_inputs.policy),
                "save_ckpt_dir": str(tmp_path / name / "sft"),
            },
            "reward": {
                "stage": "reward",
                "load_sft_checkpoint": str(tmp_path / name / "sft" / "final"),
                "save_ckpt_dir": str(tmp_path / name / "reward"),
                "save_full_ckpt": str(tmp_path / name / "reward.ckpt"),
                "calibration_samples": 21,
                "center_coef": 0.01,
            },
        }
        resumed = stages["sft"] | {
            "save_ckpt_dir": str(tmp_path / name / "resumed"),
            "resume_from": str(tmp_path / "four" / "sft" / "step_000004"),
        }
        jobs = {key: shared | given for key, given in (stages | {"resumed": resumed}).items()}
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(json.dumps(jobs))
    with working_alone(files["one"], tmp_path) as alone:
        run_workers("worker_stages.py", 4, str(files["four"]), timeout=400)
        assert alone.wait(timeout=300) == 0, (tmp_path / "one.log").read_text()[-3000:]
    straight = read_lines(tmp_path / "four" / "sft" / "metrics.jsonl")[4:]
    assert_metrics_close(read_lines(tmp_path / "four" / "resumed" / "metrics.jsonl"), straight, rel=1e-6)
    assert_metrics_close(read_lines(tmp_path / "one" / "resumed" / "metrics.jsonl"), straight, rel=1e-4)
    assert (
        "the checkpoint is resharded: plan.config.parallel.data_parallel: 2 in the checkpoint, 1 now"
        in (tmp_path / "one.log").read_text()
    )
    for stage in ("sft", "reward"):
        for file, least in (("metrics.jsonl", 10), ("evaluations.jsonl", 3)):
            one, four = (read_lines(tmp_path / name / stage / file) for name in ("one", "four"))
            assert len(one) == len(four) >= least
            assert_metrics_close(four, one, rel=1e-4)
    one, four = (
        json.loads((tmp_path / name / "reward" / "reward_model.json").read_text()) for name in ("one", "four")
    )
    assert four["calibration"].pop("source") == one["calibration"].pop("source") == "sft"
    assert four["calibration"] == pytest.approx(one["calibration"], rel=1e-3, abs=1e-4)
    assert_same_weights(tmp_path / "one" / "reward.ckpt", tmp_path / "four" / "reward.ckpt", ppo_inputs)


@contextlib.contextmanager
def working_alone(file: Path, directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """worker_stages.py in one process; its output is in a log named after the file."""
    with (directory / f"{file.stem}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "worker_stages.py"), str(file)],
            env={**os.environ, "MINDRLHF_TEST_RESULTS": str(directory), "PYTHONPATH": str(REPO_ROOT)},
            cwd=directory,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def assert_same_weights(first: Path, second: Path, inputs: Any) -> None:
    from mindrlhf.checkpoint.shards import load_shard
    from mindrlhf.configs.load import load_run_config
    from mindrlhf.models.qwen2.layouts import parameter_layouts
    from mindrlhf.parallel.layout import Mesh

    model = load_run_config(inputs.yaml("finetune", 1, 1)).model
    layouts = parameter_layouts(model, Mesh(), lm_head=False, score_head=True)
    one, other = (load_shard(path, layouts, 0) for path in (first, second))
    for name, array in one.items():
        np.testing.assert_allclose(other[name], array, rtol=0, atol=1e-4, err_msg=name)
