"""The running sums of a measurement, which can be written to a file after any batch and read back.

Every batch gives effects ``E`` of shape ``(V, columns)`` whose products are the second-order terms. Up to `MAX_EXACT`
options the Gram matrix ``Σ E·Eᵀ`` is kept in full and factored at the end. Beyond that the effects are mixed by random
signs into `SKETCH_RANK` columns, whose products have the same expectation (Johnson-Lindenstrauss), so that memory stays
linear in V.

If each column is a sample, as for ``"sampled"``, the columns themselves are kept, so that the spread of any prediction
over the samples is known, and outlying effects are limited (`qcompress.measuring.outlying`); from column `SKETCH_RANK`
on, each is added to an earlier one with a random sign, and none is limited.
"""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from formulations.errors import FileFormatError
from formulations.file_kinds import FileKind
from formulations.files import AnyPath
from qcompress.errors import DataError
from qcompress.measuring.outlying import limited

FILE_KIND = FileKind("qcompress partial measurement", version=2)
COUNTS = ("num_samples", "num_batches", "num_columns", "by_sample")
MAX_EXACT = 4096
SKETCH_RANK = 512
EIGENVALUE_FLOOR = 1e-13  # relative to the largest eigenvalue; smaller ones are rounding errors of the sums


def probe_generator(seed: int, number: int) -> torch.Generator:
    """Return the generator for everything that is random in the batch with that number."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number)


def error_of_sum(
    costs: NDArray[np.float64],
    errors: NDArray[np.float64],
    num_samples: int,
    between: NDArray[np.float64] | float = 0.0,
) -> float:
    """Return the standard error of a prediction, from its spread over the columns.

    What the errors of the single options have beyond their own spread (effects that were limited) is added as if the
    options were independent. Where samples share a column, costs are still sums over the samples, so that their error
    is smaller than the columns show; that of pair terms is not.

    Args:
        costs: ``(options, columns)`` shares of the options that the prediction is made of.
        errors: ``(options,)`` standard errors of these options' costs.
        num_samples: number of samples; beyond `SKETCH_RANK` they share columns.
        between: ``(columns,)`` shares of the pair terms.

    >>> error_of_sum(np.ones((1, 4)), np.array([3.0]), 4)
    3.0
    """
    count = costs.shape[1]
    narrower = (SKETCH_RANK / max(num_samples, SKETCH_RANK)) ** 0.5 if count == SKETCH_RANK else 1.0
    own = costs.var(axis=1, ddof=1) * count * narrower**2
    spread = (narrower * costs.sum(axis=0) + between).var(ddof=1) * count
    return float((spread + np.maximum(np.square(errors) - own, 0.0).sum()) ** 0.5)


class Sums:
    """Sums of costs and second-order terms over the samples seen so far.

    Attributes:
        num_columns: number of samples that were added as columns.
        cost_squares: ``(V,)`` sums of the squared costs of all samples, if known.
        tried: names of parts whose options are evaluated one by one, and why.
        stopped: why batches were left out, if any.
        first_tried: the same after the first batch, from which all others start; None before it.
    """

    def __init__(self, num_options: int, seed: int, *, by_sample: bool = False) -> None:
        self._seed, self.by_sample, self.num_columns = seed, by_sample, 0
        self.exact = num_options <= MAX_EXACT and not by_sample
        self.cost = np.zeros(num_options)
        self.cost_squares = np.zeros(num_options)
        self.softened: NDArray[np.float64] | None = None
        self.second = np.zeros((num_options, num_options if self.exact else SKETCH_RANK))
        self.num_samples = 0
        self.num_batches = 0
        self.tried: dict[str, str] = {}
        self.first_tried: dict[str, str] | None = None
        self.stopped = ""

    def add(
        self,
        cost: NDArray[np.float64],
        effects: Iterable[NDArray[np.floating]],
        num_samples: int,
        softened: NDArray[np.float64] | None = None,
        cost_squares: NDArray[np.float64] | None = None,
    ) -> None:
        """Add one batch: sums of the costs ``(V,)`` over its samples, and its effects as blocks ``(V, columns)``."""
        if cost_squares is not None:
            self.cost_squares += cost_squares
        rng = np.random.default_rng([self._seed, self.num_batches])
        self.cost += cost
        if softened is None or (self.softened is None and self.num_batches):
            self.softened = None  # one batch without softened costs drops them for all
        else:
            self.softened = softened if self.softened is None else self.softened + softened
        for block in effects:
            if self.by_sample:
                self._add_columns(block, rng)
            elif self.exact:
                wide = block.astype(np.float64)
                self.second += wide @ wide.T
            else:
                signs = rng.integers(0, 2, size=(block.shape[1], SKETCH_RANK), dtype=np.int8).astype(block.dtype)
                self.second += block @ ((2 * signs - 1) / np.sqrt(SKETCH_RANK))
        self.num_samples += num_samples
        self.num_batches += 1

    def _add_columns(self, block: NDArray[np.floating], rng: np.random.Generator) -> None:
        drawn = rng.choice((-1.0, 1.0), size=block.shape[1])
        for column, sign in zip(block.T, drawn, strict=True):
            place = self.num_columns % SKETCH_RANK
            self.second[:, place] += column if self.num_columns < SKETCH_RANK else sign * column
            self.num_columns += 1

    def mean_cost(self) -> NDArray[np.float64]:
        """Return ``(V,)`` mean cost per sample."""
        if not self.by_sample:
            return self.cost / self.num_samples
        effects, columns = self.second[:, : self.num_columns], self._columns()
        standing_out = 0.5 * (np.square(effects) - np.square(columns)).sum(axis=1)
        return np.asarray((self.cost - standing_out) / self.num_samples)

    def _columns(self) -> NDArray[np.float64]:
        """Return ``(V, columns)``: the columns, whose outlying effects are limited if every column is a sample."""
        columns = self.second[:, : self.num_columns]
        return limited(columns) if 0 < self.num_columns <= SKETCH_RANK else columns

    def mean_softened(self) -> NDArray[np.float64] | None:
        """Return ``(V,)`` mean softened cost per sample, or None if there are none."""
        return None if self.softened is None else self.softened / self.num_samples

    def factor(self) -> NDArray[np.float64]:
        """Return ``(V, r)`` factor whose products are the mean second-order terms per sample."""
        if self.by_sample:
            return np.ascontiguousarray(self._columns() / np.sqrt(self.num_samples))
        if not self.exact:
            return np.asarray(self.second / np.sqrt(self.num_samples))
        size = np.sqrt(np.diag(self.second))
        unit = np.where(size > 0, size, 1.0)  # options differ by orders of magnitude: factor the correlations
        values, vectors = np.linalg.eigh(self.second / np.outer(unit, unit))
        kept = values > max(EIGENVALUE_FLOOR * values[-1], 0.0)
        factor = vectors[:, kept] * np.sqrt(values[kept]) * (size / np.sqrt(self.num_samples))[:, None]
        return np.ascontiguousarray(factor)

    def standard_error(self) -> NDArray[np.float64] | None:
        """Return ``(V,)`` standard errors of the mean costs, from their spread over the samples; None if unknown.

        The amount by which limiting outlying effects lowers a mean counts as an error too, because it may be real.
        """
        count = self.num_columns
        if count < 2:
            return None
        spread = np.maximum(self.cost_squares / count - (self.cost / count) ** 2, 0.0)
        limited_by = self.cost / self.num_samples - self.mean_cost()
        return np.sqrt(spread * count / (count - 1) * count / self.num_samples**2 + limited_by**2)

    def save(self, path: AnyPath, key: str) -> None:
        """Write the sums, completely or not at all; ``key`` identifies the measurement."""
        counts = {name: getattr(self, name) for name in COUNTS}
        header = {"key": key, "seed": self._seed, "tried": self.tried, "first_tried": self.first_tried, **counts}
        arrays = {"cost": self.cost, "second": self.second, "cost_squares": self.cost_squares}
        if self.softened is not None:
            arrays["softened"] = self.softened
        FILE_KIND.write_arrays(path, header, arrays)

    @classmethod
    def load(cls, path: AnyPath, key: str) -> "Sums":
        """Read the sums of an interrupted measurement.

        Raises:
            DataError: they belong to another measurement (model, data, options or method differ), or are damaged.
        """
        try:
            header, arrays = FILE_KIND.read_arrays(path)
        except FileFormatError as error:
            raise DataError(f"{error}; delete {path} to measure from the start") from error
        if header["key"] != key:
            raise DataError(
                f"{path} holds the sums of another measurement (model, data, options, method or seed differ); "
                "choose another cache file or delete it"
            )
        sums = cls(len(arrays["cost"]), header["seed"], by_sample=header["by_sample"])
        sums.cost, sums.second, sums.softened = arrays["cost"], arrays["second"], arrays.get("softened")
        sums.cost_squares = arrays["cost_squares"]
        for name in COUNTS:
            setattr(sums, name, header[name])
        sums.tried, sums.first_tried = header["tried"], header["first_tried"]
        return sums
