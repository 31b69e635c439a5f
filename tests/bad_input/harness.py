"""One bad input: good files of a tiny job, what is spoilt, and how a script is run and its end judged."""

from __future__ import annotations

import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

REPO_ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = REPO_ROOT / "examples" / "qwen_ppo_tutorial"
CONFIGS = REPO_ROOT / "model_configs" / "qwen_ppo"
CONVERT, DATA = EXAMPLES / "convert_weight.py", EXAMPLES / "rlhf_data.py"
PPO, SFT, REWARD = EXAMPLES / "ppo_one_stage.py", EXAMPLES / "sft.py", EXAMPLES / "reward_model.py"
TRANSFORM = REPO_ROOT / "scripts" / "transform_checkpoint.py"
CHAT, REPORT = EXAMPLES / "chat.py", REPO_ROOT / "mindrlhf" / "report" / "__main__.py"
LAUNCHER = REPO_ROOT / "scripts" / "msrun_launcher.py"

NO_MINDSPORE = {CONVERT, TRANSFORM, LAUNCHER, CHAT, REPORT}
"""Scripts that find their fault before they import it, in files without MindRecord."""

SECONDS = 20.0
_HASHED_BYTES = 1 << 20
EXIT_CODE = 2

# 256 bytes, three control tokens and five rows that nothing uses, so that 8 divides it.
VOCAB, TOKENS, PAD = 264, 259, 256
MODEL = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_layers": 1, "num_heads": 4, "n_kv_heads": 2,
    "intermediate_size": 16, "seq_length": 96, "eos_token_id": [258, 256], "pad_token_id": PAD,
    "bos_token_id": PAD,
}  # fmt: skip
PPO_SETTINGS = {
    "rollout_batch_size": 4, "num_minibatches": 2, "max_prompt_length": 32, "max_response_length": 8,
    "stop_token_ids": [258, 256], "pad_token_id": PAD, "valid_vocab_size": TOKENS, "total_iterations": 1,
}  # fmt: skip

# The flags of a job without fault; paths are below the case's directory, which is the working directory.
GOOD: dict[Path, dict[str, Any]] = {
    CONVERT: {"--input_path": "hf", "--output_path": "out.ckpt"},
    DATA: {
        "--file_path": "data.jsonl", "--output_path": "out.mindrecord", "--tokenizer_path": "tokenizer",
        "--system_prompt": "", "--max_prompt_length": "32", "--seq_length": "64",
    },
    PPO: {
        "--sft_path_infer": "generate_x.yaml", "--sft_path_train": "finetune_x.yaml",
        "--reward_path": "generate_x.yaml", "--critic_path": "finetune_x.yaml",
        "--load_sft_checkpoint_train": "policy.ckpt", "--load_rm_checkpoint": "reward.ckpt",
        "--mind_dataset_dir": "data.mindrecord", "--save_ckpt_dir": "runs/new", "--use_parallel": "False",
    },
    SFT: {
        "--sft_path": "finetune_x.yaml", "--load_sft_checkpoint": "policy.ckpt", "--batch_size": "4",
        "--mind_dataset_dir": "data.mindrecord", "--save_ckpt_dir": "runs/new", "--use_parallel": "False",
    },
    REWARD: {
        "--reward_path": "finetune_x.yaml", "--load_sft_checkpoint": "policy.ckpt", "--batch_size": "4",
        "--mind_dataset_dir": "pairs.mindrecord", "--save_ckpt_dir": "runs/new", "--use_parallel": "False",
    },
    TRANSFORM: {"--input": "policy.ckpt", "--output": "ranks", "--output_config": "split.yaml"},
    CHAT: {
        "--checkpoint": "policy.ckpt", "--config": "finetune_x.yaml", "--tokenizer_path": "tokenizer",
        "--prompt_file": "data.jsonl", "--output_file": "out.jsonl", "--max_tokens": "2",
    },
    REPORT: {"": "run", "--output": "out.html"},
    LAUNCHER: {"--workers": "1", "--log_dir": "log", "": "script.py"},
}  # fmt: skip


