"""Makes everything a small PPO job needs, without a download: data, tokenizer, checkpoint.

    python scripts/make_demo_inputs.py --output_dir demo

writes cvalues_demo.jsonl (CValues' keys; Chinese and English), tokenizer/ (byte-level BPE of 1024 tokens in
Qwen2's files) and hf_model/ (a tiny random Qwen2 that transformers loads). Same arguments, same bytes.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import safetensors
import tokenizers
from demo_files import tokenizer_config, write_json, write_merges
from demo_text import demo_rows
from tokenizers import models, normalizers, pre_tokenizers, trainers

from mindrlhf.checkpoint.conversion import hf_output
from mindrlhf.checkpoint.element_types import BY_NAME
from mindrlhf.checkpoint.hf_config import finish_hf_config, hf_config_from_model
from mindrlhf.configs.keys import ModelConfig
from mindrlhf.configs.load import load_run_config
from mindrlhf.data.jsonl import KEYS, rows_output
from mindrlhf.data.prompt_format import CHATML_TEMPLATE, QWEN2_SYSTEM_PROMPT
from mindrlhf.data.tokenizer import IM_END, IM_START, QWEN2_SPECIAL_TOKENS, QWEN_SPLIT_PATTERN
from mindrlhf.models.qwen2.layouts import parameter_layouts
from mindrlhf.models.qwen2.weight_names import canonical_to_hf
from mindrlhf.parallel.layout import Mesh
from mindrlhf.utils.command_line import new_parser, run_main, str_to_bool
from mindrlhf.utils.errors import DataError
from mindrlhf.utils.files import atomic_file
from mindrlhf.utils.outputs import Output, check_outputs, directory_of
from mindrlhf.utils.seeds import random_stream

ORDINARY_TOKENS = 1021
TOKENIZER_TEXT_ROWS = 1200
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json")


def write_rows(path: Path, rows: int, seed: int) -> None:
    """The jsonl file."""
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in demo_rows(rows, seed):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def train_tokenizer() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE over the demo text and ChatML's words; always the same."""
    core = tokenizers.Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=ORDINARY_TOKENS,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    # Prompts weigh more than answers: they have to fit beside the chat template in few tokens.
    texts = [
        text
        for row in demo_rows(TOKENIZER_TEXT_ROWS, 0)
        for text in (
            f"system\n{QWEN2_SYSTEM_PROMPT}",
            "user\n",
            "assistant\n",
            *[row["prompt"]] * 4,
            row["pos_resp"],
        )
    ]
    core.train_from_iterator(texts, trainer)
    model = json.loads(core.to_str())["model"]
    vocab = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    if len(vocab) != ORDINARY_TOKENS:
        raise AssertionError(f"the demo text gives {len(vocab)} tokens, expected {ORDINARY_TOKENS}")
    return vocab, [(left, right) for left, right in model["merges"]]


def write_tokenizer(directory: Path) -> None:
    """vocab.json, merges.txt and tokenizer_config.json as Qwen2 has them."""
    vocab, merges = train_tokenizer()
    special = {text: ORDINARY_TOKENS + i for i, text in enumerate(QWEN2_SPECIAL_TOKENS)}
    write_json(directory / "vocab.json", vocab, indent=None)
    write_merges(directory / "merges.txt", (f"{left} {right}" for left, right in merges))
    config = tokenizer_config(
        special, CHATML_TEMPLATE, max_length=32768, additional_special_tokens=[IM_START, IM_END]
    )
    write_json(directory / "tokenizer_config.json", config)


def random_weight(name: str, shape: tuple[int, ...], model: ModelConfig, seed: int) -> np.ndarray:
    """Float32 values, each tensor from its own stream; no norm is plain ones and no bias zero, so that a
    conversion which loses one of them is detected."""
    draw = random_stream("demo weight", seed, name).standard_normal(shape, dtype=np.float32)
    if name.endswith("norm.weight"):
        return np.float32(1) + np.float32(0.1) * draw
    return np.float32(model.initializer_range) * draw


