"""Rank directories: loading, saving, splitting, merging."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mindrlhf.checkpoint import sources as sources_module
from mindrlhf.checkpoint.conversion import export_hf, hf_to_mindspore, mindspore_to_hf
from mindrlhf.checkpoint.hf_config import model_config_from_hf
from mindrlhf.checkpoint.shards import (
    find_weights,
    load_shard,
    merge_shards,
    open_full,
    save_shard,
    split_to_ranks,
)
from mindrlhf.checkpoint.sources import FileSource
from mindrlhf.checkpoint.weight_files import open_weights
from mindrlhf.models.qwen2.layouts import parameter_layouts
from mindrlhf.models.qwen2.weight_names import hf_to_canonical
from mindrlhf.models.score_head import SCORE_HEAD
from mindrlhf.parallel.layout import AxisName, Layout, Mesh
from mindrlhf.utils.errors import CheckpointError, MindRLHFError

# Sizes that four ranks can split.
SIZES = {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.fixture
def model(hf):
    return model_config_from_hf({**hf.config, **SIZES}, "test")


@pytest.fixture
def full(tmp_path, hf, model):
    """The canonical arrays, which also lie in ``tmp_path/hf`` and ``tmp_path/full.ckpt``."""
    weights = hf.make(tmp_path / "hf", **SIZES)
    hf_to_mindspore(tmp_path / "hf", tmp_path / "full.ckpt")
    names = hf_to_canonical(2)
    return {names[name]: array for name, array in weights.items()}


def save_all(directory, full, layouts, ranks=None):
    mesh = next(iter(layouts.values())).mesh
    for rank in range(mesh.size) if ranks is None else ranks:
        save_shard(directory, rank, {name: layouts[name].take(full[name], rank) for name in layouts})


def test_a_run_stands_for_its_last_weights_and_a_checkpoint_for_its_model(tmp_path):
    def make(place):
        (tmp_path / place / "rank_0").mkdir(parents=True)
        return tmp_path / place

    for number in ("3", "000002_backup", "999999", "1000000"):
        policy = make(f"iteration_{number}/policy")
    assert find_weights(tmp_path) == find_weights(policy.parent) == find_weights(policy) == policy
    critic = make("iteration_1000000/critic")
    assert [find_weights(tmp_path, name) for name in ("policy", "critic")] == [policy, critic]
    for wanted in (None, "reward"):
        with pytest.raises(CheckpointError, match=f"holds several models: name {policy} or {critic}"):
            find_weights(tmp_path, wanted)
    assert find_weights(tmp_path / "none") == tmp_path / "none"
    assert find_weights(make("final").parent) == tmp_path / "final"


def test_every_program_takes_a_run_and_its_record_is_no_model(tmp_path, full, model):
    run = tmp_path / "run"
    save_all(run / "step_000004" / "policy", full, parameter_layouts(model, Mesh(1, 2)))
    record = {"created": "now", "versions": {}, "configuration": {}}
    for place in (run, run / "step_000004"):
        (place / "config.json").write_text(json.dumps(record))
    for number, place in enumerate((run, run / "step_000004")):
        mindspore_to_hf(place, tmp_path / f"back{number}", config=tmp_path / "hf")
        back, _ = open_full(tmp_path / f"back{number}", model)
        with back:
            assert all(np.array_equal(back.read(name), array) for name, array in full.items())
    with pytest.raises(CheckpointError, match=r"run/config\.json is the record of a run, not a model's"):
        mindspore_to_hf(run, tmp_path / "back", config=run)


@pytest.mark.parametrize("mesh", [Mesh(1, 1), Mesh(2, 2), Mesh(1, 4), Mesh(4, 1)], ids=str)
def test_every_form_loads_alike(tmp_path, full, model, mesh):
    layouts = parameter_layouts(model, mesh)
    hf_to_mindspore(tmp_path / "hf", tmp_path / "full.safetensors")
    save_all(tmp_path / "ranks", full, layouts)
    save_all(tmp_path / "slices", full, layouts, ranks=range(mesh.mp))  # data parallelism not counted
    for rank in range(mesh.size):
        for form in ("full.ckpt", "full.safetensors", "hf", "ranks", "slices"):
            loaded = load_shard(tmp_path / form, layouts, rank)
            assert list(loaded) == list(layouts)
            for name, array in loaded.items():
                assert array.dtype == np.float32
                assert np.array_equal(array, layouts[name].take(full[name], rank)), (form, rank, name)


def test_casting_and_bfloat16(tmp_path, full, model):
    from mindspore.common.np_dtype import bfloat16

    layouts = parameter_layouts(model, Mesh(1, 2))
    narrow = load_shard(tmp_path / "full.ckpt", layouts, 1, dtype=np.dtype(bfloat16))
    for name, array in narrow.items():
        assert array.dtype == bfloat16
        assert np.array_equal(array, layouts[name].take(full[name], 1).astype(bfloat16))
    save_shard(
        tmp_path / "ranks", 0, load_shard(tmp_path / "full.ckpt", layouts, 0, dtype=np.dtype(bfloat16))
    )
    save_shard(tmp_path / "ranks", 1, narrow)
    kept = load_shard(tmp_path / "ranks", layouts, 1)
    wide = load_shard(tmp_path / "ranks", layouts, 1, dtype=np.dtype(np.float32))
    for name, array in kept.items():
        assert array.dtype == bfloat16
        assert array.tobytes() == narrow[name].tobytes()
        assert np.array_equal(wide[name], narrow[name].astype(np.float32))


def test_overflow_when_loading(tmp_path, full, model):
    full["model.norm_out.weight"][0] = 1e6
    save_shard(tmp_path / "ranks", 0, full)
    layouts = parameter_layouts(model, Mesh())
    with pytest.raises(CheckpointError, match=r"model\.norm_out\.weight: float32 -> float16"):
        load_shard(tmp_path / "ranks", layouts, 0, dtype=np.dtype(np.float16))


def test_a_saved_shard_is_where_it_should_be(tmp_path):
    path = save_shard(tmp_path, 3, {"w": np.ones(2, np.float32)})
    assert path == tmp_path / "rank_3" / "checkpoint_3.ckpt"
    import mindspore as ms

    assert ms.load_checkpoint(str(path))["w"].asnumpy().tolist() == [1.0, 1.0]
    assert save_shard(tmp_path, 0, {}, prefix="step_10_").name == "step_10_0.ckpt"


def test_an_optimizers_tensors_load_too(tmp_path):
    mesh = Mesh(1, 2)
    states = {"step": np.array(7, np.int32), "adam_m.model.norm_out.weight": np.ones(4, np.float32)}
    layouts = {"step": Layout(mesh, (), ()), "adam_m.model.norm_out.weight": Layout(mesh, (8,), ("mp",))}
    for rank in range(2):
        save_shard(tmp_path, rank, states)
    loaded = load_shard(tmp_path, layouts, 1, stored=mesh)
    assert loaded["step"].dtype == np.int32
    assert loaded["step"].shape == ()
    assert int(loaded["step"]) == 7
    assert loaded["adam_m.model.norm_out.weight"].tolist() == [1.0] * 4


# --- strictness ---


def test_new_heads_must_be_named(tmp_path, full, model):
    layouts = parameter_layouts(model, Mesh(1, 2), score_head=True)
    with pytest.raises(
        CheckpointError, match=r"2 fault\(s\)(?s:.*)score_head.weight \(1, 32\).*\n.*score_head.bias"
    ):
        load_shard(tmp_path / "full.ckpt", layouts, 0)
    loaded = load_shard(tmp_path / "full.ckpt", layouts, 0, new=SCORE_HEAD)
    assert set(loaded) == set(layouts) - set(SCORE_HEAD)


def test_unused_tensors_must_be_named(tmp_path, full, model):
    layouts = parameter_layouts(model, Mesh(1, 2), lm_head=False)
    with pytest.raises(CheckpointError, match=r"not in the model: lm_head\.weight"):
        load_shard(tmp_path / "hf", layouts, 0)
    assert "lm_head.weight" not in load_shard(tmp_path / "hf", layouts, 0, ignore=["lm_head.weight"])


def test_a_redundant_tied_head_is_not_loaded(tmp_path, hf):
    sizes = {**SIZES, "tie_word_embeddings": True}
    weights = hf.weights({**hf.config, **sizes}, "BF16", 0)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    hf.make(tmp_path / "tied", dtype="BF16", tensors=weights, **sizes)
    layouts = parameter_layouts(model_config_from_hf({**hf.config, **sizes}, "t"), Mesh(1, 4))
    assert set(load_shard(tmp_path / "tied", layouts, 2)) == set(layouts)


def test_all_faults_of_a_rank_at_once(tmp_path, full, model):
    layouts = parameter_layouts(model, Mesh(1, 2))
    save_all(tmp_path / "ranks", full, layouts)
    local = {name: layout.take(full[name], 1) for name, layout in layouts.items()}
    local["adam_m.x"] = local.pop("model.norm_out.weight")
    local["lm_head.weight"] = full["lm_head.weight"]
    save_shard(tmp_path / "ranks", 1, local)
    with pytest.raises(CheckpointError) as error:
        load_shard(tmp_path / "ranks", layouts, 1)
    message = str(error.value)
    assert "hidden size 32) does not fit the model, 3 fault(s)" in message
    assert "rank_1/checkpoint_1.ckpt: missing: model.norm_out.weight (32,)" in message
    assert "not in the model: adam_m.x (32,)" in message
    assert "wrong shape: lm_head.weight is (24, 32), the model has (12, 32)" in message


# --- which directory ---


@pytest.mark.parametrize("stored", [Mesh(1, 1), Mesh(4, 1), Mesh(2, 2), Mesh(1, 4)], ids=str)
@pytest.mark.parametrize("mesh", [Mesh(1, 1), Mesh(2, 2), Mesh(1, 4)], ids=str)
def test_rank_directories_of_any_layout_are_resharded(tmp_path, full, model, stored, mesh):
    """Nothing states their layout: the shapes do."""
    save_all(tmp_path / "ranks", full, parameter_layouts(model, stored))
    layouts = parameter_layouts(model, mesh)
    for rank in range(mesh.size):
        for name, array in load_shard(tmp_path / "ranks", layouts, rank).items():
            assert np.array_equal(array, layouts[name].take(full[name], rank)), (rank, name)


@pytest.mark.parametrize(
    ("stored", "lost", "missing"),
    [(Mesh(1, 4), [1, 2, 3], "rank_1"), (Mesh(2, 2), [3], "rank_3"), (Mesh(1, 2), [0], "rank_0")],
    ids=str,
)
def test_ranks_that_are_missing_are_named(tmp_path, full, model, stored, lost, missing):
    save_all(tmp_path, full, parameter_layouts(model, stored))
    for rank in lost:
        shutil.rmtree(tmp_path / f"rank_{rank}")
    last, part = stored.size - 1, f"1/{stored.mp}"
    with pytest.raises(
        CheckpointError, match=rf"rank_0 \.\. rank_{last} holds {part} .*missing:\n  - {missing}"
    ):
        load_shard(tmp_path, parameter_layouts(model, Mesh()), 0)


def test_several_files_of_a_rank(tmp_path, full, model):
    save_all(tmp_path, full, parameter_layouts(model, Mesh(1, 2)))
    save_shard(tmp_path, 1, {}, prefix="other_")
    with pytest.raises(CheckpointError, match=r"rank_1: .*found checkpoint_1.ckpt, other_1.ckpt"):
        load_shard(tmp_path, parameter_layouts(model, Mesh()), 0)


def test_another_model_is_described_in_one_line_with_few_faults(tmp_path, hf, full, model):
    save_all(tmp_path / "ranks", full, parameter_layouts(model, Mesh(2, 2)))
    other = model_config_from_hf({**hf.config, "hidden_size": 64}, "test")
    with pytest.raises(CheckpointError) as error:
        open_full(tmp_path / "ranks", other)
    first, *others = str(error.value).splitlines()
    assert "ranks (dp2 mp2, layers 2, vocabulary 24, hidden size 32) does not fit the model" in first
    assert len(others) == 11
    with pytest.raises(CheckpointError, match=r"cannot be split over dp2 mp2: .* 25"):
        open_full(tmp_path / "ranks", model_config_from_hf({**hf.config, "vocab_size": 25}, "test"))


# --- split, merge ---


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_split_and_merge_are_inverse(tmp_path, full, model, monkeypatch, suffix):
    monkeypatch.setattr(sources_module, "BLOCK_BYTES", 300)
    for mesh in (Mesh(1, 4), Mesh(2, 2)):
        source, layouts = open_full(tmp_path / "full.ckpt", model)
        layouts = {name: layout.on(mesh) for name, layout in layouts.items()}
        with source:
            files = split_to_ranks(source, layouts, tmp_path / "split", {}, suffix=suffix, overwrite=True)
        assert [file.parent.name for file in files] == [f"rank_{rank}" for rank in range(4)]
        for rank in range(4):
            for name, array in load_shard(tmp_path / "split", layouts, rank).items():
                assert np.array_equal(array, layouts[name].take(full[name], rank))
        merge_shards(tmp_path / "split", layouts, tmp_path / f"merged{suffix}")
        with open_weights(tmp_path / f"merged{suffix}") as merged:
            assert list(merged.tensors) == list(layouts)
            assert all(merged.read(name).tobytes() == full[name].tobytes() for name in full)


def test_merging_ranks_that_do_not_fit_names_each(tmp_path, full, model):
    layouts = parameter_layouts(model, Mesh(1, 2))
    save_all(tmp_path / "ranks", full, layouts)
    lacking = {name: layout.take(full[name], 1) for name, layout in layouts.items()}
    del lacking["lm_head.weight"]
    lacking["model.norm_out.weight"] = lacking["model.norm_out.weight"].astype(np.float16)
    save_shard(tmp_path / "ranks", 1, lacking)
    with pytest.raises(CheckpointError) as error:
        merge_shards(tmp_path / "ranks", layouts, tmp_path / "m.ckpt")
    assert "checkpoint_1.ckpt: missing: lm_head.weight (12, 32)" in str(error.value)
    assert "model.norm_out.weight is float16, in" in str(error.value)
    assert not (tmp_path / "m.ckpt").exists()


def test_ranks_export_to_hugging_face(tmp_path, full, model, hf):
    layouts = parameter_layouts(model, Mesh(2, 2))
    save_all(tmp_path / "ranks", full, layouts)
    export_hf(tmp_path / "ranks", tmp_path / "back", model)
    assert hf.read(tmp_path / "back") == hf.read(tmp_path / "hf")
    known = r"dp2 mp2, layers 2, vocabulary 24, hidden size 32\): give --config"
    with pytest.raises(CheckpointError, match=known):
        mindspore_to_hf(tmp_path / "ranks", tmp_path / "back2")
    (tmp_path / "ranks" / "config.json").write_text((tmp_path / "hf" / "config.json").read_text())
    mindspore_to_hf(tmp_path / "ranks", tmp_path / "back2")
    assert hf.read(tmp_path / "back2") == hf.read(tmp_path / "hf")


def test_a_value_head_can_be_left_out_of_the_export(tmp_path, full, model, hf):
    layouts = parameter_layouts(model, Mesh(1, 2), score_head=True)
    head = {name: np.ones(layouts[name].shape, np.float32) for name in SCORE_HEAD}
    save_all(tmp_path / "ranks", full | head, layouts)
    export_hf(tmp_path / "ranks", tmp_path / "back", model, leave_out=SCORE_HEAD)
    assert hf.read(tmp_path / "back") == hf.read(tmp_path / "hf")


def test_splitting_over_foreign_files_is_refused(tmp_path, full, model):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "log.txt").write_text("x")
    source, layouts = open_full(tmp_path / "full.ckpt", model)
    with source, pytest.raises(MindRLHFError, match=r"also holds log\.txt"):
        split_to_ranks(source, layouts, tmp_path / "out", {}, overwrite=True)


# --- rank directories of one layout, read by the ranks of another ---

MESHES = [Mesh(1, 1), Mesh(4, 1), Mesh(2, 2), Mesh(1, 4), Mesh(1, 2), Mesh(1, 8)]
TENSORS = {
    "adam_m.rows": np.arange(16 * 6, dtype=np.float32).reshape(16, 6),
    "adam_v.columns": -np.arange(5 * 24, dtype=np.float32).reshape(5, 24),
    "norm": np.linspace(0, 1, 7, dtype=np.float32),
    "global_step": np.array([12], np.int32),
}


def tensor_layouts(mesh: Mesh) -> dict[str, Layout]:
    axes: dict[str, tuple[AxisName | None, ...]] = {
        "adam_m.rows": ("mp", None),
        "adam_v.columns": (None, "mp"),
    }
    return {
        name: Layout(mesh, array.shape, axes.get(name, (None,) * array.ndim))
        for name, array in TENSORS.items()
    }


def save_tensors(directory: Path, mesh: Mesh) -> None:
    for rank in range(mesh.size):
        local = {name: layout.take(TENSORS[name], rank) for name, layout in tensor_layouts(mesh).items()}
        save_shard(directory, rank, {name: np.ascontiguousarray(array) for name, array in local.items()})


# Each mesh is stored and read; test_reader_properties.py draws any pair.
@pytest.mark.parametrize(
    ("stored", "target"),
    [(stored, MESHES[(i + shift) % len(MESHES)]) for i, stored in enumerate(MESHES) for shift in (0, 1, 4)],
    ids=str,
)
def test_every_rank_gets_its_slices_bit_for_bit(tmp_path: Path, stored: Mesh, target: Mesh) -> None:
    save_tensors(tmp_path, stored)
    for rank in range(target.size):
        found = load_shard(tmp_path, tensor_layouts(target), rank, stored=stored)
        assert list(found) == list(TENSORS)
        for name, layout in tensor_layouts(target).items():
            expected = layout.take(TENSORS[name], rank)
            assert found[name].dtype == expected.dtype
            np.testing.assert_array_equal(found[name], expected, err_msg=name)


def test_only_the_slices_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of what is split, and what is not split once."""
    save_tensors(tmp_path, Mesh(1, 2))
    count = 0
    read = FileSource._read_file

    def counted(self: FileSource, name: str, position: int, buffer: memoryview) -> None:
        nonlocal count
        count += len(buffer)
        read(self, name, position, buffer)

    monkeypatch.setattr(FileSource, "_read_file", counted)
    load_shard(tmp_path, tensor_layouts(Mesh(1, 4)), 3, stored=Mesh(1, 2))
    split = TENSORS["adam_m.rows"].nbytes + TENSORS["adam_v.columns"].nbytes
    assert count == split // 4 + TENSORS["norm"].nbytes + TENSORS["global_step"].nbytes


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    save_tensors(tmp_path, Mesh(1, 4))
    shutil.rmtree(tmp_path / "rank_2")
    with pytest.raises(CheckpointError, match=r"1/4 of the model; .*missing:\n  - rank_2$"):
        load_shard(tmp_path, tensor_layouts(Mesh(1, 2)), 0, stored=Mesh(1, 4))


def test_shards_of_another_model_are_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path, Mesh(1, 4))
    wanted = tensor_layouts(Mesh(1, 2)) | {"norm": Layout(Mesh(1, 2), (9,), (None,))}
    with pytest.raises(CheckpointError, match=r"norm is \(7,\), the model has \(9,\)"):
        load_shard(tmp_path, wanted, 0, stored=Mesh(1, 4))
