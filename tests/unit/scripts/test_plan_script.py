"""scripts/plan.py: what it prints, its JSON, and one error with exit code 2 for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SIZES = ("generate", "finetune", "ppo")


def run(repo_root: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repo_root / "scripts/plan.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=120, check=False)


def yamls(repo_root: Path, size: str) -> list[Path]:
    return [repo_root / f"model_configs/qwen_ppo/{kind}_{size}.yaml" for kind in SIZES]


def plan(repo_root: Path, *arguments: object) -> dict[str, Any]:
    result = run(repo_root, *arguments, "--json")
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_tables_for_people(repo_root: Path) -> None:
    result = run(repo_root, *yamls(repo_root, "qwen2_7b"), "--device_memory", "24GB")
    assert result.returncode == 0
    assert result.stderr == ""
    for text in (
        "4 worker(s) on Ascend",
        "not measured",
        "policy train   dp2 mp2    3,807.9 M",
        "DOES NOT FIT",
        "finetune_qwen2_7b.yaml",
        "A weight sync brings 0 to 3.81 GB to a rank, 7.62 GB in total",
        "20 strategy files",
    ):
        assert text in result.stdout


def test_json_of_flags_and_of_three_yamls_is_the_same(repo_root: Path) -> None:
    generate, finetune, _ = files = yamls(repo_root, "qwen2_tiny")
    found = plan(repo_root, *files)
    assert found == plan(repo_root, "--sft_path_infer", generate, "--sft_path_train", finetune)
    assert [phase["name"] for phase in found["phases"]] == ["rollout", "scoring", "training", "sync", "save"]
    assert [model["name"] for model in found["models"]] == [
        "policy infer", "policy train", "reference", "reward", "critic"
    ]  # fmt: skip
    assert found["peak"] == max(phase["total"] for phase in found["phases"])
    assert len(found["strategy_files"]) == 20
    assert found["fits"] is None


def test_another_world_size_a_reward_function_and_cpu(repo_root: Path) -> None:
    files = yamls(repo_root, "qwen2_7b")
    found = plan(repo_root, *files, "--world_size", 8, "--device_memory", "64GB", "--reward_fn", "a:b")
    assert (found["world_size"], found["yaml_world_size"]) == (8, 4)
    splits = {(cost["file"], cost["data_parallel"], cost["model_parallel"]) for cost in found["splits"]}
    assert splits == {
        (file.name, dp, mp) for file in files[:2] for dp, mp in ((8, 1), (4, 2), (2, 4))
    }  # fmt: skip
    assert "reward" not in [model["name"] for model in found["models"]]
    assert len(found["sync"]["received_by_rank"]) == 8
    on_cpu = plan(repo_root, *yamls(repo_root, "smollm2_135m"), "--no_reward_model", "--device_target", "CPU")
    assert on_cpu["constants_measured"] is True
    assert on_cpu["host"] == 0
    assert on_cpu["sync"]["received_total"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--sft_path_infer: missing - name the YAML"),
        (["only.yaml"], "positional arguments: 1 YAML(s) given"),
        (["a", "b", "c", "--sft_path_infer", "d"], "3 YAML(s) and --sft_path_infer given"),
        (["missing_g.yaml", "missing_f.yaml", "missing_p.yaml"], "missing_g.yaml"),
        (["GOOD", "--device_memory", "lots"], "--device_memory: not a size ('lots')"),
        (["GOOD", "--world_size", "0"], "--world_size: not a number of workers (0)"),
        (["GOOD", "--world_size", "3"], "--world_size 3: no data_parallel x model_parallel"),
        (["GOOD", "--set", "micro_batch_size=5"], "--set micro_batch_size"),
        (["GOOD", "--device_target", "TPU"], "invalid choice: 'TPU'"),
    ],
)
def test_bad_input_is_one_error(repo_root: Path, arguments: list[str], message: str) -> None:
    given = [part for a in arguments for part in (yamls(repo_root, "qwen2_tiny") if a == "GOOD" else [a])]
    result = run(repo_root, *given)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
