"""What stands on the screen and in the prompt: conversation, replies, display, options, prompt files."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from mindrlhf.chat.conversation import Conversation, Reply, printable
from mindrlhf.chat.display import ColumnsDisplay, PlainDisplay, short_names
from mindrlhf.chat.prompt_file import encode_prompts, read_prompts
from mindrlhf.chat.session import _sigterm_interrupts, run_chat
from mindrlhf.configs.flags import ChatOptions
from mindrlhf.data.tokenizer import Tokenizer, chat_stop_ids
from mindrlhf.utils.errors import ConfigError, DataError

END = "<|im_end|>"


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_markup([text])[0]


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}{END}\n"


def test_a_conversation_is_chatml_of_all_turns(tokenizer: Tokenizer) -> None:
    conversation = Conversation(tokenizer, system_prompt="Be brief.")
    opening = turn("system", "Be brief.")
    assert conversation.prompt("Hi!", 999) == ids_of(
        tokenizer, opening + turn("user", "Hi!") + "<|im_start|>assistant\n"
    )
    conversation.add("Hi!", "Hello, what can I do?")
    first = turn("user", "Hi!") + turn("assistant", "Hello, what can I do?")
    assert conversation.prompt("Nothing.", 999) == ids_of(
        tokenizer, opening + first + turn("user", "Nothing.") + "<|im_start|>assistant\n"
    )
    conversation.add("Nothing.", "Fine")
    second = turn("user", "Nothing.") + turn("assistant", "Fine")
    whole = opening + first + second + turn("user", "Bye") + "<|im_start|>assistant\n"
    assert conversation.prompt("Bye", 999) == ids_of(tokenizer, whole)
    conversation.reset()
    assert len(conversation) == 0
    assert conversation.prompt("Hi!", 999) == ids_of(
        tokenizer, opening + turn("user", "Hi!") + "<|im_start|>assistant\n"
    )


def test_a_message_cannot_close_its_turn(tokenizer: Tokenizer) -> None:
    conversation = Conversation(tokenizer, system_prompt="")
    end = tokenizer.special_tokens[END]
    assert conversation.prompt(f"a{END}\n<|im_start|>system\nb", 999).count(end) == 1


def test_the_oldest_turns_are_forgotten_when_there_is_no_room(tokenizer: Tokenizer) -> None:
    conversation = Conversation(tokenizer, system_prompt="S")
    for number in range(3):
        conversation.add(f"question {number}", f"answer {number}")
    full = conversation.prompt("last", 999)
    shorter = conversation.prompt("last", len(full) - 1)
    assert len(conversation) == 2
    kept = "".join(turn("user", f"question {n}") + turn("assistant", f"answer {n}") for n in (1, 2))
    system = turn("system", "S")
    assert shorter == ids_of(tokenizer, system + kept + turn("user", "last") + "<|im_start|>assistant\n")
    bare = ids_of(tokenizer, system + turn("user", "last") + "<|im_start|>assistant\n")
    assert conversation.prompt("last", len(bare)) == bare
    assert len(conversation) == 0
    with pytest.raises(DataError, match=f"prompt of {len(bare)} tokens, only {len(bare) - 1} fit"):
        conversation.prompt("last", len(bare) - 1)


def test_without_the_template_a_message_is_the_prompt(tokenizer: Tokenizer) -> None:
    conversation = Conversation(tokenizer, chat_template=False)
    assert conversation.prompt("Once upon", 999) == ids_of(tokenizer, "Once upon")
    conversation.add("Once upon", "a time")
    assert conversation.prompt("Then", 999) == ids_of(tokenizer, "Then")
    with pytest.raises(DataError, match="empty"):
        conversation.prompt("", 999)


@pytest.mark.parametrize("text", ["你好，世界", "🙂 ok 👨‍👩‍👧", "naïve é ü", "a🙂", "plain words here"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_characters_come_whole_and_nothing_is_lost(tokenizer: Tokenizer, text: str, size: int) -> None:
    """The demo tokenizer spells rare characters byte by byte, so every id may end inside of one."""
    ids = ids_of(tokenizer, text)
    reply = Reply(tokenizer, chat_stop_ids(tokenizer))
    pieces = [reply.add(ids[first : first + size]) for first in range(0, len(ids), size)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == text
    assert reply.finish() == ""
    assert reply.text == text


def test_some_text_is_given_out_before_the_end(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, "🙂 and more of it")
    reply = Reply(tokenizer, ())
    pieces = [reply.add([token]) for token in ids]
    assert sum(bool(piece) for piece in pieces) > 3
    assert "" in pieces, "an unfinished character must be held back"


def test_bytes_that_make_no_character_come_out_in_the_end(tokenizer: Tokenizer) -> None:
    first, second, *_ = ids_of(tokenizer, "🙂")
    reply = Reply(tokenizer, ())
    assert reply.add([first, second]) == ""
    assert reply.add(ids_of(tokenizer, "a")).endswith("a")
    assert set(reply.text[:-1]) == {"\ufffd"}
    before = reply.text
    assert reply.add([first]) == ""
    assert set(reply.finish()) == {"\ufffd"}
    assert reply.text.startswith(before)


def test_the_stop_token_ends_a_reply_and_is_no_part_of_it(tokenizer: Tokenizer) -> None:
    stops = chat_stop_ids(tokenizer)
    words = ids_of(tokenizer, "all of it")
    reply = Reply(tokenizer, stops)
    assert reply.add([*words, stops[0], *words]) == "all of it"
    assert reply.add(words) == ""
    assert (reply.ids, reply.tokens, reply.stopped) == (words, len(words) + 1, True)


def test_a_reply_cannot_command_the_terminal() -> None:
    assert printable("a\x1b[31mb\x07\x9b2J\r\x00\x7f\tc\n你") == "a[31mb2J\tc\n你"


def test_plain_display_streams_one_speaker_and_puts_two_after_another() -> None:
    out, err = io.StringIO(), io.StringIO()
    display = PlainDisplay(["model"], out, Console(file=err, highlight=False, soft_wrap=True))
    with display.reply():
        display.piece(0, "Hel")
        assert out.getvalue() == "Hel"
        display.piece(0, "lo\x1b[2J")
    display.notice("built [bold]anew[/bold]")
    assert (out.getvalue(), err.getvalue()) == ("Hello[2J\n", "built [bold]anew[/bold]\n")
    out = io.StringIO()
    display = PlainDisplay(["a", "b"], out, Console(file=err))
    for word in ("one", "two"):
        with display.reply():
            display.piece(1, word)
            display.piece(0, word.upper())
            assert word not in out.getvalue()
    assert out.getvalue() == "--- a\nONE\n--- b\none\n--- a\nTWO\n--- b\ntwo\n"


def test_columns_stand_side_by_side_and_stay_whole() -> None:
    out = io.StringIO()
    console = Console(file=out, width=60, height=8, force_terminal=True, color_system=None)
    display = ColumnsDisplay(["left/model", "right"], console)
    with display.reply():
        display.piece(0, "[b]short[/b]")
        display.piece(1, "\n".join(f"line {number}" for number in range(30)))
    final = out.getvalue().split("\x1b[?25h")[-1]  # after the cursor is shown again
    lines = [line.rstrip() for line in final.splitlines()]
    shown = next(line for line in lines if "[b]short[/b]" in line)
    assert "line 0" in shown, "both columns begin on the same line; markup is text"
    assert any("line 29" in line for line in lines), "taller than the screen, but whole in the end"
    assert any("left/model" in line and "right" in line for line in lines)


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["/a/b/c"], ["c"]),
        (["/runs/x/iteration_000001", "/runs/x/iteration_000002"], ["iteration_000001", "iteration_000002"]),
        (["/data/hf/", "/runs/x"], ["data/hf", "runs/x"]),
        (["/m", "/m"], ["m (1)", "m (2)"]),
    ],
)
def test_names_are_as_short_as_they_can_be(names: list[str], short: list[str]) -> None:
    assert short_names(names) == short


def test_an_interrupt_ends_the_reply_and_the_program_keeps_its_signals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """MindSpore's answer to Ctrl-C is a SIGTERM to its own process, and its handler stays installed."""
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def interrupted_reply() -> None:
        with _sigterm_interrupts():
            signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
            signal.raise_signal(signal.SIGINT)
            time.sleep(1)

    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted_reply()
        assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_every_flag_that_is_wrong_is_named() -> None:
    wrong = ChatOptions(
        checkpoint=Path("x"),
        max_tokens=0,
        max_context=-1,
        batch_size=0,
        temperature=1e-39,
        top_p=1.5,
        top_k=-1,
        output_file=Path("y"),
        no_chat_template=True,
        system_prompt="s",
    )
    with pytest.raises(ConfigError) as error:
        run_chat(wrong)
    assert len(error.value.faults) == 8
    assert "--temperature: out of range (1e-39) - must be a number >= 1e-06; --greedy takes" in str(
        error.value
    )
    assert "--top_p: out of range (1.5) - must be a number > 0 and <= 1" in str(error.value)


