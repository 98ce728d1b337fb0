"""Products of gradients with changes: the same bits however many gradients are held."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import qcompress
from qcompress.measuring.candidates import Candidates, fitted
from qcompress.measuring.methods import gradients as module
from qcompress.measuring.methods.gradients import Gradients
from qcompress.model.parts import survey
from tests.models import seeded

ROOMS = (0, 3000, 20_000, 1 << 28)  # no gradient held, some of them, all of them, and all changes besides


class Tagger(nn.Module):
    """Few of the vocabulary's rows get a gradient; the linear layer gets a dense one."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(40, 7), nn.Linear(7, 5)

    def forward(self, words: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.table(words)).mean(1))


def model_and_candidates(granularity: str | int = "layer") -> tuple[nn.Module, Candidates]:
    model = seeded(Tagger)
    parts = survey(model, [words(0)], lambda model, batch: model(batch), granularity).parts
    return model, fitted(model, parts, qcompress.prune_quantize(bits=(2, 3), sparsity=(0.0, 0.5)))[0]


def words(seed: int) -> Tensor:
    return torch.randint(40, (1, 3), generator=torch.Generator().manual_seed(seed))


def effects(model: nn.Module, candidates: Candidates, room: int) -> NDArray[np.float64]:
    with Gradients(model, candidates, room) as gradients:
        for seed in range(6):
            with torch.enable_grad():
                output = model(words(seed))
            gradients.add(output, torch.ones_like(output), keep=True)
            gradients.add(output, torch.arange(5.0)[None])
        return gradients.effects()


@pytest.mark.parametrize("granularity", ["layer", 2])
def test_columns_are_inner_products_with_the_gradient(granularity: str | int) -> None:
    model, candidates = model_and_candidates(granularity)
    found = effects(model, candidates, 1 << 28)
    for column, (seed, probe) in enumerate((s, p) for s in range(6) for p in (torch.ones(5), torch.arange(5.0))):
        weights = [candidates.layers[index].site(model).weight for index in range(2)]
        for weight in weights:
            weight.requires_grad_(True)
        taken = torch.autograd.grad((model(words(seed)) * probe).sum(), weights)
        for layer, gradient in zip(candidates.layers, taken, strict=True):
            for part in layer.parts:
                start, stop = candidates.parts[part].rows or (0, len(gradient))
                for option in range(len(candidates.transforms[part])):
                    expected = float((gradient[start:stop].double() * candidates.change(part, option).double()).sum())
                    actual = found[candidates.offsets[part] + option, column]
                    assert actual == pytest.approx(expected, rel=1e-4, abs=1e-6)  # float32 sums of up to 280 products


@pytest.mark.parametrize("granularity", ["layer", 2])
def test_the_numbers_do_not_depend_on_how_many_are_held(
    granularity: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 16)
    model, candidates = model_and_candidates(granularity)
    first, *others = (effects(model, candidates, room) for room in ROOMS)
    assert np.abs(first).max() > 0
    assert all((other == first).all() for other in others)


def counted(candidates: Candidates, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    asked: list[int] = []
    change: Callable[[Candidates, int, int], Tensor] = Candidates.change
    monkeypatch.setattr(
        Candidates, "change", lambda self, part, option: asked.append(option) or change(self, part, option)
    )
    return asked


def test_an_option_is_made_once_for_all_gradients_that_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    model, candidates = model_and_candidates()
    options = candidates.num_options - len(candidates.parts)
    asked = counted(candidates, monkeypatch)
    effects(model, candidates, 1 << 28)
    assert len(asked) == options
    effects(model, candidates, 0)
    assert len(asked) > 10 * options


def test_layers_that_no_gradient_reaches_are_not_among_the_reached() -> None:
    model, candidates = model_and_candidates()
    with Gradients(model, candidates) as gradients:
        with torch.enable_grad():
            output = model(words(0))
        gradients.add(output, torch.zeros_like(output), keep=True)
        gradients.add(output, torch.ones_like(output))
    assert [len(reached) for reached in gradients.reached] == [0, 2]
    assert all(own.grad is None and not own.requires_grad for own in (model.table.weight, model.layer.weight))
