"""Talking to a tiny random model: the whole program in this process, against one call of ``generate``."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mindspore as ms
import numpy as np
import pytest

from mindrlhf.chat.conversation import printable
from mindrlhf.chat.reply_generator import bucket, mesh_for_workers, prompt_limit
from mindrlhf.chat.session import run_chat
from mindrlhf.chat.worker_group import Broadcast, WorkerGroup
from mindrlhf.checkpoint.shards import save_shard
from mindrlhf.configs.flags import ChatOptions
from mindrlhf.data.tokenizer import Tokenizer, chat_stop_ids
from mindrlhf.models.generator import GenerationConfig, PPOModelInfer
from mindrlhf.models.qwen2.layouts import parameter_layouts
from mindrlhf.models.score_head import SCORE_HEAD
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Mesh
from mindrlhf.runtime import device
from mindrlhf.runtime.device import Runtime
from mindrlhf.runtime.host_exchange import HostExchange
from mindrlhf.utils.errors import MindRLHFError

TOKENS = 20
COLUMNS = 200
HELLO, LONG = "Hello!", "Tell me something about the weather and the sea. " * 3 + "Please."
WHOLE = Groups(Mesh(), 0)


@pytest.fixture(scope="module", autouse=True)
def _graph_mode() -> None:
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")


@pytest.fixture(autouse=True)
def _device_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """MindSpore lets a process choose its device once; this one has."""
    monkeypatch.setattr(device, "start_runtime", lambda *args, **kwargs: Runtime(0, 1))


@pytest.fixture(scope="module")
def first(tiny: Callable[..., SimpleNamespace]) -> SimpleNamespace:
    return tiny(1)


@pytest.fixture(scope="module")
def second(tiny: Callable[..., SimpleNamespace], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Another model, as the checkpoint of a PPO run with a value head, split over 2 ranks."""
    made = tiny(2)
    made.run = tmp_path_factory.mktemp("run")
    mesh = Mesh(1, 2)
    layouts = parameter_layouts(made.model, mesh, score_head=True)
    heads = {name: np.ones(layouts[name].shape, np.float32) for name in SCORE_HEAD}
    for rank in range(2):
        shards = {name: layout.take({**made.arrays, **heads}[name], rank) for name, layout in layouts.items()}
        save_shard(made.run / "iteration_000003" / "policy", rank, shards)
    made.yaml = made.run / "finetune.yaml"
    return made


def model_of(made: SimpleNamespace, **changes: Any) -> PPOModelInfer:
    """The model with room for any prompt of these tests, one row."""
    generation = GenerationConfig(
        **{
            "max_prompt_length": COLUMNS,
            "max_response_length": TOKENS,
            "do_sample": False,
            "stop_token_ids": (1022, 1023, 1021),
            "pad_token_id": 1021,
            "valid_vocab_size": 1024,
            **changes,
        }
    )
    model = PPOModelInfer(made.model, WHOLE, generation, batch_size=1, decode_steps_per_call=7)
    model.load(made.arrays)
    return model


@pytest.fixture(scope="module")
def answer(
    first: SimpleNamespace, second: SimpleNamespace, tokenizer: Tokenizer
) -> Callable[[int, Sequence[str]], list[str]]:
    """Greedy replies of the first or second model to messages of one conversation, by ``generate``."""
    models = [model_of(first), model_of(second)]
    stops = set(chat_stop_ids(tokenizer))

    def reply(place: int, messages: Sequence[str]) -> list[str]:
        texts = []
        ids: list[int] = tokenizer.encode_markup(["<|im_start|>system\nBe brief.<|im_end|>\n"])[0]
        for message in messages:
            turn = f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"
            ids = ids + tokenizer.encode_markup([turn])[0]
            prompt = np.full((1, COLUMNS), 1021)
            prompt[0, COLUMNS - len(ids) :] = ids
            output = models[place].generate(prompt, np.array([len(ids)]), np.zeros((1, TOKENS), np.float32))
            said = output.response_ids[0, : output.lengths[0]].tolist()
            said = said[:-1] if said[-1] in stops else said
            text = tokenizer.decode(said, skip_special=True)
            texts.append(printable(text))
            ids = ids + tokenizer.encode_markup([f"{text}<|im_end|>\n"])[0]
        return texts

    return reply


