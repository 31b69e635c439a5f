"""Outputs drawn among inputs, links to them and what else is there, for every program; each fails at random.

Whatever happens, a file that was there is bit for bit what it was, or it was to be replaced and is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mindrlhf.utils.provenance import provenance
from tests.bad_input import harness
from tests.bad_input.harness import CHAT, CONVERT, DATA, PPO, REPORT, REWARD, SFT, TRANSFORM, Case

BACK = {"--reversed": "True", "--input_path": "policy.ckpt", "--output_path": "", "--config": "hf"}
MERGE = {"--input": "two_ranks", "--output": "", "--input_config": "split.yaml"}
FULL, SAVED = {"--save_full_ckpt": "out.ckpt"}, {"--save_ckpt_dir": "saved"}
# Script, its flags (none: the good ones), the old results that its outputs may replace, draws.
PROGRAMS: dict[str, tuple[Path, dict[str, Any] | None, dict[str, str], int]] = {
    "convert": (CONVERT, None, {"--output_path": "out.ckpt"}, 50),
    "convert back": (CONVERT, BACK, {"--output_path": "out_hf"}, 50),
    "preprocess": (DATA, None, {"--output_path": "o.mindrecord", "--eval_output_path": "e.mindrecord"}, 30),
    "merge": (TRANSFORM, MERGE, {"--output": "out.ckpt"}, 50),
    "split": (TRANSFORM, None, {"--output": "out_ranks"}, 50),
    "chat": (CHAT, None, {"--output_file": "out.jsonl"}, 50),
    "report": (REPORT, None, {"--output": "out.html"}, 20),
    "ppo": (PPO, None, SAVED | {"--export_hf_dir": "out_hf", "--save_data_file": "x.mindrecord"}, 20),
    "sft": (SFT, None, SAVED | FULL | {"--export_hf_dir": "out_hf"}, 24),
    "reward model": (REWARD, None, SAVED | FULL, 24),
}
FAILING = [*[(Path, "replace")] * 4, (Path, "mkdir"), (os, "fsync"), (shutil, "copyfile")]
"""Calls that name and write files; the first is what replaces them."""
ERRORS = (OSError(28, "injected"), KeyboardInterrupt())


def make_case(source: Path, directory: Path, program: str) -> Case:
    """Good files and flags, and old results of every kind."""
    script, flags, _, _ = PROGRAMS[program]
    harness.link_files(source, directory)
    case = Case(directory, script)
    case.flags = dict(case.flags if flags is None else flags)
    if script == REWARD:
        case.give(calibrate="off")
    for old, new in {
        **{"hf": "out_hf", "two_ranks": "out_ranks", "reward.ckpt": "out.ckpt"},
        **{f"data.mindrecord{end}": f"{name}.mindrecord{end}" for name in "oe" for end in ("", ".db")},
    }.items():
        (harness.link_files if (case / old).is_dir() else os.link)(case / old, case / new)
    case.write("out.jsonl", '{"prompt": "", "response": "", "tokens": 1, "stopped": true}\n')
    # Results of another program, which no flag allows to touch.
    case.write("another/metrics.jsonl", '{"step": 1}\n')
    (case / "another" / "config.json").write_text(json.dumps(provenance({"stage": "another"})))
    case.write("out.html", '<meta name="generator" content="MindRLHF report"></html>')
    return case


def drawn_path(case: Case, draw: random.Random, old: str) -> str:
    """An old result, a new name, or what means trouble: another place, a link to it, inside or around it."""
    new = f"new_{old}"
    if draw.random() < 0.7:
        return draw.choice([old, new])
    named = [Path(value) for value in case.flags.values() if (case / value).exists()]
    below = [path for place in draw.choice([named, [Path()]]) for path in (case / str(place)).rglob("*")]
    target = draw.choice(sorted([*named, *(path.relative_to(case.directory) for path in below)]))
    link = case / f"link_{draw.randrange(10**6)}{target.suffix}"
    where = draw.choice([str(target), f"hf/../{target}", str(target / new), str(target.parent), link.name])
    if where == link.name and draw.random() < 0.5 and (case / str(target)).is_file():
        link.hardlink_to(case / str(target))
    elif where == link.name:
        link.symlink_to(case / str(target))
    return where


@contextlib.contextmanager
def failing(owner: Any, name: str, number: int, error: BaseException) -> Iterator[None]:
    """The call of that number fails, and no other; an exception that the program lets out ends here."""
    calls, real = iter(range(10**9)), getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise error
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(type(error)):
        patch.setattr(owner, name, call)
        yield


def is_whole(path: Path) -> bool:
    """Whether a file that was replaced can be read."""
    from mindrlhf.checkpoint.weight_files import open_weights
    from mindrlhf.data.mindrecord import read_schema

    if path.suffix in (".ckpt", ".safetensors"):
        open_weights(path).close()
    if path.suffix in (".mindrecord", ".db"):
        return read_schema(str(path).removesuffix(".db"))[1] > 0
    return path.suffix != ".html" or path.read_text(encoding="utf-8").rstrip().endswith("</html>")


@pytest.fixture
def no_model(one_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chat and training without a model that runs; what they write is real."""
    from mindrlhf.chat import session
    from mindrlhf.trainer.recipes import ppo_job, reward_model, rl, sft
    from mindrlhf.trainer.recorder import write_experience

    def workers(options: Any, models: Any, *_: Any, **__: Any) -> Any:
        generator = SimpleNamespace(model=models[0], rows=8, stop_ids=[])
        replies = lambda *_: iter([(0, np.full((8, 1), 65))])  # noqa: E731
        return SimpleNamespace(is_main=True, generators=[generator], generate=replies, end=lambda: None)

    def train(run: Any, recipe: Any) -> bool:
        run.begin(recipe)
        if recipe.__class__ is rl.PPOTrainer:
            run.save(recipe)
            if path := run.recorder._experience_file:
                write_experience(path, "iteration", 1, {"tokens": np.ones((2, 3), np.int32)})
        return bool(run.finish(recipe))

    monkeypatch.setattr(
        "mindrlhf.trainer.run.supervised", contextlib.nullcontext
    )  # it would end this process
    monkeypatch.setattr(session, "start_workers", workers)
    for module in (ppo_job, reward_model, sft):
        monkeypatch.setattr(module, "train", train)


