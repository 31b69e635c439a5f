"""MindFormers' builder of schedules comes without the rest of it, which is there when it is asked for."""

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
from mindrlhf.trainer.mindformers_schedules import load_build_lr
build_lr = load_build_lr()
seconds = time.process_time() - started
from mindformers.tools.register import MindFormerModuleType as Kind, MindFormerRegister
def names():
    return sorted(MindFormerRegister.registry[Kind.LR])
light, heavy = names(), sorted({"torch", "datasets", "pandas"} & set(sys.modules))
again = load_build_lr() is build_lr
from mindformers import AutoTokenizer
import mindformers.models.llama
print(json.dumps({
    "seconds": seconds, "heavy": heavy, "again": again, "light": light, "whole": names(),
    "tokenizer": AutoTokenizer.__name__,
    "same": mindformers.core.lr.build_lr is build_lr,
    "optimizer": mindformers.AdamW is mindformers.core.optim.AdamW,
    "after": load_build_lr() is build_lr,
}))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env={**os.environ, "GLOG_v": "4"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_it_brings_nothing_heavy(found: dict[str, Any]) -> None:
    assert found["heavy"] == []
    assert found["seconds"] < 2.0  # measured: 0.2; all of MindFormers: 4


def test_it_knows_every_schedule(found: dict[str, Any]) -> None:
    assert found["light"] == found["whole"]
    assert len(found["light"]) > 5


def test_all_of_mindformers_can_be_had_later_and_is_the_same(found: dict[str, Any]) -> None:
    assert found["tokenizer"] == "AutoTokenizer"
    assert (found["again"], found["same"], found["optimizer"], found["after"]) == (True,) * 4
