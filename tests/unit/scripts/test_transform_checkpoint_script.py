"""scripts/transform_checkpoint.py on the repository's own tiny YAMLs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from mindrlhf.checkpoint.shards import load_shard
from mindrlhf.checkpoint.sources import ArraySource
from mindrlhf.checkpoint.weight_files import write_weights
from mindrlhf.configs.load import load_run_config
from mindrlhf.models.qwen2.layouts import parameter_layouts
from mindrlhf.parallel.layout import Mesh, mesh_of
from mindrlhf.utils.errors import CheckpointError


@pytest.fixture(scope="module")
def script(import_script: Callable[[str], ModuleType]) -> ModuleType:
    return import_script("transform_checkpoint")


@pytest.fixture(scope="module")
def yamls(repo_root) -> tuple[Path, Path]:
    folder = repo_root / "model_configs" / "qwen_ppo"
    return folder / "generate_qwen2_tiny.yaml", folder / "finetune_qwen2_tiny.yaml"


@pytest.fixture
def full(tmp_path, yamls) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    layouts = parameter_layouts(load_run_config(yamls[0]).model, Mesh())
    arrays = {name: rng.normal(size=layout.shape).astype(np.float16) for name, layout in layouts.items()}
    write_weights(tmp_path / "full.ckpt", ArraySource(arrays))
    return arrays


def assert_ranks_hold(directory: Path, yaml: Path, full: dict[str, np.ndarray]) -> None:
    run = load_run_config(yaml)
    mesh = mesh_of(run)
    ranks = [f"rank_{rank}" for rank in range(mesh.size)]
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", *ranks]
    layouts = parameter_layouts(run.model, mesh)
    for rank in range(mesh.size):
        for name, array in load_shard(directory, layouts, rank).items():
            assert array.tobytes() == layouts[name].take(full[name], rank).tobytes()


def test_full_to_infer_to_train_to_full_is_bit_equal(script, tmp_path, yamls, full, capsys):
    infer, train = (str(yaml) for yaml in yamls)
    assert load_run_config(infer).parallel != load_run_config(train).parallel
    at = {name: str(tmp_path / name) for name in ("full.ckpt", "infer", "train", "again.safetensors")}
    script.main(["--input", at["full.ckpt"], "--output", at["infer"], "--output_config", infer])
    assert_ranks_hold(tmp_path / "infer", yamls[0], full)
    both = ["--input_config", infer, "--output_config", train, "--format", "safetensors"]
    script.main(["--input", at["infer"], "--output", at["train"], *both])
    assert_ranks_hold(tmp_path / "train", yamls[1], full)
    script.main(["--input", at["train"], "--output", at["again.safetensors"]])
    whole = parameter_layouts(load_run_config(train).model, Mesh())
    again = load_shard(tmp_path / "again.safetensors", whole, 0)
    assert all(array.tobytes() == full[name].tobytes() for name, array in again.items())
    assert f"4 file(s), 0.00 GB -> {at['train']}" in capsys.readouterr().out


def test_mindspore_transforms_our_ranks_to_the_same_file(tmp_path, yamls, full, script, monkeypatch):
    """MindSpore's own transform_checkpoints, with a strategy file, puts our rank files together again."""
    strategy = pytest.importorskip("mindrlhf.parallel.strategy")
    import mindspore as ms

    monkeypatch.chdir(tmp_path)
    run = load_run_config(yamls[1])
    layouts = parameter_layouts(run.model, mesh_of(run))
    strategy.write_strategy(layouts, tmp_path / "strategy.ckpt")
    paths = ["--input", str(tmp_path / "full.ckpt"), "--output", str(tmp_path / "train")]
    script.main([*paths, "--output_config", str(yamls[1])])
    ms.transform_checkpoints(
        str(tmp_path / "train"), str(tmp_path / "ms"), "whole_", str(tmp_path / "strategy.ckpt"), None
    )
    whole = ms.load_checkpoint(str(tmp_path / "ms" / "rank_0" / "whole_0.ckpt"))
    assert set(whole) == set(full)
    assert all(np.array_equal(whole[name].asnumpy(), array) for name, array in full.items())


def test_mistakes_are_one_clear_error(script, tmp_path, yamls, full, repo_root):
    """Others are in tests/bad_input/rows_weights.py."""
    file, out, infer = str(tmp_path / "full.ckpt"), str(tmp_path / "out"), str(yamls[0])
    other = str(repo_root / "model_configs" / "qwen_ppo" / "finetune_qwen2_0_5b.yaml")
    with pytest.raises(CheckpointError, match=r"does not fit .*0_5b\.yaml, 291 fault"):
        script.main(["--input", file, "--output", out, "--output_config", other])
    assert not (tmp_path / "out").exists()
    script.main(["--input", file, "--output", out, "--output_config", infer])
    with pytest.raises(CheckpointError, match=r"out/config\.json and .*describe different models"):
        script.main(["--input", out, "--output", str(tmp_path / "o.ckpt"), "--input_config", other])
    with pytest.raises(CheckpointError, match=r"must end with \.ckpt or \.safetensors"):
        script.main(["--input", out, "--output", str(tmp_path / "again"), "--input_config", infer])
    script.main(["--input", file, "--output", out, "--output_config", infer, "--overwrite"])
