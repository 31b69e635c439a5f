"""Every form of weights a person may name is found, merged, and gives the same tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from mindrlhf.chat.saved_model import SavedModel, find_model
from mindrlhf.checkpoint.hf_config import hf_config_from_model
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
def test_rank_directories_are_merged_whatever_the_yaml_splits(
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
    assert_whole(other, made)


def record(directory: Path, made: SimpleNamespace, architecture: str = "Qwen2ForCausalLM") -> None:
    """What our programs write beside rank directories."""
    config = hf_config_from_model(made.model) | {"architectures": [architecture]}
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["iteration_000012", ""])
def test_a_run_is_its_last_policy_without_the_value_head(
    made: SimpleNamespace, tokenizer_dir: Path, tmp_path: Path, name: str
) -> None:
    """Sizes are those that the checkpoint recorded; the split is seen."""
    policy = tmp_path / "iteration_000012" / "policy"
    write_ranks(policy, made, Mesh(2, 2), value_head=True)
    (tmp_path / "iteration_000002" / "policy").mkdir(parents=True)
    (tmp_path / "iteration_000012" / "critic").mkdir()
    for other in ("iteration_3", "iteration_000012_backup"):
        (tmp_path / other / "policy" / "rank_0").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="--config"):
        find_model(tmp_path / name, tokenizer_path=tokenizer_dir)
    record(policy, made)
    found = find_model(tmp_path / name, tokenizer_path=tokenizer_dir)
    assert found.weights == policy
    assert found.sizes.model == made.model
    assert_whole(found, made)


def test_the_results_of_sft_are_their_last_weights(
    made: SimpleNamespace, tokenizer_dir: Path, tmp_path: Path
) -> None:
    for place in ("step_000008/policy", "final"):  # the second appears when the run has finished
        write_ranks(tmp_path / place, made, Mesh(1, 2))
        record(tmp_path / place, made)
        found = find_model(tmp_path, tokenizer_path=tokenizer_dir)
        assert found.weights == tmp_path / place
        assert_whole(found, made)


@pytest.mark.parametrize("place", ["step_000008/reward", "final"])
def test_the_results_of_a_reward_model_are_refused(
    made: SimpleNamespace, tokenizer_dir: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / place / "rank_0").mkdir(parents=True)
    record(tmp_path / place, made, "Qwen2ForSequenceClassification")
    with pytest.raises(CheckpointError, match=f"{place} holds a reward model or a critic, which cannot"):
        find_model(tmp_path, tokenizer_path=tokenizer_dir)


def test_the_second_checkpoint_may_lean_on_the_first(made: SimpleNamespace) -> None:
    first = find_model(made.hf)
    second = find_model(made.full, fallback=first)
    assert second.tokenizer is first.tokenizer
    assert_whole(second, made)


def test_a_reward_model_is_refused(made: SimpleNamespace, tokenizer_dir: Path, tmp_path: Path) -> None:
    arrays = {name: array for name, array in {**made.arrays, **HEAD}.items() if name != "lm_head.weight"}
    write_weights(tmp_path / "reward.ckpt", ArraySource(arrays))
    found = find_model(tmp_path / "reward.ckpt", config=made.hf, tokenizer_path=tokenizer_dir)
    with pytest.raises(CheckpointError, match=r"reward\.ckpt holds a reward model or a critic"):
        list(found.shards(Mesh(), 0))


def test_what_does_not_fit_is_refused(
    made: SimpleNamespace, tokenizer_dir: Path, tmp_path: Path, tiny: Callable[..., SimpleNamespace]
) -> None:
    with pytest.raises(CheckpointError, match="gone does not exist"):
        find_model(tmp_path / "gone")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds a LoRA adapter .*merge_and_unload\(\)"):
        find_model(tmp_path)
    small = tiny(2, vocab_size=512)
    with pytest.raises(DataError, match="1024 tokens, more than the vocab_size 512"):
        find_model(small.full, config=small.hf, tokenizer_path=tokenizer_dir)
    wide = find_model(made.full, config=tiny(3, intermediate_size=64).hf, tokenizer_path=tokenizer_dir)
    with pytest.raises(CheckpointError, match=r"hidden size 32\) does not fit .*/hf, 4 fault"):
        list(wide.shards(Mesh(), 0))
