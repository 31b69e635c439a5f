"""Answers a file of prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from mindrlhf.chat.conversation import Conversation, Reply
from mindrlhf.data.jsonl import CValuesReader, open_regular
from mindrlhf.utils.errors import DataError, bullet_list
from mindrlhf.utils.files import atomic_file
from mindrlhf.utils.progress import ProgressBar

if TYPE_CHECKING:
    from mindrlhf.chat.worker_group import WorkerGroup

REPLY_KEYS = ("prompt", "response", "tokens", "stopped")
"""Of a line of ``--output_file``."""


def read_prompts(path: Path, *, skip_bad_lines: bool = False) -> list[str]:
    """Prompts of a file: jsonl with the string ``prompt`` on each line, or one text per line.

    It is jsonl when its name ends with .jsonl or its first line begins with a brace. Blank lines are skipped.

    Raises:
        DataError: the file cannot be read, is not UTF-8, holds no prompt, or has bad lines (all are named).
    """
    try:
        with open_regular(path) as file:
            first = file.readline().strip(b"\xef\xbb\xbf \t\r\n")
        if path.suffix == ".jsonl" or first.startswith(b"{"):
            reader = CValuesReader(path, prompt_only=True, skip_bad_lines=skip_bad_lines)
            prompts = [sample.prompt for sample in reader]
        else:
            text = path.read_text(encoding="utf-8-sig")
            prompts = [line.strip() for line in text.split("\n") if line.strip()]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from error
    if not prompts:
        raise DataError(f"{path}: holds no prompts")
    return prompts


def encode_prompts(
    prompts: Sequence[str], conversations: Sequence[Conversation], limits: Sequence[int]
) -> list[list[list[int]]]:
    """Ids of every prompt, per model.

    Raises:
        DataError: prompts that are too long, all of them at once.
    """
    faults, encoded = [], []
    for conversation, limit in zip(conversations, limits, strict=True):
        rows: list[list[int]] = []
        for number, prompt in enumerate(prompts, start=1):
            try:
                rows.append(conversation.prompt(prompt, limit))
            except DataError as error:
                faults.append(f"prompt {number}: {error}")
        encoded.append(rows)
    if faults:
        raise DataError(f"{len(faults)} prompt(s) cannot be sent:{bullet_list(faults)}")
    return encoded


def answer_file(
    workers: WorkerGroup, prompts: Sequence[str], encoded: Sequence[list[list[int]]], output: Path | None
) -> None:
    """Writes one JSON line per prompt, in the order of the file.

    Keys: ``prompt``, ``response``, ``tokens`` (with the stop token) and ``stopped``; those of the second
    model are ``compare_response``, ``compare_tokens`` and ``compare_stopped``.

    Args:
        workers: their models fix the number of rows per call.
        prompts: texts.
        encoded: per model, the ids of each prompt.
        output: the file, which appears when it is complete; standard output without one.
    """
    rows = workers.generators[0].rows
    with _opened(output) as file, ProgressBar("replies", len(prompts)) as bar:
        for first in range(0, len(prompts), rows):
            count = min(rows, len(prompts) - first)
            # The shape is fixed: a last batch that is not full repeats a prompt, and drops its replies.
            places = [first + min(row, count - 1) for row in range(rows)]
            replies = [[Reply(g.model.tokenizer, g.stop_ids) for _ in places] for g in workers.generators]
            for model, ids in workers.generate([[row[p] for p in places] for row in encoded], places):
                for reply, new in zip(replies[model], ids, strict=True):
                    reply.add(new)
            for row, prompt in enumerate(prompts[first : first + count]):
                line: dict[str, str | int | bool] = {"prompt": prompt}
                for prefix, of_model in zip(("", "compare_"), replies, strict=False):
                    reply = of_model[row]
                    reply.finish()
                    line[f"{prefix}response"] = reply.text
                    line[f"{prefix}tokens"] = reply.tokens
                    line[f"{prefix}stopped"] = reply.stopped
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(count)


@contextmanager
def _opened(output: Path | None) -> Iterator[IO[str]]:
    if output is None:
        yield sys.stdout
        return
    try:
        with atomic_file(output) as temporary, temporary.open("w", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise DataError(f"--output_file {output}: cannot be written ({error.strerror})") from error
