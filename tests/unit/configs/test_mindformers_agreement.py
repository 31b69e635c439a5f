"""The tables of MindFormers' keys and arguments agree with the installed MindFormers."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindrlhf.configs import keys
from mindrlhf.configs import mindformers as foreign
from mindrlhf.configs.fields import Count, keys_of
from mindrlhf.configs.load import load_run_config
from mindrlhf.configs.optimizer_section import (
    LR_ALIASES,
    LR_SCHEDULES,
    OPTIMIZERS,
    completed_schedule,
    read_lr_schedule,
)


@pytest.fixture(scope="module")
def mindformers() -> Any:
    """MindFormers, imported once (it costs seconds)."""
    import mindformers

    assert mindformers.AutoConfig  # runs the package's own code, if a test before needed only its builders
    import mindformers.core
    import mindformers.models.llama

    return mindformers


def _parameters(function: Any) -> set[str]:
    named = inspect.signature(inspect.unwrap(function)).parameters.values()
    return {p.name for p in named if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {"self", "cls"}


def test_configs_do_not_import_mindspore(repo_root: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, '.'); import mindrlhf.configs.load; "
        "print(sorted({'mindspore', 'mindformers', 'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", sorted(LR_SCHEDULES))
def test_schedule_arguments(name: str, mindformers: Any) -> None:
    taken = _parameters(getattr(mindformers.core.lr.lr_schedule, name).__init__)
    assert set(LR_SCHEDULES[name]) - {"total_steps"} <= taken
    assert taken - {"total_steps"} <= set(LR_SCHEDULES[name])


def test_aliases(mindformers: Any) -> None:
    from mindformers.tools.register import MindFormerModuleType, MindFormerRegister

    for alias, name in LR_ALIASES.items():
        assert MindFormerRegister.get_cls(MindFormerModuleType.LR, alias).__name__ == name


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_optimizer_arguments(name: str, mindformers: Any) -> None:
    taken = _parameters(getattr(mindformers.core.optim, name).__new__)
    assert set(OPTIMIZERS[name]) <= taken
    assert taken - set(OPTIMIZERS[name]) == {"params", "amsgrad", "maximize"}  # not without its fused kernel


def test_llama_config_keys(mindformers: Any) -> None:
    taken = _parameters(mindformers.models.llama.LlamaConfig.__init__)
    known = {*keys_of(keys.ModelConfig), *foreign.MODEL}
    assert taken <= known


def test_top_level_sections(mindformers: Any) -> None:
    from mindformers.tools.register.template import CONFIG_NAME_TO_CLASS, GeneralConfig

    known = {*foreign.USED_SECTIONS, *foreign.IGNORED_SECTIONS, *foreign.TOP}
    assert (set(CONFIG_NAME_TO_CLASS) - {"general_config"}) | set(GeneralConfig.keys()) <= known


def test_parallel_and_runner_keys(mindformers: Any) -> None:
    from mindformers.tools.register.template import ParallelConfig, RunnerConfig

    assert set(ParallelConfig.keys()) <= {*keys_of(keys.ParallelConfig), *foreign.PARALLEL}
    assert set(RunnerConfig.keys()) <= {*keys_of(keys.RunnerConfig), *foreign.RUNNER}


def test_mindformers_loads_every_yaml(mindformers: Any, model_configs: Path) -> None:
    from mindformers.tools.register import MindFormerConfig

    for path in sorted(model_configs.glob("*.yaml")):
        theirs = MindFormerConfig(str(path))
        if path.name.startswith("ppo_"):
            continue
        ours = load_run_config(path)
        assert theirs.model.model_config.hidden_size == ours.model.hidden_size
        assert theirs.parallel_config.model_parallel == ours.parallel.model_parallel
        if ours.optimizer:
            assert theirs.lr_schedule.learning_rate == ours.lr_schedule["learning_rate"]


def test_what_is_read_builds_a_schedule(mindformers: Any, model_configs: Path) -> None:
    import mindspore as ms

    config = load_run_config(model_configs / "finetune_qwen2_tiny.yaml")
    schedule = mindformers.core.build_lr(completed_schedule(config.lr_schedule, 20))
    # warm-up of 0.1 x 20 = 2 steps from 1e-4 / 2 to 1e-4, then a half cosine over 18 steps to 1e-5
    expected = [5e-5, 7.5e-5, 1e-4, 5.5e-5, 1e-5]
    rates = [float(schedule(ms.Tensor(step, ms.int32)).asnumpy()) for step in (0, 1, 2, 11, 20)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_the_first_step_of_a_warm_up_learns_unless_the_yaml_says_otherwise() -> None:
    schedule = {"type": "LinearWithWarmUpLR", "learning_rate": 8e-4, "warmup_steps": 4}
    assert completed_schedule(schedule, 10) == schedule | {"warmup_lr_init": 2e-4, "total_steps": 10}
    assert completed_schedule(schedule | {"warmup_lr_init": 0.0}, 10)["warmup_lr_init"] == 0.0
    for without in ({"warmup_steps": 0}, {"warmup_steps": None, "warmup_ratio": 0.05}):
        assert "warmup_lr_init" not in completed_schedule(schedule | without, 10)


@pytest.mark.parametrize("name", sorted(LR_SCHEDULES))
def test_every_schedule_that_passes_can_be_built(name: str, mindformers: Any) -> None:
    from mindrlhf.configs.faults import Faults

    section: dict[str, Any] = {"type": name}
    for key, rule in LR_SCHEDULES[name].items():
        if rule.required:
            section[key] = 1 if rule.annotation is Count else 0.5
    section |= {"warmup_steps": 2, "total_steps": None} if "warmup_steps" in LR_SCHEDULES[name] else {}
    section |= {"decay_start_steps": 4} if "decay_start_steps" in LR_SCHEDULES[name] else {}
    faults = Faults()
    schedule = read_lr_schedule(section, "file: lr_schedule", faults)
    assert len(faults) == 0
    assert mindformers.core.build_lr(completed_schedule(schedule, 10)) is not None
