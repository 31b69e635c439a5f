"""What every test may use, and the scratch directory for MindSpore and MindFormers."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

REPO_ROOT = Path(__file__).resolve().parents[1]
_scratch: list[Path] = []


def pytest_configure(config: pytest.Config) -> None:
    """Sets the environment before any test module, and so before MindSpore, is imported.

    MindFormers makes ``output/log`` in the working directory when imported (LOCAL_DEFAULT_PATH,
    LOG_MF_PATH), MindSpore ``rank_0/om`` when a compile fails (MS_OM_PATH) and ``kernel_meta``
    (MS_COMPILER_CACHE_PATH). Processes that tests start inherit it all.
    """
    scratch = Path(tempfile.mkdtemp(prefix="mindrlhf-tests-"))
    _scratch.append(scratch)
    os.environ["LOCAL_DEFAULT_PATH"] = str(scratch / "output")
    os.environ["LOG_MF_PATH"] = str(scratch / "output" / "log")
    os.environ["MS_OM_PATH"] = str(scratch)
    os.environ["MS_COMPILER_CACHE_PATH"] = str(scratch)
    os.environ.setdefault("GLOG_v", "3")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("MS_ROLE", "RANK_ID", "MS_NODE_ID", "MS_WORKER_NUM", "MINDRLHF_LOG"):
        os.environ.pop(name, None)
    # msrun is found by name, whichever way pytest was started.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling:
    """With several processes, the tests of a file share one, and so do all jobs of msrun in ``tests/st``."""

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "st" if nodeid.startswith("tests/st/") else str(super()._split_scope(nodeid))

    return Scheduling(config, log)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes the scratch directory."""
    while _scratch:
        shutil.rmtree(_scratch.pop(), ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _what_stays_is_no_garbage() -> None:
    """Leaves what lives on, modules above all, out of later collections of garbage.

    MindSpore collects before each of hundreds of compilations, which takes a second when it looks at all that
    the suite has imported.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", params=["kernels", "plain"])
def either_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Once with the CPU kernels, once by MindSpore's operations, which every other device has."""
    from mindrlhf.kernels.library import kernel_library

    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            for module in ("decoding", "fused_layers", "log_probs"):
                patch.setattr(f"mindrlhf.kernels.{module}.kernel_library", lambda: None)
        elif kernel_library() is None:
            pytest.skip("no kernels on this machine")
        yield


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The repository's root directory."""
    return REPO_ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The data folder beside the repository; tests that need it are skipped where it is not."""
    path = REPO_ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no shared data at {path}")
    return path
