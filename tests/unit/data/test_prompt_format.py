"""Chats by templates and raw prompts: equal to transformers, and safe against control tokens in text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindrlhf.data.jsonl import Sample
from mindrlhf.data.prompt_format import CHATML_TEMPLATE, PromptFormat
from mindrlhf.data.tokenizer import ChatTemplate, SpecialIds, Tokenizer
from mindrlhf.data.tokenizer_loading import load_tokenizer, read_chat_template
from mindrlhf.utils.errors import DataError

NO_DEFAULT = (
    "{%- for m in messages %}\n    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
TEMPLATES = {
    "chatml": CHATML_TEMPLATE,
    "no default system turn": NO_DEFAULT,
    # Trims, names control tokens, marks what the assistant says, and uses what transformers adds to Jinja.
    "trimmed": "{{ eos_token }}{{ bos_token }}{% set stop = '<|im_end|>' %}"
    "{% for m in messages %}{% if m.role == 'tool' %}{% break %}{% endif %}[{{ m.role | upper }}]\n"
    "{% if m.role == 'assistant' %}{% generation %}{% set stop = 'inner' %}{{ m.content | trim }}"
    "{% endgeneration %}{% else %}{{ m.content | trim }}{% endif %}{{ stop }}{% endfor %}"
    "{% if add_generation_prompt %}[ASSISTANT]\n{% endif %}{{ strftime_now('%Y') if tools }}",
    "json": "{% for m in messages %}<|im_start|>{{ {'é<': m.content} | tojson }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{\"é<\": \"{% endif %}",
    "thinks": NO_DEFAULT.replace("m.content", "('<t>\\n\\n</t>' if m.role[0] == 'a' else '') + m.content"),
}  # fmt: skip
TEXTS = ["hi", "怎样学英语？", "\n\n  two lines\nand blanks \n", "<|im_end", "{{ x }} 'q' \"q\" 🙂 é"]


@pytest.fixture(scope="module")
def with_template(
    tmp_path_factory: pytest.TempPathFactory, demo_tokenizer_dir: Path
) -> Callable[[str], tuple[Path, Tokenizer]]:
    """The demo tokenizer with a template as a current transformers saves it."""

    def make(template: str) -> tuple[Path, Tokenizer]:
        directory = tmp_path_factory.mktemp("template") / "tokenizer"
        shutil.copytree(demo_tokenizer_dir, directory)
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
        return directory, load_tokenizer(directory)

    return make


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.mark.parametrize("system", [None, "Be brief.\n"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_equal_those_of_transformers(
    with_template: Callable[[str], tuple[Path, Tokenizer]], name: str, system: str | None
) -> None:
    transformers = pytest.importorskip("transformers")
    directory, tokenizer = with_template(TEMPLATES[name])
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    form = PromptFormat(tokenizer, system_prompt=system)
    head = [] if system is None else [{"role": "system", "content": system}]
    for text in TEXTS if name != "json" else TEXTS[:2]:
        turns = [user(text), {"role": "assistant", "content": text[::-1]}, user("and?")]
        ids = theirs.apply_chat_template(head + turns, add_generation_prompt=True)
        assert form.encode_prompt(turns) == ids
        if name == "json":
            continue
        (sample,) = form.encode_samples([Sample(text, text[::-1], 1)])
        assert sample.response is not None
        assert sample.response[-1] == form.stop == 1023
        whole = theirs.apply_chat_template(head + turns[:2])
        ours = [*sample.prompt, *sample.response]
        if tokenizer.decode(whole).endswith("\n"):
            ours += tokenizer.encode_batch(["\n"])[0]
        assert tokenizer.decode(ours) == tokenizer.decode(whole)
        if not text.endswith("\n"):  # the reply's first line end would merge with the generation prompt's
            assert ours == whole


# Both keep or cut what a model thinks. DeepSeek's marks turns by tokens that are not special.
THINKING = {
    "Qwen3": NO_DEFAULT.replace("m.content", "(m.content if not loop.last or m.role == 'user' else "
    "'<think>\\n\\n</think>\\n\\n' + m.content.split('</think>')[-1])"),
    "DeepSeek": "{% for m in messages %}{{ '<|User|>' + m.content if m.role == 'user' else '<|Assistant|>' + "
    "m.content.split('</think>')[-1] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% endif %}",
    "ChatML": NO_DEFAULT,
}  # fmt: skip


@pytest.mark.parametrize("name", THINKING)
def test_added_tokens_that_are_not_special_are_text(
    with_template: Callable[[str], tuple[Path, Tokenizer]], name: str
) -> None:
    """They have their ids in messages, and decoding keeps them, unless the template marks turns with them."""
    transformers = pytest.importorskip("transformers")
    directory, _ = with_template(THINKING[name])
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    for number, text in enumerate(("<think>", "</think>", "<|User|>", "<|Assistant|>"), start=1024):
        config["added_tokens_decoder"][str(number)] = {"content": text, "special": False, "normalized": False}
    file.write_text(json.dumps(config), encoding="utf-8")
    tokenizer, theirs = load_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    form = PromptFormat(tokenizer)
    thought = "<think>why</think>ok"
    turns = [user(thought), {"role": "assistant", "content": thought}, user("and </think>?")]
    assert form.encode_prompt(turns) == theirs.apply_chat_template(turns, add_generation_prompt=True)
    (sample,) = form.encode_samples([Sample(thought, thought, 1)])
    ours, whole = [*sample.prompt, *(sample.response or [])], theirs.apply_chat_template(turns[:2])
    assert ours == whole[: len(ours)]
    assert tokenizer.decode(whole[len(ours) :]).strip() == ""
    assert form.last_message(sample.prompt) == thought
    if name != "DeepSeek":
        skipped = tokenizer.decode(whole, skip_special=True)
        assert skipped == theirs.decode(whole, skip_special_tokens=True)
        assert thought in skipped
        assert set(tokenizer.special_tokens.values()) == {1021, 1022, 1023}
        return
    (sample,) = form.encode_samples([Sample("<|Assistant|>no<|User|>", "<|User|>no", 1)])
    assert [i for i in [*sample.prompt, *(sample.response or [])] if i > 1020] == [1026, 1027, 1023]


def test_ids_equal_the_published_ones(
    shared_data: Path, load_qwen2: Callable[[str | None], Tokenizer]
) -> None:
    lines = (shared_data / "qwen2_tokenizer/golden_chat.jsonl").read_text(encoding="utf-8").splitlines()
    for golden in map(json.loads, lines):
        form, turns, ids = PromptFormat(load_qwen2(golden["config"])), golden["messages"], golden["ids"]
        if golden["add_generation_prompt"]:
            assert form.encode_prompt(turns) == ids
        elif [turn["role"] for turn in turns] == ["user", "assistant"]:
            (sample,) = form.encode_samples([Sample(turns[0]["content"], turns[1]["content"], 1)])
            assert [*sample.prompt, *(sample.response or []), 198] == ids


@pytest.mark.parametrize(
    ("config", "system_prompt"),
    [
        ("tokenizer_config.qwen2-instruct.json", "You are a helpful assistant."),
        (
            "tokenizer_config.qwen2.5-instruct.json",
            "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        ),
    ],
)
def test_the_default_system_prompt_is_the_templates_own_wherever_it_stands(
    shared_data: Path,
    demo_tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    config: str,
    system_prompt: str,
) -> None:
    content = json.loads((shared_data / "qwen2_tokenizer" / config).read_text(encoding="utf-8"))
    template = content["chat_template"]
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
    written = tmp_path / "tokenizer_config.json"
    for place in (template, named, "chat_template.jinja goes before this"):
        written.write_text(json.dumps({**content, "chat_template": place}), encoding="utf-8")
        if place not in (template, named):
            (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
        monkeypatch.setattr(demo_tokenizer, "chat_template", read_chat_template(tmp_path, written))
        assert PromptFormat(demo_tokenizer).example == (
            f"<|im_start|>system\n{system_prompt}<|im_end|>\n"
            "<|im_start|>user\n...<|im_end|>\n<|im_start|>assistant\n"
        )


@pytest.mark.parametrize("chat_template", [3, [], [{"name": "rag", "template": "x"}], ["x"]])
def test_a_template_in_another_form_is_refused(
    demo_tokenizer_dir: Path, tmp_path: Path, chat_template: object
) -> None:
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": chat_template}))
    with pytest.raises(DataError, match=r"tokenizer_config\.json: chat_template is neither"):
        load_tokenizer(demo_tokenizer_dir, config_path=config)


@pytest.mark.parametrize(
    ("template", "system", "fault"),
    [
        ("{% if %}", None, "is not valid Jinja"),
        ("{{ raise_exception('no way') }}", None, r"fails \(TemplateError: no way\)"),
        ("{{ messages[0].content.no() }}", None, r"fails \(UndefinedError"),
        ("{{ messages[0].content + 1 }}", None, r"fails \(TypeError"),
        ("{{ messages.append(1) }}", None, r"fails \(SecurityError"),
        ("<|im_start|>", None, "does not show the user's message once"),
        (NO_DEFAULT.replace("t\\n' }", "t\\n<t>' }"), None, "does not begin the assistant's turn with the"),
        (NO_DEFAULT.replace("<|im_end|>", "</s>"), None, "does not end the assistant's turn with a control"),
        ("{{ raise_exception('no system') if messages[0].role == 'system' }}", "S", "no system"),
        ("{{ messages | length }}" + NO_DEFAULT, "", "no system turn that could be left out"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_used_is_one_error(
    demo_tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    template: str,
    system: str | None,
    fault: str,
) -> None:
    monkeypatch.setattr(demo_tokenizer, "chat_template", ChatTemplate(template, "t.jinja", {}))
    with pytest.raises(
        DataError, match=rf"t\.jinja: the chat template .*{fault}.*\(--tokenizer_config, or chat_template"
    ):
        PromptFormat(demo_tokenizer, system_prompt=system)
    assert PromptFormat(demo_tokenizer, chat_template=False).prefix == []


def test_a_template_that_fails_for_one_sample_alone(
    demo_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = NO_DEFAULT.replace("'<|im_end|>\\n'", "('<|im_end|>\\n' if m.content != 'odd' else '')")
    monkeypatch.setattr(demo_tokenizer, "chat_template", ChatTemplate(odd, "t.jinja", {}))
    with pytest.raises(DataError, match=r"does not always end the assistant's turn with '<\|im_end"):
        PromptFormat(demo_tokenizer).encode_samples([Sample("a", "b", 1), Sample("a", "odd", 2)])


def test_an_empty_system_prompt_leaves_the_turn_out(demo_tokenizer: Tokenizer) -> None:
    form = PromptFormat(demo_tokenizer, system_prompt="")
    assert form.example == "<|im_start|>user\n...<|im_end|>\n<|im_start|>assistant\n"


@settings(deadline=None)
@given(st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "<|endoftext|>", "\n", " ", "hi", "学"])))
def test_text_cannot_write_control_tokens(demo_tokenizer: Tokenizer, pieces: list[str]) -> None:
    text = "".join(pieces)
    form = PromptFormat(demo_tokenizer, system_prompt=f"S{text}")
    (sample,) = form.encode_samples([Sample(text, text, 1)])
    control = set(demo_tokenizer.special_tokens.values())
    assert [i for i in sample.prompt if i in control] == [1022, 1023, 1022, 1023, 1022]
    assert [i for i in sample.response or [] if i in control] == [1023]
    turn = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    whole = f"<|im_start|>system\nS{text}<|im_end|>\n{turn}{text}<|im_end|>"
    assert demo_tokenizer.decode([*sample.prompt, *(sample.response or [])]) == whole


def test_the_example_shows_a_system_prompt_as_it_was_written(demo_tokenizer: Tokenizer) -> None:
    form = PromptFormat(demo_tokenizer, system_prompt="close <|im_end|> nothing")
    assert form.example.startswith("<|im_start|>system\nclose <|im_end|> nothing<|im_end|>\n<|im_start|>user")


def test_raw_prompts(demo_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    form = PromptFormat(demo_tokenizer, chat_template=False)
    assert (form.prefix, form.suffix, form.stop, form.example) == ([], [], 1021, "...")
    plain = demo_tokenizer.encode_batch(["hi", "ho<|im_end|>", "yes"])
    assert form.encode_samples([Sample("hi", None, 1), Sample("ho<|im_end|>", "yes", 2)]) == [
        (plain[0], None, None),
        (plain[1], [*plain[2], 1021], None),
    ]
    monkeypatch.setattr(demo_tokenizer, "special", SpecialIds(end_of_text=1023, pad=1023, begin_of_text=1022))
    assert PromptFormat(demo_tokenizer, chat_template=False).prefix == [1022]
    with pytest.raises(DataError, match="--system_prompt needs the chat template"):
        PromptFormat(demo_tokenizer, chat_template=False, system_prompt="S")
    monkeypatch.setattr(demo_tokenizer, "chat_template", None)
    with pytest.raises(DataError, match=r"nor ChatML's control tokens .*--no_chat_template"):
        PromptFormat(demo_tokenizer)
