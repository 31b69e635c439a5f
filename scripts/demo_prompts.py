"""Writes everyday requests for the demo of PPO on a real language model, made by rule.

    python scripts/demo_prompts.py --train_path prompts.jsonl --held_out_path held_out.jsonl

Each line is {"prompt": ...}. Topics of held-out prompts never occur in the training prompts. Same arguments,
same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from mindrlhf.data.jsonl import rows_output
from mindrlhf.utils.command_line import new_parser, run_main
from mindrlhf.utils.files import atomic_file
from mindrlhf.utils.outputs import check_outputs
from mindrlhf.utils.seeds import random_stream

TEMPLATES = (
    "Describe {topic} in one sentence.",
    "Write one sentence about {topic}.",
    "Give me one short remark on {topic}.",
    "What is {topic} like? Answer in one sentence.",
    "Complete the sentence: I think {topic} is",
    "Tell me in one short sentence how you feel about {topic}.",
    "What do you think of {topic}? Answer briefly.",
    "In one sentence, how does {topic} make you feel?",
)
"""Requests whose answers are short and may be cheerful or not."""

TOPICS = (
    "a rainy Monday", "the morning bus", "an old bicycle", "a long meeting", "a dentist visit",
    "the first snow", "a lost umbrella", "a noisy neighbour", "a cup of tea", "the school holidays",
    "a broken phone", "a walk in the park", "cooking for one", "a train delay", "the night shift",
    "a small garden", "moving house", "a job interview", "a tax form", "the village market",
    "an empty fridge", "a birthday letter", "a cold shower", "washing the dishes", "a rented flat",
    "learning to swim", "the last day of summer", "a chess game", "a traffic jam", "a borrowed book",
    "the office printer", "a stray cat", "a power cut", "a new pair of shoes", "waiting in a queue",
    "a long flight", "the city library", "a failed cake", "a school exam", "an early alarm",
    "a muddy field", "the evening news", "a football match", "a quiet beach", "a crowded lift",
    "growing tomatoes", "a late parcel", "the corner shop", "a hospital corridor", "a camping trip",
)  # fmt: skip
"""What training prompts are about."""

HELD_OUT_TOPICS = (
    "a foggy harbour", "the school bus", "a squeaky door", "a piano lesson", "an overdue bill",
    "a mountain path", "a burnt dinner", "the family dog",
)  # fmt: skip
"""What evaluation prompts are about."""


def prompts(topics: Iterable[str], seed: int) -> list[str]:
    """Every template with every topic, shuffled."""
    every = [template.format(topic=topic) for topic in topics for template in TEMPLATES]
    return [every[index] for index in random_stream(seed, "demo_prompts").permutation(len(every))]


def write_jsonl(path: Path, texts: Iterable[str]) -> None:
    """One {"prompt": text} per line."""
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"prompt": text}) + "\n")


def main() -> int:
    """Writes both files."""
    parser = new_parser(__doc__)
    add = parser.add_argument_group("files").add_argument
    add("--train_path", type=Path, required=True, help="jsonl of training prompts")
    add("--held_out_path", type=Path, required=True, help="jsonl of evaluation prompts")
    add("--seed", type=int, default=0, help="number that decides the order of the lines")
    add("--overwrite", action="store_true", help="replace prompts that are there")
    args = parser.parse_args()
    files = {"--train_path": args.train_path, "--held_out_path": args.held_out_path}
    check_outputs((rows_output(*one, ["prompt"], overwrite=args.overwrite) for one in files.items()), [])
    for path, topics in zip(files.values(), (TOPICS, HELD_OUT_TOPICS), strict=True):
        texts = prompts(topics, args.seed)
        write_jsonl(path, texts)
        print(f"{path}: {len(texts)} prompts")
    return 0


if __name__ == "__main__":
    run_main(main)
