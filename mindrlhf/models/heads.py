"""The heads on top of the decoder: the language-model head and the scalar head."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from mindrlhf.configs.keys import ModelConfig
from mindrlhf.models.dtypes import ms_dtype
from mindrlhf.parallel.groups import Groups
from mindrlhf.parallel.tensor_parallel import RowsProduct, empty_parameter
from mindrlhf.utils.sizes import exact_div


class LMHead(nn.Cell):
    """This rank's rows of the output embedding of an untied model: hidden states -> local logits."""

    def __init__(self, config: ModelConfig, groups: Groups) -> None:
        super().__init__()
        rows = exact_div(config.vocab_size, groups.mesh.mp, "vocabulary by mp")
        self.product = RowsProduct(ms_dtype(config.compute_dtype), config.matmul_dtype)
        self.weight = empty_parameter((rows, config.hidden_size), ms_dtype(config.param_init_type), "weight")

    def construct(self, hidden: Tensor) -> Tensor:
        """``hidden`` (B, R, H) -> logits (B, R, V / mp)."""
        return self.product(hidden, self.weight)


class ScoreHead(nn.Cell):
    """One number per position, ``w . h + b``, without an activation.

    Every rank of a model-parallel group holds the whole head, and its hidden states are whole too, so
    there is nothing to communicate. Kept and computed in float32: it is small and its output is a target.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.product = RowsProduct(ms.float32)
        self.weight = empty_parameter((1, config.hidden_size), ms.float32, "weight")
        self.bias = empty_parameter((1,), ms.float32, "bias")

    def construct(self, hidden: Tensor) -> Tensor:
        """``hidden`` (..., H) -> (...) float32."""
        return (self.product(hidden, self.weight) + self.bias).squeeze(-1)


def last_token(hidden: Tensor, index: Tensor) -> Tensor:
    """The column ``index`` (B,) of ``hidden`` (B, R, H) -> (B, H)."""
    chosen = ops.one_hot(index, hidden.shape[1], Tensor(1.0, hidden.dtype), Tensor(0.0, hidden.dtype))
    return (hidden * ops.expand_dims(chosen, -1)).sum(axis=1)