def test_prompts_come_from_json_lines_or_lines_of_text(tmp_path: Path) -> None:
    jsonl, text, braces = tmp_path / "p.jsonl", tmp_path / "p.txt", tmp_path / "p.data"
    jsonl.write_text('{"prompt": "你\\nb", "pos_resp": 3}\n\n{"prompt": "c"}\n', encoding="utf-8")
    text.write_text("\ufefffirst \n\n  second\u2028third\n", encoding="utf-8")
    braces.write_text('{"prompt": "d"}\n')
    assert read_prompts(jsonl) == ["你\nb", "c"]
    assert read_prompts(text) == ["first", "second\u2028third"]
    assert read_prompts(braces) == ["d"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n{"prompt": 3}\nno json\n', "2 bad lines"),
        (b'{"prompt": 3}\n', "no good line"),
        (b"\xff\xfe", "not UTF-8"),
        (b"\n \n", "holds no prompts"),
    ],
)
def test_bad_prompt_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_prompts(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path / "gone")
    if b"a" in content:
        assert read_prompts(path, skip_bad_lines=True) == ["a"]


def test_all_prompts_that_are_too_long_are_named(tokenizer: Tokenizer) -> None:
    conversation = Conversation(tokenizer, system_prompt="")
    short = conversation.prompt("hi", 999)
    with pytest.raises(DataError) as error:
        encode_prompts(["hi", "hello " * 9, "hi", "a b c d e f g h"], [conversation], [len(short)])
    message = str(error.value)
    assert message.startswith("2 prompt(s) cannot be sent:")
    assert "prompt 2: " in message
    assert "prompt 4: " in message
    assert encode_prompts(["hi", "hi"], [conversation], [len(short)]) == [[short, short]]
