"""``ppo_one_stage.py`` as a person runs it: raw ``msrun``, plain environment, own working directory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.st.commands import REPO_ROOT, Command, Finished, msrun

SCRIPT = REPO_ROOT / "examples" / "qwen_ppo_tutorial" / "ppo_one_stage.py"
CONFIGS = REPO_ROOT / "model_configs" / "qwen_ppo"
MODELS = ("infer_policy", "train_policy", "ref", "reward", "critic")
WORKERS = 4

# Keys that every line of metrics.jsonl must have.
METRICS = {
    *("iteration", "episode", "epoch", "lr", "grad_norm"),
    *("objective/kl", "objective/kl_coef", "objective/entropy", "objective/non_score_reward"),
    *("objective/scores", "objective/rlhf_reward"),
    *("policy/approxkl", "policy/clipfrac", "policy/entropy", "policy/ratio", "policy/ratio_var"),
    *("loss/policy", "loss/value", "loss/pretrain", "loss/total"),
    *("value/clipfrac", "value/error", "value/mean", "value/explained_var"),
    *("response/length", "response/eos_rate", "tokens_per_second"),
    *("time/rollout", "time/score", "time/sync", "time/train"),
}


def yaml_flags(infer: Path, train: Path) -> list[str]:
    return [
        *("--sft_path_infer", str(infer), "--sft_path_train", str(train)),
        *("--reward_path", str(infer), "--critic_path", str(train)),
    ]


SEVEN_B = yaml_flags(CONFIGS / "generate_qwen2_7b.yaml", CONFIGS / "finetune_qwen2_7b.yaml")


@pytest.fixture(scope="module")
def strategies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    """``--only_save_strategy`` for the 7b YAMLs, by msrun and alone."""
    directory = tmp_path_factory.mktemp("strategies")
    flags = [*SEVEN_B, "--only_save_strategy", "True"]
    alone = Command(
        [sys.executable, str(SCRIPT), *flags, "--world_size", str(WORKERS)], directory / "alone"
    ).finish(120)
    return {
        "alone": alone,
        "msrun": Command(msrun(SCRIPT, *flags, workers=WORKERS), directory / "msrun").finish(120),
    }


@pytest.mark.msrun
@pytest.mark.parametrize(("how", "beside"), [("alone", set()), ("msrun", {"ppo_log"})])
def test_strategies_of_7b_and_nothing_else(
    strategies: dict[str, Finished], how: str, beside: set[str]
) -> None:
    result = strategies[how]
    assert result.code == 0, result.logs
    assert result.seconds < 60
    assert {path.name for path in result.directory.iterdir()} == {"strategy"} | beside
    files = {
        str(path.relative_to(result.directory))
        for path in result.directory.glob("strategy/**/*")
        if path.is_file()
    }
    assert files == {
        f"strategy/{model}_strategy/strategy_{rank}.ckpt" for model in MODELS for rank in range(WORKERS)
    }
    assert list(result.temporary.iterdir()) == []


@pytest.mark.msrun
def test_strategies_are_the_same_with_and_without_msrun(strategies: dict[str, Finished]) -> None:
    for path in strategies["alone"].directory.glob("strategy/*/*"):
        other = strategies["msrun"].directory / path.relative_to(strategies["alone"].directory)
        assert path.read_bytes() == other.read_bytes(), path.name


def test_strategies_say_how_7b_is_split(strategies: dict[str, Finished]) -> None:
    """Device matrix and the split of three kinds of weights, read with MindSpore's own message."""
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

    matrices = {
        "infer_policy": [1, 4],
        "train_policy": [2, 2],
        "ref": [1, 4],
        "reward": [1, 4],
        "critic": [2, 2],
    }
    for model, matrix in matrices.items():
        content = ParallelStrategyMap()
        path = strategies["alone"].directory / f"strategy/{model}_strategy/strategy_3.ckpt"
        content.ParseFromString(path.read_bytes())
        layouts = {item.param_name: item.parallel_layouts for item in content.parallel_layout_item}
        expected = {"attention.wq.weight": [0, -1], "attention.wo.weight": [-1, 0], "ffn_norm.weight": [-1]}
        for name, tensor_map in expected.items():
            layout = layouts[f"model.layers.27.{name}"]
            assert list(layout.dev_matrix[0].dim) == matrix
            assert list(layout.tensor_map[0].dim) == tensor_map


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer in Qwen2's files: 58 letters and Qwen2's three special tokens, 61 in all."""
    directory = tmp_path_factory.mktemp("tokenizer")
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ012345"
    vocab = {letter: number for number, letter in enumerate(letters)}
    (directory / "vocab.json").write_text(json.dumps(vocab))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    return directory


def job_flags(inputs: Any, infer: tuple[int, int], train: tuple[int, int]) -> list[str]:
    return [
        *yaml_flags(inputs.yaml("generate", *infer), inputs.yaml("finetune", *train)),
        *("--ppo_config", str(inputs.ppo)),
        *(
            "--load_sft_checkpoint_infer",
            str(inputs.policy),
            "--load_sft_checkpoint_train",
            str(inputs.policy),
        ),
        *("--load_rm_checkpoint", str(inputs.reward), "--load_critic_checkpoint", ""),
        *("--mind_dataset_dir", str(inputs.data), "--save_ckpt_dir", "results"),
    ]


@pytest.fixture(scope="module")
def jobs(ppo_inputs: Any, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    """The whole job, two iterations: on 4 workers, infer dp1 mp4, train dp2 mp2; and in one process."""
    flags = [
        *job_flags(ppo_inputs, (1, 4), (2, 2)),
        *("--set", "total_iterations=2", "--set", "log_samples=2"),
        *("--save_data_file", "results/experience.mindrecord", "--export_hf_dir", "exported"),
        *("--tokenizer_path", str(tokenizer), "--verify_sync", "True"),
        *("--eval_dataset_dir", str(ppo_inputs.held_out)),
    ]
    directory = tmp_path_factory.mktemp("jobs")
    alone = Command([sys.executable, str(SCRIPT), *flags, "--use_parallel", "False"], directory / "alone")
    four = Command(
        msrun(SCRIPT, *flags, "--use_parallel", "True", workers=WORKERS), directory / "four"
    ).finish(400)
    finished = {"four": four, "alone": alone.finish(400)}
    for result in finished.values():
        if result.code:
            pytest.fail(f"exit code {result.code}\n{result.logs}", pytrace=False)
    return finished


@pytest.fixture(scope="module")
def trained(jobs: dict[str, Finished]) -> Finished:
    """The job on 4 workers."""
    return jobs["four"]


@pytest.mark.msrun
def test_one_process_without_msrun_learns_the_same(jobs: dict[str, Finished]) -> None:
    """``--use_parallel False`` with the same split YAMLs, which it overrides."""
    alone, four = (read_lines(jobs[how].directory / "results" / "metrics.jsonl") for how in ("alone", "four"))
    for one, other in zip(alone, four, strict=True):
        assert one.keys() == other.keys()
        names = [name for name in one if not name.startswith(("time/", "tokens_per_second"))]
        assert [other[name] for name in names] == pytest.approx(
            [one[name] for name in names], rel=1e-4, abs=1e-5
        )
    assert {path.name for path in jobs["alone"].directory.iterdir()} == {"results", "exported"}


@pytest.mark.msrun
def test_job_leaves_what_was_asked_for_and_nothing_else(trained: Finished) -> None:
    results = trained.directory / "results"
    assert {path.name for path in trained.directory.iterdir()} == {"results", "exported", "ppo_log"}
    experience = [f"experience_iteration_{i:06d}.mindrecord{end}" for i in (1, 2) for end in ("", ".db")]
    assert {path.name for path in results.iterdir()} == {
        *("iteration_000001", "iteration_000002", "config.json"),
        *("metrics.jsonl", "samples.jsonl", "curves.png", "tensorboard"),
        *("evaluations.jsonl", "eval_samples.jsonl", "evaluation_summary.json", "before_after.md"),
        *experience,
    }
    models = ("policy", "policy_optimizer", "critic", "critic_optimizer")
    for iteration in ("iteration_000001", "iteration_000002"):
        files = {
            str(p.relative_to(results / iteration)) for p in (results / iteration).rglob("*") if p.is_file()
        }
        assert files == {
            *("state.json", "config.json", "manifest.json", "policy/config.json", "critic/config.json")
        } | {
            name
            for rank in range(WORKERS)
            for name in (
                f"random/rank_{rank}.json",
                *(f"{model}/rank_{rank}/checkpoint_{rank}.ckpt" for model in models),
            )
        }


@pytest.mark.msrun
def test_job_leaves_nothing_in_the_temporary_directory(trained: Finished) -> None:
    assert list(trained.temporary.iterdir()) == []


@pytest.mark.msrun
def test_metrics_and_samples(trained: Finished, ppo_inputs: Any) -> None:
    lines = read_lines(trained.directory / "results" / "metrics.jsonl")
    assert [line["iteration"] for line in lines] == [1, 2]
    for line in lines:
        assert line.keys() >= METRICS
        assert all(np.isfinite(value) for value in line.values())
    assert [line["episode"] for line in lines] == [8, 16]
    # One of two minibatches sees the ratio before any update, the other one after.
    assert lines[0]["policy/ratio"] == pytest.approx(1, abs=0.1)
    assert abs(lines[0]["objective/kl"]) < 1e-4 < abs(lines[1]["objective/kl"])
    samples = read_lines(trained.directory / "results" / "samples.jsonl")
    assert [sample["iteration"] for sample in samples] == [1, 1, 2, 2]
    assert all(isinstance(sample["response"], str) and sample["response"] for sample in samples)


@pytest.mark.msrun
def test_evaluations(jobs: dict[str, Finished]) -> None:
    """Before and after, the same on 4 workers as in one process; the log ends with what came of it."""
    alone, four = (jobs[how].directory / "results" for how in ("alone", "four"))
    lines = read_lines(four / "evaluations.jsonl")
    assert [line["iteration"] for line in lines] == [0, 2]
    for one, other in zip(read_lines(alone / "evaluations.jsonl"), lines, strict=True):
        assert one.pop("seconds") > 0 < other.pop("seconds")
        assert one.pop("held_out_digest") == other.pop("held_out_digest")
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    texts = [[line["response"] for line in read_lines(path / "eval_samples.jsonl")] for path in (alone, four)]
    assert texts[0] == texts[1]
    summary = json.loads((alone / "evaluation_summary.json").read_text())
    assert summary["prompts"] == 11
    said = next(line for line in jobs["alone"].stderr.splitlines() if "held-out score" in line)
    assert f"{summary['score_before']:+.4f} -> {summary['score_after']:+.4f} (" in said


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.msrun
def test_stored_experience_is_what_the_metrics_say(trained: Finished, ppo_inputs: Any) -> None:
    from tests.probes import read_columns

    results = trained.directory / "results"
    columns = (
        "tokens",
        "mask",
        "score",
        "response_length",
        "logprobs",
        "ref_logprobs",
        "prompt_length",
        "valid",
    )
    for number, line in enumerate(read_lines(results / "metrics.jsonl"), start=1):
        stored = read_columns(results / f"experience_iteration_{number:06d}.mindrecord", columns)
        assert stored["tokens"].shape == (8, 11)
        assert stored["score"].mean() == pytest.approx(line["objective/scores"], rel=1e-5)
        assert stored["response_length"].mean() == line["response/length"]
        np.testing.assert_array_equal(stored["mask"].sum(1), stored["response_length"][:, 0])
        np.testing.assert_array_equal(
            stored["valid"].sum(1), (stored["prompt_length"] + stored["response_length"])[:, 0]
        )
        kl = ((stored["logprobs"] - stored["ref_logprobs"]) * stored["mask"]).sum(1).mean()
        assert kl == pytest.approx(line["objective/kl"], abs=1e-5)


@pytest.mark.msrun
def test_export_loads_in_transformers_and_holds_the_merged_shards(
    trained: Finished, ppo_inputs: Any, tokenizer: Path
) -> None:
    """Every tensor, read from rank files by the layout's own slices, bit for bit; and it was trained."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    from mindrlhf.checkpoint.shards import load_shard
    from mindrlhf.configs.load import load_run_config
    from mindrlhf.models.qwen2.layouts import parameter_layouts
    from mindrlhf.models.qwen2.weight_names import canonical_to_hf
    from mindrlhf.parallel.layout import Mesh

    exported = trained.directory / "exported"
    model, info = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not any(info.values()), info
    tensors = model.state_dict()
    config = load_run_config(ppo_inputs.yaml("finetune", 2, 2)).model
    layouts = parameter_layouts(config, Mesh(2, 2))
    start = load_shard(ppo_inputs.policy, parameter_layouts(config, Mesh(1, 1)), 0)
    shards = [
        load_shard(trained.directory / "results" / "iteration_000002" / "policy", layouts, rank)
        for rank in range(WORKERS)
    ]
    names = canonical_to_hf(config.num_layers)
    assert len(layouts) == len(tensors)
    for name, layout in layouts.items():
        full = tensors[names[name]].numpy()
        assert full.dtype == np.float32
        for rank, shard in enumerate(shards):
            np.testing.assert_array_equal(layout.take(full, rank), shard[name], err_msg=name)
        assert name.endswith("wk.bias") or np.abs(full - start[name]).max() > 1e-4, name
    assert (exported / "vocab.json").read_bytes() == (tokenizer / "vocab.json").read_bytes()
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
