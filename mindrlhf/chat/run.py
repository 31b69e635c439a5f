"""A whole chat from its options: check, start, talk or answer a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mindrlhf.chat.batch import answer_file, encode_prompts, read_prompts
from mindrlhf.chat.checkpoint import Checkpoint, find_checkpoint
from mindrlhf.chat.conversation import Conversation
from mindrlhf.chat.display import new_display, short_names
from mindrlhf.chat.options import ChatOptions
from mindrlhf.runtime.launching import count_workers, scratch_directory, serve_as_scheduler
from mindrlhf.utils.logging import get_logger
from mindrlhf.utils.ranks import env_world_size, is_scheduler

if TYPE_CHECKING:
    from mindrlhf.chat.team import Team

logger = get_logger(__name__)


def run_chat(options: ChatOptions) -> None:
    """Talks on standard input and output, or answers ``--prompt_file``; under msrun on all workers.

    Raises:
        MindRLHFError: anything the user can mend; all but the weights is checked before a model is built.
    """
    os.environ.setdefault("GLOG_v", "3")
    options = options.checked()
    count_workers(use_parallel=True)
    if is_scheduler():
        serve_as_scheduler()
        return
    for stream in (sys.stdin, sys.stdout):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding="utf-8", errors="replace")
    checkpoints = find_checkpoints(options)
    conversations = [
        Conversation(
            checkpoint.tokenizer,
            system_prompt=options.system_prompt,
            chat_template=not options.no_chat_template,
        )
        for checkpoint in checkpoints
    ]
    if options.prompt_file is None:
        _talk(options, checkpoints, conversations)
    else:
        _answer(options, checkpoints, conversations)


def find_checkpoints(options: ChatOptions) -> list[Checkpoint]:
    """That of ``--checkpoint``, and that of ``--compare`` when given."""
    first = find_checkpoint(
        options.checkpoint,
        config=options.config,
        tokenizer_path=options.tokenizer_path,
        device_target=options.device_target,
    )
    if options.compare is None:
        return [first]
    second = find_checkpoint(
        options.compare,
        config=options.config,
        tokenizer_path=options.tokenizer_path,
        device_target=options.device_target,
        fallback=first,
    )
    return [first, second]


def _talk(
    options: ChatOptions, checkpoints: Sequence[Checkpoint], conversations: Sequence[Conversation]
) -> None:
    from mindrlhf.chat.session import HELP, Session, read_messages

    display = new_display(short_names(checkpoint.name for checkpoint in checkpoints))
    team, is_main = _start(options, checkpoints, rows=1, longest=1, notice=display.notice)
    if not is_main:
        team.serve()
        return
    if sys.stdin.isatty():
        display.notice(HELP)
    # Not in a finally clause: after a failure the others wait elsewhere, and msrun's supervisor ends them.
    Session(team, conversations, display).talk(read_messages(team))
    team.dismiss()


def _answer(
    options: ChatOptions, checkpoints: Sequence[Checkpoint], conversations: Sequence[Conversation]
) -> None:
    from mindrlhf.chat.speaker import prompt_limit

    assert options.prompt_file is not None
    prompts = read_prompts(options.prompt_file, skip_bad_lines=options.skip_bad_lines)
    limits = [prompt_limit(checkpoint, options) for checkpoint in checkpoints]
    encoded = encode_prompts(prompts, conversations, limits)
    longest = max(len(ids) for of_speaker in encoded for ids in of_speaker)
    rows = min(options.batch_size, len(prompts))
    team, is_main = _start(options, checkpoints, rows=rows, longest=longest, notice=logger.info)
    if not is_main:
        team.serve()
        return
    answer_file(team, prompts, encoded, options.output_file)
    team.dismiss()


def _start(
    options: ChatOptions,
    checkpoints: Sequence[Checkpoint],
    *,
    rows: int,
    longest: int,
    notice: Callable[[str], None],
) -> tuple[Team, bool]:
    """Takes the device, joins the other workers, loads the weights.

    Returns:
        the team, ready for prompts of ``longest`` ids, and whether this is the main rank.
    """
    from mindrlhf.chat.speaker import Speaker, speaking_mesh
    from mindrlhf.chat.team import Team
    from mindrlhf.parallel.groups import create_groups
    from mindrlhf.runtime.device import check_device, start_runtime
    from mindrlhf.runtime.host_exchange import HostExchange

    context = checkpoints[0].sizes.context
    check_device(context)
    runtime = start_runtime(context, use_parallel=env_world_size() > 1, scratch_dir=scratch_directory())
    meshes = [speaking_mesh(checkpoint.model, runtime.world_size) for checkpoint in checkpoints]
    for checkpoint, mesh in zip(checkpoints, meshes, strict=True):
        logger.info("%s: %s on %s", checkpoint.name, mesh, context.device_target)

    def silent(text: str) -> None:
        """Other ranks do the same; once is enough."""

    speakers = [
        Speaker(
            checkpoint,
            create_groups(mesh, runtime.rank),
            options,
            rows=rows,
            notice=notice if runtime.is_main else silent,
        )
        for checkpoint, mesh in zip(checkpoints, meshes, strict=True)
    ]
    for speaker in speakers:
        speaker.prepare(longest)
    return Team(speakers, HostExchange(runtime), options.seed), runtime.is_main
