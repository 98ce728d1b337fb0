"""Samples that go through the blocks together: the numbers of a pass each, with every option decoded once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qcompress
from qcompress.errors import ChainError, NotFiniteError
from qcompress.measuring.candidates import Candidates
from qcompress.measuring.streamed import together
from qcompress.measuring.streamed.together import TogetherGradients
from tests.models import seeded
from tests.opened_models import in_memory, saved, tokens

OPTIONS = qcompress.prune_quantize(bits=(3, 4), group_size=16)


def both(monkeypatch: pytest.MonkeyPatch, *given: Any, **named: Any) -> tuple[Any, Any]:
    """A measurement sample by sample, and one in which nothing may stay decoded."""
    plain = qcompress.measure(*given, method="sampled", **named)
    monkeypatch.setattr(TogetherGradients, "_saves_time", lambda _: True)
    return plain, qcompress.measure(*given, method="sampled", **named)


def require_same(found: Any, expected: Any) -> None:
    # the same operations; only gradients of a weight that is used twice are added in another order
    np.testing.assert_allclose(found.cost, expected.cost, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(found.factor, expected.factor, rtol=1e-4, atol=1e-6 * np.abs(expected.factor).max())
    np.testing.assert_allclose(found.standard_error, expected.standard_error, rtol=1e-4, atol=1e-12)
    assert (found.num_samples, found.tried, found.notes) == (expected.num_samples, expected.tried, expected.notes)


@pytest.mark.parametrize(
    ("more", "shapes"),
    [
        ({}, [(6, 9)]),
        pytest.param({"tie_word_embeddings": True}, [(1, 9)] * 4, marks=pytest.mark.slow),
        ({"tie_word_embeddings": True}, [(1, 9), (3, 9), (2, 7)]),
    ],
)
def test_the_numbers_are_those_of_a_pass_each(
    more: dict[str, Any], shapes: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = in_memory(saved("Llama", tmp_path, **more))
    data = [tokens(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    expected, found = both(monkeypatch, model, data, OPTIONS, seed=3)
    require_same(found, expected)
    assert all(own.grad is None for own in model.parameters())


def test_options_are_decoded_once_for_the_samples_of_all_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = in_memory(saved("Llama", tmp_path))
    monkeypatch.setattr(TogetherGradients, "_saves_time", lambda _: True)
    some, asked = Candidates.some, 0

    def counted(self: Candidates, *given: Any) -> Candidates:
        nonlocal asked
        asked += 1
        return some(self, *given)

    monkeypatch.setattr(Candidates, "some", counted)
    qcompress.measure(model, [tokens(1, 5, seed=seed) for seed in range(7)], OPTIONS, method="sampled")
    units = 3 + 2  # blocks, and what comes before and after them
    assert asked == 3 * units  # to see whether the blocks are a chain, the first batch, and the six others


def test_few_samples_go_together_where_their_states_are_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = in_memory(saved("Llama", tmp_path))
    monkeypatch.setattr(together, "ROUND_BYTES", 2 * 4 * 32 * 4 * 9)  # of two samples at four boundaries
    sizes: list[int] = []
    effects = together.effects_by_block
    monkeypatch.setattr(
        together, "effects_by_block", lambda *given: sizes.append(sum(map(len, given[1]))) or effects(*given)
    )
    data = [tokens(1, 9, seed=seed) for seed in range(6)]
    require_same(*reversed(both(monkeypatch, model, data, OPTIONS)))
    assert sizes == [1, 1, 2, 2, 1]


def test_other_processes_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = in_memory(saved("Llama", tmp_path))
    data = [tokens(2, 9, seed=seed) for seed in range(3)]
    expected = qcompress.measure(model, data, OPTIONS, method="sampled")
    monkeypatch.setattr(TogetherGradients, "_saves_time", lambda _: True)
    require_same(qcompress.measure(model, data, OPTIONS, method="sampled", jobs=2), expected)


class SidePath(nn.Module):
    """What a layer gives goes into blocks beside the hidden states, always or later; or blocks are run twice."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.beside = kind, nn.Linear(6, 16), nn.Linear(6, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden, beside = self.first(x), self.beside(x)
        for block in [*self.blocks, *(self.blocks if self.kind == "twice" else [])]:
            goes = self.kind == "beside" or (self.kind == "later" and x[0, 0] > 1)
            hidden = block(hidden, beside if goes else 0.0)
        return self.last(hidden)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, hidden: Tensor, beside: Tensor | float) -> Tensor:
        return torch.tanh(self.layer(hidden + beside))


@pytest.mark.parametrize("kind", ["beside", "twice"])
def test_blocks_that_are_no_chain_for_gradients_are_gone_through_sample_by_sample(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = seeded(lambda: SidePath(kind))
    data = [torch.randn(4, 6, generator=torch.Generator().manual_seed(0))]
    expected, found = both(monkeypatch, model, data, qcompress.prune_quantize(bits=(4,), sparsity=(0,)))
    assert (found.cost == expected.cost).all()
    assert (expected.cost[1::2] > 0).sum() >= 4


def test_samples_for_which_blocks_are_no_chain_go_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = seeded(lambda: SidePath("later")), [torch.full((1, 6), float(number)) for number in range(4)]
    require_same(*reversed(both(monkeypatch, model, data, qcompress.prune_quantize(bits=(4,), sparsity=(0,)))))


def test_samples_that_go_alone_in_the_end_have_the_labels_that_they_have_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Any, __: Any, generators: Any) -> None:
        for generator in generators:
            torch.rand(3, generator=generator)
        raise ChainError("the blocks do not form a chain")

    model, data = seeded(lambda: SidePath("none")), [torch.full((1, 6), float(number)) for number in range(4)]
    monkeypatch.setattr(TogetherGradients, "_how_many", lambda *_: 2)
    monkeypatch.setattr(together, "effects_by_block", fails)
    require_same(*reversed(both(monkeypatch, model, data, qcompress.prune_quantize(bits=(4,), sparsity=(0,)))))


def test_outputs_that_are_not_finite_are_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise NotFiniteError("the output holds NaN")

    model, data = seeded(lambda: SidePath("none")), [torch.full((1, 6), float(number)) for number in range(4)]
    monkeypatch.setattr(TogetherGradients, "_how_many", lambda *_: 2)
    monkeypatch.setattr(together, "effects_by_block", fails)
    with pytest.raises(NotFiniteError):
        both(monkeypatch, model, data, qcompress.prune_quantize(bits=(4,), sparsity=(0,)))


def test_a_network_without_repeated_blocks_is_gone_through_sample_by_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)))
    data = [torch.randn(4, 6, generator=torch.Generator().manual_seed(0))]
    expected, found = both(monkeypatch, model, data, qcompress.prune_quantize(bits=(4,), sparsity=(0,)))
    assert (found.cost == expected.cost).all()
