"""Random numbers that depend on names, not on who draws them; and the state of the global generators.

Every stream of a job is keyed by (seed, purpose, iteration, row) and so needs no state. The library never
draws from the global generators of Python and NumPy, but a ``--reward_fn`` may: a resumed run restores them.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np


def random_stream(*keys: int | str) -> np.random.Generator:
    """A generator that depends on ``keys`` alone and is the same on every rank and layout.

    Philox (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3"), keyed by the first
    128 bits of SHA-256 over the keys; streams of different keys are independent.

    Args:
        keys: for instance ``("rollout", seed, iteration, sample_id)``; ``1`` and ``"1"`` differ.

    Raises:
        TypeError: a key is neither an integer nor a string.
    """
    digest = hashlib.sha256()
    for key in keys:
        if isinstance(key, str):
            text = "s" + key
        elif isinstance(key, (int, np.integer)):
            text = f"i{int(key)}"
        else:
            raise TypeError(f"a random stream is keyed by integers and strings, got {type(key).__name__}")
        encoded = text.encode()
        # The length in front keeps ("ab", "c") and ("a", "bc") apart.
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    words = np.frombuffer(digest.digest()[:16], dtype="<u8").astype(np.uint64)
    return np.random.Generator(np.random.Philox(key=words))


def generator_states() -> dict[str, Any]:
    """The states of the global generators of Python and NumPy, as JSON can hold them."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
    }


def restore_generators(states: Mapping[str, Any]) -> None:
    """Sets the global generators to states from :func:`generator_states`."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), position, has_gauss, cached))
