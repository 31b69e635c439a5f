"""SFT, reward model and PPO one after the other, as commands."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.st.stage_metrics import assert_metrics_close, read_lines

REPO_ROOT = Path(__file__).resolve().parents[2]
TUTORIAL = REPO_ROOT / "examples" / "qwen_ppo_tutorial"
HIDDEN_VARIABLES = ("LOCAL_DEFAULT_PATH", "LOG_MF_PATH", "MS_OM_PATH", "MS_COMPILER_CACHE_PATH", "GLOG_v")


class Workshop:
    """A directory in which commands are run, with an environment in which stray files show."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "work"
        self.temporary = directory / "tmp"
        self.matplotlib = directory / "matplotlib"
        for path in (self.directory, self.temporary):
            path.mkdir()

    def start(self, script: str, arguments: Sequence[str | Path]) -> subprocess.Popen[str]:
        """Starts a script of the tutorial."""
        env = {name: value for name, value in os.environ.items() if name not in HIDDEN_VARIABLES}
        env |= {"TMPDIR": str(self.temporary), "MPLCONFIGDIR": str(self.matplotlib)}
        return subprocess.Popen(
            [sys.executable, str(TUTORIAL / script), *map(str, arguments), "--use_parallel", "False"],
            cwd=self.directory,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, script: str, *arguments: str | Path, code: int = 0) -> str:
        """Runs a script of the tutorial; returns what it said."""
        return self.finish(self.start(script, arguments), code)

    def finish(self, process: subprocess.Popen[str], code: int) -> str:
        """Waits for a script and returns what it said."""
        try:
            output, _ = process.communicate(timeout=300)
        finally:
            process.kill()
        if process.returncode != code:
            pytest.fail(f"exit code {process.returncode}\n{output}"[-5000:], pytrace=False)
        return output

    def signal_at(self, step: int, number: int, name: str, arguments: Sequence[str | Path], code: int) -> str:
        """Runs sft.py until a step of the run ``name`` is in its metrics, and sends it a signal then."""
        process = self.start("sft.py", arguments)
        end = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < end:
            file = self.directory / name / "metrics.jsonl"
            if file.exists() and f'"step": {step},' in file.read_text(encoding="utf-8"):
                process.send_signal(number)
                break
            time.sleep(0.02)
        return self.finish(process, code)

    def metrics(self, name: str, file: str = "metrics") -> list[dict[str, float]]:
        return read_lines(self.directory / name / f"{file}.jsonl")


SHARED = ("--batch_size", "12", "--eval_interval", "9", "--learning_rate", "1e-2")


