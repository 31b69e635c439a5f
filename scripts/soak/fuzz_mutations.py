"""Random damage to files: bits, bytes, spans, tokens. The same generator gives the same damage."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

# Known to break readers: limits of integers, special floats, nesting, half characters, other formats.
TOKENS = (
    b"", b"0", b"-1", b"1", b"2147483648", b"9223372036854775807", b"18446744073709551616", b"1e999", b"-0.0",
    b"NaN", b"Infinity", b"null", b"true", b"~", b"''", b'""', b"{}", b"[]", b"[" * 900, b"[" * 3000,
    b"[" * 40000, b"{'a':" * 500, b'{"a":' * 3000,
    b"9" * 5000, b"1" * 400, b"&a [*a]", b"*a", b"!!python/object:os.system", b"!!binary x",
    b"!!int ''", b"<<: *x", b"2001-13-45", b"\xff\xfe", b"\xed\xa0\x80", b"\\ud800", b"\x00", b"\xef\xbb\xbf",
    b"../x", b"/etc/passwd", b"..", b"a/b", b"model-00001-of-00002.safetensors", b"F4", b"BF16", b"Float32",
    b"\n", b"\t", b":", b",", b"\"", b"'", b"#", b"- ", b"? ", b"|", b"%YAML 9.9", b"\xff" * 10, b"\x80" * 12,
    b"PK\x03\x04", b"\x7f\x45\x4c\x46", "\u2028".encode(), b"crc_num\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
)  # fmt: skip
_WORDS = re.compile(rb"[A-Za-z0-9_.+-]+|[^\sA-Za-z0-9_]")
_NUMBERS = re.compile(rb"\d+")

Mutation = Callable[[bytes, np.random.Generator], bytes]


def mutate(content: bytes, random: np.random.Generator) -> tuple[bytes, list[str]]:
    """``content`` after one to four mutations, and their names.

    Args:
        content: of the file.
        random: the only source of randomness.
    """
    names = []
    for _ in range(int(random.choice([1, 1, 1, 2, 2, 3, 4]))):
        mutation = MUTATIONS[int(random.integers(len(MUTATIONS)))]
        content = mutation(content, random)
        names.append(mutation.__name__.strip("_"))
    return content, names


def _at(content: bytes, random: np.random.Generator) -> int:
    """A position; often near the start, where headers are."""
    size = len(content)
    return int(random.integers(min(size, 64) + 1) if random.random() < 0.4 else random.integers(size + 1))


def _span(content: bytes, random: np.random.Generator) -> tuple[int, int]:
    start = _at(content, random)
    return start, min(len(content), start + int(2 ** random.uniform(0, 8)))


def _flip_bit(content: bytes, random: np.random.Generator) -> bytes:
    if not content:
        return content
    at = min(_at(content, random), len(content) - 1)
    return content[:at] + bytes([content[at] ^ (1 << int(random.integers(8)))]) + content[at + 1 :]


def _set_byte(content: bytes, random: np.random.Generator) -> bytes:
    at = _at(content, random)
    return (
        content[:at] + bytes([int(random.choice([0, 1, 0x7F, 0x80, 0xFF, 34, 44, 58]))]) + content[at + 1 :]
    )


def _truncate(content: bytes, random: np.random.Generator) -> bytes:
    return content[: _at(content, random)]


def _insert(content: bytes, random: np.random.Generator) -> bytes:
    at = _at(content, random)
    return content[:at] + random.bytes(int(2 ** random.uniform(0, 6))) + content[at:]


def _delete(content: bytes, random: np.random.Generator) -> bytes:
    start, stop = _span(content, random)
    return content[:start] + content[stop:]


def _repeat(content: bytes, random: np.random.Generator) -> bytes:
    start, stop = _span(content, random)
    return content[:stop] + content[start:stop] * int(random.integers(1, 4)) + content[stop:]


def _insert_token(content: bytes, random: np.random.Generator) -> bytes:
    at = _at(content, random)
    return content[:at] + TOKENS[int(random.integers(len(TOKENS)))] + content[at:]


def _replace_word(content: bytes, random: np.random.Generator) -> bytes:
    words = list(_WORDS.finditer(content))
    if not words:
        return content
    word = words[int(random.integers(len(words)))]
    return content[: word.start()] + TOKENS[int(random.integers(len(TOKENS)))] + content[word.end() :]


def _swap_words(content: bytes, random: np.random.Generator) -> bytes:
    words = list(_WORDS.finditer(content))
    if len(words) < 2:
        return content
    first, second = sorted(random.choice(len(words), 2, replace=False))
    a, b = words[first], words[second]
    return content[: a.start()] + b[0] + content[a.end() : b.start()] + a[0] + content[b.end() :]


def _change_number(content: bytes, random: np.random.Generator) -> bytes:
    numbers = list(_NUMBERS.finditer(content))
    if not numbers:
        return content
    number = numbers[int(random.integers(len(numbers)))]
    value = int(number[0][:15])
    changed = [value + 1, value - 1, value * 2, -value, value * 2**32, value << 62, 0][
        int(random.integers(7))
    ]
    return content[: number.start()] + str(changed).encode() + content[number.end() :]


def _swap_lines(content: bytes, random: np.random.Generator) -> bytes:
    lines = content.split(b"\n")
    if len(lines) < 2:
        return content
    a, b = random.choice(len(lines), 2, replace=False)
    lines[a], lines[b] = lines[b], lines[a]
    return b"\n".join(lines)


MUTATIONS: tuple[Mutation, ...] = (
    _flip_bit, _set_byte, _truncate, _insert, _delete, _repeat, _insert_token, _replace_word, _swap_words,
    _change_number, _swap_lines,
)  # fmt: skip
