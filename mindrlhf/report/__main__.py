"""``python -m mindrlhf.report RUN_DIR [RUN_DIR ...]``: one HTML page about one run or several.

``mindrlhf-report`` is the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mindrlhf.report.page import is_report, render
from mindrlhf.report.run_data import FILES, ReportError, read_runs
from mindrlhf.utils.command_line import new_parser, run_main
from mindrlhf.utils.files import atomic_file
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.outputs import Output, check_outputs, file_of

DEFAULT_NAME = "report.html"

logger = get_logger("mindrlhf.report")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    as_module = Path(sys.argv[0]).name == "__main__.py"
    parser = new_parser(
        "Writes one self-contained HTML page about a run, or about several side by side.",
        prog="python -m mindrlhf.report" if as_module else None,
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN_DIR",
        help="--save_ckpt_dir of a run of any stage (holds metrics.jsonl)",
    )
    files.add_argument(
        "--output",
        type=Path,
        help=f"the page; default: {DEFAULT_NAME} in RUN_DIR, or in the current directory for several runs, "
        "in place of an earlier report",
    )
    files.add_argument("--overwrite", action="store_true", help="replace a report at --output")
    return parser


def write_report(directories: Sequence[Path], output: Path | None = None, *, overwrite: bool = False) -> Path:
    """Writes the page about runs and returns its path.

    Args:
        directories: one ``--save_ckpt_dir`` or several.
        output: the page; by default ``report.html`` in the directory of the only run, or in the current one,
            in place of an earlier report.
        overwrite: whether a report at ``output`` may be replaced.

    Raises:
        MindRLHFError: a run cannot be read; the page cannot be written, or would replace something else.
    """
    default = directories[0] / DEFAULT_NAME if len(directories) == 1 else Path(DEFAULT_NAME)
    path = output or default
    check_outputs(
        [Output("--output", path, file_of("a report", is_report), overwrite or path == default)],
        [("RUN_DIR", directory / name) for directory in directories for name in FILES],
    )
    runs = read_runs(directories)
    page = render(runs)
    try:
        with atomic_file(path) as temporary:
            # A lone surrogate, which a tokenizer may leave in a response, becomes its escape sequence.
            temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ReportError(f"--output {path}: cannot be written ({error.strerror}); give another") from error
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Parses, writes, says where."""
    arguments = build_parser().parse_args(argv)
    path = write_report(arguments.runs, arguments.output, overwrite=arguments.overwrite)
    logger.info("report: %s (%.1f MB)", path, path.stat().st_size / 1e6)


def command() -> NoReturn:
    """``mindrlhf-report``."""
    run_main(main)


if __name__ == "__main__":
    command()
