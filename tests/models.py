"""Small networks with everything that trips up tools that look at layers one by one."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Convolutions with batch norm, an activation in place, and a shortcut added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.body = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=2), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 1))
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = x + self.body(x)
        x += 1.0
        return self.head(x.mean(dim=(2, 3)))


class Reused(nn.Module):
    """One linear layer called three times, and a second path to it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.again = self.first
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.tanh(self.first(x))
        return self.out(torch.tanh(self.again(x)))


class TiedLanguageModel(nn.Module):
    """Embedding and output layer share one weight, as modules of their own."""

    def __init__(self, words: int = 11, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(ids))))


class Functional(nn.Module):
    """Uses the embedding's weight as output layer without calling a module."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.linear(self.mix(self.embed(ids)), self.embed.weight)


def seeded(factory: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A network with the same random weights every time, in evaluation mode."""
    torch.manual_seed(seed)
    return factory().eval()
