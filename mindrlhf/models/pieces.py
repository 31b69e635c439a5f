"""Differentiable pieces of a network: cells that take their weights as inputs, compiled once each.

A network runs piece by piece, forward and, if it learns, backward, and every layer goes through the same two
compiled graphs. So compiling takes the time of one layer, no more gradients exist than those that are summed
up, and what is kept for the backward pass is decided outside of the graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from mindrlhf.models.dtypes import float32_copy
from mindrlhf.parallel.partition import buckets


class Gradients:
    """Sums of gradients in float32, by the name of their parameter."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, names: Sequence[str], gradients: Sequence[Tensor]) -> None:
        """Adds one gradient for each name; takes the tensors over: what is added later goes into them."""
        for name, gradient in zip(names, gradients, strict=True):
            gradient = gradient.astype(ms.float32)
            if name in self._sums:
                ops.assign_add(self._sums[name], gradient)
            else:
                self._sums[name] = gradient

    def __getitem__(self, name: str) -> Tensor:
        return self._sums[name]

    def transform(self, function: Callable[[Sequence[Tensor]], Sequence[Tensor]]) -> None:
        """Replaces the sums by a function of them, some at a time, in an order that is equal on all ranks."""
        for names in buckets({name: self._sums[name].nbytes for name in sorted(self._sums)}):
            self._sums |= zip(names, function([self._sums[name] for name in names]), strict=True)

    @property
    def nbytes(self) -> int:
        """What they take."""
        return sum(one.nbytes for one in self._sums.values())

    def clear(self) -> None:
        """Forgets them all and frees their memory."""
        self._sums.clear()


class Weights:
    """Some parameters of a model, as the inputs of a piece.

    Args:
        parameters: of the model, by name.
        names: those of the piece, in the order in which it takes them.
    """

    def __init__(self, parameters: Mapping[str, Parameter], names: Iterable[str]) -> None:
        self.names = tuple(names)
        self._parameters = tuple(parameters[name] for name in self.names)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Tensors that share the parameters' memory; for each Parameter a graph would be compiled anew.

        On CPU, where nothing computes in fewer bits than float32, they are float32 copies of other types.
        """
        widen = ms.get_context("device_target") == "CPU"
        return tuple(
            float32_copy(one) if widen and one.dtype != ms.float32 else Tensor(one)
            for one in self._parameters
        )


class Piece:
    """A cell without parameters, and its gradient.

    Args:
        cell: ``construct(*inputs, *constants, *weights)`` -> one tensor or a tuple of them.
        inputs: how many tensors are differentiated besides the weights, 0 or 1.
        constants: how many are not.
        gradient: ``construct(dout, kept, *arguments of the cell)`` -> the gradient of the input, if there is
            one, and those of the weights; ``kept`` are the results of the cell but the first. ``None``: the
            gradient of any cell, from its arguments alone.
    """

    def __init__(
        self, cell: nn.Cell, *, inputs: int, constants: int, gradient: nn.Cell | None = None
    ) -> None:
        self._cell = cell
        self._gradient = gradient or _Gradient(cell, inputs, constants)
        self._has_input = inputs > 0
        self._backward: dict[tuple[int, int], _Backward] = {}

    def __call__(self, *args: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The cell's results."""
        return self._cell(*args)

    def backward(
        self,
        douts: Sequence[Tensor],
        args: Sequence[Tensor],
        weights: Weights,
        gradients: Gradients,
        kept: Sequence[Tensor] = (),
    ) -> Tensor | None:
        """Adds the gradients of the weights to their sums; returns that of the input, if there is one.

        Args:
            douts: gradients of the cell's results; of the first one alone when the others are kept.
            args: inputs and constants of the cell.
            weights: of the cell.
            gradients: the sums.
            kept: the results of the cell but the first, if its gradient takes them.
        """
        sizes = len(douts), len(kept)
        if sizes not in self._backward:
            self._backward[sizes] = _Backward(self._gradient, *sizes)
        found = self._backward[sizes](*douts, *kept, *args, *weights.tensors)
        gradients.add(weights.names, found[self._has_input :])
        return found[0] if self._has_input else None


class _Gradient(nn.Cell):
    """Of any cell, from its arguments."""

    def __init__(self, cell: nn.Cell, inputs: int, constants: int) -> None:
        super().__init__()
        self.cell = cell
        self.inputs, self.first_weight = inputs, inputs + constants
        self.gradient = ops.GradOperation(get_all=True, sens_param=True)

    def construct(
        self, dout: Tensor | tuple[Tensor, ...], kept: tuple[Tensor, ...], *args: Tensor
    ) -> tuple[Tensor, ...]:
        found = self.gradient(self.cell)(*args, dout)
        return found[: self.inputs] + found[self.first_weight :]


class Recomputed(nn.Cell):
    """The gradient of a cell that takes its results, computed anew from its arguments.

    Args:
        cell: whose results the gradient takes.
        gradient: see :class:`Piece`.
    """

    def __init__(self, cell: nn.Cell, gradient: nn.Cell) -> None:
        super().__init__()
        self.cell, self.gradient = cell, gradient

    def construct(self, dout: Tensor, kept: tuple[Tensor, ...], *args: Tensor) -> tuple[Tensor, ...]:
        """As ``gradient``, with nothing kept."""
        return self.gradient(dout, self.cell(*args)[1:], *args)


class _Backward(nn.Cell):
    """A gradient that takes all tensors one by one: a graph has no tuples for inputs."""

    def __init__(self, gradient: nn.Cell, douts: int, kept: int) -> None:
        super().__init__()
        self.gradient = gradient
        self.douts, self.first = douts, douts + kept

    def construct(self, *args: Tensor) -> tuple[Tensor, ...]:
        dout = args[0] if self.douts == 1 else args[: self.douts]
        return self.gradient(dout, args[self.douts : self.first], *args[self.first :])
