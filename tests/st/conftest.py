"""``run_workers``: a script of this directory on several workers, under msrun."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import pytest

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
    """``scripts/msrun_launcher.py`` as a module; scripts are no package."""
    path = REPO_ROOT / "scripts" / "msrun_launcher.py"
    spec = importlib.util.spec_from_file_location("msrun_launcher", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
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
            pytest.fail(output.getvalue(), pytrace=False)
        missing = [rank for rank in range(world_size) if not (results / f"rank_{rank}.json").exists()]
        if missing:
            report = launcher.failure_report(directory / "log", world_size)
            pytest.fail(f"ranks {missing} wrote no results\n{report}", pytrace=False)
        return [
            {**json.loads((results / f"rank_{rank}.json").read_text()), "directory": results}
            for rank in range(world_size)
        ]

    return run
