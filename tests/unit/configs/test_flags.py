"""Flags with a form of their own: the name of a run, trackers."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from mindrlhf.cli.ppo import build_parser as ppo_parser
from mindrlhf.cli.sft import build_parser as sft_parser
from mindrlhf.configs.flags import run_directory


@pytest.mark.parametrize("name", ["a", "smollm2-seed_1", "0.5B+lr=1e-5", "运行"])
def test_run_names(name: str) -> None:
    assert run_directory(name) == Path("runs") / name


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/tmp/x", "-x", ".hidden", "a b", "x\n", "a" * 101])
def test_what_is_no_run_name(name: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a name of a run"):
        run_directory(name)


PPO_FLAGS = [
    *("--sft_path_infer", "a", "--sft_path_train", "b", "--reward_path", "c", "--critic_path", "d"),
]
SFT_FLAGS = ["--sft_path", "a", "--load_sft_checkpoint", "b", "--mind_dataset_dir", "c"]


def test_run_name_is_another_spelling_of_the_directory_of_results(capsys: pytest.CaptureFixture[str]) -> None:
    for parser, flags in ((ppo_parser(), PPO_FLAGS), (sft_parser(), SFT_FLAGS)):
        assert parser.parse_args([*flags, "--run_name", "x"]).save_ckpt_dir == Path("runs/x")
        assert parser.parse_args([*flags, "--save_ckpt_dir", "y"]).save_ckpt_dir == Path("y")
        assert "run_name" not in parser.parse_args([*flags, "--run_name", "x"])
        with pytest.raises(SystemExit):
            parser.parse_args([*flags, "--run_name", "x", "--save_ckpt_dir", "y"])
        assert "not allowed with argument" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            parser.parse_args([*flags, "--run_name", "../x"])
        assert "is not a name of a run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sft_parser().parse_args(SFT_FLAGS)
    assert "one of the arguments --save_ckpt_dir --run_name is required" in capsys.readouterr().err


def test_trackers_flag(capsys: pytest.CaptureFixture[str]) -> None:
    for parser, flags in ((ppo_parser(), PPO_FLAGS), (sft_parser(), [*SFT_FLAGS, "--run_name", "x"])):
        assert parser.parse_args(flags).trackers == ("tensorboard",)
        assert parser.parse_args([*flags, "--trackers", "wandb,swanlab"]).trackers == ("wandb", "swanlab")
        assert parser.parse_args([*flags, "--trackers", "none"]).trackers == ()
        with pytest.raises(SystemExit):
            parser.parse_args([*flags, "--trackers", "none,wandb"])
        assert "none stands alone" in capsys.readouterr().err
