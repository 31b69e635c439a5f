"""Bad inputs of rlhf_data.py."""

from __future__ import annotations

import json

from tests.bad_input.harness import DATA, Bad, Case
from tests.bad_input.spoiling import FULL, NO_SPACE, REAL


def line(case: Case, number: int, text: str | bytes) -> None:
    """Replaces a line of the jsonl."""
    lines = (case / "data.jsonl").read_bytes().split(b"\n")
    lines[number - 1] = text.encode() if isinstance(text, str) else text
    case.write("data.jsonl", b"\n".join(lines))


def vocabulary(case: Case, **changes: int) -> None:
    content = json.loads((case / "tokenizer/vocab.json").read_text(encoding="utf-8"))
    case.write("tokenizer/vocab.json", json.dumps({**content, **changes}))


ROWS = [
    Bad("no input file", DATA, lambda c: c.give(file_path="no.jsonl"),
        r"no\.jsonl", "No such file", "give the path of a jsonl file", REAL),
    Bad("input is a directory", DATA, lambda c: c.give(file_path="hf"),
        "hf", "Is a directory", "give the path of a jsonl file"),
    Bad("empty input", DATA, lambda c: c.write("data.jsonl", ""),
        r"data\.jsonl", "is empty", "give a file with one JSON object per line"),
    Bad("nothing but blank lines", DATA, lambda c: c.write("data.jsonl", "\n \n"),
        r"data\.jsonl", "is empty", "give a file with one JSON object per line"),
    Bad("a device", DATA, lambda c: c.give(file_path="/dev/null"),
        "/dev/null", "is a pipe or a device", "give a regular file"),
    Bad("bad lines alone, to be skipped", DATA,
        lambda c: (c.write("data.jsonl", "x\n"), c.give(skip_bad_lines=True)),
        r"data\.jsonl:1", "not JSON", "fix the file, which has no good line"),
    Bad("pairs without the rejected response", DATA,
        lambda c: (line(c, 5, '{"prompt": "a", "pos_resp": "b"}'), c.give(pairs="True")),
        r"data\.jsonl:5", "'neg_resp' is missing", "fix the file"),
    Bad("a line that is cut short", DATA, lambda c: line(c, 3, '{"prompt": "a", "pos'),
        r"data\.jsonl:3", r"not JSON \(", "fix the file, or skip bad lines with --skip_bad_lines"),
    Bad("a line without the key", DATA, lambda c: line(c, 5, '{"promt": "a"}'),
        r"data\.jsonl:5", "'prompt' is missing .*'promt'", "fix the file"),
    Bad("a number where text belongs", DATA,
        lambda c: line(c, 2, '{"prompt": 7, "pos_resp": "a", "neg_resp": "b"}'),
        r"data\.jsonl:2", "'prompt' is int", "expected a string"),
    Bad("bytes that are not UTF-8", DATA, lambda c: line(c, 4, b'{"prompt": "\xff"}'),
        r"data\.jsonl:4", "not UTF-8 \\(byte 12", "fix the file"),
    Bad("several bad lines", DATA, lambda c: (line(c, 1, "x"), line(c, 7, "[]")),
        r"data\.jsonl:1: .*data\.jsonl:7: ", "2 bad lines", "fix the file"),
    Bad("all prompts too long", DATA, lambda c: c.give(max_prompt_length=20),
        r"data\.jsonl", "12 prompts longer than max_prompt_length", "raise --max_prompt_length"),
    Bad("no room for a prompt", DATA, lambda c: c.give(max_prompt_length=10),
        "max_prompt_length", "10, but the template around a prompt alone takes 19", "raise it"),
    Bad("no room for a response", DATA, lambda c: c.give(seq_length=32),
        "seq_length", "is 32", "must be greater than max_prompt_length 32"),
    Bad("text where a number belongs", DATA, lambda c: c.give(seq_length="long"),
        "--seq_length", "'long'", "invalid int value"),
    Bad("batch of nothing", DATA, lambda c: c.give(batch=0),
        "batch", "is 0", "must be at least 1"),
    Bad("pairs without responses", DATA, lambda c: c.give(pairs="True", prompt_only=True),
        "--pairs.*--prompt_only", "for none", "leave one of them out"),
    Bad("fraction above one", DATA, lambda c: c.give(eval_output_path="e.mindrecord", eval_fraction=2),
        "eval_fraction", r"is 2\.0", "above 0 and below 1"),
    Bad("nothing held out", DATA, lambda c: c.give(eval_output_path="e.mindrecord", eval_fraction=1e-9),
        r"data\.jsonl", "no prompt is held out at --eval_fraction 1e-09", "choose another one"),
    Bad("one output twice", DATA, lambda c: c.give(eval_output_path="out.mindrecord"),
        r"--eval_output_path out\.mindrecord", r"is --output_path out\.mindrecord", "give another path"),
    Bad("output is the input", DATA, lambda c: c.give(output_path="hf/../data.jsonl", overwrite=True),
        r"--output_path hf/\.\./data\.jsonl", r"is --file_path data\.jsonl", "give another path", REAL),
    Bad("output is a hard link to the input", DATA,
        lambda c: ((c / "o").hardlink_to(c / "data.jsonl"), c.give(output_path="o", overwrite=True)),
        "--output_path o", r"is --file_path data\.jsonl", "give another path"),
    Bad("index of the output is the held-out output", DATA,
        lambda c: c.give(eval_output_path="out.mindrecord.db"),
        r"--eval_output_path out\.mindrecord\.db", r"is --output_path out", "give another path"),
    Bad("output among the tokenizer's files", DATA, lambda c: c.give(output_path="tokenizer/o"),
        "--output_path tokenizer/o", "lies in --tokenizer_path tokenizer", "give another path"),
    Bad("output is something else", DATA,
        lambda c: (c.write("out.mindrecord", "mine"), c.give(overwrite=True)),
        r"--output_path out\.mindrecord", "is not a MindRecord file", "give another path"),
    Bad("output is a directory", DATA, lambda c: c.give(output_path="hf"),
        "--output_path hf", "is a directory", "give another path"),
    Bad("output below a file", DATA, lambda c: c.give(output_path="data.jsonl/out.mindrecord"),
        r"data\.jsonl/out\.mindrecord", r"lies in --file_path data\.jsonl", "give another path"),
    Bad("output where nothing can be made", DATA, lambda c: c.give(output_path="/proc/none/o.mindrecord"),
        r"/proc/none/o\.mindrecord", "cannot be written", "give another path"),
    Bad("full disk", DATA, lambda c: c.give(output_path="full/new/out.mindrecord"),
        r"full/new/out\.mindrecord", NO_SPACE, "free space, or give another path", FULL),
    Bad("no tokenizer", DATA, lambda c: c.give(tokenizer_path="no"),
        "no: ", "no such tokenizer", "give"),
    Bad("tokenizer given twice", DATA, lambda c: c.give(vocab_path="tokenizer/vocab.json"),
        r"tokenizer/vocab\.json", "both", "give a tokenizer path, or a vocabulary"),
    Bad("vocabulary without merges", DATA,
        lambda c: c.give(tokenizer_path=None, vocab_path="tokenizer/vocab.json"),
        "merges file", r"no merges file \(merges\.txt\) given", "give both"),
    Bad("vocabulary cut short", DATA, lambda c: c.cut("tokenizer/vocab.json"),
        r"tokenizer/vocab\.json", r"not JSON", "copy it again"),
    Bad("vocabulary with a gap", DATA, lambda c: vocabulary(c, a=999),
        r"tokenizer/vocab\.json", "id 64 is missing|id .* is missing", "must have the ids 0..255"),
    Bad("merges of another vocabulary", DATA, lambda c: c.write("tokenizer/merges.txt", "x y\n"),
        r"tokenizer/merges\.txt", "line 1: 'xy' is not in the vocabulary", "does it belong to another"),
    Bad("added tokens of another vocabulary", DATA,
        lambda c: c.write("tokenizer/tokenizer_config.json",
                          '{"added_tokens_decoder": {"300": {"content": "<|endoftext|>"}}}'),
        r"tokenizer_config\.json", "'<|endoftext|>' has id 300", "it must be 256"),
    Bad("a damaged sentencepiece model", DATA,
        lambda c: (c.write("t.model", b"\x0a\xff\xff"), c.give(tokenizer_path="t.model")),
        r"t\.model", "not a sentencepiece model", "copy it again"),
]  # fmt: skip
