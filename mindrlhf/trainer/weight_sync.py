"""Trained weights into the generating model, in memory, from any layout to any layout."""

from __future__ import annotations

from collections.abc import Iterator

from mindspore import Tensor

from mindrlhf.models.infer import PPOModelInfer
from mindrlhf.models.train import PPOModelTrain
from mindrlhf.parallel.checksum import checksums
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.layout import Layout
from mindrlhf.parallel.reshard import Resharder
from mindrlhf.utils.errors import MindRLHFError


class WeightSync:
    """Copies the policy from ``ppo_model_train`` to ``ppo_model_infer``.

    Both live in the same ranks; parameters are resharded one after another, so no rank ever holds more
    than one full parameter beside its shards.

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
        self._resharder = Resharder(train.layouts, infer_layouts, infer_groups.rank, train.groups)

    def sync(self) -> None:
        """Overwrites the generating model; collective over all ranks."""
        self.infer.load(self._resharded())

    def _resharded(self) -> Iterator[tuple[str, Tensor]]:
        parameters = self.train.parameters_dict()
        for name in self.infer_layouts:
            yield name, self._resharder.reshard(name, parameters[name])

    def differences(self) -> list[str]:
        """Names whose full tensors differ between the two models, by 64-bit checksum; collective."""
        trained = checksums(self.train.shards(self.infer_layouts), self._train_layouts(), self.train.groups)
        generating = checksums(self.infer.shards(), self.infer_layouts, self.infer_groups)
        return [name for name in self.infer_layouts if trained[name] != generating[name]]

    def verify(self) -> None:
        """Refuses to go on with a generating model that is not the trained one; collective.

        Raises:
            MindRLHFError: names every parameter that differs.
        """
        if different := self.differences():
            raise MindRLHFError(
                f"{len(different)} parameter(s) differ between the trained and the generating policy after a "
                "sync: " + ", ".join(different)
            )

    def _train_layouts(self) -> dict[str, Layout]:
        return {name: self.train.layouts[name] for name in self.infer_layouts}
