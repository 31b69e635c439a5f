"""rlhf_data.py: its report, its held-out file, and its one message when the output exists."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mindrlhf.cli.data import main
from mindrlhf.data.prompts import PromptData


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"prompt": f"How do I {n}?", "pos_resp": "Slowly.", "neg_resp": "No."} for n in range(30)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def rows(path: Path) -> int:
    data = PromptData(path, max_prompt_length=32, pad_token_id=1021, vocab_size=1024)
    batch = data.read(np.arange(len(data)))
    assert (batch.prompt_lengths > 19).all()
    return len(data)


def test_as_a_program(repo_root: Path, demo_tokenizer_dir: Path, jsonl: Path, tmp_path: Path) -> None:
    """Then again: an existing output is an error of the user: one message, exit code 2, no traceback."""
    output = tmp_path / "demo.mindrecord"
    command = [sys.executable, str(repo_root / "examples/qwen_ppo_tutorial/rlhf_data.py")]
    command += ["--file_path", str(jsonl), "--output_path", str(output)]
    command += ["--vocab_path", f"{demo_tokenizer_dir}/vocab.json"]
    command += ["--merges_file_path", f"{demo_tokenizer_dir}/merges.txt"]
    command += ["--max_prompt_length", "32", "--seq_length", "128"]
    first, again = (
        subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=120,
            env={"PYTHONPATH": str(repo_root)},
            check=False,
        )
        for _ in range(2)
    )
    assert first.returncode == 0, first.stderr
    assert "rows written         30\n" in first.stdout
    assert "prompts dropped      0 " in first.stdout
    assert str(output) in first.stdout
    assert rows(output) == 30
    assert again.returncode == 2
    assert again.stderr.startswith("error: ")
    assert "--overwrite" in again.stderr
    assert "Traceback" not in again.stderr


def test_prompts_are_held_out(
    demo_tokenizer_dir: Path, jsonl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, held_out = tmp_path / "train.mindrecord", tmp_path / "held_out.mindrecord"
    flags = ["--file_path", str(jsonl), "--tokenizer_path", str(demo_tokenizer_dir)]
    flags += ["--output_path", str(train), "--eval_output_path", str(held_out), "--eval_fraction", "0.3"]
    assert main([*flags, "--max_prompt_length", "32", "--seq_length", "128"]) == 0
    counts = rows(train), rows(held_out)
    assert sum(counts) == 30
    report = capsys.readouterr().out
    assert f"rows written         {counts[0]}\nrows held out        {counts[1]}\n" in report
    assert f"held-out file        {held_out}\n" in report
