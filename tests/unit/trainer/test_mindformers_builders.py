"""MindFormers' builders come without the rest of it, which is there all the same when it is asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

PROGRAM = """
import json, sys, time
import mindspore
started = time.process_time()
from mindrlhf.trainer.mindformers_builders import load_builders
build_lr, build_optim = load_builders()
seconds = time.process_time() - started
from mindformers.tools.register import MindFormerModuleType as Kind, MindFormerRegister
def names():
    return {kind: sorted(MindFormerRegister.registry[kind]) for kind in (Kind.LR, Kind.OPTIMIZER)}
light, heavy = names(), sorted({"torch", "datasets", "pandas"} & set(sys.modules))
again = load_builders() == (build_lr, build_optim)
from mindformers import AutoTokenizer
import mindformers.models.llama
print(json.dumps({
    "seconds": seconds, "heavy": heavy, "again": again, "light": light, "whole": names(),
    "tokenizer": AutoTokenizer.__name__,
    "same": mindformers.core.build_optim is build_optim and mindformers.core.lr.build_lr is build_lr,
    "optimizer": mindformers.AdamW is mindformers.core.optim.AdamW,
    "after": load_builders() == (build_lr, build_optim),
}))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env={**os.environ, "GLOG_v": "4"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_builders_bring_nothing_heavy(found: dict[str, Any]) -> None:
    assert found["heavy"] == []
    assert found["seconds"] < 2.0  # measured: 0.2; all of MindFormers: 4


def test_they_know_every_optimizer_and_schedule(found: dict[str, Any]) -> None:
    assert found["light"] == found["whole"]
    assert min(map(len, found["light"].values())) > 5


def test_all_of_mindformers_can_be_had_later_and_is_the_same(found: dict[str, Any]) -> None:
    assert found["tokenizer"] == "AutoTokenizer"
    assert (found["again"], found["same"], found["optimizer"], found["after"]) == (True,) * 4
