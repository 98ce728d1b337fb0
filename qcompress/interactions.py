"""Pair terms as far as the samples support them.

``method="sampled"`` estimates a pair term from one number per sample, so with tens of samples most terms are noise, and
a solver exploits noise. Two halves of the samples show how much of it is signal: if ``A`` and ``B`` are estimates of
the same terms from either half, the sum of ``A·B`` keeps the signal only. Its ratio to the sum of squares of the whole
estimates is the weight to multiply them by for the least mean squared error (James and Stein, 1961). It is computed for
pairs of parts within one block of the network, and for those of different blocks. In language models the latter have
been all noise; then only terms within blocks are kept, which also makes the problem easier.

A block is identified by an index in the names: ``model.layers.3.mlp.up_proj`` is in block ``model.layers.3``.

Invariant: both kinds of terms are positive semidefinite with the diagonal, and their weights are at most 1, so the
guarantee of `qcompress.formulation` holds.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from formulations import PairTerms
from qcompress.measurement import Measurement

LEAST_SIGNAL = 0.1
"""Smallest share of signal for which terms between blocks are kept."""

MOST_OPTIONS = 2000
"""Maximum number of options whose pairs are compared between the halves; whole blocks are drawn."""

MOST_TERMS = 4_000_000
"""Maximum number of terms within blocks; if there are more, they count only as far as terms between blocks do."""


class Signal(NamedTuple):
    """Share of signal, from 0 to 1, in the pair terms within blocks and between them."""

    within: float
    between: float


def pair_terms(measurement: Measurement, rows: NDArray[np.float64], strength: float) -> PairTerms:
    """Return the pair terms of ``rows``, multiplied by ``strength`` and, if they are sampled, by their signal.

    Args:
        measurement: measurement with V options.
        rows: ``(V, r)`` its factor, with each row scaled.
        strength: from 0.0 to 1.0.
    """
    if not strength:
        return PairTerms()
    signal = signal_of(measurement)
    if signal is None:
        return PairTerms(factor=rows * strength**0.5)
    kept = signal.between >= LEAST_SIGNAL
    between = strength * signal.between if kept else 0.0
    more = max(strength * signal.within - between, 0.0)
    return PairTerms(
        factor=rows * between**0.5 if kept else None,
        sparse=_within_blocks(rows, *_places(measurement), more) if more else None,
    )


def signal_of(measurement: Measurement) -> Signal | None:
    """Return the share of signal in the pair terms, or None if they are not estimated from single samples.

    >>> import torch
    >>> from qcompress import measure, prune_quantize
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    >>> signal_of(measure(model, [torch.randn(8, 4)], prune_quantize(bits=(4,), sparsity=(0,)))) is None
    True
    """
    if measurement.standard_error is None or any(measurement.standing):
        return None
    size = np.linalg.norm(measurement.factor, axis=1)
    part, block = _places(measurement)
    drawn = _drawn(np.where(size > 0, block, -1))
    effects, part, block = measurement.factor[drawn] / size[drawn, None], part[drawn], block[drawn]
    first, second = (2.0 * half @ half.T for half in (effects[:, ::2], effects[:, 1::2]))
    pairs = np.triu(part[:, None] != part, 1)
    within = block[:, None] == block
    shared, square = first * second, np.square(0.5 * (first + second))
    return Signal(*(_share(shared[chosen], square[chosen]) for chosen in (pairs & within, pairs & ~within)))


def _share(shared: NDArray[np.float64], square: NDArray[np.float64]) -> float:
    total = float(square.sum())
    return min(max(float(shared.sum()) / total, 0.0), 1.0) if total else 0.0


def _places(measurement: Measurement) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return ``(V,)`` part and block of every option; a part outside all blocks is a block of its own."""
    names = [_block_of(part.path) for part in measurement.parts]
    numbers: dict[str, int] = {}
    block = np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)
    part = np.repeat(np.arange(len(names)), [len(options) for options in measurement.transforms])
    return part, block[part]


def _block_of(path: str) -> str:
    """Return the path up to the first index.

    >>> _block_of("model.layers.3.mlp.up_proj"), _block_of("lm_head")
    ('model.layers.3', 'lm_head')
    """
    words = path.split(".")
    indices = [place for place, word in enumerate(words) if word.isdecimal()]
    return ".".join(words[: indices[0] + 1]) if indices else path


def _drawn(block: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the indices of the options of blocks that are drawn at random; options of block -1 are left out."""
    blocks = np.random.default_rng(0).permutation(np.unique(block[block >= 0]))
    sizes = np.cumsum([np.count_nonzero(block == number) for number in blocks])
    kept = blocks[: max(2, int(np.searchsorted(sizes, MOST_OPTIONS, side="right")))]
    return np.flatnonzero(np.isin(block, kept))[:MOST_OPTIONS]


def _within_blocks(
    rows: NDArray[np.float64], part: NDArray[np.int64], block: NDArray[np.int64], weight: float
) -> scipy.sparse.csr_array | None:
    """Return the products of rows of different parts of a block, times ``weight``; None if there are too many."""
    used = np.flatnonzero(np.any(rows, axis=1))
    order = used[np.argsort(block[used], kind="stable")]
    groups = np.split(order, np.flatnonzero(np.diff(block[order])) + 1)
    if sum(len(group) ** 2 for group in groups) > 2 * MOST_TERMS:
        return None

    def terms() -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]]:
        for group in groups:
            u, v = np.nonzero(np.triu(part[group][:, None] != part[group], 1))
            yield group[u], group[v], weight * (rows[group] @ rows[group].T)[u, v]

    firsts, seconds, values = (np.concatenate(arrays) for arrays in itertools.zip_longest(*terms()))
    return scipy.sparse.csr_array((values, (firsts, seconds)), shape=(len(rows), len(rows)))
