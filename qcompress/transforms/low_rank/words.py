"""The low-rank form of an Embedding: a lookup of short codes, and a small matrix that expands them to features.

The weight ``(words, features)`` is ``codes @ basis``. An Embedding's input is a word, seen as a unit vector, so its
second moments are the frequencies ``p`` of the words. *Whitened* minimises the error weighted by these frequencies,
``Σ p_i·‖w_i - w_i'‖²``, by decomposing ``diag(p)^½ · W`` (as GroupReduce, arXiv 1806.06950, does within a block).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompress.transforms.base import Target, Weight
from qcompress.transforms.low_rank.decomposition import DAMPING
from qcompress.transforms.low_rank.forms import Factors, MatrixFactorisation, Ranks, moments_of


@dataclass(frozen=True, slots=True)
class Words(MatrixFactorisation):
    """A short code per word, then one matrix for all words."""

    def label(self, ranks: Ranks) -> str:
        """Short name, such as ``"rank 8"``."""
        return f"rank {ranks[0]}"

    def why_not(self, target: Target) -> str:  # noqa: ARG002
        """Return an empty string: it always fits."""
        return ""

    def largest(self, target: Target) -> Ranks:
        """The largest rank of the weight."""
        return (min(target.channels, target.per_channel),)

    def shapes(self, target: Target, ranks: Ranks) -> dict[str, tuple[int, int]]:
        """``(rank, features)`` and ``(words, rank)``; the right-hand side of the product comes first."""
        return {"basis": (ranks[0], target.per_channel), "codes": (target.channels, ranks[0])}

    def positions(self, target: Target) -> tuple[float, ...]:
        """The basis is multiplied once per looked-up word; the codes are only looked up."""
        return target.lookups, 0.0

    def matrices(self, weight: Weight, *, whitened: bool) -> list[tuple[Tensor, Tensor | None]]:
        """Return the weight with its rows scaled by the square root of their frequency."""
        return [(weight.exact() * self._stretch(weight, whitened=whitened), None)]

    def factors(self, weight: Weight, ranks: Ranks, *, whitened: bool) -> Factors:
        """Return the first rows and columns of the split, with the scaling undone."""
        (piece,), rank = self.splits(weight, ranks[0], whitened=whitened), ranks[0]
        return {"basis": piece.right[:rank], "codes": piece.left[:, :rank] / self._stretch(weight, whitened=whitened)}

    def product(self, factors: Factors, kernel: tuple[int, int]) -> Tensor:  # noqa: ARG002
        """Multiply codes and basis."""
        return factors["codes"] @ factors["basis"]

    def _stretch(self, weight: Weight, *, whitened: bool) -> Tensor:
        """Row scales ``(words, 1)``; words that never occur get a small one, so that they are not dropped entirely."""
        if not whitened:
            return torch.ones(1, 1, dtype=torch.float64)
        often = moments_of(weight)
        mean = float(often.mean())
        return (often + DAMPING * mean).sqrt()[:, None] if mean > 0 else torch.ones_like(often)[:, None]
