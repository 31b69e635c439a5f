"""A part of the fuzzing that ``scripts/soak/fuzz.py`` does at length: the same cases in every run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

CASES = 450


def run(repo_root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(repo_root / "scripts/soak/fuzz.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": str(repo_root), "MINDRLHF_LOG": "ERROR", "GLOG_v": "3"},
        check=False,
    )


def test_damaged_files_end_in_a_clean_error_or_a_correct_result(repo_root: Path) -> None:
    done = run(repo_root, "--cases", str(CASES), "--seed", "7")
    assert done.returncode == 0, done.stdout + done.stderr
    counts = dict(re.findall(r"^(\w+: [a-z ]+?) +(\d+)$", done.stdout, re.MULTILINE))
    targets = {"yaml", "jsonl", "safetensors", "ckpt", "index", "config", "manifest", "strategy", "tokenizer"}
    assert {name.split(":")[0] for name in counts} == targets
    assert sum(map(int, counts.values())) == CASES
    for target in targets:  # a reader that refuses or takes everything would prove nothing
        assert f"{target}: clean error" in counts
        assert f"{target}: correct result" in counts


def test_a_defect_is_found_and_its_case_comes_again(repo_root: Path, tmp_path: Path) -> None:
    """A reader that lets an exception of its own out, one that hangs, and one that eats memory."""
    spoilt = tmp_path / "sitecustomize.py"
    spoilt.write_text(
        "import importlib.abc, sys, time\n"
        "import mindrlhf.data.jsonl as jsonl, mindrlhf.checkpoint.manifest as manifest\n"
        "import mindrlhf.checkpoint.weight_files as opening\n"
        "def parse(self, line, number): raise KeyError('mine')\n"
        "def hang(directory): time.sleep(60)\n"
        "def eat(path): return bytearray(1 << 30)\n"
        "jsonl.CValuesReader._parse = parse\n"
        "manifest.read_manifest = hang\n"
        "opening._OPENERS['.ckpt'] = eat\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, str(repo_root / "scripts/soak/fuzz.py"), "--cases", "9", "--seconds", "0.5"],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": f"{tmp_path}:{repo_root}", "MINDRLHF_LOG": "ERROR", "GLOG_v": "3"},
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    found = re.findall(r"^DEFECT --seed 1 --only (\d+)  (\w+): (\w+)", done.stdout, re.MULTILINE)
    assert {(target, kind) for _, target, kind in found} == {
        ("jsonl", "KeyError"),
        ("manifest", "_Hang"),
        ("ckpt", "MemoryError"),
    }
