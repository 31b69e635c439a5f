"""An operator of the compiled library as one of MindSpore's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mindspore import ops


def operator(library: Path, name: str, shape: Callable[..., Any], dtype: Any) -> ops.Custom:
    """The operator ``name`` of a library.

    Args:
        library: the compiled file.
        name: of its function.
        shape: gives the shapes of the results from those of the operands.
        dtype: type of the result, or of each.
    """
    return ops.Custom(f"{library}:{name}", shape, lambda *_: dtype, func_type="aot")
