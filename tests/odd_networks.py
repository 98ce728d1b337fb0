"""A generator of odd small networks: what a seed draws of all that trips up tools that look at layers one by one.

A network is a chain of blocks over tokens ``(samples, steps, width)`` between an embedding and a head of few outputs.
Blocks share weights with each other, use them past their layers, mix samples, gather tokens, hide steps from autograd,
return tuples, put time first, count calls, draw noise, and branch on their inputs.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 6


@dataclass(frozen=True, slots=True)
class Odd:
    """A network with its data.

    Attributes:
        model: in evaluation mode.
        data: batches of unequal sizes.
        loss: what to measure it by.
        blocks: names of what it is made of.
    """

    model: nn.Module
    data: list[Tensor]
    loss: str
    blocks: tuple[str, ...]


class Pair(nn.Linear):
    """Returns a tuple."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


class Normed(nn.Linear):
    """Multiplies with a function of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True), self.bias)


class Block(nn.Module):
    """One odd step, chosen by name."""

    def __init__(self, kind: str, shared: nn.Linear) -> None:
        super().__init__()
        self.kind = kind
        layers: dict[str, Callable[[], nn.Module]] = {
            "tuple": lambda: Pair(WIDTH, WIDTH),
            "own": lambda: Normed(WIDTH, WIDTH),
        }
        self.one = layers.get(kind, lambda: nn.Linear(WIDTH, WIDTH))()
        self.two = shared if kind in ("shared", "functional") else nn.Linear(WIDTH, WIDTH)
        if kind == "tied":
            self.two.weight = self.one.weight
        if kind == "convolution":
            self.one = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=2)
            self.two = nn.ConvTranspose1d(WIDTH, WIDTH, 3, padding=1)
        if kind == "positions":
            self.two = nn.Embedding(16, WIDTH)
        if kind == "state":
            self.register_buffer("calls", torch.zeros(()))
        if kind == "hook":
            self.one.register_forward_hook(lambda module, args, output: output * 2 + torch.tanh(output))

    def forward(self, x: Tensor) -> Tensor:
        step: Callable[[Tensor], Tensor] = getattr(self, f"_{self.kind}", self._plain)
        return step(x)

    def _plain(self, x: Tensor) -> Tensor:
        return x + self.two(torch.tanh(self.one(x)))

    def _convolution(self, x: Tensor) -> Tensor:
        return x + self.two(torch.tanh(self.one(x.mT))).mT

    def _functional(self, x: Tensor) -> Tensor:
        return torch.tanh(self.two(x)) @ self.two.weight.T + self.one(x)

    def _uncalled(self, x: Tensor) -> Tensor:
        return x + functional.linear(torch.tanh(self.one(x)), self.two.weight)

    def _tuple(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)[0]))

    def _time(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x.transpose(0, 1))).cumsum(0)).transpose(0, 1)

    def _flat(self, x: Tensor) -> Tensor:
        flat = x.transpose(0, 1).reshape(-1, WIDTH)
        return x + self.two(torch.tanh(self.one(flat))).reshape(x.shape[1], -1, WIDTH).transpose(0, 1)

    def _coupled(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.two(x - x.mean(0))

    def _positions(self, x: Tensor) -> Tensor:
        return torch.tanh(self.one(x) + self.two(torch.arange(x.shape[1])[None]))

    def _experts(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        chosen = torch.arange(len(tokens)) % 3 == 0
        out = torch.zeros_like(tokens)
        for expert, own in ((self.one, chosen), (self.two, ~chosen)):
            places = own.nonzero().flatten()
            out = out.index_add(0, places, torch.tanh(expert(tokens[places])))
        return x + out.view_as(x)

    def _detached(self, x: Tensor) -> Tensor:
        return self.two(x) + torch.tanh(self.one(x)).detach()

    def _hidden(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = torch.tanh(self.one(x))
        return self.two(x)

    def _numpy(self, x: Tensor) -> Tensor:
        return self.two(x) + torch.from_numpy(torch.tanh(self.one(x)).numpy(force=True))

    def _noise(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x) + torch.randn(x.shape[-1]) + random.random()))  # noqa: S311

    def _state(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.two(torch.tanh(self.one(x))) * (1 + self.calls / 4)

    def _branch(self, x: Tensor) -> Tensor:
        if x.shape[0] % 2:
            return self.two(x)
        for _ in range(x.shape[1] % 3 + 1):
            x = torch.tanh(self.one(x))
        return x

    def _inplace(self, x: Tensor) -> Tensor:
        x = self.one(x)
        x.clamp_(min=-1)
        x += self.two(x.clone())
        return x


KINDS = (
    "plain", "shared", "functional", "uncalled", "tied", "own", "hook", "tuple", "time", "flat", "coupled", "positions",
    "experts", "detached", "hidden", "numpy", "noise", "state", "branch", "inplace", "convolution",
)  # fmt: skip


class Network(nn.Module):
    """Words → blocks → few numbers a sample."""

    def __init__(self, kinds: tuple[str, ...], outputs: int) -> None:
        super().__init__()
        self.embed, self.shared = nn.Embedding(13, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.Sequential(*(Block(kind, self.shared) for kind in kinds))
        self.head = nn.Linear(WIDTH, outputs)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(ids)).mean(1))


def odd_network(seed: int) -> Odd:
    """The network of a seed."""
    drawn = random.Random(seed)  # noqa: S311
    kinds = tuple(drawn.choice(KINDS) for _ in range(drawn.randint(1, 4)))
    torch.manual_seed(seed)
    model = Network(kinds, drawn.randint(2, 8)).eval()
    steps = drawn.randint(1, 8)
    sizes = [drawn.randint(2, 9) for _ in range(drawn.randint(1, 3))]
    data = [torch.randint(13, (size, steps)) for size in sizes]
    return Odd(model, data, drawn.choice(("kl", "mse")), kinds)
