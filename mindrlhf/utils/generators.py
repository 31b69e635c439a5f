"""The state of Python's and NumPy's global random generators.

Nothing of ours draws from them: every stream of a job is keyed by (seed, purpose, iteration, row), see
:mod:`mindrlhf.utils.seeds`, and so needs no state. A ``--reward_fn`` may draw, and goes on where it was.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np


def generator_states() -> dict[str, Any]:
    """Both states, as JSON can hold them."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
    }


def restore_generators(states: Mapping[str, Any]) -> None:
    """Goes on from :func:`generator_states`."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), position, has_gauss, cached))
