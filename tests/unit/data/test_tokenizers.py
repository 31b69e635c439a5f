"""Tokenizers against published ids, and against files that do not fit together."""

from __future__ import annotations

import base64
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from mindrlhf.data.tokenizer import Tokenizer, chat_stop_ids
from mindrlhf.data.tokenizer_loading import load_tokenizer
from mindrlhf.utils.errors import DataError

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "demo_encodings.jsonl"
QWEN2_CONFIGS = (
    "tokenizer_config.json",
    "tokenizer_config.qwen2-instruct.json",
    "tokenizer_config.qwen2.5-instruct.json",
)


def read_jsonl(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def qwen2_dir(shared_data: Path) -> Path:
    return shared_data / "qwen2_tokenizer"


def test_qwen2_ids_equal_the_goldens(load_qwen2: Callable[[str | None], Tokenizer], qwen2_dir: Path) -> None:
    goldens = read_jsonl(qwen2_dir / "golden_encodings.jsonl")
    full, plain = load_tokenizer(qwen2_dir), load_qwen2(None)
    assert len(goldens) == 116
    texts = [golden["text"] for golden in goldens]
    assert full.encode_markup(texts) == [golden["ids"] for golden in goldens]
    for golden in goldens:
        assert full.decode(golden["ids"]) == unicodedata.normalize("NFC", golden["text"])
        # without a config only the three instruct tokens are known, e.g. not <tool_call>
        if all(i < 151646 for i in golden["ids"]):
            assert plain.encode_markup([golden["text"]]) == [golden["ids"]]


@pytest.mark.parametrize(
    ("config", "size"), [(None, 151646), *zip(QWEN2_CONFIGS, (151665, 151646, 151665), strict=True)]
)
def test_qwen2_special_tokens(
    load_qwen2: Callable[[str | None], Tokenizer], config: str | None, size: int
) -> None:
    tokenizer = load_qwen2(config)
    special = tokenizer.special
    assert tokenizer.size == size
    assert (special.end_of_text, special.turn_start, special.turn_end) == (151643, 151644, 151645)
    assert special.pad == 151643
    assert chat_stop_ids(tokenizer) == (151645, 151643)


def test_merges_with_a_version_line_and_crlf_give_the_same_ids(
    demo_tokenizer_dir: Path, demo_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    lines = (demo_tokenizer_dir / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("#version")
    merges = tmp_path / "merges.txt"
    merges.write_bytes("\r\n".join(lines[1:]).encode())
    other = load_tokenizer(vocab_path=demo_tokenizer_dir / "vocab.json", merges_path=merges)
    texts = ["怎样学英语？", "How do I cook?\n\n", "äöü 🦜 123"]
    assert other.encode_batch(texts) == demo_tokenizer.encode_batch(texts)


def test_demo_goldens(demo_tokenizer: Tokenizer) -> None:
    for golden in read_jsonl(GOLDEN):
        assert demo_tokenizer.encode_batch([golden["text"]]) == [golden["ids"]]


def test_agrees_with_transformers(demo_tokenizer_dir: Path, demo_tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(demo_tokenizer_dir)
    texts = ["怎样学英语？", "I'm here, it's 2026!\n\n  ok", "cafe\u0301", "<|im_start|>user\nhi<|im_end|>\n"]
    assert demo_tokenizer.encode_markup(texts) == theirs(texts)["input_ids"]
    assert demo_tokenizer.size == len(theirs) == 1024


@settings(deadline=None)
@given(st.text())
def test_round_trip_is_nfc_and_never_a_control_token(demo_tokenizer: Tokenizer, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    for candidate in (text, f"{text}<|im_end|>{text}<|endoftext|>"):
        ids = demo_tokenizer.encode_batch([candidate])[0]
        assert all(i < 1021 for i in ids)
        assert demo_tokenizer.decode(ids) == unicodedata.normalize("NFC", candidate)


def test_markup_and_skip_special(demo_tokenizer: Tokenizer) -> None:
    text = "a<|im_end|>b<|endoftext|>"
    ids = demo_tokenizer.encode_markup([text])[0]
    assert 1023 in ids
    assert ids[-1] == 1021
    assert demo_tokenizer.decode(ids) == text
    assert demo_tokenizer.decode(ids, skip_special=True) == "ab"
    assert 1023 not in demo_tokenizer.encode_batch([text])[0]
    hidden = demo_tokenizer.without_markup(text)
    assert demo_tokenizer.encode_markup([f"{hidden}<|im_end|>"]) == [
        [*demo_tokenizer.encode_batch([text])[0], 1023]
    ]


VOCAB = {"a": 0, "b": 1, "ab": 2}
BAD_FILES: dict[str, tuple[str, str, str | None, str]] = {
    "vocab not JSON": ("{", "a b", None, "not JSON"),
    "vocab a list": ("[1]", "a b", None, "JSON list"),
    "vocab empty": ("{}", "", None, "no token"),
    "token twice": ('{"a": 0, "a": 1}', "", None, "'a'"),
    "id twice": ('{"a": 0, "b": 0}', "", None, "used by two tokens: 0"),
    "id no number": ('{"a": "0"}', "", None, "'a': '0'"),
    "id true": ('{"a": 0, "b": true}', "", None, "'b': True"),
    "gap": ('{"a": 0, "b": 2}', "", None, "id 1 is missing"),
    "ids from one": ('{"a": 1, "b": 2}', "", None, "id 0 is missing"),
    "unknown part": (json.dumps(VOCAB), "a b\na c", None, "line 2: 'c'"),
    "unknown product": (json.dumps(VOCAB), "a b\nb a", None, "line 2: 'ba'"),
    "three parts": (json.dumps(VOCAB), "a b c", None, "line 1: 'a b c' is not two tokens"),
    "merge missing": (json.dumps(VOCAB), "#version: 0.2\n", None, "no merge makes 1 tokens"),
    "config not JSON": (json.dumps(VOCAB), "a b", "nope", "not JSON"),
    "added gap": (
        json.dumps(VOCAB), "a b", '{"added_tokens_decoder": {"4": {"content": "<x>"}}}', "'<x>' has id 4",
    ),
    "added no content": (json.dumps(VOCAB), "a b", '{"added_tokens_decoder": {"3": {}}}', "'3'"),
    "added twice": (
        json.dumps(VOCAB), "a b", '{"added_tokens_decoder": {"3": "<x>", "4": "<x>"}}', "two ids, 3 and 4",
    ),
    "no end token": (
        json.dumps(VOCAB), "a b", '{"added_tokens_decoder": {"3": {"content": "<x>"}}}', "end token",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_bpe_files(tmp_path: Path, name: str) -> None:
    vocab, merges, config, message = BAD_FILES[name]
    (tmp_path / "vocab.json").write_text(vocab)
    (tmp_path / "merges.txt").write_text(merges)
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(DataError, match=r"(vocab|merges|tokenizer_config)\.\w+") as caught:
        load_tokenizer(tmp_path)
    assert message in str(caught.value)


def test_small_good_files(tmp_path: Path) -> None:
    """The faults above are the only reason why those files are refused."""
    (tmp_path / "vocab.json").write_text(json.dumps(VOCAB))
    (tmp_path / "merges.txt").write_text("a b\n")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_batch(["abba"]) == [[2, 1, 0]]
    assert tokenizer.special_tokens == {"<|endoftext|>": 3, "<|im_start|>": 4, "<|im_end|>": 5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no vocabulary"),
        ({"vocab_path": "v"}, "no merges file"),
        ({"path": "x.model", "vocab_path": "v"}, "no such|are given"),
        ({"path": "nowhere"}, "no such tokenizer"),
        ({"vocab_path": "nowhere", "merges_path": "m"}, "no such vocabulary"),
        ({"path": "."}, "holds no vocab.json"),
        ({"path": __file__}, "not a tokenizer"),
    ],
)
def test_bad_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        load_tokenizer(**arguments)


def test_tokenizer_json(demo_tokenizer: Tokenizer, tmp_path: Path) -> None:
    demo_tokenizer._core.save(str(tmp_path / "tokenizer.json"))  # type: ignore[attr-defined]
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = load_tokenizer(path)
        assert tokenizer.special == demo_tokenizer.special
        assert tokenizer.encode_batch(["x<|im_end|>"]) == demo_tokenizer.encode_batch(["x<|im_end|>"])
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    for number, text in enumerate(("<think>", "<named>"), start=1024):
        token = {**content["added_tokens"][0], "id": number, "content": text, "special": False}
        content["added_tokens"].append(token)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    roles = {"eos_token": "<|im_end|>", "additional_special_tokens": [{"content": "<named>"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(roles))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_markup(["<think><named>"]) == [[1024, 1025]]
    assert tokenizer.decode([1024, 1025], skip_special=True) == "<think>"
    assert tokenizer.encode_markup([tokenizer.without_markup("<think><named>")])[0][0] == 1024
    assert 1025 not in tokenizer.encode_markup([tokenizer.without_markup("<think><named>")])[0]
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def make_sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def make(**options: object) -> Path:
        directory = tmp_path_factory.mktemp("sentencepiece")
        text = ["the cat sat on the mat", "a dog ran after the cat", "the mat was on the dog"] * 20
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text),
            model_prefix=str(directory / "tiny"),
            vocab_size=45,
            minloglevel=2,
            hard_vocab_limit=False,
            **options,
        )
        return directory / "tiny.model"

    return make


def test_sentencepiece(make_sentencepiece: Callable[..., Path]) -> None:
    path = make_sentencepiece(control_symbols=["<|im_start|>", "<|im_end|>"])
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer(path)
    texts = ["the cat ran", "a mat", ""]
    assert tokenizer.encode_batch(texts) == [reference.encode(text) for text in texts]
    assert tokenizer.size == reference.get_piece_size()
    special = tokenizer.special
    assert special.begin_of_text == reference.bos_id() == 1
    assert special.end_of_text == special.pad == reference.eos_id() == 2
    start, end = reference.piece_to_id("<|im_start|>"), reference.piece_to_id("<|im_end|>")
    assert (special.turn_start, special.turn_end) == (start, end)
    assert end not in tokenizer.encode_batch(["the cat<|im_end|>"])[0]
    ids = tokenizer.encode_markup(["<|im_start|>the cat<|im_end|>"])[0]
    assert ids == [start, *reference.encode("the cat"), end]
    assert tokenizer.decode(ids) == "<|im_start|>the cat<|im_end|>"
    assert tokenizer.decode(ids, skip_special=True) == "the cat"
    assert load_tokenizer(path.parent).size == tokenizer.size


def test_sentencepiece_symbols_that_user_text_can_write_are_no_chat_tokens(
    make_sentencepiece: Callable[..., Path],
) -> None:
    tokenizer = load_tokenizer(make_sentencepiece(user_defined_symbols=["<|im_start|>", "<|im_end|>"]))
    assert tokenizer.special.turn_end is None


def test_bad_sentencepiece(make_sentencepiece: Callable[..., Path], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.model"
    damaged.write_bytes(b"not a model")
    with pytest.raises(DataError, match="not a sentencepiece model"):
        load_tokenizer(damaged)
    with pytest.raises(DataError, match="no end-of-text piece"):
        load_tokenizer(make_sentencepiece(eos_id=-1))


def ranks_text(tokens: list[bytes]) -> str:
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))


def test_tiktoken(tmp_path: Path) -> None:
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" c", "学".encode()[:2], "学".encode()]
    path = tmp_path / "tiny.tiktoken"
    path.write_text(ranks_text(tokens))
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode_batch(["the cat 学", "caf\u0065\u0301"]) == [
        [257, 258, ord("a"), ord("t"), 32, 260],
        [*b"caf", *"é".encode()],
    ]
    assert tokenizer.size == 264
    assert chat_stop_ids(tokenizer) == (263, 261)
    assert tokenizer.encode_batch(["a<|im_end|>"]) == [[*b"a<|im_end|>"]]
    assert tokenizer.encode_markup(["a<|im_end|>"]) == [[97, 263]]
    assert tokenizer.decode([257, 263]) == "the<|im_end|>"
    assert tokenizer.decode([257, 263], skip_special=True) == "the"


def test_tiktoken_ranks_of_qwen2_give_qwen2_ids(qwen2_dir: Path, tmp_path: Path) -> None:
    """The same vocabulary, another library: an independent reference for pattern, NFC and merging."""
    from tokenizers import pre_tokenizers

    # ByteLevel's alphabet: printable bytes as themselves, the others in order from U+0100.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    assert sorted(byte_of) == sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = json.loads((qwen2_dir / "vocab.json").read_text(encoding="utf-8"))
    tokens = [bytes(byte_of[char] for char in token) for token in sorted(vocab, key=vocab.__getitem__)]
    (tmp_path / "qwen.tiktoken").write_text(ranks_text(tokens))
    tokenizer = load_tokenizer(tmp_path)
    for golden in read_jsonl(qwen2_dir / "golden_encodings.jsonl"):
        if all(i < 151646 for i in golden["ids"]):
            assert tokenizer.encode_markup([golden["text"]]) == [golden["ids"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "256 of the 256 single bytes"),
        ("YQ== x\n", ":1: 'YQ== x'"),
        ("YQ== 0 1\n", ":1: "),
        ("Y 0\n", ":1: "),
        ("YQ== 0\nYQ== 1\n", ":2: .*occurs twice"),
        (ranks_text([bytes([byte]) for byte in range(1, 256)]), "first 0x00"),
        (ranks_text([bytes([byte]) for byte in range(256)]) + "YWI= 300\n", "not 0..256"),
    ],
)
def test_bad_tiktoken(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.tiktoken"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        load_tokenizer(path)
