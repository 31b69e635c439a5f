"""``run_workers``: a script of this directory under msrun; inputs of the smallest jobs."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import pytest
import yaml

REPO_ROOT = Path(__file__).resolve().parents[2]
RESULTS_VARIABLE = "MINDRLHF_TEST_RESULTS"


class RunWorkers(Protocol):
    """Runs a worker script and returns what each rank reported."""

    def __call__(
        self,
        script: str,
        world_size: int,
        *args: str,
        timeout: float = 240,
        env: Mapping[str, str] | None = None,
    ) -> list[dict[str, Any]]: ...


def load_launcher() -> ModuleType:
    """``scripts/msrun_launcher.py`` as a module; scripts are not a package."""
    path = REPO_ROOT / "scripts" / "msrun_launcher.py"
    spec = importlib.util.spec_from_file_location("msrun_launcher", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def run_workers(tmp_path_factory: pytest.TempPathFactory) -> RunWorkers:
    """Runs ``tests/st/{script}`` under msrun and returns one dictionary per rank.

    Workers write their dictionary with :func:`worker_support.write_results`. A worker that fails, one
    that reports nothing, or the time limit is a test failure that shows the ends of the logs. The
    workers' directory of results (also for larger files of their own) is under ``"directory"``.
    """
    launcher = load_launcher()

    def run(
        script: str, world_size: int, *args: str, timeout: float = 240, env: Mapping[str, str] | None = None
    ) -> list[dict[str, Any]]:
        directory = tmp_path_factory.mktemp(Path(script).stem)
        results = directory / "results"
        results.mkdir()
        output = io.StringIO()
        code = launcher.launch(
            Path(__file__).parent / script,
            args,
            workers=world_size,
            log_dir=directory / "log",
            timeout=timeout,
            show_rank=None,
            env={"GLOG_v": "3", **(env or {}), RESULTS_VARIABLE: str(results)},
            cwd=directory,
            output=output,
        )
        if code:
            report = failure_report(directory / "log", world_size)
            pytest.fail(f"{output.getvalue()}\n{report}", pytrace=False)
        missing = [rank for rank in range(world_size) if not (results / f"rank_{rank}.json").exists()]
        if missing:
            report = failure_report(directory / "log", world_size)
            pytest.fail(f"ranks {missing} wrote no results\n{report}", pytrace=False)
        return [
            {**json.loads((results / f"rank_{rank}.json").read_text()), "directory": results}
            for rank in range(world_size)
        ]

    return run


def failure_report(log_dir: Path, workers: int) -> str:
    """The last lines of the workers that raised, of all workers when none did, else of msrun itself."""
    names = [*(f"worker_{rank}" for rank in range(workers)), "msrun"]
    logs = {name: log_dir / f"{name}.log" for name in names}
    texts = {name: log.read_text(errors="replace")[-6000:] for name, log in logs.items() if log.exists()}
    msrun = texts.pop("msrun", "")
    raised = {name: text for name, text in texts.items() if "Traceback (most recent call last)" in text}
    shown = {name: text for name, text in (raised or texts).items() if text} or {"msrun": msrun}
    return "".join(f"--- end of the log of {name} ---\n{text}\n" for name, text in shown.items())


@pytest.fixture(scope="session")
def split_reports(run_workers: RunWorkers) -> list[dict[str, Any]]:
    """What 4 workers reported to ``test_parallel.py`` and ``test_infer.py``, one dictionary a rank."""
    return run_workers("worker_split.py", 4, timeout=400)


@dataclass(frozen=True)
class PPOInputs:
    """Files of the smallest PPO job; YAMLs of any layout are written on demand."""

    directory: Path

    VOCAB = 64
    VALID_VOCAB = 61
    PAD = 2
    PROMPT_COLUMNS = 6
    STOP_IDS = (2, 5, 11, 17, 23, 40, 58)

    @property
    def policy(self) -> Path:
        """Checkpoint of the policy: a full file, no head."""
        return self.directory / "policy.ckpt"

    @property
    def stale(self) -> Path:
        """Another policy's weights: a generating model that starts from them must be brought up to date."""
        return self.directory / "stale.safetensors"

    @property
    def reward(self) -> Path:
        """Checkpoint of the reward model, with its head."""
        return self.directory / "reward.ckpt"

    @property
    def data(self) -> Path:
        """20 prompts of 1 to 6 tokens, one of them with a pad token inside."""
        return self.directory / "prompts.mindrecord"

    @property
    def held_out(self) -> Path:
        """11 prompts for evaluation: one whole batch, and one that is not."""
        return self.directory / "held_out.mindrecord"

    @property
    def ppo(self) -> Path:
        """The hyper-parameters."""
        return self.directory / "ppo_small.yaml"

    def yaml(self, kind: str, dp: int, mp: int, *, offload: bool = False, splits_rows: bool = False) -> Path:
        """``generate`` or ``finetune`` YAML of a layout.

        Args:
            offload: all that can be in host memory is there.
            splits_rows: with sequence parallelism.
        """
        suffix = f"{'_offload' if offload else ''}{'_rows' if splits_rows else ''}"
        path = self.directory / f"{kind}_dp{dp}mp{mp}{suffix}.yaml"
        if not path.exists():
            trained = {"lr_schedule": {"learning_rate": 2e-3}, "optimizer": {"swap": offload}}
            _change_yaml(
                CONFIGS / f"{kind}_qwen2_tiny.yaml",
                path,
                {
                    "parallel_config": {
                        "data_parallel": dp,
                        "model_parallel": mp,
                        "use_seq_parallel": splits_rows,
                    },
                    "model.model_config": SMALL_MODEL,
                    "context": {"memory_offload": "ON" if offload else "OFF"},
                    **(trained if kind == "finetune" else {}),
                },
            )
        return path


