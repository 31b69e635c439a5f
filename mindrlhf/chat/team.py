"""All workers as one: the main rank asks, every rank answers in step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from mindrlhf.chat.speaker import Speaker
from mindrlhf.runtime.host_exchange import HostExchange
from mindrlhf.utils.seeds import random_stream

# One shape for every message, so that one graph carries them all.
_BLOCK = 1024
_HEADER = 4


class Broadcast:
    """Messages from the main rank to all others, as JSON."""

    def __init__(self, exchange: HostExchange) -> None:
        self._exchange = exchange

    def send(self, message: dict[str, Any]) -> None:
        """Main rank: gives all ranks a message; does nothing when there is no other."""
        if self._exchange.runtime.world_size == 1:
            return
        body = json.dumps(message).encode("ascii")
        packet = len(body).to_bytes(_HEADER, "little") + body
        for first in range(0, len(packet), _BLOCK):
            self._share(packet[first : first + _BLOCK])

    def receive(self) -> dict[str, Any]:
        """Other ranks: the next message."""
        packet = self._share(b"")
        size = _HEADER + int.from_bytes(packet[:_HEADER], "little")
        while len(packet) < size:
            packet += self._share(b"")
        message: dict[str, Any] = json.loads(packet[_HEADER:size])
        return message

    def _share(self, mine: bytes) -> bytes:
        block = np.frombuffer(mine.ljust(_BLOCK, b"\0"), "<i4").astype(np.int32)
        return bytes(self._exchange.every_rank(block)[0].astype("<i4").tobytes())


class Team:
    """One or two speakers on all workers.

    The main rank calls :meth:`ask` and at last :meth:`dismiss`; the others call :meth:`serve`. Whatever
    is asked must be read to its end when there are several workers.

    Args:
        speakers: this rank's, in the same order everywhere.
        exchange: among the workers' hosts.
        seed: of all draws.
    """

    def __init__(self, speakers: Sequence[Speaker], exchange: HostExchange, seed: int) -> None:
        self.speakers = speakers
        self.is_alone = exchange.runtime.world_size == 1
        self._broadcast, self._seed = Broadcast(exchange), seed

    def ask(
        self, prompts: Sequence[Sequence[Sequence[int]]], numbers: Sequence[int]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Speakers' replies, piece by piece and in turns.

        Args:
            prompts: for each speaker, the ids of each row.
            numbers: number of each row, which its random numbers are drawn by; so they are the same for
                every speaker.

        Yields:
            place of a speaker, and its next ids (rows, n).
        """
        self._broadcast.send({"prompts": prompts, "numbers": numbers})
        return self._answer(prompts, numbers)

    def still_here(self) -> None:
        """Main rank: keeps waiting workers from giving up; to be called every few seconds."""
        self._broadcast.send({})

    def dismiss(self) -> None:
        """Main rank: ends the others' :meth:`serve`."""
        self._broadcast.send({"end": True})

    def serve(self) -> None:
        """Other ranks: answers with the main rank until it is done."""
        while True:
            message = self._broadcast.receive()
            if "end" in message:
                return
            if message:
                for _ in self._answer(message["prompts"], message["numbers"]):
                    pass

    def _answer(
        self, prompts: Sequence[Sequence[Sequence[int]]], numbers: Sequence[int]
    ) -> Iterator[tuple[int, np.ndarray]]:
        uniforms = np.stack([self._uniforms(number) for number in numbers])
        pairs = zip(self.speakers, prompts, strict=True)
        streams = [speaker.stream(rows, uniforms) for speaker, rows in pairs]
        for pieces in zip_longest(*streams):
            for place, piece in enumerate(pieces):
                if piece is not None:
                    yield place, piece

    def _uniforms(self, number: int) -> np.ndarray:
        length = self.speakers[0].options.max_tokens
        # Drawn as float32: float64 numbers just below 1 would round up to it.
        return random_stream("chat", self._seed, number).random(length, dtype=np.float32)
