"""Makes everything a small PPO job starts from, without a download: data, tokenizer, checkpoint.

    python scripts/make_demo_inputs.py --output_dir demo

writes cvalues_demo.jsonl (CValues' keys; Chinese and English), tokenizer/ (byte-level BPE of 1024 tokens in
Qwen2's files) and hf_model/ (a tiny random Qwen2 that transformers loads). Same arguments, same bytes.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import tokenizers
from demo_text import demo_rows
from tokenizers import models, normalizers, pre_tokenizers, trainers

from mindrlhf.configs.load import load_run_config
from mindrlhf.configs.schema import ModelConfig
from mindrlhf.data.prompt_format import QWEN2_SYSTEM_PROMPT
from mindrlhf.data.tokenizer import (
    END_OF_TEXT,
    IM_END,
    IM_START,
    QWEN2_SPECIAL_TOKENS,
    QWEN_SPLIT_PATTERN,
)
from mindrlhf.utils.command_line import new_parser, run_main, str_to_bool
from mindrlhf.utils.errors import DataError
from mindrlhf.utils.files import atomic_file
from mindrlhf.utils.seeds import random_stream

ORDINARY_TOKENS = 1021
TOKENIZER_TEXT_ROWS = 1200
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json")

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n"
    + QWEN2_SYSTEM_PROMPT
    + "<|im_end|>\n{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_rows(path: Path, rows: int, seed: int) -> None:
    """The jsonl file."""
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in demo_rows(rows, seed):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_json(path: Path, content: Mapping[str, Any], *, indent: int | None = 2) -> None:
    """A JSON file with a line end."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")


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
        raise AssertionError(f"the demo text gives {len(vocab)} tokens, {ORDINARY_TOKENS} are wanted")
    return vocab, [(left, right) for left, right in model["merges"]]


def write_tokenizer(directory: Path) -> None:
    """vocab.json, merges.txt and tokenizer_config.json as Qwen2 has them."""
    vocab, merges = train_tokenizer()
    special = {text: ORDINARY_TOKENS + i for i, text in enumerate(QWEN2_SPECIAL_TOKENS)}
    write_json(directory / "vocab.json", vocab, indent=None)
    with atomic_file(directory / "merges.txt") as temporary:
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(number): {"content": text, **flags} for text, number in special.items()},
        "additional_special_tokens": [IM_START, IM_END],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_json(directory / "tokenizer_config.json", config)


def hf_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of a Qwen2 model in Hugging Face's format."""
    hidden, inner, kv = model.hidden_size, model.intermediate_size, model.n_kv_heads * model.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model.vocab_size, hidden)}
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv)):
            shapes[f"{prefix}self_attn.{name}.weight"] = (rows, hidden)
            shapes[f"{prefix}self_attn.{name}.bias"] = (rows,)
        shapes[prefix + "self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[prefix + "mlp.gate_proj.weight"] = (inner, hidden)
        shapes[prefix + "mlp.up_proj.weight"] = (inner, hidden)
        shapes[prefix + "mlp.down_proj.weight"] = (hidden, inner)
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not model.tie_word_embeddings:
        shapes["lm_head.weight"] = (model.vocab_size, hidden)
    return shapes


def random_weight(name: str, shape: tuple[int, ...], model: ModelConfig, seed: int) -> np.ndarray:
    """Float32 values, each tensor from its own stream; no norm is plain ones and no bias zero, so that a
    conversion which loses one of them shows."""
    draw = random_stream("demo weight", seed, name).standard_normal(shape, dtype=np.float32)
    if name.endswith("norm.weight"):
        return np.float32(1) + np.float32(0.1) * draw
    return np.float32(model.initializer_range) * draw


def to_dtype(array: np.ndarray, dtype: str) -> np.ndarray:
    """``array`` in a storage type; bfloat16 as its bits, rounded to nearest even."""
    if dtype != "bfloat16":
        return array.astype(dtype)
    bits = array.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_model(directory: Path, model: ModelConfig, *, dtype: str, seed: int, tokenizer_dir: Path) -> int:
    """The checkpoint directory; returns the number of parameters."""
    arrays = {
        name: to_dtype(random_weight(name, shape, model, seed), dtype)
        for name, shape in hf_shapes(model).items()
    }
    specs = {
        name: safetensors.TensorSpec(
            dtype=dtype, shape=list(array.shape), data_ptr=array.ctypes.data, data_len=array.nbytes
        )
        for name, array in arrays.items()
    }
    with atomic_file(directory / "model.safetensors") as temporary:
        safetensors.serialize_file(specs, str(temporary), metadata={"format": "pt"})
    write_json(directory / "config.json", hf_config(model, dtype))
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


def hf_config(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """``config.json`` of a Qwen2 model."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": model.bos_token_id,
        "eos_token_id": model.eos_token_id[0],
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.initializer_range,
        "intermediate_size": model.intermediate_size,
        "max_position_embeddings": model.seq_length,
        "max_window_layers": model.num_layers,
        "model_type": "qwen2",
        "num_attention_heads": model.num_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.n_kv_heads,
        "pad_token_id": model.pad_token_id,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.theta,
        "sliding_window": None,
        "tie_word_embeddings": model.tie_word_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": model.vocab_size,
    }


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
    add("--output_dir", required=True, help="directory for all of it; made when missing")
    add("--only", choices=("data", "tokenizer", "model"), nargs="+", help="make only these (default: all)")
    add("--rows", type=int, default=400, help="rows of cvalues_demo.jsonl")
    add("--seed", type=int, default=0, help="of the data and the weights; the tokenizer is always the same")
    add = parser.add_argument_group("model").add_argument
    add("--config", help="a model YAML whose sizes the checkpoint gets (default: the tiny ones)")
    add("--tokenizer_dir", help="tokenizer files to put beside the weights (default: the demo tokenizer)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the weights")
    add("--tied", type=str_to_bool, help="True or False: tie_word_embeddings (default: as the sizes say)")
    return parser.parse_args()


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
