"""Reads CValues comparison data, one JSON object per line, without holding the file in memory."""

from __future__ import annotations

import json
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mindrlhf.utils.errors import MOST_BULLETS, DataError, bullet_list
from mindrlhf.utils.outputs import Output, file_of

KEYS = ("prompt", "pos_resp", "neg_resp")
_READ_SIZE = 1 << 20


class Sample(NamedTuple):
    """One line of the file.

    Attributes:
        prompt: the user's text.
        response: the preferred answer, ``None`` when only prompts are read.
        line: its line number, counted from 1.
        rejected: the other answer, ``None`` unless pairs are read.
    """

    prompt: str
    response: str | None
    line: int
    rejected: str | None = None


class CValuesReader:
    """Iterates over the samples of a CValues jsonl file.

    A line has the strings ``prompt`` and ``pos_resp``, which may not be empty; other keys are ignored,
    blank lines are skipped, a byte order mark at the start is tolerated.

    Args:
        path: the file.
        prompt_only: ask for ``prompt`` alone.
        pairs: ask for ``neg_resp`` too.
        skip_bad_lines: count bad lines and continue instead of raising.

    Raises:
        DataError: while iterating: the file cannot be read or is empty; no line is good; or a line is bad
            and ``skip_bad_lines`` is off, in which case the rest of the file is checked too and all bad
            lines are named at once.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        prompt_only: bool = False,
        pairs: bool = False,
        skip_bad_lines: bool = False,
    ) -> None:
        self.path = Path(path)
        self.bad_lines = 0
        self._keys = KEYS[: 1 if prompt_only else 3 if pairs else 2]
        self._skip_bad_lines = skip_bad_lines

    def __iter__(self) -> Iterator[Sample]:
        """Yields the good lines in order."""
        self.bad_lines = 0
        is_any_good = False
        shown: list[str] = []
        try:
            # Bytes, so that only \n ends a line and bad UTF-8 is a fault of its line alone.
            with open_regular(self.path) as file:
                for number, line in enumerate(file, start=1):
                    if not line.strip(b"\xef\xbb\xbf \t\r\n"):
                        continue
                    try:
                        sample = self._parse(line, number)
                    except ValueError as fault:
                        self.bad_lines += 1
                        if len(shown) < MOST_BULLETS:
                            shown.append(f"{self.path}:{number}: {fault}")
                        continue
                    is_any_good = True
                    if self._skip_bad_lines or not self.bad_lines:
                        yield sample
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if self.bad_lines and not (self._skip_bad_lines and is_any_good):
            raise DataError(self._message(shown, is_any_good))
        if not is_any_good:
            raise DataError(f"{self.path}: is empty; give a file with one JSON object per line")

    def _message(self, shown: list[str], is_any_good: bool) -> str:
        noun = "line" if self.bad_lines == 1 else "lines"
        remedy = "or skip bad lines with --skip_bad_lines" if is_any_good else "which has no good line"
        return (
            f"{self.bad_lines} bad {noun}:{bullet_list(shown, total=self.bad_lines)}\nfix the file, {remedy}"
        )

    def _parse(self, line: bytes, number: int) -> Sample:
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 (byte {error.start} of the line)") from error
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            hint = "; expected one object per line" if text.lstrip().startswith("[") else ""
            raise ValueError(f"not JSON ({error}){hint}") from error
        if not isinstance(row, dict):
            raise ValueError(f"a JSON {type(row).__name__}, expected an object")
        prompt, response, rejected = [*(_string(row, key) for key in self._keys), None, None][:3]
        assert prompt is not None
        return Sample(prompt, response, number, rejected)


def _string(row: dict[str, object], key: str) -> str:
    if key not in row:
        raise ValueError(f"key {key!r} is missing (the line has {', '.join(map(repr, row)) or 'none'})"[:300])
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is {type(value).__name__}, expected a string")
    if not value.strip():
        raise ValueError(f"{key!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{key!r} holds half a surrogate pair at character {error.start}") from error
    return value


def _unreadable(path: str | Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror}); give the path of a jsonl file")


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a file that is read more than once; a pipe would be empty, or would block, the second time.

    Raises:
        DataError: it is a pipe or a device.
        OSError: it cannot be read.
    """
    mode = Path(path).stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise DataError(f"{path}: is a pipe or a device, but is read more than once; give a regular file")
    return Path(path).open("rb")


def count_lines(path: str | Path) -> int:
    """Number of lines of a file, a last one without its line end included.

    Raises:
        DataError: the file cannot be read.
    """
    lines, last = 0, b"\n"
    try:
        with open_regular(path) as file:
            while block := file.read(_READ_SIZE):
                lines += block.count(b"\n")
                last = block[-1:]
    except OSError as error:
        raise _unreadable(path, error) from error
    return lines + (last != b"\n")


def rows_output(flag: str, path: Path, keys: Collection[str], *, overwrite: bool = False) -> Output:
    """A jsonl file whose rows have just these keys, for :func:`mindrlhf.utils.outputs.check_outputs`."""

    def is_one(path: Path) -> bool:
        with path.open(encoding="utf-8", errors="replace") as file:
            try:
                row = json.loads(file.readline())
            except (ValueError, RecursionError):
                return False
        return isinstance(row, dict) and row.keys() == set(keys)

    return Output(flag, path, file_of(f"a jsonl file with {', '.join(keys)}", is_one), overwrite)
