"""Bad inputs of convert_weight.py (both spellings, both directions) and transform_checkpoint.py."""

from __future__ import annotations

import json
import struct

import numpy as np

from tests.bad_input.harness import CONVERT, TRANSFORM, Bad, Case
from tests.bad_input.spoiling import FULL, MODEL, NO_SPACE, REAL, hf_config


def back(case: Case, **flags: object) -> None:
    """A conversion from MindSpore to Hugging Face."""
    case.instead(reversed=True, input_path="policy.ckpt", output_path="back", config="hf")
    case.give(**flags)


def ranks_to_file(case: Case, **flags: object) -> None:
    """Rank directories to one file."""
    case.instead(input="two_ranks", output="full.ckpt", input_config="split.yaml")
    case.give(**flags)


def header(case: Case, name: str = "hf/model.safetensors") -> tuple[dict[str, dict[str, object]], bytes]:
    content = (case / name).read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def put_header(case: Case, entries: dict[str, dict[str, object]], data: bytes) -> None:
    text = json.dumps(entries).encode()
    case.write("hf/model.safetensors", struct.pack("<Q", len(text)) + text + data)


def change_entry(case: Case, tensor: str, **changes: object) -> None:
    """Changes what a safetensors header says of a tensor."""
    entries, data = header(case)
    entries[tensor].update(changes)
    put_header(case, entries, data)


def rename_tensor(case: Case, old: str, new: str) -> None:
    entries, data = header(case)
    entries = {new if name == old else name: entry for name, entry in entries.items()}
    put_header(case, entries, data)


def index(case: Case, **shards: str) -> None:
    """An index in place of the one file: tensor (``_`` for ``.``) -> shard."""
    weight_map = {name.replace("_", "."): file for name, file in shards.items()}
    case.remove("hf/model.safetensors")
    case.write("hf/model.safetensors.index.json", json.dumps({"weight_map": weight_map}))


def too_large_for_half(case: Case) -> None:
    entries, data = header(case)
    start = entries["model.norm.weight"]["data_offsets"][0]  # type: ignore[index]
    data = data[:start] + np.float32(1e30).tobytes() + data[start + 4 :]
    put_header(case, entries, data)
    case.give(dtype="fp16")


RANK_1 = "two_ranks/rank_1/checkpoint_1.ckpt"
EMBEDDING = "model.embed_tokens.weight"
MISSING = r"hf/model\.safetensors"

