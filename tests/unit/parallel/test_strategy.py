"""Strategy files: read back, and accepted by MindSpore's own checkpoint transformation, bit for bit."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindrlhf.configs.keys import ModelConfig
from mindrlhf.models.qwen2.layouts import parameter_layouts
from mindrlhf.parallel.layout import Layout, Mesh
from mindrlhf.parallel.strategy import Strategy, read_strategy, write_strategies, write_strategy
from mindrlhf.utils.errors import CheckpointError

SMALL = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    n_kv_heads=4,
    intermediate_size=24,
    tie_word_embeddings=False,
)
QWEN2_7B = ModelConfig(
    vocab_size=152064,
    hidden_size=3584,
    num_layers=28,
    num_heads=28,
    n_kv_heads=4,
    intermediate_size=18944,
    tie_word_embeddings=False,
)


def layouts_on(mesh: Mesh, *, score_head: bool = True) -> dict[str, Layout]:
    return parameter_layouts(SMALL, mesh, score_head=score_head)


def random_weights(layouts: dict[str, Layout], *, bfloat16: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(layout.shape).astype(np.float32) for name, layout in layouts.items()}
    if bfloat16:
        from mindspore.common.np_dtype import bfloat16 as bf16

        return {name: value.astype(bf16) for name, value in weights.items()}
    return weights


def save_full(weights: dict[str, np.ndarray], directory: Path) -> None:
    import mindspore as ms

    (directory / "rank_0").mkdir(parents=True)
    params = [{"name": name, "data": ms.Tensor(value)} for name, value in weights.items()]
    ms.save_checkpoint(params, str(directory / "rank_0" / "full.ckpt"))


def load_rank(directory: Path, rank: int) -> dict[str, np.ndarray]:
    import mindspore as ms

    (file,) = (directory / f"rank_{rank}").glob("*.ckpt")
    return {name: param.asnumpy() for name, param in ms.load_checkpoint(str(file)).items()}


def assert_bit_equal(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert actual[name].shape == value.shape, name
        assert actual[name].tobytes() == np.ascontiguousarray(value).tobytes(), name


def strategy_argument(path: Path, form: str) -> str:
    """The one file MindSpore wants: a rank's own, or the ranks' files merged by MindSpore."""
    if form == "rank":
        return str(path / "strategy_3.ckpt")
    from mindspore import merge_pipeline_strategys

    merged = path.parent / f"{path.name}_merged.ckpt"
    merge_pipeline_strategys(str(path), str(merged))
    return str(merged)


class TestTransformCheckpoints:
    @pytest.fixture
    def strategies(self, tmp_path: Path) -> Path:
        models = {"infer_policy": layouts_on(Mesh(1, 4)), "train_policy": layouts_on(Mesh(2, 2))}
        write_strategies(tmp_path / "strategy", models, range(4))
        return tmp_path / "strategy"

    @pytest.mark.parametrize("form", ["rank", "merged"])
    @pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
    def test_full_to_infer_to_train_to_full(
        self, tmp_path: Path, strategies: Path, form: str, bfloat16: bool
    ) -> None:
        import mindspore as ms

        infer, train = layouts_on(Mesh(1, 4)), layouts_on(Mesh(2, 2))
        infer_file = strategy_argument(strategies / "infer_policy_strategy", form)
        train_file = strategy_argument(strategies / "train_policy_strategy", form)
        full = random_weights(infer, bfloat16=bfloat16)
        dirs = {name: tmp_path / name for name in ("full", "infer", "train", "back")}
        save_full(full, dirs["full"])

        ms.transform_checkpoints(str(dirs["full"]), str(dirs["infer"]), "checkpoint_", None, infer_file)
        ms.transform_checkpoints(
            str(dirs["infer"]), str(dirs["train"]), "checkpoint_", infer_file, train_file
        )
        ms.transform_checkpoints(str(dirs["train"]), str(dirs["back"]), "checkpoint_", train_file, None)

        for directory, layouts in ((dirs["infer"], infer), (dirs["train"], train)):
            assert sorted(path.name for path in directory.iterdir()) == [f"rank_{rank}" for rank in range(4)]
            for rank in range(4):
                assert (directory / f"rank_{rank}" / f"checkpoint_{rank}.ckpt").is_file()
                shards = {name: layout.take(full[name], rank) for name, layout in layouts.items()}
                assert_bit_equal(load_rank(directory, rank), shards)
        assert [path.name for path in dirs["back"].iterdir()] == ["rank_0"]
        assert_bit_equal(load_rank(dirs["back"], 0), full)

    def test_rank_by_rank(self, tmp_path: Path, strategies: Path) -> None:
        """The per-rank functions: which source ranks are needed, then one rank's file."""
        import mindspore as ms

        infer, train = layouts_on(Mesh(1, 4)), layouts_on(Mesh(2, 2))
        infer_file = str(strategies / "infer_policy_strategy" / "strategy_0.ckpt")
        train_file = str(strategies / "train_policy_strategy" / "strategy_0.ckpt")
        full = random_weights(infer)
        save_full(full, tmp_path / "full")
        ms.transform_checkpoints(
            str(tmp_path / "full"), str(tmp_path / "infer"), "checkpoint_", None, infer_file
        )
        rank = 3
        needed = ms.rank_list_for_transform(rank, infer_file, train_file)
        assert {2, 3} <= set(needed)
        files = {r: str(tmp_path / "infer" / f"rank_{r}" / f"checkpoint_{r}.ckpt") for r in needed}
        target = tmp_path / "train" / "rank_3" / "one.ckpt"
        target.parent.mkdir(parents=True)
        ms.transform_checkpoint_by_rank(rank, files, str(target), infer_file, train_file)
        shards = {name: layout.take(full[name], rank) for name, layout in train.items()}
        assert_bit_equal(load_rank(tmp_path / "train", rank), shards)

    def test_more_ranks_and_one_rank(self, tmp_path: Path) -> None:
        """dp2 mp2 on 4 ranks -> dp2 mp4 on 8 ranks -> 1 rank: the number of ranks may change."""
        import mindspore as ms

        meshes = {"four": Mesh(2, 2), "eight": Mesh(2, 4), "one": Mesh(1, 1)}
        files = {}
        for name, mesh in meshes.items():
            files[name] = str(tmp_path / f"{name}.ckpt")
            write_strategy(layouts_on(mesh), Path(files[name]))
        full = random_weights(layouts_on(Mesh(1, 1)))
        save_full(full, tmp_path / "full")
        source, source_file = tmp_path / "full", None
        for name, mesh in meshes.items():
            ms.transform_checkpoints(str(source), str(tmp_path / name), "c_", source_file, files[name])
            for rank in range(mesh.size):
                shards = {key: layout.take(full[key], rank) for key, layout in layouts_on(mesh).items()}
                assert_bit_equal(load_rank(tmp_path / name, rank), shards)
            source, source_file = tmp_path / name, files[name]

    def test_policy_into_critic_is_named_by_stage(self, tmp_path: Path) -> None:
        """MindSpore's other file name, documented in the module: source names a subset of the target's."""
        import mindspore as ms

        policy, critic = layouts_on(Mesh(2, 2), score_head=False), layouts_on(Mesh(1, 4))
        write_strategy(policy, tmp_path / "policy.ckpt")
        write_strategy(critic, tmp_path / "critic.ckpt")
        full = random_weights(policy)
        save_full(full, tmp_path / "full")
        policy_file, critic_file = str(tmp_path / "policy.ckpt"), str(tmp_path / "critic.ckpt")
        ms.transform_checkpoints(str(tmp_path / "full"), str(tmp_path / "policy"), "c_", None, policy_file)
        ms.transform_checkpoints(
            str(tmp_path / "policy"), str(tmp_path / "critic"), "c_", policy_file, critic_file
        )
        for rank in range(4):
            assert (tmp_path / "critic" / f"rank_{rank}" / f"c_{rank}_part0.ckpt").is_file()
            shards = {name: critic[name].take(value, rank) for name, value in full.items()}
            assert_bit_equal(load_rank(tmp_path / "critic", rank), shards)

    def test_strategy_argument_must_be_a_file(self, tmp_path: Path, strategies: Path) -> None:
        import mindspore as ms

        save_full(random_weights(layouts_on(Mesh(1, 4))), tmp_path / "full")
        with pytest.raises(ValueError, match="no such strategy file"):
            ms.transform_checkpoints(
                str(tmp_path / "full"),
                str(tmp_path / "x"),
                "c_",
                None,
                str(strategies / "infer_policy_strategy"),
            )


