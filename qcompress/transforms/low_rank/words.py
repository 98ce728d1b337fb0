"""The low-rank form of an Embedding: a lookup of short codes, and one small matrix that makes features of them.

The weight ``(words, features)`` is ``codes @ basis``. An Embedding's input is a word, seen as a unit vector; its second
moments are the frequencies of the words, and *whitened* means closest for words as frequent as that: the least
``Σ p_i·‖w_i - w_i'‖²``, by the decomposition of ``diag(p)^½ · W`` (GroupReduce, arXiv 1806.06950, within a block).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompress.transforms.base import Target, Weight
from qcompress.transforms.low_rank.decomposition import DAMPING
from qcompress.transforms.low_rank.forms import Factors, MatrixFactorisation, Ranks, moments_of


@dataclass(frozen=True, slots=True)
class Words(MatrixFactorisation):
    """Codes of a word, then a matrix for all words."""

    def label(self, ranks: Ranks) -> str:
        """The name, as ``"rank 8"``."""
        return f"rank {ranks[0]}"

    def why_not(self, target: Target) -> str:  # noqa: ARG002
        """It always fits."""
        return ""

    def largest(self, target: Target) -> Ranks:
        """The largest rank of the weight."""
        return (min(target.channels, target.per_channel),)

    def shapes(self, target: Target, ranks: Ranks) -> dict[str, tuple[int, int]]:
        """``(rank, features)`` and ``(words, rank)``: as in any product the right side comes first."""
        return {"basis": (ranks[0], target.per_channel), "codes": (target.channels, ranks[0])}

    def positions(self, target: Target) -> tuple[float, ...]:
        """Once per word that is looked up; the codes themselves are only looked up."""
        return target.lookups, 0.0

    def matrices(self, weight: Weight, *, whitened: bool) -> list[tuple[Tensor, Tensor | None]]:
        """The weight, its rows stretched by the root of their frequency."""
        return [(weight.exact() * self._stretch(weight, whitened=whitened), None)]

    def factors(self, weight: Weight, ranks: Ranks, *, whitened: bool) -> Factors:
        """The first rows and columns of the split, the stretch undone."""
        (piece,), rank = self.splits(weight, ranks[0], whitened=whitened), ranks[0]
        return {"basis": piece.right[:rank], "codes": piece.left[:, :rank] / self._stretch(weight, whitened=whitened)}

    def product(self, factors: Factors, kernel: tuple[int, int]) -> Tensor:  # noqa: ARG002
        """Codes times basis."""
        return factors["codes"] @ factors["basis"]

    def _stretch(self, weight: Weight, *, whitened: bool) -> Tensor:
        """``(words, 1)``; a word that never comes has a little, so that it is not given up."""
        if not whitened:
            return torch.ones(1, 1, dtype=torch.float64)
        often = moments_of(weight)
        mean = float(often.mean())
        return (often + DAMPING * mean).sqrt()[:, None] if mean > 0 else torch.ones_like(often)[:, None]
