"""A whole chat from its options: check, start, then talk on the terminal or answer a file."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mindrlhf.chat.conversation import Conversation, Reply
from mindrlhf.chat.display import PlainDisplay, new_display, short_names
from mindrlhf.chat.prompt_file import REPLY_KEYS, answer_file, encode_prompts, read_prompts
from mindrlhf.chat.saved_model import SavedModel, find_model
from mindrlhf.configs.faults import collected
from mindrlhf.configs.flags import ChatOptions
from mindrlhf.configs.parser import check_options
from mindrlhf.data.jsonl import rows_output
from mindrlhf.runtime.launching import count_workers, scratch_directory, serve_as_scheduler
from mindrlhf.utils.errors import DataError
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.outputs import check_outputs
from mindrlhf.utils.ranks import env_world_size, is_scheduler

if TYPE_CHECKING:
    from mindrlhf.chat.worker_group import WorkerGroup

logger = get_logger(__name__)

HELP = "/reset forgets the conversation, /quit ends it; // in front of a message sends it with one /"
_PROMPT = "you> "
_KEEP_ALIVE_SECONDS = 5.0


def run_chat(options: ChatOptions) -> None:
    """Talks on standard input and output, or answers ``--prompt_file``; under msrun on all workers.

    Raises:
        MindRLHFError: anything the user can fix; all except the weights is checked before a model is built.
    """
    os.environ.setdefault("GLOG_v", "3")
    _check(options)
    count_workers(use_parallel=True)
    if is_scheduler():
        serve_as_scheduler()
        return
    for stream in (sys.stdin, sys.stdout):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding="utf-8", errors="replace")
    models: list[SavedModel] = []
    for path in filter(None, (options.checkpoint, options.compare)):
        model = find_model(
            path,
            config=options.config,
            tokenizer_path=options.tokenizer_path,
            device_target=options.device_target,
            fallback=models[0] if models else None,
        )
        models.append(model)
    if options.output_file is not None:
        flags = ("config", "tokenizer_path", "prompt_file")
        check_outputs(
            [rows_output("--output_file", options.output_file, REPLY_KEYS, overwrite=options.overwrite)],
            [
                *(("--checkpoint or --compare", model.weights) for model in models),
                *((f"--{flag}", getattr(options, flag)) for flag in flags),
            ],
        )
    template = not options.no_chat_template
    conversations = [
        Conversation(model.tokenizer, system_prompt=options.system_prompt, chat_template=template)
        for model in models
    ]
    (_talk if options.prompt_file is None else _answer_file)(options, models, conversations)


def _check(options: ChatOptions) -> None:
    """Refuses flags that are out of their range or need another one.

    Raises:
        ConfigError: names every one.
    """
    with collected() as faults:
        check_options(options, faults)
        if options.output_file is not None and options.prompt_file is None:
            faults.add("--output_file", "there is no --prompt_file", "give both, or neither")
        if options.no_chat_template and options.system_prompt:
            faults.add("--system_prompt", "needs the chat template", "leave --no_chat_template out")


def _talk(options: ChatOptions, models: Sequence[SavedModel], conversations: Sequence[Conversation]) -> None:
    display = new_display(short_names(model.name for model in models))
    workers = start_workers(options, models, conversations, rows=1, longest=1, notice=display.notice)
    if not workers.is_main:
        workers.serve()
        return
    if sys.stdin.isatty():
        display.notice(HELP)
    # Not in a finally clause: after a failure the others wait elsewhere, and msrun's supervisor ends them.
    Session(workers, conversations, display).talk(read_messages(workers))
    workers.end()


def _answer_file(
    options: ChatOptions, models: Sequence[SavedModel], conversations: Sequence[Conversation]
) -> None:
    from mindrlhf.chat.reply_generator import prompt_limit

    assert options.prompt_file is not None
    prompts = read_prompts(options.prompt_file, skip_bad_lines=options.skip_bad_lines)
    encoded = encode_prompts(prompts, conversations, [prompt_limit(model, options) for model in models])
    longest = max(len(ids) for of_model in encoded for ids in of_model)
    rows = min(options.batch_size, len(prompts))
    workers = start_workers(options, models, conversations, rows=rows, longest=longest, notice=logger.info)
    if not workers.is_main:
        workers.serve()
        return
    answer_file(workers, prompts, encoded, options.output_file)
    workers.end()


def start_workers(
    options: ChatOptions,
    models: Sequence[SavedModel],
    conversations: Sequence[Conversation],
    *,
    rows: int,
    longest: int,
    notice: Callable[[str], None],
) -> WorkerGroup:
    """Takes the device, joins the other workers, and loads the weights for prompts of ``longest`` ids."""
    from mindrlhf.chat.reply_generator import ReplyGenerator, mesh_for_workers
    from mindrlhf.chat.worker_group import WorkerGroup
    from mindrlhf.parallel.groups import create_groups
    from mindrlhf.runtime.device import check_device, start_runtime
    from mindrlhf.runtime.host_exchange import HostExchange

    context = models[0].sizes.context
    check_device(context)
    runtime = start_runtime(context, use_parallel=env_world_size() > 1, scratch_dir=scratch_directory())
    generators = []
    for model, conversation in zip(models, conversations, strict=True):
        mesh = mesh_for_workers(model.sizes.model, runtime.world_size)
        logger.info("%s: %s on %s", model.name, mesh, context.device_target)
        # Other ranks do the same as the main rank; one notice is enough.
        on_main = notice if runtime.is_main else logger.debug
        groups = create_groups(mesh, runtime.rank)
        generators.append(
            ReplyGenerator(model, groups, options, conversation.stop_ids, rows=rows, notice=on_main)
        )
    for generator in generators:
        generator.prepare(longest)
    return WorkerGroup(generators, HostExchange(runtime), options.seed)


class Session:
    """Answers messages until the user or the input ends, on the main rank.

    Args:
        workers: all workers with the models.
        conversations: one per model, each with its own replies.
        display: where replies go.
    """

    def __init__(
        self, workers: WorkerGroup, conversations: Sequence[Conversation], display: PlainDisplay
    ) -> None:
        self._workers, self._conversations, self._display = workers, conversations, display
        self._asked = 0

    def talk(self, messages: Iterator[str]) -> None:
        """Answers message after message; ``/quit`` or the end of messages ends it."""
        for line in messages:
            message = line.strip()
            if message in ("/quit", "/exit"):
                return
            if message == "/reset":
                for conversation in self._conversations:
                    conversation.reset()
                self._display.notice("the conversation is forgotten")
            elif message == "/help":
                self._display.notice(HELP)
            elif message.startswith("/") and not message.startswith("//"):
                self._display.notice(f"{message.split()[0]}: no such command; {HELP}")
            elif message:
                self._answer(message.removeprefix("/"))

    def _answer(self, message: str) -> None:
        try:
            prompts = [self._prompt(place, message) for place in range(len(self._conversations))]
        except DataError as error:
            self._display.notice(f"not sent: {error}")
            return
        replies = [Reply(g.model.tokenizer, g.stop_ids) for g in self._workers.generators]
        self._asked += 1
        with self._display.reply(), _sigterm_interrupts():
            try:
                for place, ids in self._workers.generate([[prompt] for prompt in prompts], [self._asked]):
                    self._display.piece(place, replies[place].add(ids[0]))
            except KeyboardInterrupt:
                if not self._workers.is_alone:  # the other workers cannot be told to stop
                    raise
            for place, reply in enumerate(replies):
                self._display.piece(place, reply.finish())
        for conversation, reply in zip(self._conversations, replies, strict=True):
            conversation.add(message, reply.text)
        if not all(reply.stopped for reply in replies):
            self._display.notice("(cut: --max_tokens or an interrupt ended it)")

    def _prompt(self, place: int, message: str) -> list[int]:
        conversation, generator = self._conversations[place], self._workers.generators[place]
        before = len(conversation)
        prompt = conversation.prompt(message, generator.limit)
        if len(conversation) < before:
            self._display.notice(
                f"{generator.model.name}: the oldest {before - len(conversation)} turn(s) are forgotten, "
                f"prompts have at most {generator.limit} tokens"
            )
        return prompt


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Makes Ctrl-C at a terminal end the reply, not the program.

    From its first graph on, MindSpore answers SIGINT with a SIGTERM to its own process. So SIGTERM counts as
    an interrupt inside the block, and Python's handler of SIGINT is restored afterwards.
    """
    if not sys.stdin.isatty():
        yield
        return
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def read_messages(workers: WorkerGroup) -> Iterator[str]:
    """Lines of standard input, with a prompt on a terminal.

    With several workers the main rank tells the others now and then that it is only waiting.
    """
    if workers.is_alone:
        yield from _lines()
        return
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in _lines():
            lines.put(line)
        lines.put(None)

    # It waits for a person, so the process must be able to end without it.
    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=_KEEP_ALIVE_SECONDS)
        except queue.Empty:
            workers.keep_alive()
            continue
        if line is None:
            return
        yield line


def _lines() -> Iterator[str]:
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        import readline  # noqa: F401  # gives input() a history and arrow keys
    while True:
        try:
            line = input(_PROMPT) if on_terminal else next(sys.stdin, None)
        except EOFError:
            return
        if line is None:
            return
        if not on_terminal and sys.stdout.isatty():
            sys.stdout.write(_PROMPT + line.rstrip("\n") + "\n")
        yield line
