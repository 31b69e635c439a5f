"""The demo generator: same bytes each time, and files that the libraries load."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.numpy import load_file

from mindrlhf.data.jsonl import CValuesReader
from mindrlhf.data.tokenizer_loading import load_tokenizer

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "demo_sha256.json"


@pytest.fixture(scope="module")
def generator(import_script: Callable[[str], ModuleType]) -> ModuleType:
    return import_script("make_demo_inputs")


def make(generator: ModuleType, monkeypatch: pytest.MonkeyPatch, output: Path, *arguments: str) -> Path:
    monkeypatch.setattr(sys, "argv", ["make_demo_inputs.py", "--output_dir", str(output), *arguments])
    assert generator.main() == 0
    return output


def digests(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_arguments_same_bytes(
    generator: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The digests were written on another day by another process."""
    assert digests(make(generator, monkeypatch, tmp_path)) == json.loads(GOLDEN.read_text())


def test_seed_changes_data_and_weights_but_not_the_tokenizer(
    generator: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = digests(make(generator, monkeypatch, tmp_path, "--seed", "1"))
    default = json.loads(GOLDEN.read_text())
    changed = {name for name in default if default[name] != other[name]}
    assert changed == {"cvalues_demo.jsonl", "hf_model/model.safetensors"}


def test_rows(generator: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make(generator, monkeypatch, tmp_path, "--only", "data", "tokenizer", "--rows", "384")
    samples = list(CValuesReader(tmp_path / "cvalues_demo.jsonl"))
    assert len({sample.prompt for sample in samples}) == len(samples) == 384
    assert all("{" not in sample.prompt + (sample.response or "") for sample in samples)
    chinese = [sample for sample in samples if "\u4e00" <= sample.prompt[0] <= "\u9fff"]
    assert len(chinese) == 192
    # every prompt fits into the 32 tokens of the tiny configuration, template included
    from mindrlhf.data.prompt_format import PromptFormat

    encoded = PromptFormat(load_tokenizer(tmp_path / "tokenizer")).encode_samples(samples)
    assert max(len(sample.prompt) for sample in encoded) <= 32


def test_tokenizer_layout(generator: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make(generator, monkeypatch, tmp_path, "--only", "tokenizer")
    vocab = json.loads((tmp_path / "tokenizer/vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocab.values()) == list(range(1021))
    assert load_tokenizer(tmp_path / "tokenizer").special_tokens == {
        "<|endoftext|>": 1021,
        "<|im_start|>": 1022,
        "<|im_end|>": 1023,
    }


@pytest.mark.parametrize(("dtype", "tied"), [("float32", False), ("bfloat16", True), ("float16", False)])
def test_transformers_loads_the_checkpoint(
    generator: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: str, tied: bool
) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    make(generator, monkeypatch, tmp_path, "--dtype", dtype, "--tied", str(tied))
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf_model", torch_dtype="auto", output_loading_info=True
    )
    assert not any(info.values())
    assert model.dtype == getattr(torch, dtype)
    assert model.config.tie_word_embeddings is tied
    sizes = model.config
    assert (sizes.hidden_size, sizes.num_hidden_layers, sizes.vocab_size) == (64, 2, 1024)
    assert (sizes.num_attention_heads, sizes.num_key_value_heads, sizes.intermediate_size) == (8, 4, 176)
    assert (sizes.rms_norm_eps, sizes.rope_theta) == (1e-6, 1e6)
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            assert 0.05 < float(weight.detach().float().std()) < 0.2, name
        else:
            assert 0.01 < float(weight.detach().float().std()) < 0.03, name
    with torch.no_grad():
        logits = model(torch.tensor([[1022, 302, 198]])).logits
    assert torch.isfinite(logits).all()


def test_sizes_from_a_yaml(
    generator: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, repo_root: Path
) -> None:
    config = repo_root / "model_configs/qwen_ppo/generate_qwen2_tiny_realvocab.yaml"
    if not config.is_file():
        pytest.skip("no such YAML")
    make(generator, monkeypatch, tmp_path, "--only", "model", "--config", str(config), "--dtype", "float16")
    weights = load_file(tmp_path / "hf_model/model.safetensors")
    assert weights["model.embed_tokens.weight"].shape == weights["lm_head.weight"].shape == (151936, 64)
    hf_config = json.loads((tmp_path / "hf_model/config.json").read_text())
    assert (hf_config["eos_token_id"], hf_config["pad_token_id"]) == (151645, 151643)
