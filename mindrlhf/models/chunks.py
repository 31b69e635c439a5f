"""Into how large parts passes over whole sequences are cut; free of MindSpore, for the planner."""

from __future__ import annotations

LAYERS_PER_GRAPH = 3
"""Decoder layers in one compiled graph, at most. One graph serves them all, whatever their number. On two
cores, MindSpore runs graphs of up to 100 kernels from a single thread, one layer takes 30 to 45 % longer by
itself than among others (measured), and three have more kernels than that."""

LOGITS_BYTES = 64 << 20
"""Bound of one (chunk of tokens, this rank's vocabulary) array in float32."""


def chunk_rows(rows: int, vocabulary: int) -> int:
    """Rows of a chunk: the fewest chunks of equal size, but for the last, within LOGITS_BYTES of logits."""
    chunks = -(-rows * vocabulary * 4 // LOGITS_BYTES)
    return -(-rows // max(1, min(chunks, rows)))