CONFIGS = REPO_ROOT / "model_configs" / "qwen_ppo"
SMALL_MODEL: dict[str, Any] = {
    "hidden_size": 32,
    "num_layers": 1,
    "num_heads": 8,
    "n_kv_heads": 4,
    "intermediate_size": 48,
    "seq_length": 16,
    "theta": 10000.0,
    "vocab_size": PPOInputs.VOCAB,
    "pad_token_id": PPOInputs.PAD,
    "bos_token_id": PPOInputs.PAD,
    "eos_token_id": list(PPOInputs.STOP_IDS),
}
SMALL_PPO: dict[str, Any] = {
    "total_iterations": 3,
    "save_interval": 1,
    "keep_checkpoints": 3,
    "rollout_batch_size": 8,
    "ppo_epochs": 1,
    "max_prompt_length": PPOInputs.PROMPT_COLUMNS,
    "max_response_length": 5,
    "stop_token_ids": list(PPOInputs.STOP_IDS),
    "pad_token_id": PPOInputs.PAD,
    "valid_vocab_size": PPOInputs.VALID_VOCAB,
    "temperature": 0.8,
    "decode_steps_per_call": 2,
    "kl_controller": "adaptive",
    "kl_coef": 0.1,
    "kl_target": 0.05,
    "kl_horizon": 20,
    "whiten_rewards": True,
}


@pytest.fixture(scope="session")
def ppo_inputs(tmp_path_factory: pytest.TempPathFactory) -> PPOInputs:
    """Weights, prompts and hyper-parameters of the smallest PPO job, all random, always the same."""
    from mindrlhf.configs.load import load_run_config

    inputs = PPOInputs(tmp_path_factory.mktemp("ppo_inputs"))
    _change_yaml(CONFIGS / "ppo_qwen2_tiny.yaml", inputs.ppo, {"": SMALL_PPO})
    model = load_run_config(inputs.yaml("generate", 1, 1)).model
    _write_random_weights(inputs.policy, model, seed=1)
    _write_random_weights(inputs.stale, model, seed=2)
    _write_random_weights(inputs.reward, model, seed=3, lm_head=False, score_head=True)
    _write_prompts(inputs.data, rows=20, seed=0)
    _write_prompts(inputs.held_out, rows=11, seed=1)
    return inputs


