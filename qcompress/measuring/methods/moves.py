"""Move layers' weights slightly and compare the predicted change of the outputs with the actual one.

Layers are moved together, because each move costs a pass. If the outputs do not follow, each half of the layers is
moved by itself, and so on; a few layers are moved one by one, because the others would hide one that is far from
linear. Many layers together are less linear than one, so two passes replace one pass per layer:

- With moves of full size, steps that autograd does not see (rounding) make jumps many times as large as the prediction.
- With n layers moved 1/n as far, the nonlinear part nearly vanishes. The tolerance is so small that the outputs cannot
  follow if a single layer's gradient is wrong by more than is tolerated when it is moved alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qcompress.errors import NotFiniteError
from qcompress.measuring.methods import evidence
from qcompress.model.scores import random_numbers

LARGEST_SHARE = 10.0
"""Largest factor by which a layer is moved farther, or less far, to change the outputs as much as the others."""

HALVINGS = 4
"""How often a move that leaves the domain of the outputs, such as that of a logarithm, is halved."""

MOST_ALONE = 4
"""Number of layers up to which each is moved by itself if a group with them did not follow."""


@dataclass(slots=True, kw_only=True)
class Moves:
    """Moves of some layers' weights, and the changes that they are predicted to make.

    Attributes:
        run: function that returns the outputs of a batch.
        point: its outputs at the unmoved weights, ``(samples, …)``.
        probes: probes of the outputs, each of the shape of ``point``.
        rounded: whether the outputs are computed in half precision.
        tolerance: relative difference of predicted and actual change that is tolerated in a layer that is moved alone.
        weights: index of a layer → its weight.
        changes: index of a layer → its move.
        predicted: index of a layer → ``(samples, probes)`` products of the probes with the predicted change, as
            float64: the square of a small float32 number is 0.
    """

    run: Callable[[], Tensor]
    point: Tensor
    probes: Sequence[Tensor]
    rounded: bool
    tolerance: float
    weights: dict[int, nn.Parameter] = field(default_factory=dict)
    changes: dict[int, Tensor] = field(default_factory=dict)
    predicted: dict[int, Tensor] = field(default_factory=dict)

    @property
    def step(self) -> float:
        """How far a weight is moved, relative to its size."""
        return evidence.STEP_ROUNDED if self.rounded else evidence.STEP

    def draw(self, index: int, weight: nn.Parameter, generator: torch.Generator) -> Tensor:
        """Draw the move of a layer, and return it."""
        values = weight.detach()
        noise = random_numbers(values.shape, values, generator)
        self.weights[index] = weight
        self.changes[index] = noise * (self.step * float(values.float().square().mean().sqrt()))
        self.predicted[index] = torch.zeros(len(self.point), len(self.probes), dtype=torch.float64)
        return self.changes[index]

    def silent(self) -> list[int]:
        """Return the indices of layers whose moves are predicted not to change the outputs."""
        return [index for index, total in self.predicted.items() if not bool(total.any())]

    def silent_with_effect(self) -> bool:
        """Whether the silent layers change the outputs, moved by their full size: nothing may, however far."""
        silent = self.silent()
        return bool(silent) and not self._follow(silent, 1 / self.step, self.tolerance)

    def misled(self) -> list[int]:
        """Return the indices of the other layers, where the outputs do not follow their gradient."""
        silent = set(self.silent())
        order = sorted(self.predicted.keys() - silent, key=self._size)
        if not order:
            return []
        middle = float(torch.tensor([self._size(index) for index in order]).median())
        for index in order:
            factor = min(max(middle / self._size(index), 1 / LARGEST_SHARE), LARGEST_SHARE)
            self.changes[index] *= factor
            self.predicted[index] *= factor
        return sorted(self._misled(sorted(order, key=self._size)))

    def _size(self, index: int) -> float:
        return float(self.predicted[index].norm())

    def _misled(self, layers: list[int], *, strictly: bool = False) -> list[int]:
        if strictly and len(layers) <= MOST_ALONE:
            return [index for layer in layers for index in self._misled([layer])]
        follow = self._follow(layers, 1.0, self.tolerance)
        if follow and (not strictly or self._follow_strictly(layers)):
            return []
        if len(layers) == 1:
            return layers
        middle = len(layers) // 2
        parts = [[layer] for layer in layers] if self.rounded else [layers[:middle], layers[middle:]]
        return [index for part in parts for index in self._misled(part, strictly=len(part) > 1)]

    def _follow_strictly(self, layers: list[int]) -> bool:
        """Whether the outputs follow so closely that each of the layers, sorted by size, would be tolerated alone."""
        share, whole = 1 / len(layers), float(self._total(layers).norm())
        strict = self.tolerance * self._size(layers[0]) / whole
        return float(self._noise().norm()) <= strict * share * whole and self._follow(layers, share, strict)

    def _total(self, layers: list[int]) -> Tensor:
        return torch.stack([self.predicted[index] for index in layers]).sum(0)

    def _noise(self) -> Tensor:
        """Return ``(samples,)`` change of the products that rounding alone may cause."""
        eps = 8 * torch.finfo(self.point.dtype).eps
        sizes = [_by_sample(probe * self.point).norm(dim=1) for probe in self.probes]
        noise: Tensor = eps * torch.stack(sizes, dim=1).norm(dim=1)
        return noise.cpu().double()

    def _follow(self, layers: list[int], share: float, tolerance: float) -> bool:
        """Whether the outputs change as predicted when these layers are moved by a share of their moves.

        If the outputs are then not finite, a smaller share is used, unless no change at all was predicted.
        """
        predicted = self._total(layers)
        for fraction in [share / 2**number for number in range(HALVINGS + 1 if bool(predicted.any()) else 1)]:
            if (output := self._moved(layers, fraction)) is not None:
                break
        if output is None or output.shape != self.point.shape:
            return False
        change = output - self.point
        actual = torch.stack([_by_sample(probe * change).sum(1) for probe in self.probes], dim=1).cpu().double()
        return evidence.follows(fraction * predicted, actual, self._noise(), tolerance)

    @torch.no_grad()
    def _moved(self, layers: list[int], share: float) -> Tensor | None:
        """Return the outputs with these layers moved by a share of their moves, or None if they are not finite."""
        before = {index: self.weights[index].detach().clone() for index in layers}
        try:
            for index in layers:
                self.weights[index].add_(self.changes[index], alpha=share)
            return self.run()
        except NotFiniteError:
            return None
        finally:
            for index, weight in before.items():
                self.weights[index].copy_(weight)


def _by_sample(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1)
