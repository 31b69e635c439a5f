"""Every form of weights a person may name is found, merged, and gives the same tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from mindrlhf.chat.saved_model import SavedModel, find_model
from mindrlhf.checkpoint.shards import save_shard
from mindrlhf.checkpoint.sources import ArraySource
from mindrlhf.checkpoint.weight_files import write_weights
from mindrlhf.models.qwen2.layouts import parameter_layouts
from mindrlhf.models.score_head import SCORE_HEAD_BIAS, SCORE_HEAD_WEIGHT
from mindrlhf.parallel.layout import Mesh
from mindrlhf.utils.errors import CheckpointError, DataError
from mindrlhf.utils.provenance import plain

HEAD = {SCORE_HEAD_WEIGHT: np.ones((1, 32), np.float32), SCORE_HEAD_BIAS: np.ones(1, np.float32)}


@pytest.fixture(scope="module")
def made(tiny: Callable[..., SimpleNamespace]) -> SimpleNamespace:
    return tiny(1, tie_word_embeddings=False)


@pytest.fixture
def write_yaml(repo_root: Path, made: SimpleNamespace, tmp_path: Path) -> Callable[[int, int], Path]:
    """A generate YAML of the tiny model for a layout."""

    def write(dp: int, mp: int) -> Path:
        source = repo_root / "model_configs" / "qwen_ppo" / "generate_qwen2_tiny.yaml"
        content = yaml.safe_load(source.read_text(encoding="utf-8"))
        section = content["model"]["model_config"]
        section.update({key: v for key, v in plain(made.model).items() if key in section})
        content["parallel_config"].update(data_parallel=dp, model_parallel=mp)
        path = tmp_path / f"generate_dp{dp}mp{mp}.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path

    return write


def write_ranks(directory: Path, made: SimpleNamespace, mesh: Mesh, *, value_head: bool = False) -> Path:
    layouts = parameter_layouts(made.model, mesh, score_head=value_head)
    full = {**made.arrays, **HEAD}
    for rank in range(mesh.size):
        save_shard(directory, rank, {name: layout.take(full[name], rank) for name, layout in layouts.items()})
    return directory


def assert_whole(found: SavedModel, made: SimpleNamespace) -> None:
    """Tensors over any mesh are the parts of what was written, and no head is among them."""
    for mesh in (Mesh(1, 1), Mesh(1, 2)):
        layouts = parameter_layouts(made.model, mesh)
        for rank in range(mesh.size):
            shards = dict(found.shards(mesh, rank))
            assert list(shards) == list(layouts)
            for name, layout in layouts.items():
                np.testing.assert_array_equal(shards[name], layout.take(made.arrays[name], rank), name)


def test_a_hugging_face_directory_needs_nothing_else(made: SimpleNamespace) -> None:
    found = find_model(made.hf)
    assert found.sizes.model == made.model
    assert found.tokenizer.size == 1024
    assert found.sizes.context.device_target == "CPU"
    assert_whole(found, made)


def test_a_full_file_needs_sizes_and_tokenizer(
    made: SimpleNamespace, write_yaml: Callable[[int, int], Path], tokenizer_dir: Path
) -> None:
    with pytest.raises(CheckpointError, match="does not say the model's sizes: give --config"):
        find_model(made.full)
    with pytest.raises(DataError, match="brings no tokenizer: give --tokenizer_path"):
        find_model(made.full, config=made.hf)
    for config in (made.hf, made.hf / "config.json", write_yaml(1, 1)):
        assert_whole(find_model(made.full, config=config, tokenizer_path=tokenizer_dir), made)


@pytest.mark.parametrize("mesh", [Mesh(1, 2), Mesh(2, 2)])
def test_rank_directories_are_merged_as_their_yaml_split_them(
    made: SimpleNamespace,
    write_yaml: Callable[[int, int], Path],
    tokenizer_dir: Path,
    tmp_path: Path,
    mesh: Mesh,
) -> None:
    ranks = write_ranks(tmp_path / "ranks", made, mesh)
    found = find_model(ranks, config=write_yaml(mesh.dp, mesh.mp), tokenizer_path=tokenizer_dir)
    assert_whole(found, made)
    other = find_model(ranks, config=write_yaml(1, 1), tokenizer_path=tokenizer_dir)
    with pytest.raises(CheckpointError):
        list(other.shards(Mesh(), 0))


def record(checkpoint: Path, made: SimpleNamespace, mesh: Mesh) -> None:
    """What a PPO run writes into a checkpoint, as far as it matters here."""
    train: dict[str, Any] = {
        "model": plain(made.model) | {"matmul_dtype": "bfloat16"},  # of the job, no part of the model
        "parallel": {"data_parallel": mesh.dp, "model_parallel": mesh.mp},
        "context": {"device_target": "CPU"},
    }
    (checkpoint / "config.json").write_text(json.dumps({"configuration": {"train": train}}))


@pytest.mark.parametrize("name", ["iteration_000012", ""])
def test_a_run_is_its_last_policy_without_the_value_head(
    made: SimpleNamespace, tokenizer_dir: Path, tmp_path: Path, name: str
) -> None:
    """Sizes and split are those that the checkpoint recorded."""
    mesh = Mesh(2, 2)
    write_ranks(tmp_path / "iteration_000012" / "policy", made, mesh, value_head=True)
    (tmp_path / "iteration_000002" / "policy").mkdir(parents=True)
    (tmp_path / "iteration_000012" / "critic").mkdir()
    with pytest.raises(CheckpointError, match="--config"):
        find_model(tmp_path / name, tokenizer_path=tokenizer_dir)
    record(tmp_path / "iteration_000012", made, mesh)
    found = find_model(tmp_path / name, tokenizer_path=tokenizer_dir)
    assert found.weights == tmp_path / "iteration_000012" / "policy"
    assert found.sizes.model == made.model
    assert_whole(found, made)


def test_the_last_weights_of_the_first_stage_are_found(
    made: SimpleNamespace, write_yaml: Callable[[int, int], Path], tokenizer_dir: Path, tmp_path: Path
) -> None:
    write_ranks(tmp_path / "final", made, Mesh(1, 1))
    found = find_model(tmp_path, config=write_yaml(1, 1), tokenizer_path=tokenizer_dir)
    assert_whole(found, made)


def test_the_second_checkpoint_may_lean_on_the_first(made: SimpleNamespace) -> None:
    first = find_model(made.hf)
    second = find_model(made.full, fallback=first)
    assert second.tokenizer is first.tokenizer
    assert_whole(second, made)


def test_a_reward_model_is_refused(made: SimpleNamespace, tokenizer_dir: Path, tmp_path: Path) -> None:
    arrays = {name: array for name, array in {**made.arrays, **HEAD}.items() if name != "lm_head.weight"}
    write_weights(tmp_path / "reward.ckpt", ArraySource(arrays))
    found = find_model(tmp_path / "reward.ckpt", config=made.hf, tokenizer_path=tokenizer_dir)
    with pytest.raises(CheckpointError, match="reward model or a critic, which cannot generate text"):
        list(found.shards(Mesh(), 0))


def test_what_does_not_fit_is_refused(
    made: SimpleNamespace, tokenizer_dir: Path, tmp_path: Path, tiny: Callable[..., SimpleNamespace]
) -> None:
    with pytest.raises(CheckpointError, match="gone does not exist"):
        find_model(tmp_path / "gone")
    small = tiny(2, vocab_size=512)
    with pytest.raises(DataError, match="1024 tokens, more than the vocab_size 512"):
        find_model(small.full, config=small.hf, tokenizer_path=tokenizer_dir)
    wide = find_model(made.full, config=tiny(3, intermediate_size=64).hf, tokenizer_path=tokenizer_dir)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        list(wide.shards(Mesh(), 0))
