"""Four workers: resharding, checksums, and sharded layers against one plain network in torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.msrun

WORLD_SIZE = 4
MESHES = {"dp4mp1": 1, "dp2mp2": 2, "dp1mp4": 4}
WEIGHTS = ("embedding.embedding_weight", "up.weight", "up.bias", "down.weight", "head.weight")
VALID_VOCAB = 21


@pytest.fixture(scope="module")
def reports(split_reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the 4 workers found, one dictionary a rank."""
    return split_reports


def checks(reports: list[dict[str, Any]], prefix: str) -> dict[str, list[bool]]:
    """Name -> the verdicts of all ranks, of the yes/no checks under ``prefix``."""
    names = [
        name for name, value in reports[0].items() if name.startswith(prefix) and isinstance(value, bool)
    ]
    return {name: [report[name] for report in reports if name in report] for name in names}


@pytest.mark.parametrize(
    ("prefix", "count"), [("reshard/", 9 * 4 * 3 + 2), ("stack/", 4), ("model/", 3), ("checksum/", 7)]
)
def test_checks_of_the_workers(reports: list[dict[str, Any]], prefix: str, count: int) -> None:
    verdicts = checks(reports, prefix)
    assert len(verdicts) == count
    assert {name: ranks for name, ranks in verdicts.items() if not all(ranks)} == {}


def test_checksums_are_equal_on_every_rank(reports: list[dict[str, Any]]) -> None:
    assert len({tuple(report["checksum/values"]) for report in reports}) == 1


@pytest.fixture(scope="module")
def plain(reports: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Outputs and gradients of the unsplit network, by torch in float64."""
    torch = pytest.importorskip("torch")
    inputs = dict(np.load(reports[0]["directory"] / "inputs_rank0.npz"))
    weights = {name: torch.tensor(inputs[name].astype(np.float64), requires_grad=True) for name in WEIGHTS}
    x = torch.tensor(inputs["x"].astype(np.float64), requires_grad=True)
    embedded = weights["embedding.embedding_weight"][torch.tensor(inputs["ids"]).long()]
    up = (embedded + x) @ weights["up.weight"].T + weights["up.bias"]
    hidden = (up * up * 0.125) @ weights["down.weight"].T
    logits = (hidden @ weights["head.weight"].T)[..., :VALID_VOCAB]
    log_softmax = torch.log_softmax(logits, dim=-1)
    tokens = torch.tensor(inputs["tokens"]).long()
    logprobs = log_softmax.gather(-1, tokens[..., None])[..., 0]
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    outputs = {"embedded": embedded, "hidden": hidden, "logprobs": logprobs, "entropy": entropy}
    loss = sum(
        (outputs[name] * torch.tensor(inputs[f"g_{name}"])).sum()
        for name in ("hidden", "logprobs", "entropy")
    )
    loss.backward()
    result = {f"out/{name}": value.detach().numpy() for name, value in outputs.items()}
    result["grad/x"] = x.grad.numpy()
    return result | {f"grad/{name}": weight.grad.numpy() for name, weight in weights.items()}


def load(directory: Path, mesh: str, rank: int) -> dict[str, np.ndarray]:
    return dict(np.load(directory / f"net_{mesh}_rank{rank}.npz"))


@pytest.mark.parametrize("mesh", MESHES)
def test_layers_equal_the_plain_network(
    reports: list[dict[str, Any]], plain: dict[str, np.ndarray], mesh: str
) -> None:
    """Outputs, input gradient, and each rank's slice of every weight's gradient."""
    for rank in range(WORLD_SIZE):
        actual = load(reports[0]["directory"], mesh, rank)
        for name, expected in plain.items():
            weight = name.removeprefix("grad/")
            if weight in WEIGHTS:
                assert actual[name].size * MESHES[mesh] == expected.size
                begin = actual[f"begin/{weight}"]
                expected = expected[
                    tuple(slice(b, b + n) for b, n in zip(begin, actual[name].shape, strict=True))
                ]
            # float32 against float64, values up to about 10.
            np.testing.assert_allclose(
                actual[name], expected, rtol=2e-5, atol=2e-5, err_msg=f"{mesh} rank {rank} {name}"
            )


@pytest.mark.parametrize("mesh", ["dp2mp2", "dp1mp4"])
def test_every_slice_is_covered(reports: list[dict[str, Any]], mesh: str) -> None:
    """The ranks of the first group start their slices at mp different places."""
    begins = [load(reports[0]["directory"], mesh, rank)["begin/up.weight"] for rank in range(MESHES[mesh])]
    assert len({tuple(begin) for begin in begins}) == MESHES[mesh]