def write_model(directory: Path, model: ModelConfig, *, dtype: str, seed: int, tokenizer_dir: Path) -> int:
    """The checkpoint directory; returns the number of parameters."""
    layouts = parameter_layouts(model, Mesh())
    names = canonical_to_hf(model.num_layers)
    arrays = {
        names[name]: random_weight(names[name], layout.shape, model, seed).astype(BY_NAME[dtype])
        for name, layout in layouts.items()
    }
    specs = {
        name: safetensors.TensorSpec(
            dtype=dtype, shape=list(array.shape), data_ptr=array.ctypes.data, data_len=array.nbytes
        )
        for name, array in arrays.items()
    }
    with atomic_file(directory / "model.safetensors") as temporary:
        safetensors.serialize_file(specs, str(temporary), metadata={"format": "pt"})
    # Qwen2's own files name one end token in config.json, and all that end a reply in generation_config.json.
    config = hf_config_from_model(replace(model, eos_token_id=model.eos_token_id[:1]))
    config |= {"max_window_layers": model.num_layers, "sliding_window": None}
    write_json(directory / "config.json", finish_hf_config(config, layouts, BY_NAME[dtype]))
    generation = {
        "bos_token_id": model.bos_token_id,
        "eos_token_id": list(model.eos_token_id),
        "pad_token_id": model.pad_token_id,
    }
    for name in TOKENIZER_FILES:
        if (tokenizer_dir / name).is_file():
            shutil.copyfile(tokenizer_dir / name, directory / name)
    write_json(directory / "generation_config.json", generation)
    return sum(array.size for array in arrays.values())


TINY = ModelConfig(
    vocab_size=1024,
    hidden_size=64,
    num_layers=2,
    num_heads=8,
    n_kv_heads=4,
    intermediate_size=176,
    seq_length=2048,
    pad_token_id=1021,
    bos_token_id=1021,
    eos_token_id=(1023, 1021),
)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = new_parser(__doc__)
    add = parser.add_argument_group("what is made").add_argument
    add("--output_dir", required=True, help="directory for everything; made when missing")
    add("--overwrite", action="store_true", help="replace what is there of an earlier run")
    add("--only", choices=("data", "tokenizer", "model"), nargs="+", help="make only these (default: all)")
    add("--rows", type=int, default=400, help="rows of cvalues_demo.jsonl")
    add("--seed", type=int, default=0, help="of the data and the weights; the tokenizer is always the same")
    add = parser.add_argument_group("model").add_argument
    add("--config", help="a model YAML whose sizes the checkpoint gets (default: the tiny ones)")
    add("--tokenizer_dir", help="tokenizer files to put beside the weights (default: the demo tokenizer)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the weights")
    add("--tied", type=str_to_bool, help="True or False: tie_word_embeddings (default: as the sizes say)")
    return parser.parse_args()


def _outputs(directory: Path, *, overwrite: bool) -> dict[str, Output]:
    """What is made, by its name in ``--only``."""
    tokenizer = directory_of("a tokenizer", lambda entry: entry.name in TOKENIZER_FILES)
    return {
        "data": rows_output("--output_dir", directory / "cvalues_demo.jsonl", KEYS, overwrite=overwrite),
        "tokenizer": Output("--output_dir", directory / "tokenizer", tokenizer, overwrite),
        "model": hf_output("--output_dir", directory / "hf_model", overwrite=overwrite),
    }


def main() -> int:
    """Parse, make, report."""
    arguments = parse_arguments()
    if arguments.rows < 1:
        raise DataError(f"--rows is {arguments.rows}; it must be at least 1")
    wanted = arguments.only or ("data", "tokenizer", "model")
    output = Path(arguments.output_dir)
    model = TINY if arguments.config is None else load_run_config(arguments.config).model
    if arguments.tied is not None:
        model = replace(model, tie_word_embeddings=arguments.tied)
    tokenizer_dir = Path(arguments.tokenizer_dir or output / "tokenizer")
    if arguments.tokenizer_dir and not tokenizer_dir.is_dir():
        raise DataError(f"{tokenizer_dir}: no such tokenizer directory")
    inputs = [("--config", arguments.config), ("--tokenizer_dir", arguments.tokenizer_dir)]
    check_outputs(
        (made for part, made in _outputs(output, overwrite=arguments.overwrite).items() if part in wanted),
        ((flag, path and Path(path)) for flag, path in inputs),
    )
    if "data" in wanted:
        write_rows(output / "cvalues_demo.jsonl", arguments.rows, arguments.seed)
        print(f"data       {output / 'cvalues_demo.jsonl'}: {arguments.rows} rows in CValues' schema")
    if "tokenizer" in wanted:
        write_tokenizer(output / "tokenizer")
        special = ", ".join(QWEN2_SPECIAL_TOKENS)
        print(f"tokenizer  {output / 'tokenizer'}: {ORDINARY_TOKENS} tokens, then {special}")
    if "model" in wanted:
        directory = output / "hf_model"
        size = write_model(
            directory, model, dtype=arguments.dtype, seed=arguments.seed, tokenizer_dir=tokenizer_dir
        )
        print(f"model      {directory}: random Qwen2, {size:,} parameters, {arguments.dtype}")
    return 0


if __name__ == "__main__":
    run_main(main)
