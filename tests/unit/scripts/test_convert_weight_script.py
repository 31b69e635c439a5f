"""examples/qwen_ppo_tutorial/convert_weight.py: its two spellings and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mindrlhf.checkpoint.hf_config import hf_config_from_model
from mindrlhf.checkpoint.sources import ArraySource
from mindrlhf.checkpoint.weight_files import open_weights, write_weights
from mindrlhf.cli.convert import main
from mindrlhf.configs.keys import ModelConfig
from mindrlhf.models.qwen2.layouts import parameter_layouts
from mindrlhf.models.qwen2.weight_names import canonical_to_hf
from mindrlhf.parallel.layout import Mesh
from mindrlhf.utils.errors import MindRLHFError

MODEL = ModelConfig(
    vocab_size=16, hidden_size=8, num_layers=1, num_heads=2, n_kv_heads=1, intermediate_size=12
)


@pytest.fixture(scope="module")
def script_path(repo_root) -> Path:
    return repo_root / "examples" / "qwen_ppo_tutorial" / "convert_weight.py"


@pytest.fixture
def hf_dir(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    names = canonical_to_hf(1)
    arrays = {
        names[name]: rng.normal(size=layout.shape).astype(np.float32)
        for name, layout in parameter_layouts(MODEL, Mesh()).items()
    }
    directory = tmp_path / "hf"
    write_weights(directory / "model.safetensors", ArraySource(arrays))
    (directory / "config.json").write_text(json.dumps(hf_config_from_model(MODEL)))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    return directory


FORWARD = [
    "--torch_ckpt_dir HF --mindspore_ckpt_path FILE --dtype bf16",
    "--model qwen2 --input_path HF --output_path FILE --dtype bfloat16",
    "--model qwen2 --torch_ckpt_dir HF --output_path FILE --dtype bf16 --reversed False",
    "--torch_ckpt_dir HF --input_path HF --mindspore_ckpt_path FILE --dtype bf16",
]
BACK = [
    "--reversed --mindspore_ckpt_path FILE --torch_ckpt_dir BACK --config HF",
    "--reversed --input_path FILE --output_path BACK --config HF/config.json --tokenizer_dir HF",
    "--reversed True --model qwen2 --mindspore_ckpt_path FILE --output_path BACK --tokenizer_dir HF",
]


@pytest.mark.parametrize(("forward", "back"), list(zip(FORWARD, [*BACK, BACK[0]], strict=True)))
def test_both_spellings_both_ways(hf_dir, tmp_path, capsys, forward, back):
    file = tmp_path / "out" / "m.ckpt"

    def words(line: str) -> list[str]:
        line = line.replace("BACK", str(tmp_path / "back")).replace("FILE", str(file))
        return line.replace("HF", str(hf_dir)).split()

    main(words(forward))
    assert capsys.readouterr().out.startswith("15 tensors, 776 parameters")
    with open_weights(file) as source:
        assert {info.dtype.name for info in source.tensors.values()} == {"bfloat16"}
    main([*words(back), "--dtype", "fp32", "--max_shard_size", "1KB"])
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 1
    assert (tmp_path / "back" / "merges.txt").exists()
    with pytest.raises(MindRLHFError, match="--overwrite"):
        main(words(forward))
    main([*words(forward), "--overwrite"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--torch_ckpt_dir a --dtype bf16", "--mindspore_ckpt_path and --output_path are both missing"),
        ("--model llama --input_path a --output_path b", "invalid choice: 'llama'"),
        ("--input a --output_path b", "unrecognized arguments: --input"),
    ],
)
def test_bad_flags_exit_with_2(capsys, line, message):
    with pytest.raises(SystemExit) as exit_info:
        main(line.split())
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_config_is_only_for_the_way_back(hf_dir, tmp_path):
    line = f"--input_path {hf_dir} --output_path {tmp_path}/m.ckpt --config {hf_dir}"
    with pytest.raises(MindRLHFError, match="need --reversed"):
        main(line.split())


def test_as_a_program_it_needs_neither_mindspore_nor_mindformers(script_path, repo_root, hf_dir, tmp_path):
    """Exit code 0 and one line; then 2 and one message. Blocked imports would be a traceback and 1."""
    code = (
        "import runpy, sys; sys.modules.update(mindspore=None, mindformers=None, torch=None);"
        f"sys.argv[0] = {str(script_path)!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, "--torch_ckpt_dir", str(hf_dir), "--mindspore_ckpt_path", "m.ckpt"]
    environment = {**os.environ, "PYTHONPATH": str(repo_root)}
    runs = [
        subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        for _ in range(2)
    ]
    assert runs[0].returncode == 0, runs[0].stderr
    assert "15 tensors" in runs[0].stdout
    assert runs[1].returncode == 2
    assert runs[1].stderr.strip() == (
        "error: output m.ckpt: exists; give another path, or --overwrite to replace it"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "m.ckpt"]
