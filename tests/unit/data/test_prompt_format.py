"""ChatML and raw prompts: equal to the published renderings, and safe against control tokens in text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindrlhf.data.jsonl import Sample
from mindrlhf.data.prompt_format import (
    QWEN2_SYSTEM_PROMPT,
    chatml_format,
    default_system_prompt,
    encode_samples,
    raw_format,
)
from mindrlhf.data.tokenizer import SpecialIds, Tokenizer
from mindrlhf.utils.errors import DataError


def whole(
    tokenizer: Tokenizer, sample: Sample, system_prompt: str | None = None
) -> tuple[list[int], list[int]]:
    """Prompt and response ids of a sample in ChatML."""
    around = chatml_format(tokenizer, system_prompt)
    encoded = encode_samples(tokenizer, around, [sample])[0]
    prompt = [*around.prefix, *encoded.text, *around.suffix]
    return prompt, [] if encoded.response is None else [*encoded.response, around.stop]


def test_chatml_equals_the_goldens(shared_data: Path, load_qwen2: Callable[[str | None], Tokenizer]) -> None:
    directory = shared_data / "qwen2_tokenizer"
    lines = (directory / "golden_chat.jsonl").read_text(encoding="utf-8").splitlines()
    goldens = [json.loads(line) for line in lines]
    seen = 0
    for golden in goldens:
        tokenizer = load_qwen2(golden["config"])
        messages = {message["role"]: message["content"] for message in golden["messages"]}
        if len(messages) < len(golden["messages"]):
            continue  # several user turns
        sample = Sample(messages["user"], messages.get("assistant"), 1)
        prompt, response = whole(tokenizer, sample, messages.get("system"))
        newline = tokenizer.encode_batch(["\n"])[0]
        if sample.response is None and golden["add_generation_prompt"]:
            assert prompt == golden["ids"]
        elif sample.response is not None and not golden["add_generation_prompt"]:
            assert prompt + response + newline == golden["ids"]
        else:
            continue
        seen += 1
    assert seen == 9  # three configs with three conversations each


@pytest.mark.parametrize(
    ("config", "system_prompt"),
    [
        ("tokenizer_config.json", "You are a helpful assistant."),
        ("tokenizer_config.qwen2-instruct.json", "You are a helpful assistant."),
        (
            "tokenizer_config.qwen2.5-instruct.json",
            "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        ),
    ],
)
def test_default_system_prompt_is_the_templates_own(
    shared_data: Path, config: str, system_prompt: str
) -> None:
    template = json.loads((shared_data / "qwen2_tokenizer" / config).read_text(encoding="utf-8"))[
        "chat_template"
    ]
    assert default_system_prompt(template) == system_prompt


def test_default_system_prompt_without_or_with_a_foreign_template() -> None:
    assert default_system_prompt(None) == QWEN2_SYSTEM_PROMPT
    assert default_system_prompt("{{ '<|im_start|>' + role + '\n' + text + '<|im_end|>' }}") == ""
    with pytest.raises(DataError, match="--no_chat_template"):
        default_system_prompt("[INST] {{ text }} [/INST]")


def test_rendered_text(demo_tokenizer: Tokenizer) -> None:
    prompt, response = whole(demo_tokenizer, Sample("怎样学英语？", "Practise.", 1), "Be brief.")
    assert demo_tokenizer.decode(prompt) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n怎样学英语？<|im_end|>\n<|im_start|>assistant\n"
    )
    assert demo_tokenizer.decode(response) == "Practise.<|im_end|>"


def test_empty_system_prompt_leaves_the_turn_out(demo_tokenizer: Tokenizer) -> None:
    around = chatml_format(demo_tokenizer, "")
    assert around.prefix == (demo_tokenizer.special.turn_start,)
    assert around.system_prompt is None


@settings(deadline=None)
@given(st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "<|endoftext|>", "\n", " ", "hi", "学"])))
def test_text_cannot_write_control_tokens(demo_tokenizer: Tokenizer, pieces: list[str]) -> None:
    text = "".join(pieces)
    prompt, response = whole(demo_tokenizer, Sample(text, text, 1))
    control = set(demo_tokenizer.special_tokens.values())
    assert [i for i in prompt if i in control] == [1022, 1023, 1022, 1023, 1022]
    assert [i for i in response if i in control] == [1023]


def test_raw_format(demo_tokenizer: Tokenizer) -> None:
    around = raw_format(demo_tokenizer)
    assert (around.prefix, around.suffix, around.overhead) == ((), (), 0)
    assert around.stop == demo_tokenizer.special.end_of_text == 1021
    encoded = encode_samples(demo_tokenizer, around, [Sample("hi", None, 1), Sample("ho", "yes", 2)])
    assert [demo_tokenizer.decode(sample.text) for sample in encoded] == ["hi", "ho"]
    assert [sample.response for sample in encoded] == [None, demo_tokenizer.encode_batch(["yes"])[0]]


def test_raw_prompt_starts_with_begin_of_text_where_there_is_one() -> None:
    class WithBegin:
        special = SpecialIds(end_of_text=2, pad=2, begin_of_text=1)

    assert raw_format(WithBegin()).prefix == (1,)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no control tokens"):
        chatml_format(WithBegin())  # type: ignore[arg-type]
