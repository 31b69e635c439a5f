"""Good files for the cases, and a process in which training may begin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bad_input import harness
from tests.bad_input.harness import Case


@pytest.fixture(scope="session")
def light_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("light")
    harness.make_good_files(directory)
    return directory


@pytest.fixture(scope="session")
def all_files(tmp_path_factory: pytest.TempPathFactory, light_files: Path) -> Path:
    directory = tmp_path_factory.mktemp("all") / "files"
    harness.link_files(light_files, directory)
    harness.make_good_records(directory)
    return directory


@pytest.fixture
def make_case(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Path], Case]:
    """A directory of its own with good files, and the good command line of a script."""

    def make(script: Path) -> Case:
        source = request.getfixturevalue("light_files" if script in harness.NO_MINDSPORE else "all_files")
        directory = tmp_path / "case"
        harness.link_files(source, directory)
        return Case(directory, script)

    return make


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """MindSpore lets a process choose its device only before it has computed, which other tests may have."""
    from mindrlhf.runtime import device
    from mindrlhf.trainer import run

    for module in (device, run):
        monkeypatch.setattr(module, "start_runtime", lambda *args, **kwargs: device.Runtime(0, 1))
