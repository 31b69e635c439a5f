"""Bytes that ranks exchange: in a weight sync, and in an optimizer step.

Collectives count as a ring does them (Patarasuk and Yuan, 2009): among n ranks a rank sends
``2 (n - 1) / n`` of an AllReduce's bytes, and half of that for a ReduceScatter or an AllGather.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from mindrlhf.configs.keys import JobConfig, RunConfig
from mindrlhf.models.job_layouts import job_layouts
from mindrlhf.parallel.exchange_plan import plan_exchange
from mindrlhf.parallel.layout import Layout
from mindrlhf.parallel.reshard import BUCKET_BYTES
from mindrlhf.planning.graph_memory import BYTES, FLOAT32, count_parameters

SUMS_PER_LAYER = 2
"""AllReduces of the residual stream in a layer's forward pass, behind attention and feed-forward, and as many
in its backward pass (Megatron-LM, arXiv 1909.08053, section 3)."""


@dataclass(frozen=True)
class UpdateTraffic:
    """Bytes that a rank sends in one optimizer step of a model.

    Attributes:
        layers: sums of the residual stream and of its gradients within the model-parallel group.
        gradients: their sums over the replicas, and the weights that come back when those share them out.
    """

    layers: float
    gradients: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.layers + self.gradients


def update_traffic(job: JobConfig, trained: RunConfig, *, lm_head: bool, score_head: bool) -> UpdateTraffic:
    """One optimizer step of the policy or of a separate critic.

    Args:
        job: batches and lengths.
        trained: its YAML.
        lm_head, score_head: which heads it has.
    """
    model, split = trained.model, trained.parallel
    rows = job.ppo.minibatch_size // split.data_parallel
    tokens = rows * job.ppo.max_length
    # Forward, backward, and forward again where layers are recomputed.
    sums = SUMS_PER_LAYER * (2 * model.num_layers + trained.recompute) * tokens
    if lm_head:  # the gradient of the hidden states; log-probs themselves take a few numbers a token
        sums += rows * job.ppo.max_response_length
    bytes_of_token = (
        sums * BYTES[model.compute_dtype] + tokens * BYTES[model.param_init_type]
    )  # the embedding
    layers = 2 * _ring(split.model_parallel) * model.hidden_size * bytes_of_token
    count = count_parameters(model, split.model_parallel, lm_head=lm_head, score_head=score_head)
    back = count.weight_bytes(BYTES[model.param_init_type]) if trained.shards_optimizer else None
    of_gradients = FLOAT32 * count.total
    ring = _ring(split.data_parallel)
    gradients = ring * (2 * of_gradients if back is None else of_gradients + back)
    return UpdateTraffic(layers, gradients)


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks


def plan_sync(job: JobConfig) -> SyncTraffic:
    """What one weight sync of the job moves."""
    layouts = job_layouts(job)
    return sync_traffic(
        layouts["train_policy"],
        layouts["infer_policy"],
        number_bytes=BYTES[job.infer.generator_model.param_init_type],
    )


@dataclass(frozen=True)
class SyncTraffic:
    """Bytes of one sync from the trained to the generating policy, in the type in which that one stores them.

    Attributes:
        received: by rank, what comes from other ranks.
        sent: by rank, what goes to other ranks.
        needed: by rank, what its target slices hold that its source slices do not: the minimum for any scheme
            of moving weights.
        pairs: of ranks that communicate, counted per direction.
        buckets: messages of all pairs.
    """

    received: tuple[int, ...]
    sent: tuple[int, ...]
    needed: tuple[int, ...]
    pairs: int
    buckets: int

    @property
    def total(self) -> int:
        """Received by all ranks together."""
        return sum(self.received)

    @property
    def least(self) -> int:
        """Needed by all ranks together."""
        return sum(self.needed)


def sync_traffic(
    source: Mapping[str, Layout], target: Mapping[str, Layout], *, number_bytes: int
) -> SyncTraffic:
    """Traffic from ``source`` to ``target`` layouts over the same ranks.

    Args:
        source, target: canonical name -> layout; ``source`` may name more.
        number_bytes: of a number as the target stores it; it is cast before it travels.
    """
    ranks = range(next(iter(target.values())).mesh.size)
    plan = plan_exchange(source, target, bucket_elements=BUCKET_BYTES // number_bytes)
    sent = [
        sum(transfer.elements for transfer in plan.transfers if transfer.sender == rank) for rank in ranks
    ]
    needed = [sum(_missing(source[name], wanted, rank) for name, wanted in target.items()) for rank in ranks]
    return SyncTraffic(
        received=tuple(plan.received(rank) * number_bytes for rank in ranks),
        sent=tuple(count * number_bytes for count in sent),
        needed=tuple(count * number_bytes for count in needed),
        pairs=len(plan.transfers),
        buckets=plan.collectives,
    )


def _missing(held: Layout, wanted: Layout, rank: int) -> int:
    """Elements of a rank's target slice that its source slice lacks."""
    sides = (
        max(0, min(a.stop, b.stop) - max(a.start, b.start))
        for a, b in zip(held.slices(rank), wanted.slices(rank), strict=True)
    )
    return prod(wanted.local_shape) - prod(sides)
