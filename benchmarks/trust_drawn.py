"""Networks of `benchmarks.trust` that need no files: trained during the benchmark on random data, one per kind of task.

They extend the benchmark beyond trained image classifiers, to regression, tables, text, signals, next symbols and
compressed images.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SEEDS = 1, 2
MOST, UNSEEN = 256, 1000
"""Maximum number of calibration samples, and number of test samples."""


class Task(NamedTuple):
    """A network and inputs ``(MOST + UNSEEN, …)`` that it was not trained on."""

    model: nn.Module
    inputs: Tensor


class Residual(nn.Module):
    """Layers whose output is added to their input."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Encoder(nn.Module):
    """Classifier of sixteen words into four topics, with three encoder layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(500, 48), nn.Parameter(0.1 * torch.randn(1, 16, 48))
        layer = nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Linear(48, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(ids) + self.places).mean(1))


class NextSymbol(nn.Module):
    """Recurrent network that predicts every next symbol of a sequence."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.embed, self.cells = nn.Embedding(symbols, 48), nn.GRU(48, 96, num_layers=2, batch_first=True)
        self.inner, self.head = nn.Linear(96, 96), nn.Linear(96, symbols)

    def forward(self, ids: Tensor) -> Tensor:
        states, _ = self.cells(self.embed(ids))
        return self.head(torch.relu(self.inner(states)))


def tabular() -> Task:
    """Classify sixteen numbers into eight classes, labelled by a random network, with five residual blocks."""
    x = torch.randn(2500 + MOST + UNSEEN, 16)
    rule = nn.Sequential(nn.Linear(16, 48), nn.Tanh(), nn.Linear(48, 8))
    with torch.no_grad():
        y = (4 * rule(x)).argmax(1)
    blocks = [
        Residual(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(5)
    ]  # fmt: skip
    model = nn.Sequential(nn.Linear(16, 64), *blocks, nn.Linear(64, 8))
    return Task(_trained(model, x[:2500], y[:2500], F.cross_entropy, 25), x[2500:])


def regression() -> Task:
    """Map images of 12 × 12 to eight numbers, the maxima and means of four filters, with residual convolutions."""
    x, filters = torch.rand(800 + MOST + UNSEEN, 1, 12, 12), torch.randn(4, 1, 5, 5)
    seen = torch.relu(F.conv2d(x, filters))
    y = torch.cat([seen.amax((2, 3)), seen.mean((2, 3))], dim=1)
    y = (y - y.mean(0)) / (y.std(0) + 1e-3)

    def block() -> nn.Module:
        inner = [nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1)]
        return nn.Sequential(Residual(*inner, nn.BatchNorm2d(24)), nn.ReLU())

    start = [nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), block(), nn.AvgPool2d(2)]
    model = nn.Sequential(*start, block(), block(), nn.Flatten(), nn.Linear(864, 8))
    return Task(_trained(model, x[:800], y[:800], F.mse_loss, 6, rate=3e-3), x[800:])


def text() -> Task:
    """Classify sixteen words into the topic that they were drawn from."""
    topics = torch.randint(4, (1500 + MOST + UNSEEN,))
    often = torch.ones(4, 500)
    for row in often:
        row[torch.randperm(500)[:60]] = 6.0
    ids = torch.multinomial(often[topics], 16, replacement=True)
    return Task(_trained(Encoder(), ids[:1500], topics[:1500], F.cross_entropy, 8), ids[1500:])


def signals() -> Task:
    """Classify noisy waves of 96 points by their frequency, with convolutions that are separable in depth."""
    classes = torch.randint(6, (1200 + MOST + UNSEEN,))
    phase, points = 6.3 * torch.rand(len(classes), 1), torch.linspace(0, 1, 96)
    waves = torch.sin(6.3 * (3 + 2 * classes[:, None]) * points + phase) + 1.2 * torch.randn(len(classes), 96)

    def stage(width: int, wider: int) -> list[nn.Module]:
        depthwise = nn.Conv1d(width, width, 5, padding=2, groups=width)
        return [depthwise, nn.Conv1d(width, wider, 1), nn.BatchNorm1d(wider), nn.ReLU(), nn.MaxPool1d(2)]

    start = [nn.Conv1d(1, 24, 7, padding=3), nn.ReLU(), *stage(24, 32), *stage(32, 48), *stage(48, 64)]
    model = nn.Sequential(*start, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 6))
    return Task(_trained(model, waves[:1200, None], classes[:1200], F.cross_entropy, 10, rate=3e-3), waves[1200:, None])


def language() -> Task:
    """Predict the next of 32 symbols, each drawn from eight that the two before it allow."""
    allowed, length = torch.randint(32, (32, 32, 8)), 24
    ids = torch.randint(32, (1500 + MOST + UNSEEN, length + 1))
    for place in range(2, length + 1):
        drawn = (torch.rand(len(ids)) ** 2 * 8).long()
        ids[:, place] = allowed[ids[:, place - 2], ids[:, place - 1], drawn]

    def loss(output: Tensor, following: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), following.flatten())

    model = _trained(NextSymbol(32), ids[:1500, :-1], ids[:1500, 1:], loss, 12, rate=3e-3)
    return Task(model, ids[1500:, :-1])


def autoencoder() -> Task:
    """Restore images of 16 × 16, each of three round spots, from 48 numbers."""
    rows = torch.arange(16.0)
    centre, width = 16 * torch.rand(1000 + MOST + UNSEEN, 3, 2, 1), 1 + 2 * torch.rand(1000 + MOST + UNSEEN, 3, 1, 1)
    bell = torch.exp(-0.5 * ((rows - centre) / width) ** 2)
    images = torch.einsum("nsx,nsy->nxy", bell[:, :, 0], bell[:, :, 1])[:, None]
    inward = [nn.Conv2d(1, 24, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(24, 48, 3, stride=2, padding=1), nn.ReLU()]
    between = [nn.Flatten(), nn.Linear(768, 48), nn.Linear(48, 768), nn.ReLU(), nn.Unflatten(1, (48, 4, 4))]
    outward = [nn.ConvTranspose2d(48, 24, 4, stride=2, padding=1), nn.ReLU()]
    model = nn.Sequential(*inward, *between, *outward, nn.ConvTranspose2d(24, 1, 4, stride=2, padding=1))
    return Task(_trained(model, images[:1000], images[:1000], F.mse_loss, 25, rate=3e-3), images[1000:])


TASKS: dict[str, tuple[Callable[[], Task], str]] = {
    "tabular": (tabular, "kl"),
    "regression": (regression, "mse"),
    "text": (text, "kl"),
    "signals": (signals, "kl"),
    "language": (language, "kl"),
    "autoencoder": (autoencoder, "mse"),
}
"""Mapping from a task's name to the function that makes it and its loss."""


def task(name: str, seed: int) -> Task:
    """Draw the data and train the network of a task from a seed."""
    torch.manual_seed(seed)
    return TASKS[name][0]()


def _trained(
    model: nn.Module, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor], epochs: int, rate: float = 1e-3
) -> nn.Module:
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimiser.zero_grad()
            loss(model(x[rows]), y[rows]).backward()
            optimiser.step()
    return model.eval()
