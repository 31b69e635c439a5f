"""What every command-line script shares: its parser, types of flags, exit codes, and how it ends."""

from __future__ import annotations

import argparse
import codecs
import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from mindrlhf.utils.errors import MindRLHFError

_TRUE = frozenset({"true", "1", "yes"})
_FALSE = frozenset({"false", "0", "no"})

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
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


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description and ends each option's help with its default.

    Nothing is added when there is no default, the option is a bare switch, or the help names a default
    itself.
    """

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if not shows_default(action) or "default" in text:
            return text
        return f"{text} (default: %(default)s)"


def shows_default(action: argparse.Action) -> bool:
    """Whether an option has a default that its help must name."""
    is_switch = action.nargs == 0
    return not is_switch and action.default is not argparse.SUPPRESS and action.default not in (None, "", [])


def new_parser(description: str | None, *, prog: str | None = None) -> argparse.ArgumentParser:
    """The parser of a script, without flags yet and without abbreviations.

    Args:
        description: the module's docstring.
        prog: the command; by default the name that the script was started with.
    """
    return argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=HelpFormatter, allow_abbrev=False
    )


def run_main(
    main: Callable[[], int | None], *, on_exit: Callable[[str, int], None] = lambda cause, code: None
) -> NoReturn:
    """Runs a script's ``main`` and exits with its code.

    A :class:`MindRLHFError` is written as one ``error: ...`` message with exit code 2. An interrupt exits
    with 130. When the reader of standard output closes the pipe, it ends silently with 141, as SIGPIPE would
    end it. Any other exception is a defect of the library and keeps its traceback.

    Args:
        main: returns the exit code, ``None`` for 0.
        on_exit: called with the cause of a failure, empty when there is none, and the exit code.
    """
    try:
        code = _exit_code(main)
    except MindRLHFError as error:
        _say(f"error: {error}\n")
        on_exit(str(error), EXIT_USER_ERROR)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        _say("interrupted\n")
        on_exit("", EXIT_INTERRUPTED)
        sys.exit(EXIT_INTERRUPTED)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        on_exit(f"it has ended with exit code {code}" if code else "", code)
        raise
    except BaseException as error:
        # MindSpore's messages have a hundred lines; the log holds all of them.
        on_exit(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}", 1)
        raise
    on_exit(f"it has ended with exit code {code}" if code else "", code)
    sys.exit(code)


def _exit_code(main: Callable[[], int | None]) -> int:
    """The exit code of ``main``, once all of its output is written.

    Raises:
        MindRLHFError: text is not UTF-8 here, or standard output cannot be written.
    """
    _check_streams()
    try:
        try:
            code = main() or 0
        except SystemExit:  # argparse writes the help and ends
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except OSError as error:
        if error.filename is not None or not _is_output_lost():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        if error.errno == errno.EPIPE:
            return EXIT_BROKEN_PIPE
        raise MindRLHFError(
            f"standard output cannot be written ({error.strerror}); free space, or send it to another place"
        ) from error
    return code


def _check_streams() -> None:
    if sys.stdout is None:
        raise MindRLHFError("standard output is closed; send it to a file, or to /dev/null")
    for encoding in (sys.getfilesystemencoding(), sys.stdout.encoding or "utf-8"):
        if codecs.lookup(encoding).name != "utf-8":
            names = ("PYTHONIOENCODING", "PYTHONUTF8", "LC_ALL", "LC_CTYPE", "LANG")
            said = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
            said = [one for one in said if "UTF-8" not in one.upper()]
            raise MindRLHFError(
                f"file names and output are {encoding} here, not UTF-8 "
                f"({', '.join(said) or 'by -X utf8=0'}); set PYTHONUTF8=1, and no PYTHONIOENCODING"
            )


def _is_output_lost() -> bool:
    """Whether standard output takes nothing more, which only a write tells."""
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError:
        return True
    return False


def _say(text: str) -> None:
    with suppress(OSError):  # the exit code tells it, too
        sys.stderr.write(text)
