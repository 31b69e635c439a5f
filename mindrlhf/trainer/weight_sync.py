"""Trained weights into the generating model, in memory, from any layout to any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from mindrlhf.models.qwen2.generator import PPOModelInfer
from mindrlhf.models.qwen2.networks import PPOModelTrain
from mindrlhf.parallel.checksum import ReplicaMismatchError, checksums
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Layout
from mindrlhf.parallel.reshard import Resharder
from mindrlhf.runtime.host_exchange import HostExchange
from mindrlhf.utils.errors import MindRLHFError


class WeightSync:
    """Copies the policy from ``ppo_model_train`` to ``ppo_model_infer``.

    Both live in the same ranks. Every rank receives what it lacks and no more, in the type in which ``infer``
    stores it, in buckets; beside its shards it holds some of these and one parameter. On one rank nothing is
    copied but into the parameters of ``infer``.

    Args:
        train: the policy that is trained.
        infer: the policy that generates.
        infer_layouts: canonical name -> layout of ``infer``.
        infer_groups: this rank's groups in the mesh of ``infer``.
    """

    def __init__(
        self,
        train: PPOModelTrain,
        infer: PPOModelInfer,
        infer_layouts: dict[str, Layout],
        infer_groups: Groups,
    ) -> None:
        self.train = train
        self.infer = infer
        self.infer_layouts = infer_layouts
        self.infer_groups = infer_groups
        _, stored = next(infer.shards())  # all are stored in one type
        self._resharder = Resharder(train.layouts, infer_layouts, infer_groups.rank, dtype=stored.dtype)

    def sync(self, on_parameter: Callable[[], None] = lambda: None) -> None:
        """Overwrites the generating model; collective over all ranks.

        Args:
            on_parameter: called after each.
        """
        self.infer.load(self._resharded(on_parameter))

    def _resharded(self, on_parameter: Callable[[], None]) -> Iterator[tuple[str, np.ndarray]]:
        for shard in self._resharder.reshard(self.train.parameters_dict()):
            yield shard
            on_parameter()

    def verify(self, exchange: HostExchange) -> None:
        """Refuses to go on with a generating model that is not the trained one; collective over all ranks.

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
        stored = {name: array.dtype for name, array in self.infer.shards()}
        train_shards = (
            (name, array.astype(stored[name])) for name, array in self.train.shards(self.infer_layouts)
        )
        train_layouts = {name: self.train.layouts[name] for name in self.infer_layouts}
        unequal: set[str] = set()

        def totals(
            shards: Iterable[tuple[str, np.ndarray]], layouts: dict[str, Layout], groups: Groups
        ) -> dict[str, int]:
            # A group that finds unequal copies must go on to the exchange that the other groups wait in.
            try:
                return checksums(shards, layouts, groups)
            except ReplicaMismatchError as error:
                unequal.update(error.names)
                return {}

        trained = totals(train_shards, train_layouts, self.train.groups)
        generating = totals(self.infer.shards(), self.infer_layouts, self.infer_groups)
        if unequal:
            return [name for name in self.infer_layouts if name in unequal]
        return [name for name in self.infer_layouts if trained[name] != generating[name]]
