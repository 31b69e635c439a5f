"""Rows per second and peak memory of rlhf_data's preprocessing.

    python scripts/benchmark/preprocess.py --tokenizer_path TOKENIZER_DIR [--file_path DATA.jsonl]

Without --file_path the text is generated, about as long as CValues' (prompt 23, response 155 characters).
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from itertools import cycle, islice
from pathlib import Path

from mindrlhf.data.preprocess import PreprocessOptions, preprocess
from mindrlhf.data.tokenizer_loading import load_tokenizer
from mindrlhf.utils.command_line import run_main

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from demo_text import demo_rows

ANSWERS_PER_RESPONSE = 3


def write_input(path: Path, rows: int, source: Path | None) -> float:
    """Writes ``rows`` lines; returns the mean number of characters of prompt and response."""
    characters = 0
    with path.open("w", encoding="utf-8") as file:
        for row in islice(long_rows() if source is None else repeated(source), rows):
            characters += len(row["prompt"]) + len(row["pos_resp"])
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return characters / rows


def long_rows():  # type: ignore[no-untyped-def]
    """Chinese demo rows whose response joins several."""
    chinese = (row for number, row in enumerate(demo_rows(sys.maxsize, 0)) if number % 2 == 0)
    while group := list(islice(chinese, ANSWERS_PER_RESPONSE)):
        yield {**group[0], "pos_resp": "\n".join(row["pos_resp"] for row in group)}


def repeated(path: Path):  # type: ignore[no-untyped-def]
    """Lines of a file, over and over."""
    with path.open(encoding="utf-8") as file:
        yield from cycle([json.loads(line) for line in file if line.strip()])


def main() -> int:
    """Parse, run, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer_path", required=True)
    parser.add_argument("--file_path", type=Path, help="jsonl whose lines are repeated up to --rows")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--max_prompt_length", type=int, default=512)
    parser.add_argument("--seq_length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=256)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.tokenizer_path)
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "input.jsonl"
        characters = write_input(source, arguments.rows, arguments.file_path)
        options = PreprocessOptions(
            source,
            Path(directory) / "output.mindrecord",
            max_prompt_length=arguments.max_prompt_length,
            seq_length=arguments.seq_length,
            batch=arguments.batch,
        )
        summary = preprocess(tokenizer, options)
    counts = summary.counts
    tokens = (counts.prompt_tokens + counts.response_tokens) / max(counts.rows, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"rows          {counts.rows:,} of {characters:.0f} characters, {tokens:.0f} tokens")
    print(f"lengths       {arguments.max_prompt_length} / {arguments.seq_length}")
    print(f"speed         {summary.rows_per_second:,.0f} rows/s ({summary.seconds:.1f} s)")
    print(f"peak memory   {peak:,.0f} MiB")
    return 0


if __name__ == "__main__":
    run_main(main)
