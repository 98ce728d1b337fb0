"""A site is where a weight is: a parameter of a module, seen as rows of output channels.

Layers of PyTorch's own and their like have one site, ``weight``, whose rows are known (`qcompress.model.layers`). Any
other parameter of two dimensions or more is a site as well, whatever its module does with it: a matrix has its rows, a
stack of matrices (the experts of a language model in one parameter) those of all its matrices one after the other.
Rows are only a way to store the numbers, so nothing has to be known of such a module; what its weight does to the
outputs is found by moving it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Size, Tensor, nn

from qcompress.model import layers

WEIGHT = "weight"
"""The parameter that is not named where a layer is."""


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A parameter of a module as rows.

    >>> Site(nn.LSTM(3, 5), "weight_ih_l0").rows.shape
    torch.Size([20, 3])
    """

    module: nn.Module
    parameter: str = WEIGHT

    @property
    def is_layer(self) -> bool:
        """Whether it is the weight of a supported layer, in which its output is linear."""
        return self.parameter == WEIGHT and layers.kind_of(self.module) is not None

    @property
    def weight(self) -> nn.Parameter:
        """The parameter itself."""
        weight = self.module._parameters[self.parameter]
        assert weight is not None  # noqa: S101
        return weight

    @property
    def rows(self) -> Tensor:
        """Its ``(channels, weights per channel)``, detached."""
        return self.to_rows(self.weight.detach())

    @property
    def num_matrices(self) -> int:
        """Matrices that the rows are of, as many of each."""
        shape = self.weight.shape
        return 1 if self.is_layer or len(shape) != 3 else shape[0]

    def why_not(self) -> str:
        """Why it cannot be compressed, or an empty string."""
        if self.module._parameters.get(self.parameter) is None:
            return f"it has no parameter {self.parameter!r}"
        if self.is_layer:
            return layers.why_unsupported(self.module)
        weight = self.weight
        if isinstance(weight, nn.UninitializedParameter):
            return "its weight is not initialised yet; run the model once first"
        if not weight.is_floating_point():
            return f"its weight holds {weight.dtype}, not floating-point numbers"
        if self.parameter == "bias" or sum(size > 1 for size in weight.shape) < 2:
            return "a vector (a scale, a bias, statistics) takes few bytes"
        if getattr(self.module, "max_norm", None) is not None:
            return f"{type(self.module).__name__} with max_norm changes its weight when it runs"
        return ""

    def to_rows(self, values: Tensor) -> Tensor:
        """Values of the weight's shape as rows."""
        if self.is_layer:
            return layers.to_rows(self.module, values)
        if self._inputs_first(values.ndim):
            values = values.transpose(-1, -2)
        return values.reshape(-1, values.shape[-1]) if values.ndim <= 3 else values.reshape(values.shape[0], -1)

    def from_rows(self, rows: Tensor) -> Tensor:
        """Undo `to_rows`."""
        return self.restored(rows, self.weight.shape)

    def restored(self, rows: Tensor, shape: Size) -> Tensor:
        """Undo `to_rows` for a weight of ``shape`` that need not be there any more."""
        if self.is_layer:
            return layers.from_rows(self.module, rows, shape)
        if self._inputs_first(len(shape)):
            return rows.reshape(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
        return rows.reshape(shape)

    def put_(self, rows: Tensor) -> None:
        """Give the weight the numbers of ``rows``."""
        with torch.no_grad():
            self.weight.copy_(self.from_rows(rows))

    def _inputs_first(self, num_dimensions: int) -> bool:
        """Whether the module says that it multiplies with the weight from the right, as ``x @ weight``."""
        return num_dimensions in (2, 3) and bool(getattr(self.module, "is_transposed", False))


def path_of(module: str, parameter: str) -> str:
    """What a weight is called by: its module's path, and the parameter's name where that is not ``weight``."""
    return module if parameter == WEIGHT else f"{module}.{parameter}".lstrip(".")


def sites_of(module: nn.Module) -> Iterator[Site]:
    """Sites of a module's own parameters, with those that cannot be compressed."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield Site(module, name)