ROWS = [
    Bad("no input directory", CONVERT, lambda c: c.give(input_path="nowhere"),
        "nowhere", "not a directory", "expected a Hugging Face model directory", REAL),
    Bad("no input directory, first spelling", CONVERT,
        lambda c: c.instead(torch_ckpt_dir="nowhere", mindspore_ckpt_path="out.ckpt", dtype="bf16"),
        "nowhere", "not a directory", "expected a Hugging Face model directory"),
    Bad("input is a file", CONVERT, lambda c: c.give(input_path="policy.ckpt"),
        r"policy\.ckpt", "not a directory", "expected a Hugging Face"),
    Bad("no input at all", CONVERT, lambda c: c.give(input_path=None),
        "--torch_ckpt_dir and --input_path", "both missing", "give one of them"),
    Bad("two inputs", CONVERT, lambda c: c.give(torch_ckpt_dir="other"),
        "--torch_ckpt_dir and --input_path", "different", "give one of them"),
    Bad("no config.json", CONVERT, lambda c: c.remove("hf/config.json"),
        r"hf/config\.json", "No such file", "fix it or copy it again"),
    Bad("config.json cut short", CONVERT, lambda c: c.cut("hf/config.json"),
        r"hf/config\.json", r"not JSON \(.*line \d+", "fix it or copy it again"),
    Bad("config.json of another architecture", CONVERT, lambda c: hf_config(c, model_type="llama"),
        r"hf/config\.json: model_type", "'llama'", "give such a model"),
    Bad("text where a size belongs", CONVERT, lambda c: hf_config(c, hidden_size="sixteen"),
        r"hf/config\.json.*hidden_size", "'sixteen'", "expected a positive integer"),
    Bad("text where a number belongs", CONVERT, lambda c: hf_config(c, rope_theta="1e6", rms_norm_eps=[1]),
        r"config\.json.*rms_norm_eps.*rope_theta", r"got \[1\].*got '1e6'", "expected a positive number"),
    Bad("heads that do not divide", CONVERT, lambda c: hf_config(c, num_attention_heads=3),
        r"hf/config\.json", "hidden_size 16 is not divisible by num_attention_heads 3", "fix it"),
    Bad("positions scaled by YaRN", CONVERT,
        lambda c: hf_config(c, rope_scaling={"type": "yarn", "factor": 4.0}),
        r"hf/config\.json.*rope_scaling", "'yarn', 'factor': 4.0}", "remove it, unless"),
    Bad("a LoRA adapter", CONVERT,
        lambda c: (c.remove("hf/config.json"), c.write("hf/adapter_config.json", "{}")),
        "hf holds a LoRA adapter", r"adapter_config\.json", r"merge_and_unload\(\)"),
    Bad("no weights", CONVERT, lambda c: c.remove("hf/model.safetensors"),
        "hf", "found none", "name the file, or a directory with one"),
    Bad("weights cut short", CONVERT, lambda c: c.cut("hf/model.safetensors", 0.9),
        MISSING, "damaged", "copy it again", REAL),
    Bad("weights of no byte", CONVERT, lambda c: c.write("hf/model.safetensors", b""),
        MISSING, "damaged", "copy it again"),
    Bad("flipped byte in the length of the header", CONVERT, lambda c: c.flip("hf/model.safetensors", 6),
        MISSING, "damaged", "copy it again"),
    Bad("flipped byte in the header", CONVERT, lambda c: c.flip("hf/model.safetensors", 10),
        MISSING, "damaged", "copy it again"),
    Bad("tensors that overlap", CONVERT, lambda c: change_entry(c, EMBEDDING, data_offsets=[4, 16900]),
        MISSING, "damaged", "copy it again"),
    Bad("element type nobody knows", CONVERT, lambda c: change_entry(c, EMBEDDING, dtype="F31"),
        MISSING, "F31", "copy it again|unsupported"),
    Bad("wrong shapes", CONVERT, lambda c: hf_config(c, intermediate_size=24),
        MISSING, r"gate_proj.weight is \(16, 16\), the model has \(24, 16\)", "of one model"),
    Bad("wrong vocabulary", CONVERT, lambda c: hf_config(c, vocab_size=280),
        MISSING, r"embed_tokens.weight is \(264, 16\), the model has \(280, 16\)", "of one model"),
    Bad("a tensor under another name", CONVERT, lambda c: rename_tensor(c, EMBEDDING, "model.embed.weight"),
        MISSING, r"missing: model\.embed_tokens.*not in the model: model\.embed\.", "of one model"),
    Bad("index that leaves the directory", CONVERT, lambda c: index(c, a="../hf/model.safetensors"),
        r"model\.safetensors\.index\.json", r"'a': '\.\./hf/model\.safetensors'", "plain file names beside"),
    Bad("index with an absolute path", CONVERT, lambda c: index(c, a="/etc/passwd"),
        r"model\.safetensors\.index\.json", "'/etc/passwd'", "plain file names beside"),
    Bad("index of shards that are not there", CONVERT, lambda c: index(c, a="x.safetensors"),
        r"model\.safetensors\.index\.json", r"hf/x\.safetensors", "copy them too"),
    Bad("index cut short", CONVERT, lambda c: (index(c, a="x"), c.cut("hf/model.safetensors.index.json")),
        r"index\.json", r"not JSON", "fix it or copy it again"),
    Bad("index without weights", CONVERT, lambda c: index(c),
        r"index\.json", "weight_map is missing or empty", "copy it again"),
    Bad("output exists", CONVERT, lambda c: c.give(output_path="policy.ckpt"),
        r"policy\.ckpt", "exists", "give another path, or --overwrite"),
    Bad("output is something else", CONVERT,
        lambda c: (c.write("out.ckpt", "mine"), c.give(overwrite=True)),
        r"out\.ckpt", "is not a file of model weights", "give another path"),
    Bad("output is what the input links to", CONVERT,
        lambda c: ((c / "hf/model.safetensors").rename(c / "blob.safetensors"),
                   (c / "hf/model.safetensors").symlink_to("../blob.safetensors"),
                   c.give(output_path="blob.safetensors", overwrite=True)),
        r"output blob\.safetensors", r"is input hf/model\.safetensors", "give another path"),
    Bad("output of an unknown kind", CONVERT, lambda c: c.give(output_path="out.npz"),
        r"out\.npz", "output", r"must end with \.ckpt or \.safetensors"),
    Bad("output below a file", CONVERT, lambda c: c.give(output_path="data.jsonl/out.ckpt"),
        r"data\.jsonl/out\.ckpt", "Not a directory", "give another path"),
    Bad("output where nothing can be made", CONVERT, lambda c: c.give(output_path="/proc/none/out.ckpt"),
        r"/proc/none/out\.ckpt", "cannot be written", "give another path"),
    Bad("full disk", CONVERT, lambda c: c.give(output_path="full/new/out.ckpt"),
        r"full/new/out\.ckpt", NO_SPACE, "free space, or write elsewhere", FULL),
    Bad("values that do not fit the type", CONVERT, too_large_for_half,
        r"hf/model\.safetensors", r"model\.norm\.weight.*float32 -> float16", "use bf16 or fp32"),
    Bad("a type that is none", CONVERT, lambda c: c.give(dtype="int8"),
        "--dtype", "'int8'", "choose from"),
    Bad("a flag that is none", CONVERT, lambda c: c.give(out_path="x"),
        "--out_path", "unrecognized arguments", "--out_path x"),
    Bad("back: no input", CONVERT, lambda c: back(c, input_path="no.ckpt"),
        r"no\.ckpt", "does not exist", "name a weights file, or a directory"),
    Bad("back: input cut short", CONVERT, lambda c: (back(c), c.cut("policy.ckpt")),
        r"policy\.ckpt is damaged", "bytes are missing", "copy or save it again", REAL),
    Bad("back: flipped byte in the header", CONVERT, lambda c: (back(c), c.flip("policy.ckpt", 0)),
        r"policy\.ckpt", "damaged", "copy or save it again"),
    Bad("back: flipped byte in a name", CONVERT, lambda c: (back(c), c.flip("policy.ckpt", 8, 0x01)),
        r"policy\.ckpt", "missing: .*not in the model: ", "of one model"),
    Bad("back: no config", CONVERT, lambda c: back(c, config=None),
        r"policy\.ckpt", "vocabulary 264, hidden size 16", r"give --config"),
    Bad("back: YAML of another model", CONVERT,
        lambda c: (back(c, config="finetune_x.yaml"), c.yaml("finetune_x.yaml", f"{MODEL}.num_layers", 2)),
        r"policy\.ckpt", r"missing: model\.layers\.1\.", "of one model"),
    Bad("back: output holds other files", CONVERT,
        lambda c: (back(c, overwrite=True), c.write("back/a.txt", "")),
        "back", r"also holds a\.txt", "give another path"),
    Bad("back: output is the working directory", CONVERT, lambda c: back(c, output_path="hf/.."),
        r"hf/\.\.", "holds input policy|is the working directory", "give another path"),
    Bad("back: output is the base model", CONVERT, lambda c: back(c, output_path="hf", overwrite=True),
        "output hf", "is config hf", "give another path"),
    Bad("back: no tokenizer directory", CONVERT, lambda c: back(c, tokenizer_dir="no"),
        "no is not a directory", "not a directory", "expected one with tokenizer files"),
    Bad("back: a size that is none", CONVERT, lambda c: back(c, max_shard_size="5XB"),
        "'5XB'", "is not a size", "write it like 5GB"),
    Bad("back: full disk", CONVERT, lambda c: back(c, output_path="full/back"),
        "full/", NO_SPACE, "free space, or write elsewhere", FULL),
    Bad("no YAML at all", TRANSFORM, lambda c: c.give(output_config=None),
        "full to full", "changes nothing", "give --output_config, or ranks as the --input", REAL),
    Bad("no such YAML", TRANSFORM, lambda c: c.give(output_config="no.yaml"),
        r"no\.yaml", "there is no such file", "give the path of a YAML file"),
    Bad("no rank directories", TRANSFORM, lambda c: ranks_to_file(c, input="hf"),
        "hf", "holds no rank_0, rank_1", "needs no --input_config"),
    Bad("a rank is missing", TRANSFORM, lambda c: (ranks_to_file(c), c.remove("two_ranks/rank_1")),
        "two_ranks", r"rank_0 \.\. rank_1 holds 1/2 of the model", r"copy what is missing:\n  - rank_1"),
    Bad("a rank's file is missing", TRANSFORM, lambda c: (ranks_to_file(c), c.remove(RANK_1)),
        "two_ranks/rank_1", "found none", "name the file, or a directory with one"),
    Bad("a rank's file cut short", TRANSFORM, lambda c: (ranks_to_file(c), c.cut(RANK_1)),
        RANK_1, "damaged", "copy or save it again"),
    Bad("a rank of another layout", TRANSFORM,
        lambda c: (ranks_to_file(c), c.write(RANK_1, (c / "policy.ckpt").read_bytes())),
        RANK_1, r"wrong shape: .* is \(264, 16\), the model has \(132, 16\)", "of one model"),
    Bad("YAMLs of different models", TRANSFORM,
        lambda c: (ranks_to_file(c, output="o", output_config="finetune_x.yaml"),
                   c.yaml("finetune_x.yaml", f"{MODEL}.vocab_size", 272)),
        r"split\.yaml and finetune_x\.yaml", "vocab_size: 264 and 272", "give files of one model"),
    Bad("output is the input", TRANSFORM, lambda c: c.give(output="policy.ckpt"),
        r"--output policy\.ckpt", "is --input", "give another path"),
    Bad("output in the input", TRANSFORM, lambda c: ranks_to_file(c, output="two_ranks/rank_0/f.ckpt"),
        r"--output two_ranks/rank_0/f\.ckpt", "lies in --input two_ranks", "give another path"),
    Bad("output exists", TRANSFORM, lambda c: c.give(output="two_ranks"),
        "--output two_ranks", "exists", "give another path, or --overwrite"),
    Bad("output holds other files", TRANSFORM,
        lambda c: (c.write("ranks/rank_0/mine", ""), c.give(overwrite=True)),
        "--output ranks", "also holds rank_0", "give another path"),
    Bad("output is a file", TRANSFORM, lambda c: c.give(output="data.jsonl"),
        r"data\.jsonl", "is a file", "give another path"),
    Bad("output below a file", TRANSFORM, lambda c: c.give(output="data.jsonl/ranks"),
        "data.jsonl/ranks", "Not a directory", "give another path"),
    Bad("full disk", TRANSFORM, lambda c: c.give(output="full/ranks"),
        "full/", NO_SPACE, "free space, or write elsewhere", FULL),
    Bad("sizes that do not divide", TRANSFORM,
        lambda c: c.yaml("split.yaml", "parallel_config.model_parallel", 3),
        r"split\.yaml: model\.model_config\.num_heads", r"4 is not divisible by .*model_parallel \(3\)",
        "choose a parallel_config.model_parallel that divides it"),
]  # fmt: skip