def _change_yaml(source: Path, target: Path, changes: Mapping[str, Mapping[str, Any]]) -> None:
    """A shipped YAML with other values; a key it does not have is a mistake of the test."""
    content = yaml.safe_load(source.read_text(encoding="utf-8"))
    for section, values in changes.items():
        part = content
        for key in filter(None, section.split(".")):
            part = part[key]
        assert values.keys() <= part.keys(), values.keys() - part.keys()
        part.update(values)
    target.write_text(yaml.safe_dump(content), encoding="utf-8")


def _write_random_weights(path: Path, model: Any, *, seed: int, **heads: bool) -> None:
    """Weights large enough that the distribution over tokens is far from uniform; biases not zero."""
    from mindrlhf.checkpoint.sources import ArraySource
    from mindrlhf.checkpoint.weight_files import write_weights
    from mindrlhf.models.qwen2.layouts import parameter_layouts
    from mindrlhf.parallel.layout import Mesh

    rng = np.random.default_rng(seed)
    arrays = {}
    for name, layout in parameter_layouts(model, Mesh(1, 1), **heads).items():
        draw = rng.standard_normal(layout.shape, np.float32)
        if "norm" in name:
            arrays[name] = np.float32(1) + np.float32(0.1) * draw
        else:
            arrays[name] = np.float32(1.0 if "embedding" in name else 0.25) * draw
    write_weights(path, ArraySource(arrays))


def _write_prompts(path: Path, rows: int, seed: int) -> None:
    from mindrlhf.data.columns import prompt_schema
    from mindrlhf.data.mindrecord import write_mindrecord

    columns, sequence = PPOInputs.PROMPT_COLUMNS, SMALL_MODEL["seq_length"]
    rng = np.random.default_rng(seed)
    prompts = np.full((rows, columns), PPOInputs.PAD, np.int32)
    pretrain = np.full((rows, sequence), PPOInputs.PAD, np.int32)
    learnt = np.zeros_like(pretrain)
    responses = np.random.default_rng(1).integers(3, PPOInputs.VALID_VOCAB, (rows, sequence))
    for row in range(rows):
        ids = rng.integers(3, PPOInputs.VALID_VOCAB, row % columns + 1)
        if row == 5:
            ids[2] = PPOInputs.PAD
        prompts[row, columns - len(ids) :] = ids
        end = len(ids) + row % 8 + 1
        pretrain[row, :end] = [*ids, *responses[row, len(ids) : end]]
        learnt[row, len(ids) : end] = 1
    batch = {"prompt_ids": prompts, "pretrain_ids": pretrain, "loss_mask": learnt}
    write_mindrecord(path, prompt_schema(columns, sequence), [batch])


ROWS, WORD, STOP = 120, 7, 5
RESPONSE_TOKENS = np.array([30, 31, 32, 33])


@pytest.fixture(scope="session")
def pairs(ppo_inputs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs in the columns of ``rlhf_data.py --pairs``; no two prompts are alike.

    The preferred responses are made of a few tokens, one of which never stands in a rejected one: SFT can
    learn the tokens, a reward model the difference.
    """
    from mindrlhf.data.columns import prompt_schema
    from mindrlhf.data.mindrecord import write_mindrecord

    schema = prompt_schema(ppo_inputs.PROMPT_COLUMNS, 16, pairs=True)
    batch = {
        name: np.full((ROWS, column.length), 0 if "mask" in name else ppo_inputs.PAD, np.int32)
        for name, column in schema.items()
    }
    rng = np.random.default_rng(0)
    for row in range(ROWS):
        prompt = [3 + row % 50, 3 + row // 50, *rng.integers(3, 61, row % 5)]
        n = len(prompt)
        batch["prompt_ids"][row, -n:] = prompt
        for ids, mask, is_chosen in (
            ("pretrain_ids", "loss_mask", True),
            ("rejected_ids", "rejected_mask", False),
        ):
            answer = rng.choice(RESPONSE_TOKENS, rng.integers(2, 5))
            if is_chosen:
                answer[rng.integers(len(answer))] = WORD
            length = n + len(answer) + 1
            batch[ids][row, :length] = [*prompt, *answer, STOP]
            batch[mask][row, n:length] = 1
    path = tmp_path_factory.mktemp("pairs") / "pairs.mindrecord"
    write_mindrecord(path, schema, [batch])
    return path
