"""The whole way from CValues jsonl to a MindRecord prompt data set."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from mindrlhf.data.chat import PromptFormat, chatml_format, encode_samples, raw_format
from mindrlhf.data.jsonl import CValuesReader, count_lines
from mindrlhf.data.mindrecord import Batch, check_output, write_mindrecord
from mindrlhf.data.rows import Overlong, RowBuilder, RowCounts
from mindrlhf.data.schema import prompt_schema
from mindrlhf.data.tokenizers import Tokenizer
from mindrlhf.utils.errors import DataError
from mindrlhf.utils.progress import ProgressBar


@dataclass(frozen=True)
class PreprocessOptions:
    """What to make of which file.

    Attributes:
        file_path: CValues jsonl.
        output_path: the MindRecord file to write.
        max_prompt_length: P, columns of ``prompt_ids``.
        seq_length: columns of ``pretrain_ids`` and ``loss_mask``.
        chat_template: put prompts into ChatML; otherwise they are taken as they are.
        system_prompt: text of the system turn; ``None`` is the model's default, ``""`` leaves it out.
        overlong: what to do with a prompt longer than P.
        skip_bad_lines: count bad lines and go on.
        prompt_only: the file has prompts alone.
        overwrite: replace an existing output.
        batch: lines encoded and rows written at a time.
    """

    file_path: Path
    output_path: Path
    max_prompt_length: int = 4096
    seq_length: int = 8193
    chat_template: bool = True
    system_prompt: str | None = None
    overlong: Overlong = "drop"
    skip_bad_lines: bool = False
    prompt_only: bool = False
    overwrite: bool = False
    batch: int = 256


@dataclass(frozen=True)
class PreprocessSummary:
    """What came of it.

    Attributes:
        counts: rows, drops, cuts and tokens.
        bad_lines: lines passed over.
        seconds: time for reading, encoding and writing.
        prompt_format: what stands around each prompt.
    """

    counts: RowCounts
    bad_lines: int
    seconds: float
    prompt_format: PromptFormat

    @property
    def rows_per_second(self) -> float:
        """Rows written in a second."""
        return self.counts.rows / max(self.seconds, 1e-9)


def preprocess(tokenizer: Tokenizer, options: PreprocessOptions) -> PreprocessSummary:
    """Reads, encodes and writes batch by batch; memory does not grow with the file.

    Args:
        tokenizer: see :func:`mindrlhf.data.tokenizers.load_tokenizer`.
        options: see :class:`PreprocessOptions`.

    Raises:
        DataError: a bad line (unless skipped), lengths without room, a tokenizer without ChatML tokens, an
            existing output, or nothing left to write. No output file is left then.
    """
    if options.batch < 1:
        raise DataError(f"batch is {options.batch}; it must be at least 1")
    prompt_format = (
        chatml_format(tokenizer, options.system_prompt) if options.chat_template else raw_format(tokenizer)
    )
    builder = RowBuilder(
        prompt_format,
        pad_id=tokenizer.special.pad,
        max_prompt_length=options.max_prompt_length,
        seq_length=options.seq_length,
        overlong=options.overlong,
    )
    check_output(options.output_path, overwrite=options.overwrite)
    reader = CValuesReader(
        options.file_path, prompt_only=options.prompt_only, skip_bad_lines=options.skip_bad_lines
    )
    lines = count_lines(options.file_path)
    if lines == 0:
        raise DataError(f"{options.file_path}: is empty")
    # The two seconds that MindSpore takes to import are not the speed of the work.
    importlib.import_module("mindspore.mindrecord")
    started = time.perf_counter()
    with ProgressBar("tokenising", lines) as bar:
        write_mindrecord(
            options.output_path,
            prompt_schema(options.max_prompt_length, options.seq_length),
            _batches(tokenizer, prompt_format, reader, builder, options.batch, bar),
            overwrite=options.overwrite,
        )
    return PreprocessSummary(builder.counts, reader.bad_lines, time.perf_counter() - started, prompt_format)


def _batches(
    tokenizer: Tokenizer,
    prompt_format: PromptFormat,
    reader: CValuesReader,
    builder: RowBuilder,
    size: int,
    bar: ProgressBar,
) -> Iterator[Batch]:
    samples = iter(reader)
    line = 0
    while batch := list(islice(samples, size)):
        yield builder.build(encode_samples(tokenizer, prompt_format, batch))
        bar.update(batch[-1].line - line)
        line = batch[-1].line
    if builder.counts.rows == 0:
        raise DataError(
            f"{reader.path}: no row is left to write ({builder.counts.dropped_prompts} prompts longer than "
            f"max_prompt_length dropped, {reader.bad_lines} bad lines)"
        )
