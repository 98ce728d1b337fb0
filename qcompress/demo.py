"""The demo: train a small residual network on digits and compress it with several solvers.

It uses scikit-learn's digits (1,797 images of 8×8). The network is trained in seconds, measured, compressed to 7 % of
its bytes, saved, loaded again and tested on unseen images.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from qcompress.compressed.apply import apply
from qcompress.compressed.file import load_compressed, save_compressed
from qcompress.errors import MissingError
from qcompress.formulation import formulate
from qcompress.measuring.measure import measure
from qcompress.measuring.true_loss import mean_loss
from qcompress.model.tensors import total_bytes
from qcompress.options import low_rank, prune_quantize
from solvers import solve

SOLVERS = ("greedy", "lagrangian", "anneal", "sa", "ga", "auto")
TRAINING_IMAGES = 1200


class ResidualBlock(nn.Module):
    """Two convolutions with batch norm around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, width, h, w)`` → the same shape."""
        inner = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(x + self.norm2(self.conv2(inner)))


def digits_network() -> nn.Module:
    """Return a small residual network for 8×8 images and ten classes."""
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        ResidualBlock(24),
        nn.Conv2d(24, 48, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(48),
        nn.ReLU(),
        ResidualBlock(48),
        ResidualBlock(48),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, 10),
    )


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels: ``(N, 1, 8, 8)`` in 0..1 and ``(N,)``.

    Raises:
        MissingError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingError("the demo needs scikit-learn for its images: pip install 'qcompress[demo]'") from error
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1)[order] / 16
    labels = torch.tensor(bunch.target)[order]
    return images[:TRAINING_IMAGES], labels[:TRAINING_IMAGES], images[TRAINING_IMAGES:], labels[TRAINING_IMAGES:]


def train(model: nn.Module, images: Tensor, labels: Tensor, *, epochs: int = 12, seed: int = 0) -> None:
    """Train in place with Adam and a cosine schedule."""
    generator = torch.Generator().manual_seed(seed)
    batch = 64
    steps = epochs * (len(images) // batch)
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for start in range(0, len(images) - batch + 1, batch):
            chosen = order[start : start + batch]
            optimiser.zero_grad()
            functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of correctly classified images."""
    return float((model(images).argmax(1) == labels).float().mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoRow:
    """Result of one solver. Losses are in nats per sample."""

    solver: str
    loss_predicted: float
    bound: float | None
    gap: float | None
    status: str
    loss_measured: float
    size_bytes: int
    accuracy: float
    solve_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """The original and the results of all solvers."""

    original_bytes: int
    original_accuracy: float
    budget_bytes: int
    rows: tuple[DemoRow, ...]


def run_demo(
    *,
    solvers: Sequence[str] = SOLVERS,
    fraction: float = 0.07,
    time_limit: float = 5.0,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> DemoResult:
    """Train, measure once, and let every solver compress the network to ``fraction`` of its bytes.

    Args:
        solvers: names of solvers.
        fraction: budget as a share of the original's bytes.
        time_limit: seconds for each solver.
        seed: seed for training, measuring and solving.
        say: called with a line of text before each step.
    """
    images, labels, test_images, test_labels = digits()
    torch.manual_seed(seed)
    model = digits_network()
    say(f"training a residual network ({total_bytes(model):,} bytes) on {len(images):,} digits")
    train(model, images, labels, seed=seed)
    before = accuracy(model, test_images, test_labels)
    options = prune_quantize(compensated=True) + low_rank(whitened=True)
    batches = list(torch.split(images[:512], 128))
    say("measuring what every option does to the loss, alone and with the others")
    start = time.perf_counter()
    measurement = measure(model, batches, options, method="direct", seed=seed)
    measure_s = time.perf_counter() - start
    say(f"measured {len(measurement.cost)} options of {len(measurement.parts)} parts in {measure_s:.1f} s")
    problem = formulate(measurement, {"bytes": fraction})
    rows = []
    for name in solvers:
        say(f"solving with {name}")
        solution = solve(problem, name, time_limit=time_limit, seed=seed)
        if solution.choice is None or solution.objective is None:
            say(f"{name} found no choice within the budget ({solution.status})")
            continue
        smaller = apply(model, measurement, solution)
        with tempfile.TemporaryDirectory() as folder:
            saved = save_compressed(smaller, Path(folder) / "model.safetensors")
            loaded = load_compressed(Path(folder) / "model.safetensors", digits_network)
        rows.append(
            DemoRow(
                solver=name,
                loss_predicted=solution.objective,
                bound=solution.bound,
                gap=solution.gap,
                status=str(solution.status),
                loss_measured=mean_loss(model, loaded, batches),
                size_bytes=saved.payload_bytes,
                accuracy=accuracy(loaded, test_images, test_labels),
                solve_s=solution.wall_s,
            )
        )
    return DemoResult(
        original_bytes=total_bytes(model),
        original_accuracy=before,
        budget_bytes=int(problem.budgets["bytes"]),
        rows=tuple(rows),
    )
