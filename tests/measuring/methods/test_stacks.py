"""Experts in one parameter: measured in one pass a sample, or tried where gradients do not tell their effect."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qcompress
from tests.models import seeded

OPTIONS = qcompress.prune_quantize(bits=(3, 6), sparsity=(0,))
LOSS = {"few outputs": 4, "many outputs": 24}


class Mixture(nn.Module):
    """Every sample goes to two of the experts, whose matrices are one parameter."""

    def __init__(self, outputs: int, kind: str = "plain") -> None:
        super().__init__()
        self.kind, self.first, self.last = kind, nn.Linear(6, 8), nn.Linear(8, outputs)
        self.experts = nn.Parameter(torch.randn(5, 8, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        chosen = hidden.detach().matmul(torch.eye(8)[:, :4]).topk(2, dim=1).indices  # the last is never chosen
        outputs = torch.einsum("nkij,nj->nki", self.experts[chosen], hidden).sum(1)
        if self.kind == "mixed":
            outputs = outputs + outputs.mean(0)
        if self.kind == "rounded":
            outputs = outputs + (torch.round(4 * outputs) / 4 - outputs).detach()
        return self.last(torch.tanh(outputs))


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(12, 6, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("outputs", LOSS.values(), ids=LOSS)
def test_experts_are_measured_by_their_gradients(outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(lambda: Mixture(outputs))
    direct = qcompress.measure(model, data(), OPTIONS, method="direct")
    monkeypatch.setattr(
        "qcompress.measuring.methods.direct.Direct.changes", lambda *_: pytest.fail("an option was tried")
    )
    linear = qcompress.measure(model, data(), OPTIONS)
    assert not linear.tried
    assert [part.name for part in linear.parts] == [part.name for part in direct.parts]
    assert [part.rows for part in linear.parts if part.parameter == "experts"] == [(8 * i, 8 * i + 8) for i in range(5)]
    fine = np.array([label == "6 bits" for labels in linear.labels for label in labels])
    # to first order in a change of 6 bits; eight random probes of 36 samples are off by up to a fifth or two
    tolerance = 0.1 if outputs == 4 else 0.5
    np.testing.assert_allclose(linear.cost[fine], direct.cost[fine], rtol=tolerance, atol=1e-9)
    pairs, expected = (own.factor @ own.factor.T for own in (linear, direct))
    sizes = np.sqrt(np.outer(expected.diagonal(), expected.diagonal()))
    assert (np.abs(pairs - expected)[np.ix_(fine, fine)] <= 2 * tolerance * sizes[np.ix_(fine, fine)] + 1e-9).all()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mixed", "samples give other outputs alone than within a batch"),
        ("rounded", "the outputs do not follow its gradient"),
    ],
)
def test_experts_whose_gradients_do_not_tell_are_tried(kind: str, reason: str) -> None:
    model = seeded(lambda: Mixture(4, kind))
    linear = qcompress.measure(model, data(), OPTIONS)
    direct = qcompress.measure(model, data(), OPTIONS, method="direct")
    names = [part.name for part in linear.parts if part.parameter == "experts"]
    assert {name: linear.tried[name] for name in names} == dict.fromkeys(names, reason)
    experts = np.array([part.parameter == "experts" for part in linear.parts for _ in range(3)])
    np.testing.assert_allclose(linear.cost[experts], direct.cost[experts], rtol=1e-5, atol=1e-12)
