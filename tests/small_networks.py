"""Random small networks of all supported layers, with the ways in which tensors are shared, hidden and left out."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Recipe:
    """What makes a network: the same recipe makes the same one, with other weights for another seed."""

    seed: int
    kind: str

    def make(self, weights: int = 0) -> nn.Module:
        """The network, in evaluation mode."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(1000 * self.seed + weights)
            rng = np.random.default_rng(self.seed)
            return (Words(rng) if self.kind == "words" else Images(rng)).eval()

    def batch(self) -> Tensor:
        """A batch for it."""
        generator = torch.Generator().manual_seed(self.seed)
        if self.kind == "words":
            return torch.randint(NUM_WORDS, (3, 4), generator=generator)
        return torch.randn(3, 4, 6, 6, generator=generator)


NUM_WORDS = 12
KINDS = ("words", "images")


class Words(nn.Module):
    """An embedding, layers of which some are reused or share a weight, and a head that may be tied to the embedding."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__()
        width = int(rng.integers(3, 10))
        self.embed = nn.Embedding(NUM_WORDS, width)
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=bool(rng.integers(2))) for _ in range(3))
        self.order = rng.integers(0, 3, size=4).tolist()
        if rng.integers(2):
            self.layers[1].weight = self.layers[0].weight
        self.head = nn.Linear(width, NUM_WORDS, bias=False)
        tie = rng.choice(["none", "same", "view", "turned"])
        if tie == "same":
            self.head.weight = self.embed.weight
        elif tie == "view":
            self.head.weight = nn.Parameter(self.embed.weight.detach())
        elif tie == "turned":
            self.back = nn.Linear(NUM_WORDS, width, bias=False)
            self.back.weight = nn.Parameter(self.embed.weight.detach().t())
        _add_odd(self, rng, width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for index in self.order:
            x = torch.tanh(self.layers[index](x))
        output = self.head(_odd(self, x))
        return output if not hasattr(self, "back") else output + self.head(self.back(output))


class Images(nn.Module):
    """Plain, grouped, depthwise and transposed convolutions with batch normalisation, and a classifier."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__()
        groups = int(rng.choice([1, 2, 4]))
        self.stem = nn.Conv2d(4, 8, 3, padding=1, bias=bool(rng.integers(2)))
        self.norm = nn.BatchNorm2d(8)
        self.mixed = nn.Conv2d(8, 8, (1, 3), padding=(0, 1), groups=groups)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=groups)
        self.up = nn.ConvTranspose2d(12, 8, 2, stride=2, groups=groups)
        self.line = nn.Conv1d(8, 8, 3, padding=1, groups=int(rng.choice([1, 8])))
        self.head = nn.Linear(8, 5)
        self.twice = bool(rng.integers(2))
        _add_odd(self, rng, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        for _ in range(1 + self.twice):
            x = x + self.mixed(x)
        x = torch.relu(self.up(torch.relu(self.down(x))))
        return self.head(_odd(self, self.line(x.flatten(2)).mean(2)))


def _add_odd(model: nn.Module, rng: np.random.Generator, width: int) -> None:
    """State that a state dict shows otherwise than it is, or not at all."""
    if rng.integers(2):
        model.register_buffer("noise", torch.randn(width), persistent=False)
        model.register_buffer("same_noise", model.noise.clone(), persistent=False)
    if rng.integers(2):
        model.hidden = [nn.Linear(width, width), {"inner": nn.Linear(width, width)}]
    if rng.integers(2):
        model._register_state_dict_hook(
            lambda module, state, prefix, metadata: state.update({k: v.clone() for k, v in state.items()})
        )
    if rng.integers(2):
        both = torch.randn(2 * width)
        model.register_buffer("upper", both[:width])
        model.register_buffer("most", both[width // 2 :])


def _odd(model: nn.Module, x: Tensor) -> Tensor:
    if hasattr(model, "noise"):
        x = x + model.noise + model.same_noise
    if hasattr(model, "hidden"):
        x = torch.tanh(model.hidden[1]["inner"](model.hidden[0](x)))
    if hasattr(model, "upper"):
        x = x * model.upper + model.most[: len(model.upper)]
    return x
