"""The table of model families: complete, light to import, and open to another entry."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from mindrlhf.configs.keys import JobConfig, ModelConfig
from mindrlhf.configs.load import load_job
from mindrlhf.models import families
from mindrlhf.models.families import FAMILIES, MODULES, Family, check_families, family_of, family_of_hf
from mindrlhf.models.job_layouts import job_layouts
from mindrlhf.parallel.layout import Layout, mesh_of
from mindrlhf.utils.errors import CheckpointError, ConfigError

TOY_LAYOUTS = """
from mindrlhf.parallel.layout import Layout

def parameter_layouts(config, mesh, *, lm_head=True, score_head=False):
    return {"toy.weight": Layout(mesh, (config.vocab_size,), ("mp",))}
"""


@pytest.fixture
def tiny_job(repo_root: Path) -> JobConfig:
    """The job of the tiny YAMLs."""
    infer, train, ppo = (
        repo_root / "model_configs" / "qwen_ppo" / f"{kind}_qwen2_tiny.yaml"
        for kind in ("generate", "finetune", "ppo")
    )
    return load_job(
        sft_path_infer=infer, sft_path_train=train, reward_path=infer, critic_path=infer, ppo_config=ppo
    )


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_family_has_what_the_library_asks_for(family: Family) -> None:
    for module, names in MODULES.items():
        missing = [name for name in names if not hasattr(getattr(family, module), name)]
        assert missing == [], module


def test_the_table_and_what_needs_no_device_do_not_load_mindspore() -> None:
    light = "layouts", "weight_names", "hf_keys"
    code = (
        "import sys; from mindrlhf.models import job_layouts; from mindrlhf.models.families import FAMILIES;"
        f"[getattr(family, name) for family in FAMILIES.values() for name in {light}];"
        "print('mindspore' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "False"


def test_a_second_family_is_a_folder_and_an_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_job: JobConfig
) -> None:
    (tmp_path / "toy_family").mkdir()
    (tmp_path / "toy_family" / "layouts.py").write_text(TOY_LAYOUTS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    toy = Family(config_type="ToyConfig", hf_model_type="toy", package="toy_family")
    monkeypatch.setattr(families, "FAMILIES", {**FAMILIES, "toy": toy})

    toy_run = replace(tiny_job.infer, model=replace(tiny_job.infer.model, type="ToyConfig"))
    assert family_of(toy_run.model) is toy
    assert family_of_hf("toy", "config.json") is toy
    assert toy.layouts is import_module("toy_family.layouts")
    layouts = job_layouts(replace(tiny_job, infer=toy_run))
    vocab = tiny_job.infer.model.vocab_size
    assert layouts["ref"] == {"toy.weight": Layout(mesh_of(toy_run), (vocab,), ("mp",))}
    assert "toy.weight" not in layouts["train_policy"], "the other models stay Qwen2"


def test_unknown_types_are_refused_and_the_known_ones_named(tiny_job: JobConfig) -> None:
    model: ModelConfig = replace(tiny_job.infer.model, type="GPT2Config")
    with pytest.raises(ConfigError, match=r"type: not supported \('GPT2Config'\) - must be LlamaConfig"):
        family_of(model)
    unknown = replace(tiny_job.infer, model=model)
    with pytest.raises(ConfigError) as caught:
        check_families([tiny_job.train, unknown, replace(unknown, path=Path("other.yaml")), unknown])
    assert [Path(fault.split(": ")[0]).name for fault in caught.value.faults] == [
        *(tiny_job.infer.path.name, "other.yaml")
    ]
    with pytest.raises(CheckpointError, match=r"config\.json: model_type is 'llama', only 'qwen2'"):
        family_of_hf("llama", "config.json")


@pytest.mark.parametrize(("critic", "files"), [("separate", True), ("shared", True), ("none", False)])
def test_a_job_without_a_critic_has_no_layouts_of_one(tiny_job: JobConfig, critic: str, files: bool) -> None:
    layouts = job_layouts(replace(tiny_job, ppo=replace(tiny_job.ppo, critic=critic)))
    assert ("critic" in layouts) == files
    assert ("score_head.weight" in layouts["train_policy"]) == (critic == "shared")
