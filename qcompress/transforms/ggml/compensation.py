"""Codes, scales and offsets of ggml's formats whose errors compensate for each other on the layer's inputs.

ggml rounds every weight independently. Starting from its blocks, three steps reduce the error of the layer's output,
measured with the second moments of the layer's inputs, in the same bytes:

1. In-order rounding of the codes, as in `qcompress.transforms.quantize.compensation`.
2. Set each scale and offset to its best value while all else stays: the integer steps and lows of groups within their
   few bits, then the units of blocks, rounded to float16.
3. Set each code to its best value while all others stay.

Steps 2 and 3 alternate. Invariant: no row loses more than with ggml's own codes, measured with the moments used here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcompress.transforms.ggml import library
from qcompress.transforms.ggml.codes import FORMATS, Format, put, scales_of
from qcompress.transforms.ggml.scales import Scales
from qcompress.transforms.ggml.types import TYPES
from qcompress.transforms.quantize import compensation
from qcompress.transforms.quantize.grid import Grid, spread
from qcompress.transforms.quantize.prune_quantize import nonzero


def compensated_blocks(
    name: str, rows: NDArray[np.float32], blocks: NDArray[np.uint8], curvature: Tensor, ordered: tuple[Tensor, Tensor]
) -> NDArray[np.uint8]:
    """Return better blocks of the same type.

    Args:
        name: name of a type with a `Format`.
        rows: ``(channels, n)`` weights.
        blocks: ``(channels, bytes of a row)`` as ggml encodes them.
        curvature: second moments of the inputs, from `compensation.shrunk`.
        ordered: the result of `compensation.inverse_factor` for ``curvature``.
    """
    wanted, metric = torch.from_numpy(rows), curvature.float()
    sizes = torch.ldexp(torch.ones(len(rows)), torch.frexp(nonzero(wanted.abs().amax(dim=1))).exponent - 1)
    fit = _Fit.of(name, blocks, rows.shape[1], sizes)
    wanted = wanted / sizes[:, None]
    kept = torch.ones(wanted.shape, dtype=torch.bool)
    grid, above = fit.grid, wanted - fit.offsets
    rounded = compensation.round_in_order(above, grid, kept, ordered)
    fit.codes = compensation.best_of(above, fit.codes, rounded, grid, metric)
    for _ in range(compensation.ROUNDS):
        gradient = (wanted - fit.rows) @ metric
        fit.refit_(gradient, metric)
        compensation.descend(fit.codes, fit.grid, kept, gradient, metric)
    fit.refit_((wanted - fit.rows) @ metric, metric)
    return put(name, blocks, fit.numbers, fit.scales)


@dataclass(slots=True, kw_only=True, eq=False)
class _Fit:
    """The approximation of rows divided by their sizes, while it is being improved.

    Attributes:
        kind: the format.
        block: number of weights in a block.
        sizes: ``(channels,)`` powers of two.
        codes: ``(channels, n)`` the values that the codes stand for.
        units, steps: scales, ``(channels, blocks)`` and ``(channels, groups)``.
        low_units, lows: the same for the offsets; zeros if the format has none.
    """

    kind: Format
    block: int
    sizes: Tensor
    codes: Tensor
    units: Tensor
    steps: Tensor
    low_units: Tensor
    lows: Tensor

    @classmethod
    def of(cls, name: str, blocks: NDArray[np.uint8], length: int, sizes: Tensor) -> "_Fit":
        kind, read, channels = FORMATS[name], scales_of(name, blocks), len(blocks)

        def by_row(numbers: NDArray[np.float32] | None, like: NDArray[np.float32]) -> Tensor:
            return torch.from_numpy(np.zeros_like(like) if numbers is None else numbers).reshape(channels, -1)

        fit = cls(
            kind=kind,
            block=TYPES[name].block,
            sizes=sizes,
            codes=torch.zeros(channels, length),
            units=by_row(read.units, read.units) / sizes[:, None],
            steps=by_row(read.steps, read.steps),
            low_units=by_row(read.low_units, read.units) / sizes[:, None],
            lows=by_row(read.lows, read.steps),
        )
        decoded = torch.from_numpy(library.decode(name, blocks, length)) / sizes[:, None]
        wide = spread(fit.grid.scales, kind.group, length)
        places = np.searchsorted(fit.between, ((decoded - fit.offsets) / nonzero(wide)).numpy())
        codes = torch.from_numpy(fit.grid.numbers[places])
        fit.codes = torch.where(wide == 0, fit.grid.numbers[0], codes)
        return fit

    @property
    def table(self) -> NDArray[np.float32]:
        """The values of the codes, ascending."""
        numbers: NDArray[np.float32] = np.unique(np.array(self.kind.numbers, np.float32))
        return numbers

    @property
    def between(self) -> NDArray[np.float32]:
        """Midpoints between neighbouring values of the table."""
        return (self.table[1:] + self.table[:-1]) * np.float32(0.5)

    @property
    def numbers(self) -> NDArray[np.uint8]:
        """``(channels, n)`` codes as they are written."""
        _, first = np.unique(np.array(self.kind.numbers), return_index=True)
        return first.astype(np.uint8)[np.searchsorted(self.table, self.codes.numpy())]

    @property
    def grid(self) -> Grid:
        """The grid of values for weights minus their offsets."""
        scales = self._of_groups(self.units) * self.steps
        low = torch.full_like(scales, float(self.table[0]))
        return Grid(
            scales=scales, low=low, high=low + float(np.ptp(self.table)), group_size=self.kind.group, numbers=self.table
        )

    @property
    def offsets(self) -> Tensor:
        """``(channels, n)`` offset of every weight."""
        return spread(self._of_groups(self.low_units) * self.lows, self.kind.group, self.codes.shape[1])

    @property
    def rows(self) -> Tensor:
        """``(channels, n)`` the approximated rows."""
        return self.codes * self.grid.spread(self.codes.shape[1]) + self.offsets

    @property
    def scales(self) -> Scales:
        """Scales and offsets as they are written."""
        units, low_units = ((sizes * self.sizes[:, None]).reshape(-1).numpy() for sizes in (self.units, self.low_units))
        steps, lows = (codes.reshape(len(units), -1).numpy() for codes in (self.steps, self.lows))
        offset = self.kind.scales.lows is not None
        return Scales(units=units, steps=steps, low_units=low_units if offset else None, lows=lows if offset else None)

    def refit_(self, gradient: Tensor, metric: Tensor) -> None:
        """Set scales and offsets to their best values, one after the other; also updates ``gradient``."""
        span, length = max(self.block, compensation.BLOCK), self.codes.shape[1]
        for start in range(0, length, span):
            here = slice(start, min(start + span, length))
            part, near = self._columns(here), gradient[:, here].clone()
            before = part.rows
            part._refit_all_(near, metric[here, here])
            gradient -= (part.rows - before) @ metric[here]

    def _columns(self, here: slice) -> "_Fit":
        """Return a view of some columns; changes to it change this object."""

        def of(factors: Tensor) -> Tensor:
            width = self.codes.shape[1] // factors.shape[1]
            return factors[:, here.start // width : here.stop // width]

        return replace(
            self, codes=self.codes[:, here], units=of(self.units), steps=of(self.steps),
            low_units=of(self.low_units), lows=of(self.lows),
        )  # fmt: skip

    def _refit_all_(self, gradient: Tensor, metric: Tensor) -> None:
        ones, layout = torch.ones_like(self.codes), self.kind.scales
        self._refit(self.steps, self.codes * self._wide(self.units), layout.steps, gradient, metric)
        if layout.lows is not None:
            self._refit(self.lows, ones * self._wide(self.low_units), layout.lows, gradient, metric)
        stored = self._powers if layout.powers else self._halves
        self._refit(self.units, self.codes * self._wide(self.steps), stored, gradient, metric)
        if layout.lows is not None:
            self._refit(self.low_units, ones * self._wide(self.lows), self._halves, gradient, metric)

    def _refit(
        self,
        factors: Tensor,
        along: Tensor,
        stored: tuple[int, int] | Callable[[Tensor], Tensor],
        gradient: Tensor,
        metric: Tensor,
    ) -> None:
        if isinstance(stored, tuple):
            least, most = stored
            if least == most:
                return
            stored = lambda numbers: numbers.round().clamp(least, most)  # noqa: E731
        size, zero = along.shape[1] // factors.shape[1], factors is self.lows or factors is self.low_units
        compensation.refit(factors, along, size, stored, gradient, metric, zero=zero)

    def _halves(self, numbers: Tensor) -> Tensor:
        limit = torch.finfo(torch.float16).max
        return (numbers * self.sizes).clamp(-limit, limit).to(torch.float16).to(torch.float32) / self.sizes

    def _powers(self, numbers: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp((numbers * self.sizes).clamp_min(2.0**-120))
        return torch.ldexp(torch.ones_like(numbers), exponent - (mantissa < 0.75).int()) / self.sizes

    def _of_groups(self, units: Tensor) -> Tensor:
        """Repeat units of blocks for their groups, ``(channels, groups)``."""
        return units.repeat_interleave(self.block // self.kind.group, dim=1)

    def _wide(self, factors: Tensor) -> Tensor:
        """Repeat factors of groups or blocks for their weights, ``(channels, n)``."""
        return factors.repeat_interleave(self.codes.shape[1] // factors.shape[1], dim=1)
