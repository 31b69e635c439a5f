"""rlhf_data.py and make_demo_inputs.py as commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mindrlhf.data.prompts import PromptStream


def run(repo_root: Path, script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repo_root / script), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={"PYTHONPATH": str(repo_root)}, check=False
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Path:
    output = tmp_path_factory.mktemp("demo")
    done = run(repo_root, "scripts/make_demo_inputs.py", "--output_dir", output, "--rows", "30")
    assert done.returncode == 0, done.stderr
    return output


def test_demo_to_mindrecord(repo_root: Path, demo: Path, tmp_path: Path) -> None:
    output = tmp_path / "demo.mindrecord"
    arguments = ["--file_path", demo / "cvalues_demo.jsonl", "--output_path", output]
    arguments += ["--vocab_path", demo / "tokenizer/vocab.json"]
    arguments += ["--merges_file_path", demo / "tokenizer/merges.txt"]
    arguments += ["--max_prompt_length", "32", "--seq_length", "128"]
    done = run(repo_root, "examples/qwen_ppo_tutorial/rlhf_data.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "rows written         30\n" in done.stdout
    assert "prompts dropped      0 " in done.stdout
    assert str(output) in done.stdout
    stream = PromptStream(
        output, batch_size=8, max_prompt_length=32, pad_token_id=1021, seed=0, vocab_size=1024
    )
    assert len(stream) == 30
    assert (stream.next_batch().prompt_lengths > 19).all()

    # an existing output is an error of the user: one message, exit code 2, no traceback
    before = output.read_bytes()
    again = run(repo_root, "examples/qwen_ppo_tutorial/rlhf_data.py", *arguments)
    assert again.returncode == 2
    assert again.stderr.startswith("error: ")
    assert "--overwrite" in again.stderr
    assert "Traceback" not in again.stderr
    assert output.read_bytes() == before


def test_prompts_are_held_out(repo_root: Path, demo: Path, tmp_path: Path) -> None:
    paths = [tmp_path / "train.mindrecord", tmp_path / "held_out.mindrecord"]
    arguments = ["--file_path", demo / "cvalues_demo.jsonl", "--tokenizer_path", demo / "tokenizer"]
    arguments += ["--output_path", paths[0], "--eval_output_path", paths[1], "--eval_fraction", "0.3"]
    arguments += ["--max_prompt_length", "32", "--seq_length", "128"]
    done = run(repo_root, "examples/qwen_ppo_tutorial/rlhf_data.py", *arguments)
    assert done.returncode == 0, done.stderr
    rows = [
        len(PromptStream(path, batch_size=1, max_prompt_length=32, pad_token_id=1021, seed=0))
        for path in paths
    ]
    assert sum(rows) == 30
    assert f"rows written         {rows[0]}\nrows held out        {rows[1]}\n" in done.stdout
    assert f"held-out file        {paths[1]}\n" in done.stdout
