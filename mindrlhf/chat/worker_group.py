"""All workers of a chat as one: the main rank sends requests, and all ranks generate together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from mindrlhf.chat.reply_generator import ReplyGenerator
from mindrlhf.runtime.host_exchange import HostExchange
from mindrlhf.utils.seeds import random_stream

# Every message has blocks of one shape, so that one graph carries them all.
_BLOCK = 1024
_HEADER = 4


class Broadcast:
    """Messages from the main rank to all others, as JSON."""

    def __init__(self, exchange: HostExchange) -> None:
        self._exchange = exchange

    def send(self, message: dict[str, Any]) -> None:
        """Main rank: gives all other ranks a message."""
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


class WorkerGroup:
    """One or two models on all workers.

    The main rank calls :meth:`generate` and finally :meth:`end`; the others call :meth:`serve`. With several
    workers, the iterator of :meth:`generate` must be read to its end.

    Args:
        generators: this rank's, in the same order on every rank.
        exchange: between the workers' hosts.
        seed: of all draws.
    """

    def __init__(self, generators: Sequence[ReplyGenerator], exchange: HostExchange, seed: int) -> None:
        self.generators = generators
        self.is_main = exchange.runtime.is_main
        self.is_alone = exchange.runtime.world_size == 1
        self._broadcast, self._seed = Broadcast(exchange), seed

    def generate(
        self, prompts: Sequence[Sequence[Sequence[int]]], numbers: Sequence[int]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Main rank: the models' replies, piece by piece and in turns.

        Args:
            prompts: per model, the ids of each row.
            numbers: per row, the number that keys its random numbers; they are the same for every model.

        Yields:
            place of a model, and its next ids (rows, n).
        """
        self._broadcast.send({"prompts": prompts, "numbers": numbers})
        return self._generate(prompts, numbers)

    def keep_alive(self) -> None:
        """Main rank: prevents waiting workers from giving up; to be called every few seconds."""
        self._broadcast.send({})

    def end(self) -> None:
        """Main rank: ends the others' :meth:`serve`."""
        self._broadcast.send({"end": True})

    def serve(self) -> None:
        """Other ranks: generate with the main rank until it ends."""
        while "end" not in (message := self._broadcast.receive()):
            if message:
                for _ in self._generate(message["prompts"], message["numbers"]):
                    pass

    def _generate(
        self, prompts: Sequence[Sequence[Sequence[int]]], numbers: Sequence[int]
    ) -> Iterator[tuple[int, np.ndarray]]:
        uniforms = np.stack([self._uniforms(number) for number in numbers])
        pairs = zip(self.generators, prompts, strict=True)
        streams = [generator.stream(rows, uniforms) for generator, rows in pairs]
        for pieces in zip_longest(*streams):
            for place, piece in enumerate(pieces):
                if piece is not None:
                    yield place, piece

    def _uniforms(self, number: int) -> np.ndarray:
        length = self.generators[0].options.max_tokens
        # Drawn as float32: float64 numbers just below 1 would round up to it.
        return random_stream("chat", self._seed, number).random(length, dtype=np.float32)
