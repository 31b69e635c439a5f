"""A tiny job in a temporary directory, whose YAMLs a test may spoil."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mindrlhf.configs.keys import JobConfig
from mindrlhf.configs.load import load_job
from mindrlhf.utils.errors import ConfigError

SOURCES = {
    "infer": "generate_qwen2_tiny.yaml",
    "train": "finetune_qwen2_tiny.yaml",
    "reward": "generate_qwen2_tiny.yaml",
    "critic": "finetune_qwen2_tiny.yaml",
    "ppo": "ppo_qwen2_tiny.yaml",
}
DELETE = object()


class Job:
    """The five files of a job, ``{role}.yaml`` each; any may be edited before loading."""

    def __init__(self, directory: Path, source: Path) -> None:
        self.paths = {role: directory / f"{role}.yaml" for role in SOURCES}
        for role, name in SOURCES.items():
            shutil.copy(source / name, self.paths[role])

    def edit(self, role: str, key_path: str, value: Any) -> None:
        """Sets (or deletes) one key, given by its dotted path."""
        path = self.paths[role]
        root = yaml.safe_load(path.read_text(encoding="utf-8"))
        *parents, last = key_path.split(".")
        section = root
        for parent in parents:
            section = section[parent]
        if value is DELETE:
            del section[last]
        else:
            section[last] = value
        path.write_text(yaml.safe_dump(root, sort_keys=False), encoding="utf-8")

    def load(self, **changes: Any) -> JobConfig:
        """Loads the job for 4 workers."""
        arguments: dict[str, Any] = {
            "sft_path_infer": self.paths["infer"],
            "sft_path_train": self.paths["train"],
            "reward_path": self.paths["reward"],
            "critic_path": self.paths["critic"],
            "ppo_config": self.paths["ppo"],
            "world_size": 4,
        }
        return load_job(**(arguments | changes))

    def faults(self, **changes: Any) -> list[str]:
        """The faults loading reports, with file names in place of their paths."""
        with pytest.raises(ConfigError) as caught:
            self.load(**changes)
        directory = str(self.paths["ppo"].parent) + "/"
        return [fault.replace(directory, "") for fault in caught.value.faults]


@pytest.fixture
def model_configs(repo_root: Path) -> Path:
    """The shipped YAMLs."""
    return repo_root / "model_configs" / "qwen_ppo"


@pytest.fixture
def job(tmp_path: Path, model_configs: Path) -> Job:
    """A tiny job without faults."""
    return Job(tmp_path, model_configs)


@pytest.fixture
def delete() -> object:
    """The value that makes ``Job.edit`` delete the key."""
    return DELETE


@pytest.fixture
def yaml_file(tmp_path: Path) -> Callable[[str], Path]:
    """Writes text into a YAML file."""

    def write(text: str) -> Path:
        path = tmp_path / "file.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """caplog, with the library's records passed on to it."""
    monkeypatch.setattr(logging.getLogger("mindrlhf"), "propagate", True)
    caplog.set_level(logging.INFO, logger="mindrlhf")
    return caplog