class TestFiles:
    def test_content(self, tmp_path: Path) -> None:
        from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

        mesh = Mesh(2, 2)
        layouts = {
            "rows": Layout(mesh, (8, 6), ("mp", None)),
            "columns": Layout(mesh, (8, 6), (None, "mp")),
            "bias": Layout(mesh, (8,), ("mp",)),
            "norm": Layout(mesh, (6,), (None,)),
        }
        write_strategy(layouts, tmp_path / "new" / "strategy.ckpt")
        read = ParallelStrategyMap()
        read.ParseFromString((tmp_path / "new" / "strategy.ckpt").read_bytes())
        expected = {
            "rows": ([0, -1], [2, 1]),
            "columns": ([-1, 0], [1, 2]),
            "bias": ([0], [2]),
            "norm": ([-1], [1]),
        }
        assert {item.param_name for item in read.parallel_layout_item} == set(expected)
        for item in read.parallel_layout_item:
            layout = item.parallel_layouts
            assert list(layout.dev_matrix[0].dim) == [2, 2]
            assert list(layout.tensor_map[0].dim) == expected[item.param_name][0]
            assert (layout.opt_weight_shard_step, layout.opt_weight_shard_size) == (0, 0)
        cuts = {
            i.node_name: list(i.parallel_strategys.parallel_strategy[0].dim)
            for i in read.parallel_strategy_item
        }
        assert cuts == {name: cut for name, (_, cut) in expected.items()}

    @settings(max_examples=60, deadline=None)
    @given(st.integers(1, 4), st.integers(1, 4), st.lists(st.none() | st.integers(0, 3), min_size=1))
    def test_what_was_written_is_read(
        self, tmp_path_factory: pytest.TempPathFactory, dp: int, mp: int, splits: list[int | None]
    ) -> None:
        axes = [tuple("mp" if dim == split else None for dim in range(4)) for split in splits]
        shape = (2 * mp,) * 4
        layouts = {f"p{i}": Layout(Mesh(dp, mp), shape, part) for i, part in enumerate(axes)}  # type: ignore[arg-type]
        path = tmp_path_factory.mktemp("strategy") / "strategy.ckpt"
        write_strategy(layouts, path)
        split_dims = {f"p{i}": split if mp > 1 else None for i, split in enumerate(splits)}
        assert read_strategy(path) == Strategy(Mesh(dp, mp), split_dims)

    def test_files_that_are_none(self, tmp_path: Path) -> None:
        path = tmp_path / "strategy.ckpt"
        with pytest.raises(CheckpointError, match=r"cannot read .*No such file"):
            read_strategy(path)
        for content in (b"", b"\xff" * 20, b"\x0a\x05abc"):
            path.write_bytes(content)
            with pytest.raises(CheckpointError, match="is damaged or is not a strategy file of one model"):
                read_strategy(path)

    def test_files_of_another_layout_are_not_mixed(self, tmp_path: Path) -> None:
        write_strategies(tmp_path, {"ref": layouts_on(Mesh(1, 4))}, range(4))
        write_strategies(tmp_path, {"ref": layouts_on(Mesh(1, 4))}, range(4))  # the same again is not a fault
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.ckpt")}
        with pytest.raises(CheckpointError) as caught:
            write_strategies(tmp_path, {"ref": layouts_on(Mesh(1, 2))}, range(2))
        message = str(caught.value)
        assert message.count("is of dp1 mp4 or another model, not of dp1 mp2") == 2
        assert "strategy_3.ckpt is of a rank that dp1 mp2 does not have" in message
        assert {path: path.read_bytes() for path in tmp_path.rglob("*.ckpt")} == before

    def test_paths_and_ranks(self, tmp_path: Path) -> None:
        models = {"train_policy": layouts_on(Mesh(2, 2)), "ref": layouts_on(Mesh(1, 4))}
        written = write_strategies(tmp_path, models, [1, 3])
        assert written == [
            tmp_path / f"{model}_strategy" / f"strategy_{rank}.ckpt" for model in models for rank in (1, 3)
        ]
        assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(written)

    def test_bad_input(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no parameters"):
            write_strategy({}, tmp_path / "a.ckpt")
        mixed = {"a": Layout(Mesh(2, 2), (4,), (None,)), "b": Layout(Mesh(1, 4), (4,), (None,))}
        with pytest.raises(ValueError, match="dp1 mp4, dp2 mp2"):
            write_strategy(mixed, tmp_path / "a.ckpt")
        with pytest.raises(ValueError, match=r"ref: ranks \[4\] are outside its mesh dp2 mp2"):
            write_strategies(tmp_path, {"ref": layouts_on(Mesh(2, 2))}, [0, 4])
        assert list(tmp_path.rglob("*.ckpt")) == []

    def test_7b_is_fast(self, tmp_path: Path) -> None:
        infer, train = Mesh(1, 4), Mesh(2, 2)
        models = {
            "infer_policy": parameter_layouts(QWEN2_7B, infer),
            "train_policy": parameter_layouts(QWEN2_7B, train),
            "ref": parameter_layouts(QWEN2_7B, train),
            "reward": parameter_layouts(QWEN2_7B, train, lm_head=False, score_head=True),
            "critic": parameter_layouts(QWEN2_7B, train, lm_head=False, score_head=True),
        }
        start = time.perf_counter()
        assert len(write_strategies(tmp_path, models, range(4))) == 20
        assert time.perf_counter() - start < 10

    def test_import_is_light(self) -> None:
        """MindSpore is imported when a file is written, not before."""
        program = "import sys, mindrlhf.parallel.strategy\nassert 'mindspore' not in sys.modules\n"
        subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
