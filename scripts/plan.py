#!/usr/bin/env python
"""Plans a PPO job without a device: memory per rank by model and phase, whether it fits, what must change.

python scripts/plan.py generate_X.yaml finetune_X.yaml ppo_X.yaml --device_memory 64GB
python scripts/plan.py --sft_path_infer G.yaml --sft_path_train F.yaml --world_size 8 --device_memory 64GB
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mindrlhf.configs.load import load_job
from mindrlhf.planning.plan_report import make_report, memory_limit, parse_bytes, print_report, report_dict
from mindrlhf.planning.splits import with_world_size
from mindrlhf.utils.command_line import run_main
from mindrlhf.utils.errors import ConfigError

MIN_WIDTH = 132


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    files = parser.add_argument_group("configurations, as for ppo_one_stage.py")
    files.add_argument(
        "yamls", nargs="*", type=Path, metavar="YAML", help="generate_X.yaml finetune_X.yaml ppo_X.yaml"
    )
    files.add_argument("--sft_path_infer", type=Path, help="policy as it generates")
    files.add_argument("--sft_path_train", type=Path, help="policy as it is trained")
    files.add_argument("--reward_path", type=Path, help="reward model (default: --sft_path_infer)")
    files.add_argument("--critic_path", type=Path, help="critic (default: --sft_path_infer)")
    files.add_argument(
        "--ppo_config", type=Path, help="PPO hyper-parameters (default: ppo_X.yaml beside finetune_X.yaml)"
    )
    files.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="override a PPO hyper-parameter; may be repeated",
    )  # fmt: skip
    machine = parser.add_argument_group("machine")
    machine.add_argument("--world_size", type=int, help="workers (default: as many as the YAMLs ask for)")
    machine.add_argument(
        "--device_memory",
        metavar="SIZE",
        help="of a device (CPU: of a worker); 64GB is 64 x 10^9, 64GiB 64 x 2^30 bytes",
    )
    machine.add_argument("--device_target", choices=["CPU", "Ascend", "GPU"], help="override the YAMLs'")
    reward = parser.add_argument_group("reward")
    reward.add_argument("--reward_fn", metavar="MODULE:FUNCTION", help="rewards from a function: no model")
    reward.add_argument("--no_reward_model", action="store_true", help="the same without naming it")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print the plan as JSON, sizes in bytes")
    return parser


def yaml_paths(args: argparse.Namespace) -> dict[str, Any]:
    """The five files of the job.

    Raises:
        ConfigError: files are missing, or given twice.
    """
    named = {name: getattr(args, name) for name in ("sft_path_infer", "sft_path_train", "ppo_config")}
    if args.yamls:
        twice = [f"--{name}" for name, path in named.items() if path is not None]
        if len(args.yamls) != len(named) or twice:
            what = " and ".join([f"{len(args.yamls)} YAML(s)", *twice])
            remedy = "give generate_X.yaml finetune_X.yaml ppo_X.yaml, or the flags alone"
            raise ConfigError([f"positional arguments: {what} given - {remedy}"])
        named = dict(zip(named, args.yamls, strict=True))
    missing = [f"--{name}: missing - name the YAML" for name in list(named)[:2] if named[name] is None]
    if missing:
        raise ConfigError(missing)
    return named | {"reward_path": args.reward_path, "critic_path": args.critic_path}


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the job, plans it, prints."""
    args = build_parser().parse_args(argv)
    if "MINDRLHF_LOG" not in os.environ:
        logging.getLogger("mindrlhf").setLevel(
            logging.WARNING
        )  # otherwise lines about each YAML precede the plan
    if args.world_size is not None and args.world_size < 1:
        raise ConfigError([f"--world_size: not a number of workers ({args.world_size}) - give 1 or more"])
    memory = None if args.device_memory is None else parse_bytes(args.device_memory)
    yaml_job = load_job(**yaml_paths(args), overrides=args.overrides, device_target=args.device_target)
    job = yaml_job
    if args.world_size not in (None, yaml_job.infer.parallel.world_size):
        job = with_world_size(yaml_job, args.world_size)
    with_reward_model = args.reward_fn is None and not args.no_reward_model
    report = make_report(
        job, limit=memory_limit(job, memory), with_reward_model=with_reward_model, yaml_job=yaml_job
    )
    if args.json:
        print(json.dumps(report_dict(report), indent=1))
        return
    console = Console()
    print_report(report, Console(width=max(console.width, MIN_WIDTH), soft_wrap=False))


if __name__ == "__main__":
    run_main(main)
