"""Sites: the locations of weights. A site is a parameter of a module, viewed as rows of output channels.

Supported layers have one site, ``weight``, whose rows are known (`qcompress.model.layers`). Any other parameter of two
dimensions or more is a site as well, whatever its module does with it. A matrix has its own rows; a stack of matrices
(such as the experts of a language model in one parameter) has the rows of all its matrices in sequence. Rows are only a
storage layout, so nothing needs to be known about such a module; the effect of its weight on the outputs is found by
perturbing it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Size, Tensor, nn

from qcompress.model import layers

WEIGHT = "weight"
"""Name of the parameter that a layer's path stands for."""


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A parameter of a module, viewed as rows.

    >>> Site(nn.LSTM(3, 5), "weight_ih_l0").rows.shape
    torch.Size([20, 3])
    """

    module: nn.Module
    parameter: str = WEIGHT

    @property
    def is_layer(self) -> bool:
        """Whether it is the weight of a supported layer, whose output is linear in it."""
        return self.parameter == WEIGHT and layers.kind_of(self.module) is not None

    @property
    def weight(self) -> nn.Parameter:
        """The parameter."""
        weight = self.module._parameters[self.parameter]
        assert weight is not None  # noqa: S101
        return weight

    @property
    def rows(self) -> Tensor:
        """The weight as ``(channels, weights per channel)``, detached."""
        return self.to_rows(self.weight.detach())

    @property
    def num_matrices(self) -> int:
        """Number of matrices that the rows belong to, with equally many rows each."""
        shape = self.weight.shape
        return 1 if self.is_layer or len(shape) != 3 else shape[0]

    def why_not(self) -> str:
        """Return why it cannot be compressed, or an empty string."""
        if self.module._parameters.get(self.parameter) is None:
            return f"it has no parameter {self.parameter!r}"
        if self.is_layer:
            return layers.why_unsupported(self.module)
        weight = self.weight
        if isinstance(weight, nn.UninitializedParameter):
            return "its weight is not initialised yet; run the model once first"
        if why := layers.why_no_numbers(weight):
            return why
        if self.parameter == "bias" or sum(size > 1 for size in weight.shape) < 2:
            return "vectors such as scales, biases and statistics are too small to compress"
        if getattr(self.module, "max_norm", None) is not None:
            return f"{type(self.module).__name__} with max_norm changes its weight when it runs"
        return ""

    def to_rows(self, values: Tensor) -> Tensor:
        """Return values of the weight's shape as rows."""
        if self.is_layer:
            return layers.to_rows(self.module, values)
        if self._inputs_first(values.ndim):
            values = values.transpose(-1, -2)
        return values.reshape(-1, values.shape[-1]) if values.ndim <= 3 else values.reshape(values.shape[0], -1)

    def from_rows(self, rows: Tensor) -> Tensor:
        """Undo `to_rows`."""
        return self.restored(rows, self.weight.shape)

    def restored(self, rows: Tensor, shape: Size) -> Tensor:
        """Undo `to_rows` for a weight of ``shape``, which need not exist any more."""
        if self.is_layer:
            return layers.from_rows(self.module, rows, shape)
        if self._inputs_first(len(shape)):
            return rows.reshape(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
        return rows.reshape(shape)

    def put_(self, rows: Tensor) -> None:
        """Set the weight to the values of ``rows``."""
        with torch.no_grad():
            self.weight.copy_(self.from_rows(rows))

    def _inputs_first(self, num_dimensions: int) -> bool:
        """Whether the module declares that it multiplies with the weight from the right, as ``x @ weight``."""
        return num_dimensions in (2, 3) and bool(getattr(self.module, "is_transposed", False))


def path_of(module: str, parameter: str) -> str:
    """Return the name of a weight: its module's path, followed by the parameter's name unless that is ``weight``."""
    return module if parameter == WEIGHT else f"{module}.{parameter}".lstrip(".")


def sites_of(module: nn.Module) -> Iterator[Site]:
    """Yield the sites of a module's own parameters, including those that cannot be compressed."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield Site(module, name)