def chat(monkeypatch: pytest.MonkeyPatch, lines: str, checkpoint: Path, **flags: Any) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    options = {"greedy": True, "max_tokens": TOKENS, "system_prompt": "Be brief.", **flags}
    run_chat(ChatOptions(checkpoint=checkpoint, **options))


def test_a_conversation_with_one_model(
    first: SimpleNamespace,
    answer: Callable[[int, Sequence[str]], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """History, a prompt that outgrows its columns, /reset, an unknown command, /quit."""
    lines = f"{HELLO}\n\n{LONG}\n/why\n/reset\n  {HELLO}\n/quit\n{LONG}\n"
    chat(monkeypatch, lines, first.hf)
    said = capsys.readouterr()
    expected = answer(0, [HELLO, LONG])
    assert expected[0] != expected[1]
    assert said.out == "".join(f"{text}\n" for text in [*expected, expected[0]])
    notices = said.err.splitlines()
    assert [n.split("up to ")[1].split()[0] for n in notices if "ready for prompts" in n] == [
        "64",
        "236",  # not 256: the model has 256 positions, and the reply wants 20 of them
    ]
    assert sum("/why: no such command" in notice for notice in notices) == 1
    assert "the conversation is forgotten" in notices


def test_two_models_hear_the_same_and_keep_their_own_history(
    first: SimpleNamespace,
    second: SimpleNamespace,
    answer: Callable[[int, Sequence[str]], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    repo_root: Path,
) -> None:
    """The second is ``iteration_NNNNNN`` of a run; sizes come from a YAML, its tokenizer from the first."""
    import yaml

    source = repo_root / "model_configs" / "qwen_ppo" / "finetune_qwen2_tiny.yaml"
    content = yaml.safe_load(source.read_text(encoding="utf-8"))
    section = content["model"]["model_config"]
    for key in section:
        value = getattr(second.model, key, section[key])
        section[key] = list(value) if isinstance(value, tuple) else value
    content["parallel_config"].update(data_parallel=1, model_parallel=2)
    second.yaml.write_text(yaml.safe_dump(content), encoding="utf-8")
    run = second.run / "iteration_000003"
    chat(monkeypatch, f"{HELLO}\nAnd then?\n", first.hf, compare=run, config=second.yaml)
    out = capsys.readouterr().out
    names = [f"{first.hf.parent.name}/hf", "run0/iteration_000003"]
    parts = out.split("--- ")[1:]
    texts = [[part.partition("\n")[2].removesuffix("\n") for part in parts[place::2]] for place in (0, 1)]
    assert [part.partition("\n")[0] for part in parts] == names * 2
    assert texts == [answer(0, [HELLO, "And then?"]), answer(1, [HELLO, "And then?"])]
    assert texts[0] != texts[1]


def test_a_file_of_prompts(
    first: SimpleNamespace,
    answer: Callable[[int, Sequence[str]], list[str]],
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Batches of two; the last has one prompt. Replies are those to each prompt alone."""
    prompts = [HELLO, "What is it?", "你好"]
    file, output = tmp_path / "prompts.jsonl", tmp_path / "new" / "replies.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    chat(monkeypatch, "", first.hf, prompt_file=file, output_file=output, batch_size=2)
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [list(line) for line in lines] == [["prompt", "response", "tokens", "stopped"]] * 3
    assert [line["prompt"] for line in lines] == prompts
    assert [printable(line["response"]) for line in lines] == [answer(0, [prompt])[0] for prompt in prompts]
    assert all(line["tokens"] == TOKENS or line["stopped"] for line in lines)
    assert capsys.readouterr().out == ""


def test_a_stream_gives_what_generate_gives(first: SimpleNamespace) -> None:
    """Sampled, with enough stop tokens that rows end early; the stream ends with the last of them."""
    model = model_of(
        first, do_sample=True, stop_token_ids=(3, 19, 30), valid_vocab_size=40, max_prompt_length=8
    )
    rng = np.random.default_rng(0)
    ids, lengths = rng.integers(0, 40, (1, 8)), np.array([8])
    lasted = []
    for _ in range(6):
        uniforms = rng.random((1, TOKENS), dtype=np.float32)
        output = model.generate(ids, lengths, uniforms)
        pieces = list(model.stream(ids, lengths, uniforms))
        assert [piece.shape[1] for piece in pieces[:2]] in ([1], [1, 7])
        streamed = np.concatenate(pieces, axis=1)[0]
        assert len(streamed) <= TOKENS
        assert len(streamed) >= output.lengths[0]
        np.testing.assert_array_equal(streamed, output.response_ids[0, : len(streamed)])
        lasted.append(len(streamed))
    assert min(lasted) < TOKENS
    with pytest.raises(ValueError, match="2 prompts, expected batch_size 1"):
        next(model.stream(np.repeat(ids, 2, 0), np.array([8, 8]), np.zeros((2, TOKENS), np.float32)))


def test_columns_grow_by_doubling() -> None:
    assert [bucket(n, 1000) for n in (1, 64, 65, 128, 300, 512, 513, 1000)] == [
        *(64, 64, 128, 128, 512, 512, 1000, 1000)
    ]
    assert bucket(5, 40) == 40


def test_room_for_the_reply_is_kept(first: SimpleNamespace) -> None:
    from mindrlhf.chat.saved_model import find_model

    checkpoint = find_model(first.hf)
    assert prompt_limit(checkpoint, ChatOptions(checkpoint=first.hf, max_tokens=56)) == 200
    small = ChatOptions(checkpoint=first.hf, max_tokens=56, max_context=100)
    assert prompt_limit(checkpoint, small) == 44
    with pytest.raises(MindRLHFError, match="--max_tokens 256 leaves the prompt none"):
        prompt_limit(checkpoint, ChatOptions(checkpoint=first.hf, max_tokens=256))


@pytest.mark.parametrize(
    ("workers", "mesh"), [(1, Mesh(1, 1)), (2, Mesh(1, 2)), (4, Mesh(2, 2)), (3, Mesh(3, 1)), (6, Mesh(3, 2))]
)
def test_workers_split_a_model_as_far_as_its_heads_allow(
    first: SimpleNamespace, workers: int, mesh: Mesh
) -> None:
    assert mesh_for_workers(first.model, workers) == mesh


@pytest.mark.parametrize("length", [0, 1000, 1013, 1014, 5000])
def test_messages_of_any_length_reach_the_other_ranks(length: int) -> None:
    """Blocks that rank 0 shared are handed to a receiver; a message may fill a block to its last byte."""
    blocks: list[np.ndarray] = []
    world = Runtime(0, 2)

    def record(block: np.ndarray) -> np.ndarray:
        blocks.append(block.copy())
        return np.stack([block, np.zeros_like(block)])

    message = {"prompts": "x" * length + "é"}
    Broadcast(SimpleNamespace(runtime=world, every_rank=record)).send(message)
    assert {block.shape for block in blocks} == {(256,)}
    assert {block.dtype for block in blocks} == {np.dtype(np.int32)}
    waiting = iter(list(blocks))
    receiver = Broadcast(SimpleNamespace(runtime=world, every_rank=lambda mine: [next(waiting), mine]))
    assert receiver.receive() == message
    assert next(waiting, None) is None


def test_a_message_to_nobody_is_not_sent() -> None:
    Broadcast(SimpleNamespace(runtime=Runtime(0, 1), every_rank=None)).send({"a": 1})


def test_same_seed_same_draws_whoever_asks() -> None:
    def draws(seed: int, number: int) -> np.ndarray:
        generator: Any = SimpleNamespace(options=SimpleNamespace(max_tokens=5))
        return WorkerGroup([generator], HostExchange(Runtime(0, 1)), seed)._uniforms(number)

    np.testing.assert_array_equal(draws(1, 2), draws(1, 2))
    assert (draws(1, 2) != draws(2, 2)).all()
    assert (draws(1, 2) != draws(1, 3)).all()
    assert draws(1, 2).dtype == np.float32
