"""What a job refuses before anything is built, each with its remedy."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindrlhf.checkpoint.hf_config import hf_config_from_model, write_json
from mindrlhf.checkpoint.sources import ArraySource
from mindrlhf.checkpoint.weight_files import write_weights
from mindrlhf.configs.flags import PPOOptions
from mindrlhf.configs.keys import JobConfig
from mindrlhf.configs.load import load_ppo_job, load_run_config
from mindrlhf.models.qwen2.layouts import parameter_layouts
from mindrlhf.parallel.layout import Mesh
from mindrlhf.runtime.device import Runtime
from mindrlhf.trainer import programs
from mindrlhf.trainer.programs import run_ppo, save_strategies
from mindrlhf.trainer.recipes.ppo_job import graph_configuration
from mindrlhf.utils.errors import ConfigError, MindRLHFError
from mindrlhf.utils.files import job_lock
from mindrlhf.utils.provenance import provenance, write_provenance


@pytest.fixture
def configs(repo_root: Path) -> Path:
    return repo_root / "model_configs" / "qwen_ppo"


def options(configs: Path, tmp_path: Path, **changes: Any) -> PPOOptions:
    """A job in one process on the tiny YAMLs, complete but for the data."""
    weights, infer = tmp_path / "weights.ckpt", configs / "generate_qwen2_tiny.yaml"
    if "load_sft_checkpoint_infer" not in changes:
        layouts = parameter_layouts(load_run_config(changes.get("sft_path_infer", infer)).model, Mesh())
        arrays = {name: np.zeros(layout.shape, np.float32) for name, layout in layouts.items()}
        write_weights(weights, ArraySource(arrays))
    given: dict[str, Any] = {
        "sft_path_infer": infer,
        "sft_path_train": configs / "finetune_qwen2_tiny.yaml",
        "reward_path": configs / "generate_qwen2_tiny.yaml",
        "critic_path": configs / "generate_qwen2_tiny.yaml",
        "load_sft_checkpoint_infer": weights,
        "mind_dataset_dir": tmp_path / "data.mindrecord",
        "save_ckpt_dir": tmp_path / "save",
        "use_parallel": False,
    }
    return PPOOptions(**{**given, **changes})


@pytest.mark.parametrize("flag", ["mind_dataset_dir", "save_ckpt_dir"])
def test_a_missing_flag_is_named(configs: Path, tmp_path: Path, flag: str) -> None:
    with pytest.raises(MindRLHFError, match=f"--{flag} is missing"):
        run_ppo(options(configs, tmp_path, **{flag: None}))


def test_no_weights_at_all_names_the_flags(configs: Path, tmp_path: Path) -> None:
    with pytest.raises(MindRLHFError, match="--load_sft_checkpoint_infer"):
        run_ppo(options(configs, tmp_path, load_sft_checkpoint_infer=None))


@pytest.mark.parametrize(
    "flag", ["load_sft_checkpoint_train", "load_rm_checkpoint", "load_critic_checkpoint"]
)
def test_weights_are_checked_before_a_scheduler_waits_for_workers(
    configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.setattr(programs, "_served_as_scheduler", lambda: pytest.fail("too late"))
    write_weights(tmp_path / "other.ckpt", ArraySource({"w": np.zeros(1, np.float32)}))
    with pytest.raises(MindRLHFError, match=r"other\.ckpt .* does not fit .*_qwen2_tiny\.yaml"):
        run_ppo(options(configs, tmp_path, **{flag: tmp_path / "other.ckpt"}))


@pytest.mark.parametrize("flag", ["load_sft_checkpoint_infer", "load_ref_checkpoint"])
def test_a_reward_model_is_no_policy(configs: Path, tmp_path: Path, flag: str) -> None:
    given = options(configs, tmp_path, **{flag: tmp_path / "reward"})
    config = hf_config_from_model(load_run_config(given.sft_path_infer).model)
    (tmp_path / "reward").mkdir()
    write_json(
        tmp_path / "reward" / "config.json", config | {"architectures": ["Qwen2ForSequenceClassification"]}
    )
    with pytest.raises(MindRLHFError, match=r"reward holds a reward model or a critic, .*; give a policy"):
        run_ppo(given)


def test_use_parallel_false_under_msrun(
    configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    monkeypatch.setenv("MS_WORKER_NUM", "4")
    with pytest.raises(MindRLHFError, match=r"--use_parallel False, but msrun started 4 workers"):
        run_ppo(options(configs, tmp_path))


def test_use_parallel_true_without_msrun_says_how_many_workers(configs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)parallel_config.*\b4\b"):
        run_ppo(options(configs, tmp_path, use_parallel=True))


def test_two_answers_to_where_a_run_goes_on_are_refused(configs: Path, tmp_path: Path) -> None:
    with pytest.raises(MindRLHFError, match=r"(?s)--resume_training True .*--resume_from .*one of the two"):
        run_ppo(options(configs, tmp_path, resume_from=tmp_path, resume_training=True))


def test_a_directory_to_resume_from_that_is_not_there_is_named(configs: Path, tmp_path: Path) -> None:
    with pytest.raises(MindRLHFError, match=r"--resume_from .*nowhere: there is no such directory"):
        run_ppo(options(configs, tmp_path, resume_from=tmp_path / "nowhere"))


def test_signal_handlers_are_as_before_when_a_job_is_refused(configs: Path, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(MindRLHFError, match="--load_sft_checkpoint_infer"):
        run_ppo(options(configs, tmp_path, load_sft_checkpoint_infer=None, resume_training=True))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device of this process, which another test may have chosen."""
    monkeypatch.setattr("mindrlhf.trainer.run.start_runtime", lambda *given, **options: Runtime(0, 1))