class Case:
    """A directory with good files, and the command line that uses them; a row of the table spoils either."""

    def __init__(self, directory: Path, script: Path) -> None:
        self.directory = directory
        self.script = script
        self.flags: dict[str, Any] = dict(GOOD[script])
        self.env: dict[str, str] = {}
        self.closing: list[Callable[[], object]] = []

    def __truediv__(self, name: str) -> Path:
        return self.directory / name

    def give(self, flags: Mapping[str, Any] | None = None, **more: Any) -> None:
        """Changes flags (``None`` takes one out); keywords are flags without their dashes."""
        for name, value in {**(flags or {}), **{f"--{key}": value for key, value in more.items()}}.items():
            if value is None:
                self.flags.pop(name, None)
            else:
                self.flags[name] = value

    def instead(self, **flags: Any) -> None:
        """Replaces all flags."""
        self.flags = {f"--{name}": value for name, value in flags.items()}

    def yaml(self, name: str, key_path: str, value: Any) -> None:
        """Sets one key of a YAML by its dotted path."""
        edit_yaml(self / name, self / name, {key_path: value})

    def text(self, name: str, old: str, new: str) -> None:
        """Replaces text in a file; it must be there."""
        content = (self / name).read_text(encoding="utf-8")
        assert old in content, old
        self.write(name, content.replace(old, new, 1))

    def write(self, name: str, content: str | bytes) -> None:
        """Makes or replaces a file."""
        path = self / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # it may be a link to the file of all cases
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def cut(self, name: str, keep: float = 0.5) -> None:
        """Truncates a file."""
        content = (self / name).read_bytes()
        self.write(name, content[: int(len(content) * keep)])

    def flip(self, name: str, at: int, mask: int = 0xFF) -> None:
        """Changes one byte."""
        content = bytearray((self / name).read_bytes())
        content[at] ^= mask
        self.write(name, bytes(content))

    def remove(self, name: str) -> None:
        """Removes a file or directory."""
        path = self / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    @property
    def arguments(self) -> list[str]:
        """The command line behind the script."""
        words: list[str] = []
        for name, value in self.flags.items():
            for entry in value if isinstance(value, list) else [value]:
                words += [*([name] if name else []), *([] if entry is True else [str(entry)])]
        return words

    def listing(self) -> dict[str, str]:
        """Every file and directory with what tells of a change."""
        paths = sorted(self.directory.rglob("*"))
        return {str(path.relative_to(self.directory)): _fingerprint(path) for path in paths}


def _fingerprint(path: Path) -> str:
    if path.is_dir():
        return "directory"
    found = path.stat()
    if found.st_size > _HASHED_BYTES:  # MindRecord files have 50 MB, however few rows
        return f"{found.st_ino} {found.st_size} {found.st_mtime_ns}"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def link_files(source: Path, target: Path) -> None:
    """A copy of a directory in which files are links; :class:`Case` breaks a link before it writes."""
    shutil.copytree(source, target, copy_function=os.link)


@dataclass(frozen=True)
class Bad:
    """A row of the table.

    Attributes:
        name: what is wrong, in words.
        script: what is run.
        spoil: makes the case bad.
        where: regular expression of the file, line, key or flag that the message must name.
        value: of the value or state that it must show.
        remedy: of what it must tell to do.
        also: marks: ``subprocess`` runs the script as a process of its own, too; ``alone`` only so (a worker
            of msrun is watched, and ended with the others); ``full_disk`` on a full disk.
    """

    name: str
    script: Path
    spoil: Callable[[Case], object]
    where: str
    value: str
    remedy: str
    also: frozenset[str] = field(default_factory=frozenset)

    def __str__(self) -> str:
        return f"{self.script.stem}: {self.name}"


@dataclass(frozen=True)
class End:
    """How a run ended."""

    code: int
    output: str
    seconds: float


