"""The tutorial's commands as they stand there, in order, in a directory of their own.

Nothing is changed but msrun's port, which may be in use, and that the PPO runs in one process, whose graphs
are the same, compile them once (``--enable_compile_cache``). The tutorial in Chinese has the same blocks,
which ``tests/unit/test_documents.py`` compares.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).resolve().parents[2]
TUTORIAL = REPO_ROOT / "examples" / "qwen_ppo_tutorial" / "README.md"

NOT_RUN = {
    "A real language model": "downloads 93 MB and takes a quarter of an hour: scripts/quickstart.sh runs it",
    "On real input": "needs Qwen2's tokenizer and CValues, whose place the reader fills in",
    "On Ascend": "needs 7B weights and NPUs",
}
"""Sections whose commands are compared with the scripts' flags only."""

ALONE = "ppo_one_stage.py --use_parallel False"

SECONDS = 300.0
"""Limit of one block: ten times what the slowest takes on a quiet machine with 2 cores."""


@dataclass(frozen=True)
class Block:
    """The bash block number ``number`` of a section."""

    section: str
    number: int
    text: str

    @property
    def name(self) -> str:
        return f"{self.section} {self.number}"


def bash_blocks() -> Iterator[Block]:
    """All bash blocks with the heading they stand under."""
    section, number = "", 0
    pieces = re.split(r"^```(\w*)\n(.*?)^```$", TUTORIAL.read_text(encoding="utf-8"), flags=re.M | re.S)
    for prose, language, content in zip(pieces[::3], [*pieces[1::3], ""], [*pieces[2::3], ""], strict=True):
        if headings := re.findall(r"^#+ (.*)$", prose, re.M):
            section, number = headings[-1], 0
        if language == "bash":
            number += 1
            yield Block(section, number, content)


BLOCKS = [block for block in bash_blocks() if block.section not in NOT_RUN]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What a reader has: the repository's files and its environment, and nothing in ``runs``."""
    directory = tmp_path_factory.mktemp("tutorial")
    for name in ("examples", "model_configs", "scripts"):
        (directory / name).symlink_to(REPO_ROOT / name)
    (directory / ".venv").symlink_to(sys.prefix)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_sections_that_are_not_run_exist() -> None:
    assert {block.section for block in bash_blocks()} >= NOT_RUN.keys()
    assert len(BLOCKS) > 12
    assert sum(ALONE in block.text for block in BLOCKS) > 2


@pytest.mark.msrun
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_command(block: Block, reader: Path) -> None:
    earlier = reader / "failed"
    if earlier.exists():
        pytest.fail(f"not tried: {earlier.read_text()} failed before it", pytrace=False)
    text = block.text.replace("--master_port=9123", f"--master_port={free_port()}")
    text = text.replace(ALONE, f"{ALONE} --enable_compile_cache True")
    text = text.replace("source .venv/bin/activate\n", "")  # PATH below does what it does
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=reader,
        env=os.environ
        | {
            "PATH": f"{reader}/.venv/bin{os.pathsep}{os.environ['PATH']}",
            "MS_COMPILER_CACHE_PATH": f"{reader}/graphs",
        },
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    if done.returncode:
        earlier.write_text(block.name)
        logs = "\n".join(log.read_text(errors="replace")[-2000:] for log in reader.rglob("worker_*.log"))
        pytest.fail(f"{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}\n{logs}", pytrace=False)
