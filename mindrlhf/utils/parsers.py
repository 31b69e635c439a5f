"""How every script's command line looks: no abbreviations, and help that names each default."""

from __future__ import annotations

import argparse


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description and ends each option's help with its default.

    Nothing is added where there is no default, where the option is a bare switch, and where the help
    speaks of the default itself.
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
    """A parser without flags as every script has it.

    Args:
        description: the module's docstring.
        prog: the command; by default the name the script was started with.
    """
    return argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=HelpFormatter, allow_abbrev=False
    )
