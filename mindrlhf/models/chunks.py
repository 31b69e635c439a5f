"""Into how large parts passes over whole sequences are cut; free of MindSpore, for the planner."""

from __future__ import annotations

LAYERS_PER_GRAPH = 3
"""Decoder layers in one compiled graph, at least, where a model has as many. On two cores, MindSpore runs
graphs of up to 100 kernels from a single thread, and one layer takes 30 to 45 % longer by itself than among
others (measured); three have more kernels than that."""

LOGITS_BYTES = 64 << 20
"""Bound of one (chunk of tokens, this rank's vocabulary) array in float32."""


def blocks(layers: int) -> list[range]:
    """Decoder layers that share a compiled graph: as many runs as allowed, of even lengths."""
    count = max(1, layers // LAYERS_PER_GRAPH) if layers else 0
    return [range(layers * i // count, layers * (i + 1) // count) for i in range(count)]


def chunk_rows(rows: int, vocabulary: int) -> int:
    """Rows of a chunk: the fewest chunks of equal size, but for the last, within LOGITS_BYTES of logits."""
    chunks = -(-rows * vocabulary * 4 // LOGITS_BYTES)
    return -(-rows // max(1, min(chunks, rows)))
