"""What every command-line script shares."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from mindrlhf.utils.errors import MindRLHFError

_TRUE = frozenset({"true", "1", "yes"})
_FALSE = frozenset({"false", "0", "no"})

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def str_to_bool(text: str) -> bool:
    """The argparse type of a ``--flag True|False`` option.

    Args:
        text: True/False/1/0/yes/no in any case.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    word = text.strip().lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Runs a script's ``main`` and exits with its code.

    A :class:`MindRLHFError` is printed as one ``error: ...`` message with exit code 2, an interrupt
    exits with 130; any other exception is a defect of ours and keeps its traceback.
    """
    try:
        code = main()
    except MindRLHFError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(code or 0)
