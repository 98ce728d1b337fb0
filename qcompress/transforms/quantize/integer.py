"""Weights and activations in 8 bits, multiplied as integers (W8A8).

The weight is stored in 8 bits by row; what goes into the layer is rounded to 8 bits when it runs, over a range that the
calibration data gave (static) or that every tensor has as it comes (dynamic). A convolution's output is rounded as
well, as integer kernels of convolutions give it. What a layer loses by this is measured as any option's loss is.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from torch import Tensor

from qcompress.errors import OptionsError
from qcompress.transforms.activations import Activations, Range
from qcompress.transforms.base import Target, Transform, Weight
from qcompress.transforms.quantize.prune_quantize import PruneQuantize

BITS = 8


@dataclass(frozen=True)
class IntegerProduct(Transform):
    """Store the weight in 8 bits, and multiply it with activations in 8 bits.

    Args:
        dynamic: with the range of every tensor as it comes; only for Linear layers. Else with that of the calibration
            data, which an option of a weight has (see `resolve`).
        compensated: as of `PruneQuantize`.
        inputs, outputs: ``(low, high)`` of the activations; of a Linear layer the outputs are left as they are.

    Raises:
        OptionsError: a value outside its range.

    >>> IntegerProduct(dynamic=True).label
    '8 bits, activations in 8 bits, dynamic'
    """

    kind: ClassVar[str] = "integer_product"

    dynamic: bool = False
    compensated: bool = False
    inputs: tuple[float, float] | None = None
    outputs: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("dynamic", "compensated"):
            if not isinstance(getattr(self, name), bool):
                raise OptionsError(f"{name} must be True or False, found {getattr(self, name)!r}")
        for name in ("inputs", "outputs"):
            value = getattr(self, name)
            if value is not None:
                low, high = map(float, value)
                if not low <= 0 <= high:
                    raise OptionsError(f"{name} must be a range that holds 0, found {value!r}")
                object.__setattr__(self, name, (low, high))

    @property
    def weights(self) -> PruneQuantize:
        """How the weight alone is stored."""
        return PruneQuantize(BITS, compensated=self.compensated)

    @property
    def label(self) -> str:
        """As ``"8 bits, compensated, activations in 8 bits, dynamic"``."""
        return f"{self.weights.label}, activations in 8 bits" + (", dynamic" if self.dynamic else "")

    @property
    def activations(self) -> Activations:
        """What is rounded."""
        if self.inputs is None and not self.dynamic:
            raise OptionsError(f"{self.label!r} has no range yet: measure() finds it")
        inputs, outputs = (None if ends is None else Range(*ends) for ends in (self.inputs, self.outputs))
        return Activations(None if self.dynamic else inputs, outputs)

    @property
    def nearest(self) -> "IntegerProduct":
        """The same, rounded to nearest."""
        return replace(self, compensated=False)

    def to_json(self) -> dict[str, Any]:
        """The transform as JSON, without what it has not."""
        value = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"kind": self.kind, **{name: entry for name, entry in value.items() if entry}}

    def needs_moments(self, target: Target) -> bool:
        """When compensated."""
        return self.weights.needs_moments(target)

    def needs_ranges(self, target: Target) -> bool:  # noqa: ARG002
        """Always: layers whose inputs are not known have none, and the option is not on offer there."""
        return True

    def resolve(self, weight: Weight) -> "IntegerProduct | None":
        """The option with the ranges of the weight's layer; None where there are none, or it does not fit."""
        linear = weight.target.layer == "Linear"
        if weight.ranges is None or self.why_not(weight.target) or (self.dynamic and not linear):
            return None
        inputs, outputs = weight.ranges
        return replace(
            self,
            compensated=self.compensated and self.needs_moments(weight.target),
            inputs=None if self.dynamic else inputs,
            outputs=None if linear else outputs,
        )

    def why_not(self, target: Target) -> str:
        """Blocks of a layer share its activations, and a weight of a few bytes saves nothing."""
        return self.weights.why_not(target) if target.whole else "a block of a layer has no activations of its own"

    def size_bytes(self, target: Target) -> int:
        """Those of the weight; ranges are a part of the option's name."""
        return self.weights.size_bytes(target)

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        """The arrays of the weight."""
        return self.weights.encode(weight)

    def decode(self, stored: dict[str, Tensor], target: Target) -> Tensor:
        """The weight's rows again."""
        return self.weights.decode(stored, target)
