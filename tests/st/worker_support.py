"""What every worker script does first and last; imported by the scripts that ``run_workers`` starts."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def start() -> tuple[int, int]:
    """Graph mode on CPU, collectives ready, imports done; returns rank and world size."""
    import mindspore as ms
    from mindspore.communication import get_group_size, get_rank, init

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    init()
    # MindSpore collects garbage before each compilation: 0.3 s a time over all that imports have made.
    gc.freeze()
    return int(get_rank()), int(get_group_size())


def results_directory() -> Path:
    """Where the test looks for what workers write."""
    return Path(os.environ["MINDRLHF_TEST_RESULTS"])


def write_results(rank: int, results: Mapping[str, Any]) -> None:
    """Hands a dictionary of JSON values to the test."""
    (results_directory() / f"rank_{rank}.json").write_text(json.dumps(dict(results)))
