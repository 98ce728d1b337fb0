"""Random small networks in which channels are coupled in all the ways that are followed."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTHS = (4, 6, 8)


def draw(generator: torch.Generator, *choices: int) -> int:
    """One of some numbers."""
    return choices[int(torch.randint(len(choices), (), generator=generator))]


class Residual(nn.Module):
    """Two convolutions around a shortcut, whose channels are squeezed and excited now and then."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        inner = draw(generator, *WIDTHS)
        self.first, self.norm = nn.Conv2d(width, inner, 3, padding=1), nn.BatchNorm2d(inner)
        self.second = nn.Conv2d(inner, width, 3, padding=1, bias=bool(draw(generator, 0, 1)))
        self.gate = nn.Linear(width, width) if draw(generator, 0, 1) else None
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(functional.relu(self.norm(self.first(x))))
        if self.gate is not None:
            y = y * torch.sigmoid(self.gate(y.mean((2, 3))))[:, :, None, None]
        return functional.relu(x + y)


class Padded(nn.Module):
    """A shortcut that pads channels with zeros and takes every second pixel."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.width, self.conv = width + 4, nn.Conv2d(width, width + 4, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))


class Branches(nn.Module):
    """Two ways, put beside each other."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.left = nn.Conv2d(width, draw(generator, *WIDTHS), 1)
        self.right = nn.Sequential(nn.Conv2d(width, draw(generator, *WIDTHS), 3, padding=1), nn.Hardswish())
        self.keeps = bool(draw(generator, 0, 1))
        self.width = self.left.out_channels + self.right[0].out_channels + (width if self.keeps else 0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x), *([x] if self.keeps else [])], dim=1)


class Split(nn.Module):
    """Halves of a layer: one gates the other, or each goes its own way."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        inner = draw(generator, *WIDTHS)
        self.conv, self.width, self.joins = nn.Conv2d(width, 2 * inner, 1), inner, bool(draw(generator, 0, 1))
        self.left, self.right = nn.Conv2d(inner, inner, 1), nn.Conv2d(inner, inner, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.conv(x).chunk(2, dim=1)
        return functional.silu(one) * other if self.joins else self.left(one) + self.right(other)


class Depthwise(nn.Module):
    """An inverted bottleneck, or a shared batch normalisation of groups."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        inner, repeats = 2 * width, draw(generator, 1, 2)
        self.expand, self.norm = nn.Conv2d(width, inner, 1), nn.GroupNorm(draw(generator, 1, 2, inner), inner)
        self.deep = nn.Conv2d(inner, inner * repeats, 3, padding=1, groups=inner)
        self.project, self.width = nn.Conv2d(inner * repeats, width, 1), width

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(functional.relu6(self.deep(functional.relu6(self.norm(self.expand(x))))))


class Grouped(nn.Module):
    """Convolutions in groups, one of them transposed."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        groups = 2
        self.enter = nn.Conv2d(width, 8, 1)
        self.mixed = nn.Conv2d(8, 12, 3, padding=1, groups=groups)
        self.up = nn.ConvTranspose2d(12, 8, 2, stride=2, groups=draw(generator, 1, 2))
        self.width = 8

    def forward(self, x: Tensor) -> Tensor:
        return functional.avg_pool2d(functional.leaky_relu(self.up(self.mixed(self.enter(x)))), 2)


class Shared(nn.Module):
    """A layer that is called twice, and one whose weight two modules have."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.conv, self.twin = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        if draw(generator, 0, 1):
            self.twin.weight = self.conv.weight
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.twin(torch.tanh(self.conv(torch.tanh(self.conv(x))))))


class Attention(nn.Module):
    """Heads over positions; queries may share keys and values; by PyTorch's function or written out."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.head, self.shared, groups = draw(generator, 3, 4), draw(generator, 1, 2), draw(generator, 2, 3)
        heads = groups * self.shared
        self.query = nn.Linear(width, heads * self.head)
        self.key, self.value = nn.Linear(width, groups * self.head), nn.Linear(width, groups * self.head)
        self.out, self.written, self.width = nn.Linear(heads * self.head, width), bool(draw(generator, 0, 1)), width

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        shape = (*tokens.shape[:2], -1, self.head)
        query, key, value = (layer(tokens).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        key, value = (own.repeat_interleave(self.shared, dim=1) for own in (key, value))
        if self.written:
            seen = ((query @ key.transpose(2, 3)) / self.head**0.5).softmax(-1) @ value
        else:
            seen = functional.scaled_dot_product_attention(query, key, value)
        seen = self.out(seen.transpose(1, 2).flatten(2))
        return x + seen.transpose(1, 2).reshape(x.shape)


class Gated(nn.Module):
    """A gated layer over channels, at every position."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        inner = draw(generator, *WIDTHS)
        self.gate, self.up, self.down = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm, self.width = nn.LayerNorm(width) if draw(generator, 0, 1) else nn.Identity(), width

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.permute(0, 2, 3, 1))
        return x + self.down(functional.silu(self.gate(y)) * self.up(y)).permute(0, 3, 1, 2)


BLOCKS: tuple[Callable[[int, torch.Generator], nn.Module], ...] = (
    Residual, Padded, Branches, Split, Depthwise, Grouped, Shared, Attention, Gated,
)  # fmt: skip


class Network(nn.Module):
    """A stem, some blocks and a classifier behind a flattening or a mean over positions."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        width = draw(generator, *WIDTHS)
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        blocks, size = [], 8
        for _ in range(draw(generator, 1, 2, 3)):
            block = BLOCKS[draw(generator, *range(len(BLOCKS)))](width, generator)
            width = block.width
            size = size // 2 if isinstance(block, Padded) else size
            blocks.append(block)
        self.blocks, self.flat = nn.Sequential(*blocks), bool(draw(generator, 0, 1))
        self.head = nn.Linear(width * (size * size if self.flat else 1), 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.head(x.flatten(1) if self.flat else x.mean((2, 3)))


def random_network(seed: int) -> nn.Module:
    """A network in evaluation mode whose normalisations are not the identity."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        network = Network(seed).eval()
        for module in network.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
                nn.init.normal_(module.weight, 1.0, 0.3)
                nn.init.normal_(module.bias, 0.0, 0.3)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0.0, 0.3)
                module.running_var.uniform_(0.5, 2.0)
    return network
