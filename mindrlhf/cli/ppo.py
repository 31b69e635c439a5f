"""PPO on Qwen2, training and inference in one job. Run it with msrun, or alone with --use_parallel False.

`mindrlhf-ppo` is the same as ppo_one_stage.py, which finds rewards.py beside itself for --reward_fn.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mindrlhf.configs.flags import PPOOptions
from mindrlhf.configs.parser import add_flags
from mindrlhf.runtime.supervision import run_worker
from mindrlhf.utils.command_line import new_parser


def build_parser() -> argparse.ArgumentParser:
    """The flags of :class:`mindrlhf.configs.flags.PPOOptions`."""
    parser = new_parser(__doc__)
    add_flags(parser, PPOOptions)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Parses, then runs the job or writes the strategies."""
    options = PPOOptions(**vars(build_parser().parse_args(argv)))
    from mindrlhf.trainer.programs import run_ppo, save_strategies

    if options.only_save_strategy:
        save_strategies(options, Path("strategy"))
    else:
        run_ppo(options)


def command() -> NoReturn:
    """``mindrlhf-ppo``."""
    run_worker(main)


if __name__ == "__main__":
    command()
