"""One job of 4 workers for the tests of what is split among workers (``split_reports`` of conftest.py)."""

from __future__ import annotations

import worker_infer
import worker_parallel
from worker_support import start, write_results


def main() -> None:
    rank, size = start()
    write_results(rank, worker_parallel.check_all(rank) | worker_infer.generate_all(rank, size))


if __name__ == "__main__":
    main()