@pytest.mark.usefixtures("device")
def test_a_used_results_directory_is_refused(configs: Path, tmp_path: Path) -> None:
    (tmp_path / "save").mkdir()
    (tmp_path / "save" / "metrics.jsonl").touch()
    with pytest.raises(MindRLHFError, match="holds the results of an earlier run"):
        run_ppo(options(configs, tmp_path))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("role", ["", "MS_SCHED"])
def test_a_job_in_the_same_directory_is_named(
    configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    """In msrun's scheduler, too, before it looks for its port, which the other job may have."""
    monkeypatch.setenv("MS_ROLE", role)
    with job_lock(tmp_path / "save"), pytest.raises(MindRLHFError, match="save is in use by process"):
        run_ppo(options(configs, tmp_path, resume_training=True))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """Qwen2's files with the 256 bytes and the 3 special tokens: 259 ids."""
    from tokenizers.pre_tokenizers import ByteLevel

    directory = tmp_path / "tokenizer"
    directory.mkdir()
    vocab = {text: number for number, text in enumerate(sorted(ByteLevel.alphabet()))}
    (directory / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (directory / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return directory


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(
    configs: Path, tmp_path: Path, tokenizer: Path
) -> None:
    paths = {}
    for name in ("generate", "finetune"):
        text = (configs / f"{name}_qwen2_tiny.yaml").read_text(encoding="utf-8")
        text = text.replace("vocab_size: 1024", "vocab_size: 256").replace("[1023, 1021]", "[255, 254]")
        paths[name] = tmp_path / f"{name}_small.yaml"
        paths[name].write_text(text.replace("1021", "254"), encoding="utf-8")
    wanted = options(
        configs,
        tmp_path,
        sft_path_infer=paths["generate"],
        sft_path_train=paths["finetune"],
        reward_path=paths["generate"],
        critic_path=paths["generate"],
        ppo_config=configs / "ppo_qwen2_tiny.yaml",
        overrides=["valid_vocab_size=0", "stop_token_ids=[255]", "pad_token_id=254"],
        tokenizer_path=tokenizer,
    )
    with pytest.raises(MindRLHFError, match=r"has 259 tokens, more than .*vocab_size 256"):
        run_ppo(wanted)


def test_valid_ids_that_the_tokenizer_lacks_are_refused(
    configs: Path, tmp_path: Path, tokenizer: Path
) -> None:
    with pytest.raises(MindRLHFError, match="set valid_vocab_size=259"):
        run_ppo(options(configs, tmp_path, tokenizer_path=tokenizer))


def test_faults_of_all_files_come_together(configs: Path, tmp_path: Path) -> None:
    broken = tmp_path / "reward.yaml"
    text = (configs / "generate_qwen2_tiny.yaml").read_text(encoding="utf-8")
    broken.write_text(text.replace("hidden_size: 64", "hiden_size: 64"), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        run_ppo(options(configs, tmp_path, reward_path=broken, overrides=["ppo_epochs=none"]))
    message = str(caught.value)
    assert "reward.yaml" in message
    assert "hiden_size" in message
    assert "ppo_epochs" in message


def test_ppo_settings_beside_the_train_config(configs: Path, tmp_path: Path) -> None:
    assert load_ppo_job(options(configs, tmp_path), 1).ppo.total_iterations == 4
    alone = options(configs, tmp_path, sft_path_train=tmp_path / "finetune_mine.yaml", overrides=["lam=2"])
    with pytest.raises(ConfigError) as caught:
        load_ppo_job(alone, 1)
    faults = "\n".join(caught.value.faults)
    for fault in ("finetune_mine.yaml: there is no such file", "--ppo_config: not given", "--set lam: out"):
        assert fault in faults


def test_strategy_files_of_the_7b_job_need_no_device(configs: Path, tmp_path: Path) -> None:
    seven = options(
        configs,
        tmp_path,
        sft_path_infer=configs / "generate_qwen2_7b.yaml",
        sft_path_train=configs / "finetune_qwen2_7b.yaml",
        reward_path=configs / "generate_qwen2_7b.yaml",
        critic_path=configs / "generate_qwen2_7b.yaml",
        load_sft_checkpoint_infer=None,  # 30 GB
        use_parallel=True,
    )
    files = save_strategies(seven, tmp_path / "strategy")
    models = {"infer_policy", "train_policy", "ref", "reward", "critic"}
    expected = {f"{model}_strategy/strategy_{rank}.ckpt" for model in models for rank in range(4)}
    assert {str(file.relative_to(tmp_path / "strategy")) for file in files} == expected
    assert all(file.stat().st_size for file in files)


def test_a_configuration_that_graphs_know_is_another_one(tiny_job: JobConfig) -> None:
    def changed(**ppo: Any) -> dict[str, Any]:
        return graph_configuration(replace(tiny_job, ppo=replace(tiny_job.ppo, **ppo)))

    before = graph_configuration(tiny_job)
    assert changed(seed=99, save_interval=7) == before
    for ppo in ({"cliprange": 0.3}, {"temperature": 0.5}, {"total_iterations": 77}, {"entropy_coef": 0.5}):
        assert changed(**ppo) != before
    elsewhere = replace(tiny_job.train, path=Path("elsewhere.yaml"))
    assert graph_configuration(replace(tiny_job, train=elsewhere)) == before
    theta = replace(tiny_job.train, model=replace(tiny_job.train.model, theta=3.0))
    assert graph_configuration(replace(tiny_job, train=theta)) != before


def test_a_run_replaces_what_it_wrote_before_alone(configs: Path, tmp_path: Path) -> None:
    """Where it may, the next fault is met, which is in the weights."""
    exported = tmp_path / "exported"
    exported.mkdir()
    for name in ("config.json", "model.safetensors"):
        (exported / name).touch()
    given: dict[str, Any] = {"export_hf_dir": exported, "resume_training": True}
    later = {"load_sft_checkpoint_infer": tmp_path / "none"}
    with pytest.raises(MindRLHFError, match=r"--export_hf_dir .*: exists; .*--overwrite"):
        run_ppo(options(configs, tmp_path, **given))  # there is nothing to continue yet
    (tmp_path / "save" / "iteration_000001").mkdir(parents=True)
    with pytest.raises(MindRLHFError, match=r"--export_hf_dir .*: exists; .*--overwrite"):
        run_ppo(options(configs, tmp_path, **given))  # the run that is there has not written it
    record = provenance({}) | {"outputs": {"--export_hf_dir": str(exported)}}
    write_provenance(tmp_path / "save", record)
    for changes in (given, given | {"overwrite": True, "save_ckpt_dir": tmp_path / "new"}):
        with pytest.raises(MindRLHFError, match="none"):
            run_ppo(options(configs, tmp_path, **changes, **later))
    for changes in ({"tokenizer_path": exported}, {"load_ref_checkpoint": exported}):
        with pytest.raises(MindRLHFError, match=r"--export_hf_dir .*: is --\w+ .*exported"):
            run_ppo(options(configs, tmp_path, **given, **changes))


def test_a_checkpoint_is_no_place_for_results(configs: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "iteration_000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    for save in (checkpoint, checkpoint / "new"):
        with pytest.raises(MindRLHFError, match="iteration_000002 is a checkpoint; give another directory"):
            run_ppo(options(configs, tmp_path, save_ckpt_dir=save, resume_from=checkpoint))


def test_files_of_experience_are_replaced_on_demand_alone(configs: Path, tmp_path: Path) -> None:
    """However many there are; a path that is like theirs may not be an input."""
    for step in range(2000):
        (tmp_path / f"seen_iteration_{step:06d}.mindrecord").touch()
    given: dict[str, Any] = {"save_data_file": tmp_path / "seen.mindrecord"}
    with pytest.raises(MindRLHFError, match=r"--save_data_file .*_\d+\.mindrecord: is not a MindRecord"):
        run_ppo(options(configs, tmp_path, **given))
    given["mind_dataset_dir"] = tmp_path / "seen_iteration_000007.mindrecord"
    with pytest.raises(MindRLHFError, match=r"--save_data_file .*: writes in --mind_dataset_dir .*_000007"):
        run_ppo(options(configs, tmp_path, **given))


def test_strategy_files_leave_the_inputs_alone(configs: Path, tmp_path: Path) -> None:
    weights = tmp_path / "strategy" / "ref_strategy" / "strategy_0.ckpt"
    with pytest.raises(MindRLHFError, match=r"strategy: writes in --load_ref_checkpoint .*strategy_0\.ckpt"):
        save_strategies(options(configs, tmp_path, load_ref_checkpoint=weights), tmp_path / "strategy")


def test_only_a_runs_own_checkpoint_continues_its_results(configs: Path, tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    moved = mine / "iteration_000002"
    mine.mkdir()
    moved.symlink_to(other / "iteration_000002")
    for start, expected in ((mine / "iteration_000001", True), (mine, True), (other, False), (moved, True)):
        assert options(configs, tmp_path, resume_from=start).continues_in(mine) is expected
    assert options(configs, tmp_path, resume_training=True).continues_in(mine)
    assert not options(configs, tmp_path).continues_in(mine)


@pytest.mark.usefixtures("device")
def test_two_runs_are_not_mixed_by_resuming(configs: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "other" / "iteration_000001").mkdir(parents=True)
    given = {"resume_from": tmp_path / "other" / "iteration_000001", "save_ckpt_dir": tmp_path / "mine"}
    with pytest.raises(MindRLHFError, match=r"mine holds the results of an earlier run \(metrics.jsonl\)"):
        run_ppo(options(configs, tmp_path, **given))
