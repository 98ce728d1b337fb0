"""Weights and activations in 8 bits, multiplied as integers (W8A8).

The weight is stored in 8 bits by row, or in 7: integer kernels of x86 processors without VNNI add pairs of products in
16 bits, for which signed weights of 8 bits are too large. The layer's input is rounded to 8 bits at run time, over a
range found on the calibration data (static) or the range of each tensor (dynamic). The output of a convolution is
rounded as well, as integer convolution kernels do. The loss this causes is measured like that of any option.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from torch import Tensor

from qcompress.errors import OptionsError
from qcompress.transforms.activations import Activations, Range
from qcompress.transforms.base import Target, Transform, Weight
from qcompress.transforms.quantize.prune_quantize import PruneQuantize

BITS = (7, 8)


@dataclass(frozen=True)
class IntegerProduct(Transform):
    """Store the weight in 8 or 7 bits and multiply it with 8-bit activations.

    Args:
        bits: of the weight; 7 only for convolutions that read several channels, with ranges of the calibration data.
        dynamic: whether to use the range of each tensor at run time; only for Linear layers, also those with tied
            weights. Otherwise the range of the calibration data is used, which `resolve` fills in.
        compensated: same as in `PruneQuantize`.
        inputs, outputs: ``(low, high)`` of the activations; the outputs of a Linear layer are not rounded.

    Raises:
        OptionsError: a value is outside its range.

    >>> IntegerProduct(dynamic=True).label
    '8 bits, activations in 8 bits, dynamic'
    """

    kind: ClassVar[str] = "integer_product"
    decodes_anywhere: ClassVar[bool] = True

    bits: int = 8
    dynamic: bool = False
    compensated: bool = False
    inputs: tuple[float, float] | None = None
    outputs: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.bits not in BITS or (self.bits < max(BITS) and self.dynamic):
            raise OptionsError(f"bits must be 8, or 7 with ranges of the calibration data, found {self.bits!r}")
        for name in ("dynamic", "compensated"):
            if not isinstance(getattr(self, name), bool):
                raise OptionsError(f"{name} must be True or False, found {getattr(self, name)!r}")
        for name in ("inputs", "outputs"):
            value = getattr(self, name)
            if value is not None:
                low, high = map(float, value)
                if not low <= 0 <= high:
                    raise OptionsError(f"{name} must be a range that contains 0, found {value!r}")
                object.__setattr__(self, name, (low, high))

    @property
    def weights(self) -> PruneQuantize:
        """The transform that stores the weight alone."""
        return PruneQuantize(self.bits, compensated=self.compensated)

    @property
    def label(self) -> str:
        """Short name, such as ``"8 bits, compensated, activations in 8 bits, dynamic"``."""
        return f"{self.weights.label}, activations in 8 bits" + (", dynamic" if self.dynamic else "")

    @property
    def activations(self) -> Activations:
        """The rounding of the layer's inputs and outputs."""
        if self.inputs is None and not self.dynamic:
            raise OptionsError(f"{self.label!r} has no range yet: measure() finds it")
        inputs, outputs = (None if ends is None else Range(*ends) for ends in (self.inputs, self.outputs))
        return Activations(None if self.dynamic else inputs, outputs)

    @property
    def nearest(self) -> "IntegerProduct":
        """The same transform, rounded to nearest."""
        return replace(self, compensated=False)

    @property
    def wider(self) -> "IntegerProduct":
        """The same with weights of 8 bits."""
        return replace(self, bits=max(BITS))

    def to_json(self) -> dict[str, Any]:
        """Return the transform as JSON, without the fields that have their default."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        defaults = {field.name: field.default for field in fields(self)}
        return {"kind": self.kind, **{name: entry for name, entry in values.items() if entry != defaults[name]}}

    def needs_moments(self, target: Target) -> bool:
        """Whether it is compensated and the layer's moments can be collected."""
        return self.weights.needs_moments(target)

    def takes_blocks(self, target: Target) -> bool:
        """Whether moments of blocks are enough for the option of the weights."""
        return self.weights.takes_blocks(target)

    def needs_ranges(self, target: Target) -> bool:  # noqa: ARG002
        """Return True: without known activations, a layer has no ranges and the option is not offered for it."""
        return True

    def resolve(self, weight: Weight) -> "IntegerProduct | None":
        """Return the option with the ranges of the weight's layer; None if there are none or it does not fit."""
        linear = weight.target.layer == "Linear" or weight.target.head
        if weight.ranges is None or self.why_not(weight.target) or (self.dynamic and not linear):
            return None
        depthwise = 1 < weight.target.input_groups == weight.target.channels
        if self.bits < max(BITS) and (linear or depthwise):
            return None
        inputs, outputs = weight.ranges
        return replace(
            self,
            compensated=self.compensated and self.needs_moments(weight.target),
            inputs=None if self.dynamic else inputs,
            outputs=None if linear else outputs,
        )

    def why_not(self, target: Target) -> str:
        """A block of rows does not fit, because blocks share the layer's activations; nor does a very small weight."""
        return self.weights.why_not(target) if target.whole else "a block of a layer has no activations of its own"

    def size_bytes(self, target: Target) -> int:
        """Return the bytes of the stored weight; the ranges are part of the option itself."""
        return self.weights.size_bytes(target)

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        """Return the arrays of the stored weight."""
        return self.weights.encode(weight)

    def decode(self, stored: dict[str, Tensor], target: Target) -> Tensor:
        """Restore the weight's rows."""
        return self.weights.decode(stored, target)
