"""Workers that meet in collectives until one of them fails: worker_failing.py hang|kill|raise TIMEOUT."""

from __future__ import annotations

import os
import signal
import sys
import time

from mindrlhf.runtime.supervision import run_worker
from mindrlhf.utils.ranks import is_scheduler

FAILING_RANK = 1
FAILING_ITERATION = 3


def fall_asleep() -> None:
    """What a rank that never comes back does."""
    time.sleep(600)


def fail(how: str) -> None:
    """Fails on one rank, in the middle of a phase that all ranks are in."""
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raise":
        raise ValueError("weights are broken")
    fall_asleep()


def main() -> None:
    from mindrlhf.runtime.launching import scratch_directory, serve_as_scheduler

    if is_scheduler():
        serve_as_scheduler()
        return
    from mindrlhf.configs.schema import ContextConfig
    from mindrlhf.runtime.device import start_runtime
    from mindrlhf.runtime.host_exchange import HostExchange
    from mindrlhf.runtime.watchdog import Watchdog
    from mindrlhf.utils.timers import PhaseTimer

    scratch = scratch_directory()
    runtime = start_runtime(ContextConfig(device_target="CPU"), use_parallel=True, scratch_dir=scratch)
    exchange = HostExchange(runtime)
    iteration = 0
    watchdog = Watchdog(float(sys.argv[2]), computing={"rollout", "train"})
    watchdog.follow(lambda: iteration, first_phase="rollout")
    timer = PhaseTimer([watchdog])
    while True:
        iteration += 1
        with timer.phase("rollout"):
            exchange.barrier()
        with timer.phase("train"):
            if iteration == FAILING_ITERATION and runtime.rank == FAILING_RANK:
                sys.stderr.write(f"fails at {time.time()}\n")
                fail(sys.argv[1])
            exchange.barrier()


if __name__ == "__main__":
    run_worker(main)