@pytest.fixture(scope="module")
def stages(ppo_inputs: Any, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """All three stages in one process each; PPO draws its prompts from the file of pairs."""
    shop = Workshop(tmp_path_factory.mktemp("stages"))
    finetune, generate = ppo_inputs.yaml("finetune", 1, 1), ppo_inputs.yaml("generate", 1, 1)
    data = ("--mind_dataset_dir", pairs)
    shop.run(
        "sft.py",
        *("--sft_path", finetune, "--load_sft_checkpoint", ppo_inputs.policy, *data),
        *("--save_ckpt_dir", "sft", "--epochs", "6", *SHARED, "--save_interval", "20"),
        *("--save_full_ckpt", "sft.safetensors", "--export_hf_dir", "sft_hf"),
    )
    shop.run(
        "reward_model.py",
        *("--reward_path", finetune, "--load_sft_checkpoint", "sft/final", *data),
        *("--save_ckpt_dir", "reward", "--epochs", "4", *SHARED, "--calibration_samples", "90"),
        *("--max_response_length", "5", "--valid_vocab_size", ppo_inputs.VALID_VOCAB),
    )
    shop.ppo_output = shop.run(  # type: ignore[attr-defined]
        "ppo_one_stage.py",
        *("--sft_path_infer", generate, "--sft_path_train", finetune),
        *("--reward_path", generate, "--critic_path", finetune, "--ppo_config", ppo_inputs.ppo),
        *("--load_sft_checkpoint_train", "sft/final", "--load_rm_checkpoint", "reward/final"),
        *("--load_critic_checkpoint", "reward/final", *data, "--save_ckpt_dir", "ppo"),
        *("--set", "total_iterations=1", "--set", "rollout_batch_size=100", "--set", "temperature=1.0"),
    )
    return shop


def test_sft_learns(stages: Workshop) -> None:
    """From worse than uniform to the entropy of the data: 4 or 5 tokens are left to choose from."""
    lines = stages.metrics("sft")
    assert [line["step"] for line in lines] == list(range(1, 55))
    held_out = stages.metrics("sft", "evaluations")
    assert [line["step"] for line in held_out] == [0, 9, 18, 27, 36, 45, 54]
    assert held_out[0]["eval/loss"] > np.log(64)
    assert held_out[-1]["eval/loss"] < 2.0
    assert held_out[-1]["eval/perplexity"] == pytest.approx(np.exp(held_out[-1]["eval/loss"]))
    assert lines[-1]["lr"] < 2e-3 < max(line["lr"] for line in lines) <= 1.001e-2
    assert lines[-1]["epoch"] == 6


def test_reward_model_learns(stages: Workshop) -> None:
    assert [line["step"] for line in stages.metrics("reward")] == list(range(1, 37))
    lines = stages.metrics("reward", "evaluations")
    assert [line["step"] for line in lines] == [0, 9, 18, 27, 36]
    assert lines[0]["eval/accuracy"] < 0.9 < lines[-1]["eval/accuracy"]
    assert lines[-1]["eval/loss"] < 0.3 < lines[0]["eval/loss"]
    report = json.loads((stages.directory / "reward" / "reward_model.json").read_text())
    for when, line in (("before", lines[0]), ("after", lines[-1])):
        assert report[when]["eval/accuracy"] == line["eval/accuracy"]
    calibration = report["calibration"]
    assert (calibration["source"], calibration["samples"]) == ("sft", 90)
    assert calibration["mean_after"] == pytest.approx(0, abs=1e-4)
    assert calibration["std_after"] == pytest.approx(1, abs=1e-4)
    assert calibration["gain"] == pytest.approx(1 / calibration["std_before"], rel=1e-6)


def test_ppo_takes_both_as_they_are(stages: Workshop) -> None:
    """No head is new, and fresh samples of the SFT policy score around 0 with a deviation around 1."""
    output = stages.ppo_output  # type: ignore[attr-defined]
    assert "has no scalar head" not in output
    assert "reward model: 16 of 16 tensors loaded from reward/final" in output
    assert "critic: 16 of 16 tensors loaded from reward/final" in output
    (line,) = stages.metrics("ppo")
    assert line["objective/scores"] == pytest.approx(0, abs=0.4)
    assert line["objective/scores_std"] == pytest.approx(1, abs=0.4)
    assert line["objective/kl"] == pytest.approx(0, abs=1e-4)


def test_weights_in_all_forms_are_the_same(stages: Workshop, ppo_inputs: Any) -> None:
    from mindrlhf.checkpoint.shards import load_shard
    from mindrlhf.configs.load import load_run_config
    from mindrlhf.models.qwen2.layouts import parameter_layouts
    from mindrlhf.parallel.layout import Mesh

    layouts = parameter_layouts(load_run_config(ppo_inputs.yaml("finetune", 1, 1)).model, Mesh())
    ranks, full, hf = (
        load_shard(stages.directory / name, layouts, 0) for name in ("sft/final", "sft.safetensors", "sft_hf")
    )
    start = load_shard(ppo_inputs.policy, layouts, 0)
    for name, array in ranks.items():
        np.testing.assert_array_equal(full[name], array)
        np.testing.assert_array_equal(hf[name], array)
        assert name.endswith("wk.bias") or np.abs(array - start[name]).max() > 1e-3


def test_nothing_else_is_left(stages: Workshop) -> None:
    here = stages.directory
    assert {path.name for path in here.iterdir()} == {"sft", "sft.safetensors", "sft_hf", "reward", "ppo"}
    assert {path.name for path in (here / "sft").iterdir()} == {
        *("final", "step_000040", "step_000054", "config.json", "metrics.jsonl", "curves.png", "tensorboard"),
        "evaluations.jsonl",
    }
    assert {path.name for path in (here / "reward").iterdir()} == {
        *("final", "config.json", "metrics.jsonl", "curves.png", "tensorboard", "reward_model.json"),
        "evaluations.jsonl",
    }
    assert list(stages.temporary.iterdir()) == []


def test_a_fault_is_one_message_and_leaves_nothing(stages: Workshop, ppo_inputs: Any, pairs: Path) -> None:
    output = stages.run(
        "sft.py",
        *("--sft_path", ppo_inputs.yaml("finetune", 1, 1), "--load_sft_checkpoint", ppo_inputs.policy),
        *("--mind_dataset_dir", pairs, "--save_ckpt_dir", "new", "--batch_size", "500"),
        code=2,
    )
    assert "Traceback" not in output
    assert "--batch_size: 500 rows, but there are only 108 to train on" in output
    assert not (stages.directory / "new").exists()


def test_a_command_that_is_killed_and_stopped_ends_as_if_nothing_had_been(
    stages: Workshop, ppo_inputs: Any, pairs: Path
) -> None:
    """SIGKILL, then SIGTERM, then the end: the numbers of the SFT run above, 54 steps."""
    arguments = (
        *("--sft_path", ppo_inputs.yaml("finetune", 1, 1), "--load_sft_checkpoint", ppo_inputs.policy),
        *("--mind_dataset_dir", pairs, "--save_ckpt_dir", "broken", "--epochs", "6", *SHARED),
        *("--save_interval", "7", "--resume_training", "True", "--watchdog_timeout", "200"),
    )
    stages.signal_at(10, signal.SIGKILL, "broken", arguments, -signal.SIGKILL)
    output = stages.signal_at(35, signal.SIGTERM, "broken", arguments, 0)
    assert "resumed from broken/step_0000" in output
    assert "stopped by SIGTERM, the state is in broken/step_0000" in output
    assert not (stages.directory / "broken" / "final").exists()
    assert "resumed from broken/step_0000" in stages.run("sft.py", *arguments)
    # Measured: 0 in all metrics of training, 2e-8 in two evaluations; MindSpore promises no last digits.
    for file in ("metrics", "evaluations"):
        assert_metrics_close(stages.metrics("broken", file), stages.metrics("sft", file), rel=1e-6)
    shutil.rmtree(stages.directory / "broken")
    for left in stages.temporary.iterdir():  # of the one that got SIGKILL
        shutil.rmtree(left, ignore_errors=True)
