"""What every command-line script shares."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from typing import NoReturn

from mindrlhf.utils.errors import MindRLHFError
from mindrlhf.utils.supervision import join_under_msrun, membership

_TRUE = frozenset({"true", "1", "yes"})
_FALSE = frozenset({"false", "0", "no"})

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


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


def seconds(text: str) -> float:
    """The argparse type of a time limit: a finite number of seconds, 0 for none.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds, at least 0, got {text!r}")
    return number


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Runs a script's ``main`` and exits with its code.

    A :class:`MindRLHFError` is printed as one ``error: ...`` message with exit code 2, an interrupt
    exits with 130; any other exception is a defect of ours and keeps its traceback. Under msrun the
    supervisor hears of it, so that all workers end together.
    """
    try:
        join_under_msrun()
        code = main()
    except MindRLHFError as error:
        sys.stderr.write(f"error: {error}\n")
        _report(str(error), EXIT_USER_ERROR)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        _report("", EXIT_INTERRUPTED)
        sys.exit(EXIT_INTERRUPTED)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        _report(f"it has ended with exit code {code}" if code else "", code)
        raise
    except BaseException as error:
        # MindSpore's messages have a hundred lines; the log has them.
        _report(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}", 1)
        raise
    _report("" if not code else f"it has ended with exit code {code}", code or 0)
    sys.exit(code or 0)


def _report(cause: str, code: int) -> None:
    """Tells the supervisor how this process ends; no cause is needed for an end that was asked for."""
    member = membership()
    if member is None:
        return
    if cause and code not in (EXIT_INTERRUPTED, EXIT_TERMINATED):
        member.fail(cause, code)
    else:
        member.leave(code)
