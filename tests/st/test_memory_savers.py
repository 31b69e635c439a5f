"""What saves memory, micro-batches and layouts change no results.

Recomputation, sequence parallelism ("rows"), optimizer states shared out or swapped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.st.stage_metrics import assert_metrics_close, read_lines
from tests.st.test_stages_layouts import working_alone

# Mesh, what the YAML asks for, rows of a micro-batch, and the job that is resumed. Every pair of settings
# occurs together once.
JOBS: dict[str, tuple[tuple[int, int], frozenset[str], int, str | None]] = {
    "replicas": ((4, 1), frozenset({"share", "swap"}), 1, None),
    "grid": ((2, 2), frozenset({"recompute", "accumulate", "rows"}), 0, None),
    "split": ((1, 4), frozenset({"recompute", "share", "swap"}), 2, None),
    "grid from replicas": ((2, 2), frozenset({"share", "rows"}), 2, "replicas"),
    "replicas from grid": ((4, 1), frozenset({"recompute"}), 2, "grid"),
    "split from grid": ((1, 4), frozenset({"swap", "rows"}), 1, "grid"),
}
NARROW = {"narrow grid": ((2, 2), frozenset({"bfloat16", "share", "swap"}), 2, None)}
"""With bfloat16 weights, whose roundings come back in every number: they equal one process with them."""

SOURCES = {"grid from replicas", *(source for *_, source in (JOBS | NARROW).values()), "narrow grid"}


def yaml_of(inputs: Any, directory: Path, mesh: tuple[int, int], savers: frozenset[str]) -> Path:
    content = yaml.safe_load(inputs.yaml("finetune", *mesh).read_text())
    content["recompute_config"]["recompute"] = "recompute" in savers
    content["parallel"]["enable_parallel_optimizer"] = "share" in savers
    content["parallel_config"]["use_seq_parallel"] = "rows" in savers
    content["optimizer"]["swap"] = "swap" in savers
    content["runner_config"]["gradient_accumulation_steps"] = 2 if "accumulate" in savers else 1
    if "bfloat16" in savers:
        content["model"]["model_config"]["param_init_type"] = "bfloat16"
    path = directory / f"{mesh[0]}_{mesh[1]}_{'_'.join(sorted(savers))}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.msrun
def test_memory_savers_change_no_results(
    run_workers: Any, ppo_inputs: Any, pairs: Path, tmp_path: Path
) -> None:
    """Each equals one process without any of them, step by step, also when it resumes what another saved."""

    def job(name: str, mesh: Any, savers: frozenset[str], micro: int, source: str | None) -> Any:
        given = {
            "stage": "sft",
            "config_path": str(yaml_of(ppo_inputs, tmp_path, mesh, savers)),
            "mind_dataset_dir": str(pairs),
            "load_sft_checkpoint": str(ppo_inputs.policy),
            "save_ckpt_dir": str(tmp_path / name),
            "batch_size": 8,
            "epochs": 1,
            "learning_rate": 3e-3,
            "micro_batch_size": micro,
            "save_interval": 4 if name in SOURCES else 0,
            "keep_checkpoints": 0,
            "watchdog_timeout": 0,
        }
        return given | ({"resume_from": str(tmp_path / source / "step_000004")} if source else {})

    four = {name: job(name, *settings) for name, settings in (JOBS | NARROW).items()}
    one = {
        "one": job("one", (1, 1), frozenset(), 0, None),
        "one narrow": job("one narrow", (1, 1), frozenset({"bfloat16"}), 0, None),
        "one narrow from grid": job(
            "one narrow from grid", (1, 1), frozenset({"bfloat16"}), 0, "narrow grid"
        ),
        "one from grid": job("one from grid", (1, 1), frozenset({"recompute"}), 4, "grid from replicas"),
    }
    one["one from grid"]["resume_from"] = str(tmp_path / "grid from replicas" / "step_000008")
    files = {"four": four, "one": one}
    for name, jobs in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(jobs))
    with working_alone(tmp_path / "one.json", tmp_path) as alone:
        run_workers("worker_stages.py", 4, str(tmp_path / "four.json"), timeout=400)
        assert alone.wait(timeout=300) == 0, (tmp_path / "one.log").read_text()[-3000:]
    whole, narrow = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("one", "one narrow"))
    assert len(whole) >= 10
    assert_metrics_close(narrow, whole, rel=3e-2)
    with pytest.raises(AssertionError):
        assert_metrics_close(narrow, whole, rel=1e-5)
    for name in [*four, "one from grid", "one narrow from grid"]:
        wanted, rel = (narrow, 2e-3) if "narrow" in name else (whole, 1e-5)
        found = read_lines(tmp_path / name / "metrics.jsonl")
        assert len(found) >= len(wanted) - 8
        assert_metrics_close(found, wanted[-len(found) :], rel=rel)
