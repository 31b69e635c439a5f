"""Runs jobs of ``sft.py`` and ``reward_model.py`` with the options of a JSON file; under msrun or alone."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from worker_support import write_results

from mindrlhf.configs.flags import RewardOptions, SFTOptions
from mindrlhf.runtime.launching import serve_as_scheduler
from mindrlhf.utils.ranks import env_rank, is_scheduler

PATHS = (
    "config_path", "load_sft_checkpoint", "mind_dataset_dir", "save_ckpt_dir", "save_full_ckpt",
    "resume_from",
)  # fmt: skip
SECONDS = 240


def wait_for(checkpoint: Path | None) -> None:
    """Another job that runs beside this one writes it."""
    end = time.monotonic() + SECONDS
    while checkpoint is not None and not checkpoint.is_dir() and time.monotonic() < end:
        time.sleep(0.1)


def main(file: str) -> None:
    """One job after the other, ``{name: {"stage": "sft" or "reward", options}}``."""
    from mindrlhf.runtime.device import start_runtime
    from mindrlhf.runtime.host_exchange import HostExchange
    from mindrlhf.trainer import run
    from mindrlhf.trainer.programs import run_stage

    started: list[Any] = []

    def start_once(*arguments: Any, **options: Any) -> Any:
        """A process chooses its device once only; it joins the others each time, as in a job of its own."""
        if started:
            HostExchange(started[0]).barrier()
        else:
            started.append(start_runtime(*arguments, **options))
        return started[0]

    run.start_runtime = start_once

    results = {}
    for name, given in json.loads(Path(file).read_text()).items():
        stage = given.pop("stage")
        options = {key: Path(value) if key in PATHS else value for key, value in given.items()}
        wait_for(options.get("resume_from"))
        if stage == "sft":
            results[name] = str(run_stage(SFTOptions(**options)))
        else:
            results[name] = str(run_stage(RewardOptions(**options)))
    write_results(env_rank(), results)


if __name__ == "__main__":
    if is_scheduler():
        serve_as_scheduler()
    else:
        main(sys.argv[1])
