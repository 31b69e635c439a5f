"""Flags made from their declarations: each option is one, and parses back to its dataclass."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mindrlhf.configs.faults import Faults
from mindrlhf.configs.fields import keys_of
from mindrlhf.configs.flags import PPOOptions, RewardOptions, SFTOptions
from mindrlhf.configs.parser import add_flags, check_options

REQUIRED = {
    PPOOptions: ("--sft_path_infer", "--sft_path_train"),
    SFTOptions: ("--sft_path", "--load_sft_checkpoint", "--mind_dataset_dir", "--save_ckpt_dir"),
    RewardOptions: ("--reward_path", "--load_sft_checkpoint", "--mind_dataset_dir", "--save_ckpt_dir"),
}


def parsed(options: Any, *arguments: str) -> Any:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser, options)
    required = [word for flag in REQUIRED[options] for word in (flag, "p")]
    return options(**vars(parser.parse_args([*required, *arguments])))


@pytest.mark.parametrize("options", list(REQUIRED))
def test_required_flags_and_defaults(options: Any) -> None:
    found = parsed(options)
    keys = keys_of(options)
    assert set(keys) == {field.name for field in dataclasses.fields(options)}
    for name, key in keys.items():
        value = getattr(found, name)
        assert value == (Path("p") if key.required else [] if name == "overrides" else key.default)
    faults = Faults()
    check_options(found, faults)
    assert len(faults) == 0


def test_values_have_their_types() -> None:
    ppo = parsed(
        PPOOptions,
        *("--set", "a=1", "--set", "b=2", "--use_parallel", "no", "--world_size", "8", "--trackers", "none"),
        *("--watchdog_timeout", "1e2", "--tokenizer_path", "", "--run_name", "x"),
    )
    assert (ppo.overrides, ppo.use_parallel, ppo.world_size, ppo.trackers) == (["a=1", "b=2"], False, 8, ())
    assert (ppo.watchdog_timeout, ppo.tokenizer_path, ppo.save_ckpt_dir) == (100.0, None, Path("runs/x"))
    sft = parsed(SFTOptions, "--learning_rate", "1e-4", "--epochs", "3", "--eval_fraction", "0.5")
    assert (sft.config_path, sft.learning_rate, sft.epochs, sft.eval_fraction) == (Path("p"), 1e-4, 3, 0.5)


def test_every_option_out_of_range_is_named() -> None:
    options = SFTOptions(
        config_path=Path("p"), load_sft_checkpoint=Path("p"), mind_dataset_dir=Path("p"),
        save_ckpt_dir=Path("p"), epochs=0, seed=True, device_target="TPU", cpu_matmul_dtype="int8",
        eval_fraction=float("nan"), learning_rate=None,
    )  # fmt: skip
    faults = Faults()
    valid = check_options(options, faults)
    names = {"epochs", "seed", "device_target", "cpu_matmul_dtype", "eval_fraction"}
    assert len(faults) == len(names)
    assert set(keys_of(SFTOptions)) - set(valid) == names
