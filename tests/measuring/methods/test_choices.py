"""Choices of a network are held while weights move, and nothing else is."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qcompress.errors import NotFiniteError
from qcompress.measuring.methods.choices import HeldChoices
from qcompress.measuring.methods.gradient_check import misleading
from qcompress.model import forward as forwards
from tests.quick import slow_but

CHOICES: dict[str, Callable[[Tensor], Tensor]] = {
    "topk": lambda x: x.topk(2, dim=-1).values,
    "topk, first dimension": lambda x: x.topk(2, dim=0).values,
    "sort": lambda x: x.sort(-1, descending=True).values,
    "argsort": lambda x: x.gather(-1, x.argsort(-1)),
    "argmax": lambda x: x.gather(-1, x.argmax(-1, keepdim=True)),
    "maximum of rows": lambda x: x.max(1).values,
    "minimum, kept": lambda x: x.min(-1, keepdim=True).values,
    "median": lambda x: x.median(0).values,
    "threshold": lambda x: torch.where(x > 0.5, 3 * x, x),
    "threshold, in numbers": lambda x: x * (x > 0.5).float(),
    "some": lambda x: x[x > 0],
}
NO_CHOICES: dict[str, Callable[[Tensor], Tensor]] = {
    "round": lambda x: torch.round(4 * x) / 4,
    "bins": lambda x: x * torch.bucketize(x, torch.tensor([-0.5, 0.5], dtype=x.dtype)),
    "integers": lambda x: (4 * x).long() / 4,
    "bytes": lambda x: (4 * x).to(torch.int8) / 4,
    "numpy": lambda x: torch.from_numpy(x.detach().numpy().round(1)),
    "sign": torch.sign,
}


def numbers(seed: int) -> Tensor:
    return torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CHOICES)
def test_what_is_chosen_stays_and_its_values_move(name: str) -> None:
    x, step = numbers(0), 3 * numbers(1)
    held = HeldChoices(lambda: CHOICES[name](x))
    before = held()
    assert torch.equal(before, CHOICES[name](numbers(0)))
    moves = []
    for share in (1e-4, 1.0):  # the second crosses thresholds, and changes every order
        x.copy_(numbers(0) + share * step)
        moves.append(held() - before)
    torch.testing.assert_close(moves[1], 1e4 * moves[0], rtol=1e-6, atol=1e-6)
    free = CHOICES[name](x)
    assert free.shape != before.shape or not torch.allclose(free, before + moves[1])


@pytest.mark.parametrize("name", NO_CHOICES)
def test_rounding_is_no_choice(name: str) -> None:
    x = numbers(0)
    held = HeldChoices(lambda: NO_CHOICES[name](x))
    held()
    x.copy_(numbers(1))
    torch.testing.assert_close(held(), NO_CHOICES[name](numbers(1)), rtol=0, atol=0)


def test_choices_stay_where_gradients_are_taken_and_results_are_changed_in_place() -> None:
    weight = nn.Parameter(numbers(0))

    def run() -> Tensor:
        places = weight.argmax(-1)
        chosen = weight.gather(-1, places[:, None] + 0)
        places.zero_()
        return chosen

    held = HeldChoices(run)
    first = held()
    with torch.no_grad():
        weight.copy_(numbers(1))
    again = held()
    again.sum().backward()
    assert torch.equal(again.detach(), numbers(1).gather(-1, numbers(0).argmax(-1, keepdim=True)))
    assert torch.equal(weight.grad != 0, numbers(0) == first.detach())


def test_a_call_that_does_something_else_is_free() -> None:
    x, other = numbers(0), [False]
    held = HeldChoices(lambda: (x[:2] if other[0] else x).argmax(-1))
    held()
    x.copy_(numbers(1))
    other[0] = True
    assert torch.equal(held(), numbers(1)[:2].argmax(-1))


def test_a_comparison_with_numbers_of_another_shape_is_free() -> None:
    x, other = numbers(0), [numbers(1)]
    held = HeldChoices(lambda: x > other[0])
    held()
    other[0] = numbers(2)[:1]
    assert torch.equal(held(), x > other[0])


def test_whether_outputs_are_finite_is_no_choice() -> None:
    x = numbers(0).abs()
    held = HeldChoices(lambda: forwards.run(nn.Identity(), x.log()))
    held()
    x[1, 2] = 0.0
    assert held()[1, 2] == forwards.RULED_OUT
    x[1, 2] = -1.0
    with pytest.raises(NotFiniteError):
        held()


class LooksWithGradients(nn.Module):
    """Compares numbers once more where gradients are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if torch.is_grad_enabled():
                assert (x > -1e9).all()
            x = torch.where(x > 0, x, 0.1 * x)
        return x


def test_right_gradients_of_a_network_that_does_more_with_gradients_are_not_accused() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        model, x = LooksWithGradients(), torch.randn(64, 16)
        weights = [layer.weight for layer in model.layers]
        assert not misleading(lambda model=model, x=x: model(x), weights, torch.Generator().manual_seed(seed))


class Mixture(nn.Module):
    """Two layers of experts, the second of which may have a gradient that does not tell all."""

    def __init__(self, lie: str) -> None:
        super().__init__()
        self.lie = lie
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
        self.routers = nn.ModuleList(nn.Linear(16, 8) for _ in range(2))
        self.experts = nn.ModuleList(nn.ModuleList(nn.Linear(16, 16) for _ in range(8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for number, (router, experts) in enumerate(zip(self.routers, self.experts, strict=True)):
            scores, places = router(x).softmax(-1).topk(2)
            if self.lie == "scores" and number == 1:
                scores = 0.2 * scores + (0.8 * scores).detach()
            for index, expert in enumerate(experts):
                share = (scores * (places == index)).sum(-1, keepdim=True)
                y = expert(x)
                if self.lie == "rounding" and (number, index) == (1, 3):
                    y = y + (torch.round(4 * y) / 4 - y).detach()
                if self.lie == "detach" and (number, index) == (1, 3):
                    y = y.detach() + 0.1 * y
                x = x + share * torch.tanh(y)
        return self.last(x)


WRONG = {"none": None, "scores": "routers.1.weight", "rounding": "experts.1.3.weight", "detach": "experts.1.3.weight"}


@pytest.mark.parametrize("tokens", slow_but([64, 512], [64, 512, 2048]))
@pytest.mark.parametrize("lie", WRONG)
def test_wrong_gradients_among_experts_are_found_and_right_ones_are_not_accused(lie: str, tokens: int) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        model, x = Mixture(lie), torch.randn(1, tokens, 16)
        names = [name for name, parameter in model.named_parameters() if parameter.ndim == 2]
        weights = [model.get_parameter(name) for name in names]
        found = misleading(lambda model=model, x=x: model(x), weights, torch.Generator().manual_seed(seed))
        assert WRONG[lie] in {names[index] for index in found} if WRONG[lie] else not found, seed
