"""Workers that meet in collectives until one of them stays away: worker_failing.py TIMEOUT."""

from __future__ import annotations

import sys
import time

from mindrlhf.runtime.supervision import run_worker
from mindrlhf.utils.ranks import is_scheduler

FAILING_RANK = 1
FAILING_ITERATION = 3


def fall_asleep() -> None:
    """What a rank that never comes back does."""
    time.sleep(600)


def main() -> None:
    from mindrlhf.runtime.launching import scratch_directory, serve_as_scheduler

    if is_scheduler():
        serve_as_scheduler()
        return
    from mindrlhf.configs.keys import ContextConfig
    from mindrlhf.runtime.device import start_runtime
    from mindrlhf.runtime.host_exchange import HostExchange
    from mindrlhf.runtime.watchdog import Watchdog
    from mindrlhf.utils.timers import PhaseTimer

    scratch = scratch_directory()
    runtime = start_runtime(ContextConfig(device_target="CPU"), use_parallel=True, scratch_dir=scratch)
    exchange = HostExchange(runtime)
    iteration = 0
    watchdog = Watchdog(float(sys.argv[1]), computing={"rollout", "train"})
    watchdog.follow(lambda: iteration)
    timer = PhaseTimer([watchdog])
    while True:
        iteration += 1
        with timer.phase("rollout"):
            exchange.barrier()
        with timer.phase("train"):
            if iteration == FAILING_ITERATION and runtime.rank == FAILING_RANK:
                sys.stderr.write(f"fails at {time.time()}\n")
                fall_asleep()
            exchange.barrier()


if __name__ == "__main__":
    run_worker(main)
