"""Trained weights into the generating model, in memory, from any layout to any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from mindrlhf.models.generator import PPOModelInfer
from mindrlhf.models.networks import PPOModelTrain
from mindrlhf.parallel.checksum import ReplicaMismatchError, checksums
from mindrlhf.parallel.reshard import Resharder
from mindrlhf.runtime.host_exchange import HostExchange
from mindrlhf.utils.errors import MindRLHFError


class WeightSync:
    """Copies the policy from ``ppo_model_train`` to ``ppo_model_infer``.

    Both live in the same ranks. Every rank receives what it lacks and no more, in the type in which ``infer``
    stores it, in buckets; besides its shards it holds some of these and one parameter. On one rank the only
    copy is the one into the parameters of ``infer``.

    Args:
        train: the policy that is trained.
        infer: the policy that generates.
    """

    def __init__(self, train: PPOModelTrain, infer: PPOModelInfer) -> None:
        self.train, self.infer = train, infer
        _, stored = next(infer.shards())  # all are stored in one type
        self._resharder = Resharder(train.layouts, infer.layouts, infer.groups.rank, dtype=stored.dtype)

    def sync(self, on_parameter: Callable[[], None] = lambda: None) -> None:
        """Overwrites the generating model; collective over all ranks.

        Args:
            on_parameter: called after each.
        """
        self.infer.load(self._resharded(on_parameter))

    def _resharded(self, on_parameter: Callable[[], None]) -> Iterator[tuple[str, np.ndarray]]:
        for shard in self._resharder.reshard(self.train.store):
            yield shard
            on_parameter()

    def verify(self, exchange: HostExchange) -> None:
        """Refuses to continue when the generating model differs from the trained one; collective.

        Full tensors are compared by 64-bit checksums, in the type in which the generating model stores them.

        Raises:
            MindRLHFError: names the parameters that differ, on every rank.
        """
        different = self.differences()
        faulty_ranks = exchange.every_rank(np.array([len(different)], np.int32))[:, 0]
        if faulty_ranks.any():
            raise MindRLHFError(
                "the generating policy is not the trained one after a sync; parameters that differ, by rank: "
                f"{faulty_ranks.tolist()}; on this rank: {', '.join(different) or 'none'}"
            )

    def differences(self) -> list[str]:
        """Names whose full tensors differ between the two models in this rank's groups; collective."""
        names = list(self.infer.layouts)
        stored = {name: array.dtype for name, array in self.infer.shards()}
        trained_shards = ((name, array.astype(stored[name])) for name, array in self.train.shards(names))
        unequal: set[str] = set()

        def totals(
            shards: Iterable[tuple[str, np.ndarray]], model: PPOModelTrain | PPOModelInfer
        ) -> dict[str, int]:
            # A group that finds unequal copies must still join the exchange in which the other groups wait.
            try:
                return checksums(shards, model.layouts, model.groups)
            except ReplicaMismatchError as error:
                unequal.update(error.names)
                return {}

        trained = totals(trained_shards, self.train)
        generating = totals(self.infer.shards(), self.infer)
        if unequal:
            return [name for name in names if name in unequal]
        return [name for name in names if trained[name] != generating[name]]