def run_here(case: Case, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> End:
    """The script in this process, as ``python script.py ...`` would run it."""
    monkeypatch.setattr(sys, "argv", [str(case.script), *case.arguments])
    monkeypatch.chdir(case.directory)
    for name, value in case.env.items():
        monkeypatch.setenv(name, value)
    capfd.readouterr()
    started = time.monotonic()
    try:
        runpy.run_path(str(case.script), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    seconds = time.monotonic() - started
    captured = capfd.readouterr()
    return End(code, captured.err + captured.out, seconds)


def run_alone(case: Case) -> End:
    """The script as a process of its own."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(case.script), *case.arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=case.directory,
        # What would be left in the temporary directory is then seen, too.
        env={**os.environ, "PYTHONPATH": str(REPO_ROOT), "TMPDIR": str(case.directory), **case.env},
        check=False,
    )
    return End(done.returncode, done.stderr + done.stdout, time.monotonic() - started)


def judge(row: Bad, end: End, before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """The whole promise: one error with place, value and remedy, code 2, in time, nothing left behind."""
    assert end.code == EXIT_CODE, end.output
    assert "Traceback" not in end.output, end.output
    errors = re.findall(r"^(?:\S+: )?error: ", end.output, re.MULTILINE)
    assert len(errors) == 1, end.output
    message = end.output[end.output.index(errors[0]) :]
    for what, pattern in (("where", row.where), ("value", row.value), ("remedy", row.remedy)):
        assert re.search(pattern, message, re.DOTALL), f"{what}: no {pattern!r} in\n{message}"
    assert end.seconds < SECONDS
    assert after == before, sorted(set(after) ^ set(before)) or "a file was changed"


def edit_yaml(source: Path, target: Path, changes: Mapping[str, Any]) -> None:
    """Writes a YAML with some keys, given by dotted paths, replaced."""
    root = yaml.safe_load(source.read_text(encoding="utf-8"))
    for key_path, value in changes.items():
        *parents, last = key_path.split(".")
        section = root
        for parent in parents:
            section = section[parent]
        section[last] = value
    target.unlink(missing_ok=True)
    target.write_text(yaml.safe_dump(root, sort_keys=False), encoding="utf-8")


def make_good_files(directory: Path) -> None:
    """Everything that the jobs of :data:`GOOD` read, but for MindRecord files."""
    _write_yamls(directory)
    _write_tokenizer(directory / "tokenizer")
    rows = [{"prompt": f"q {i}", "pos_resp": f"yes {i}", "neg_resp": f"no {i}"} for i in range(12)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "data.jsonl").write_text(lines, encoding="utf-8")
    (directory / "script.py").write_text("print('ran')\n", encoding="utf-8")
    (directory / "run").mkdir()
    metrics = {"iteration": 1, "objective/scores": 0.5}
    (directory / "run" / "metrics.jsonl").write_text(json.dumps(metrics) + "\n", encoding="utf-8")
    _write_weights(directory)


def _write_yamls(directory: Path) -> None:
    model = {f"model.model_config.{key}": value for key, value in MODEL.items()}
    for kind in ("generate", "finetune"):
        one = {"parallel_config.data_parallel": 1, "parallel_config.model_parallel": 1}
        edit_yaml(CONFIGS / f"{kind}_qwen2_tiny.yaml", directory / f"{kind}_x.yaml", model | one)
    two = {"parallel_config.data_parallel": 1, "parallel_config.model_parallel": 2}
    edit_yaml(directory / "finetune_x.yaml", directory / "split.yaml", two)
    edit_yaml(CONFIGS / "ppo_qwen2_tiny.yaml", directory / "ppo_x.yaml", PPO_SETTINGS)


def _write_tokenizer(directory: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    directory.mkdir()
    vocab = {text: number for number, text in enumerate(sorted(ByteLevel.alphabet()))}
    (directory / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (directory / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")


def _write_weights(directory: Path) -> None:
    from mindrlhf.checkpoint.conversion import mindspore_to_hf
    from mindrlhf.checkpoint.shards import save_shard
    from mindrlhf.checkpoint.sources import ArraySource
    from mindrlhf.checkpoint.weight_files import write_weights
    from mindrlhf.configs.load import load_run_config
    from mindrlhf.models.qwen2.layouts import LM_HEAD, parameter_layouts
    from mindrlhf.parallel.layout import Mesh

    model = load_run_config(directory / "finetune_x.yaml").model
    random = np.random.default_rng(0)
    layouts = parameter_layouts(model, Mesh(), score_head=True)
    full = {name: random.normal(0, 0.02, layout.shape).astype("f4") for name, layout in layouts.items()}
    policy = {name: array for name, array in full.items() if "score" not in name}
    write_weights(directory / "policy.ckpt", ArraySource(policy))
    reward = {name: array for name, array in full.items() if name != LM_HEAD}
    write_weights(directory / "reward.ckpt", ArraySource(reward))
    for rank in range(2):
        parts = parameter_layouts(model, Mesh(1, 2))
        save_shard(
            directory / "two_ranks", rank, {name: parts[name].take(policy[name], rank) for name in parts}
        )
    mindspore_to_hf(directory / "policy.ckpt", directory / "hf", config=directory / "finetune_x.yaml")


def make_good_records(directory: Path) -> None:
    """The MindRecord files of prompts and pairs."""
    from mindrlhf.data.preprocess import PreprocessOptions, preprocess
    from mindrlhf.data.tokenizer_loading import load_tokenizer

    for name, pairs in (("data", False), ("pairs", True)):
        options = PreprocessOptions(
            file_path=directory / "data.jsonl",
            output_path=directory / f"{name}.mindrecord",
            max_prompt_length=32,
            seq_length=64,
            system_prompt="",
            pairs=pairs,
        )
        preprocess(load_tokenizer(directory / "tokenizer"), options)


def write_records(path: Path, *, remove: bool = True, **columns: np.ndarray) -> None:
    """A MindRecord file with any int32 columns in place of ``path``."""
    from mindrlhf.data.mindrecord import Column, write_mindrecord

    if remove:
        path.unlink(missing_ok=True)
        Path(f"{path}.db").unlink(missing_ok=True)
    schema = {name: Column("int32", array.shape[1]) for name, array in columns.items()}
    write_mindrecord(path, schema, [{name: array.astype(np.int32) for name, array in columns.items()}])


def prompt_columns(path: Path) -> dict[str, np.ndarray]:
    """The three columns of a prompt data set."""
    from tests.probes import read_columns

    return read_columns(path, ["prompt_ids", "pretrain_ids", "loss_mask"])