@pytest.mark.parametrize("program", list(PROGRAMS))
def test_nothing_is_destroyed(
    program: str,
    all_files: Path,
    no_model: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    draw = random.Random(program)
    *_, outputs, draws = PROGRAMS[program]
    ends: Counter[str] = Counter()
    for number in range(draws):
        case = make_case(all_files, tmp_path / str(number), program)
        inputs = {case / value for flag, value in case.flags.items() if flag not in outputs and value}
        for flag, old in outputs.items():
            case.flags[flag] = drawn_path(case, draw, old)
        if overwrite := draw.random() < 0.6:
            case.give(overwrite="True" if case.script in (PPO, SFT, REWARD) else True)
        if case.script in (PPO, SFT, REWARD) and draw.random() < 0.3:
            case.give(resume_training="True", save_ckpt_dir=draw.choice(["saved", "another"]))
        asked = {os.path.realpath(case / case.flags[flag]) for flag in outputs}
        fault = (*draw.choice(FAILING), draw.choice([-1, *range(5)]), draw.choice(ERRORS))
        before, code = case.listing(), 1
        with failing(*fault):
            code = harness.run_here(case, monkeypatch, capfd).code
        after = case.listing()
        story = f"draw {number}: {case.arguments}, fails at {fault}: exit code {code}"
        for name in (name for name, content in before.items() if after.get(name) != content):
            places = [os.path.realpath(place) for place in (case / name, *(case / name).parents)]
            assert overwrite, story
            assert not name.startswith("another/"), story
            assert asked & {*places, places[0].removesuffix(".db")}, story
            assert not inputs & {case / name, *(case / name).parents}, story
            assert not (case / name).exists() or is_whole(case / name), story
        assert not any(name.endswith(f"-{os.getpid()}") for name in after), story
        ends[{0: "done", 2: "refused"}.get(code, "failed")] += 1
        shutil.rmtree(case.directory)
    assert min(ends["done"], ends["refused"]) > 0, ends
