"""Measurements without losses, of small models of every supported kind, for tests of what comes after measuring."""

import copy
from collections.abc import Iterator, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qcompress.measurement import Measurement
from qcompress.measuring.inputs.ranges import activation_ranges
from qcompress.model.parts import survey, weights_of
from qcompress.options import Options
from solvers import Solution, Status, StopReason
from tests.models import Reused, TiedLanguageModel


class Chain(nn.Module):
    """Layers in a row; inputs of a fixed shape."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Mixed(nn.Module):
    """Convolutions, grouped and depthwise ones, batch normalisation, a residual addition and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.wide = nn.Conv2d(8, 16, 3, stride=2, padding=1, padding_mode="reflect")
        self.up = nn.ConvTranspose2d(16, 6, 2, stride=2, groups=2)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.grouped(self.depthwise(x))
        return self.fc(self.up(torch.relu(self.wide(x))).mean((2, 3)))


KINDS: dict[str, tuple[Any, Any]] = {  # name → (makes the model, makes a batch)
    "linear": (lambda: Chain(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3, bias=False)), lambda: torch.randn(4, 9)),
    "conv1d": (lambda: Chain(nn.Conv1d(4, 6, 3), nn.Conv1d(6, 4, 2, groups=2)), lambda: torch.randn(2, 4, 9)),
    "conv2d": (lambda: Chain(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 2, groups=6)), lambda: torch.randn(2, 3, 7, 7)),
    "conv3d": (lambda: Chain(nn.Conv3d(2, 4, 2), nn.Conv3d(4, 4, 2, groups=2)), lambda: torch.randn(2, 2, 4, 4, 4)),
    "transposed1d": (lambda: Chain(nn.ConvTranspose1d(4, 6, 3, groups=2)), lambda: torch.randn(2, 4, 5)),
    "transposed2d": (lambda: Chain(nn.ConvTranspose2d(4, 6, (2, 3))), lambda: torch.randn(2, 4, 5, 5)),
    "transposed3d": (lambda: Chain(nn.ConvTranspose3d(4, 8, 2, groups=4)), lambda: torch.randn(2, 4, 3, 3, 3)),
    "embedding": (lambda: Chain(nn.Embedding(20, 6), nn.Linear(6, 4)), lambda: torch.randint(20, (3, 5))),
    "tied": (TiedLanguageModel, lambda: torch.randint(11, (3, 5))),
    "reused": (Reused, lambda: torch.randn(4, 5)),
    "mixed": (Mixed, lambda: torch.randn(4, 3, 6, 6)),
}


def measured(model: nn.Module, batch: Tensor, options: Options, granularity: str | int = "layer") -> Measurement:
    """A measurement with the true parts, options and sizes of ``model``, and no losses."""
    found = survey(model, [batch], None, granularity)
    ranged = [part for part in found.parts if options.need_ranges(part.target)]
    ranges = activation_ranges(model, ranged, [batch], None)
    weights = weights_of(model, found.parts, {}, {}, ranges=ranges)
    transforms = tuple(tuple(own.transform for own in options.for_weight(weight)) for weight in weights)
    pairs = [(part.target, one) for part, own in zip(found.parts, transforms, strict=True) for one in own]
    sizes = np.array([transform.size_bytes(target) for target, transform in pairs], dtype=np.float64)
    macs = np.array([transform.macs(target) for target, transform in pairs])
    return Measurement(
        parts=found.parts,
        transforms=transforms,
        cost=np.zeros(len(sizes)),
        factor=np.zeros((len(sizes), 1)),
        error=np.zeros(len(sizes)),
        resources=MappingProxyType({"bytes": sizes, "macs": macs}),
        fixed=MappingProxyType(found.fixed),
        original=MappingProxyType(found.original),
        skipped=found.skipped,
        num_samples=len(batch),
        method="none",
        loss="none",
        seed=0,
        standing=(0,) * len(found.parts),
        model_fingerprint=Measurement.fingerprint_of(model),
    )


def predicted_bytes(measurement: Measurement, choice: Sequence[int]) -> float:
    """What the chosen options and everything fixed take."""
    chosen = zip(measurement.parts, measurement.transforms, choice, strict=True)
    return measurement.fixed["bytes"] + sum(own[option].size_bytes(part.target) for part, own, option in chosen)


def solution(choice: Sequence[int] | None) -> Solution:
    """A solution with this choice."""
    return Solution(
        choice=None if choice is None else np.array(choice, dtype=np.int64),
        objective=0.0,
        usage={},
        feasible=choice is not None,
        bound=None,
        gap=None,
        status=Status.UNKNOWN if choice is None else Status.FEASIBLE,
        stop_reason=StopReason.COMPLETED,
        wall_s=0.0,
        solver="by hand",
    )


def option_like(measurement: Measurement, kind: str) -> list[int]:
    """For every part its last option of this kind, or 0 (keep) where it has none."""
    choice = []
    for own in measurement.transforms:
        places = [place for place, transform in enumerate(own) if transform.kind == kind]
        choice.append(places[-1] if places else 0)
    return choice


def changed_copies(model: nn.Module, measurement: Measurement) -> Iterator[nn.Module]:
    """A copy of the model for every option of every part, in the measurement's order, with that option in it alone."""
    for part, weight, options in zip(
        measurement.parts, measurement.weights(model), measurement.transforms, strict=True
    ):
        for option in options:
            changed = copy.deepcopy(model)
            site = part.site(changed)
            rows = site.rows.clone()
            start, stop = part.rows or (0, len(rows))
            rows[start:stop] = option.approximate(weight)
            site.put_(rows)
            yield changed
