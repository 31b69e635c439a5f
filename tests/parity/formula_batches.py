"""What the tests of graphs against formulas share: ragged batches, tolerances and slopes.

Tolerance: graphs compute in float32, whose unit is 2**-23 (1.2e-7) of a number. A token's term takes about
ten operations, so it is held to 8 units (1e-6) of the largest number that is added or subtracted on the way
to it, and a sum to the sum of its terms' tolerances. MindSpore's ``Exp`` on the CPU is less exact than
float32 allows (measured: 3.3e-6 relative between -1 and 1, 8.1e-6 between -20 and 20, 2.3e-5 at -80), which
comes on top wherever there is an exponential. Counts are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

EIGHT_UNITS = 2.0**-20

STEP = 1e-6
"""Of central differences in float64: the error of a slope is about 1e-10."""

SHAPES = ((1, 1), (1, 6), (3, 4), (4, 7))
"""(B, R). Every one is a graph to compile, hence so few."""


def exp_error(exponent: float) -> float:
    """What was measured of ``exp``, plus the 8 units of all the rest; relative."""
    return 3.5e-6 + 2.5e-7 * abs(exponent) + EIGHT_UNITS


class Texts(NamedTuple):
    """Shape and lengths of a batch of responses, and where its numbers come from."""

    shape: tuple[int, int]
    lengths: list[int]
    seed: int

    @property
    def mask(self) -> np.ndarray:
        return np.arange(self.shape[1]) < np.array(self.lengths)[:, None]

    @property
    def places(self) -> list[tuple[int, int]]:
        """Rows and columns of the real tokens."""
        return [(row, t) for row, length in enumerate(self.lengths) for t in range(length)]

    def rubbish_behind(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """float32, with NaN behind the ends."""
        return [np.where(self.mask, array, np.nan).astype(np.float32) for array in arrays]


@st.composite
def texts(draw: st.DrawFn) -> Texts:
    """Ragged texts, texts of one token only, and texts that fill all columns."""
    rows, columns = shape = draw(st.sampled_from(SHAPES))
    ragged = st.lists(st.integers(1, columns), min_size=rows, max_size=rows)
    lengths = draw(st.one_of(ragged, st.just([1] * rows), st.just([columns] * rows)))
    return Texts(shape, lengths, draw(st.integers(0, 2**32 - 1)))


def central_difference(function: Callable[[float], float], at: float) -> float:
    return (function(at + STEP) - function(at - STEP)) / (2 * STEP)
