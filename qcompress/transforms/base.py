"""A transform is one way to store a layer's weight in fewer bytes, as a frozen, JSON-able value.

It answers three questions about a weight: what does it become (`approximate`), what does that take (`size_bytes`,
`macs`), and which arrays are written to disk (`encode`, `decode`). What always holds: ``decode(encode(w))`` equals
``approximate(w)`` bit for bit, and the arrays of ``encode`` take exactly ``size_bytes``.

A weight is seen as rows ``(channels, weights per channel)`` (see `qcompress.model.layers`), possibly a block of them.
What is offered for all weights alike, as "the rank that keeps 95 % of the energy", is an `Offer`: each weight resolves
it to a transform of its own. A transform is its own offer.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from qcompress.errors import ModelError
from qcompress.transforms.activations import Activations

Found = TypeVar("Found")
Ranges = tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """How an ungrouped Conv2d goes over its input; positions are counted per sample, over all calls.

    Attributes:
        kernel: height and width.
        inputs: positions of the input, height times width.
        halfway: height of the output times width of the input.
    """

    kernel: tuple[int, int]
    inputs: float
    halfway: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a transform is asked to store: a weight's rows, without the numbers.

    Attributes:
        layer: type of the layer, as ``"Linear"`` or ``"Conv2d"``.
        channels, per_channel: shape of the rows.
        dtype: of the weight.
        macs: multiply-accumulates per sample through these rows, dense.
        whole: whether the rows are all of the layer's.
        replaceable: whether the layer can be swapped for others (it is called as a module, is not grouped and its
            weight is not shared with another module).
        window: of a replaceable Conv2d, else None.
        lookups: rows looked up per sample, of a replaceable Embedding.
        common_input: whether all rows are multiplied with the same input, of which `measure` can take the moments (a
            Linear layer or an ungrouped convolution).
        head: whether the weight is that of an Embedding and of Linear layers, and their inputs are such.
    """

    layer: str
    channels: int
    per_channel: int
    dtype: torch.dtype
    macs: float
    whole: bool = True
    replaceable: bool = True
    window: Window | None = None
    lookups: float = 0.0
    common_input: bool = False
    input_groups: int = 1
    head: bool = False

    @property
    def num_weights(self) -> int:
        """Weights in the rows."""
        return self.channels * self.per_channel

    @property
    def dense_bytes(self) -> int:
        """Bytes of the rows as they are."""
        return self.num_weights * self.dtype.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A weight as a transform sees it: numbers, what they belong to and, where calibrated, what goes in.

    Attributes:
        rows: ``(channels, per_channel)``, any float dtype, any strides, any device.
        target: their description.
        moments: ``(per_channel, per_channel)`` second moments ``E[x xᵀ]`` of the layer's (unfolded) input, or None; of
            an Embedding, whose inputs are unit vectors, their diagonal: ``(channels,)`` frequencies of the words; of a
            grouped convolution one matrix for each group, ``(input_groups, per_channel, per_channel)``.
        num_inputs: how many inputs the moments are the mean of.
        squares: ``(per_channel,)`` mean square of each input column of the layer, or None.
        ranges: ``(low, high)`` of the layer's inputs and of its outputs (see `qcompress.measuring.ranges`), or None.
    """

    rows: Tensor
    target: Target
    moments: Tensor | None = None
    num_inputs: float = math.inf
    squares: Tensor | None = None
    ranges: Ranges | None = None
    _found: dict[Any, Any] = field(default_factory=dict, repr=False)
    _found_of_inputs: dict[Any, Any] = field(default_factory=dict, repr=False)

    def once(self, key: Any, find: Callable[[], Found]) -> Found:
        """``find()``, run only the first time for a key: what several transforms need of one weight."""
        if key not in self._found:
            self._found[key] = find()
        value: Found = self._found[key]
        return value

    def once_of_inputs(self, key: Any, find: Callable[[], Found]) -> Found:
        """Find once what depends on the moments alone, shared by all blocks of a layer (see `once`)."""
        if key not in self._found_of_inputs:
            self._found_of_inputs[key] = find()
        value: Found = self._found_of_inputs[key]
        return value

    def block(self, rows: Tensor, target: Target, ranges: Ranges | None = None) -> "Weight":
        """Another weight with the same inputs."""
        known = self.moments, self.num_inputs, self.squares
        return Weight(rows, target, *known, ranges, _found_of_inputs=self._found_of_inputs)

    def exact(self) -> Tensor:
        """The rows on the CPU in float64.

        Raises:
            ModelError: one is not finite.
        """
        exact = self.rows.detach().cpu().double()
        if not bool(torch.isfinite(exact).all()):
            raise ModelError("the weight holds NaN or infinity")
        return exact

    def relative_error(self, approximation: Tensor) -> float:
        """Squared error of an approximation relative to the weight's own square.

        With moments it is the error of the layer's output, ``E‖(W - W')x‖²`` relative to ``E‖Wx‖²``; with the mean
        squares of the inputs alone, the same for inputs that are independent of each other.
        """
        wide = torch.promote_types(self.rows.dtype, torch.float32)
        rows = self.once("wide", lambda: self.rows.detach().cpu().to(wide))
        whole = self.once("energy", lambda: self._energy(rows))
        lost = self._energy(rows - approximation.cpu().to(wide))
        return lost / whole if whole else float(lost > 0)

    def _energy(self, rows: Tensor) -> float:
        if self.moments is None and self.squares is not None:
            return float((rows.square() @ self.squares.cpu().to(rows)).sum(dtype=torch.float64))
        if self.moments is None:
            return float(torch.linalg.vector_norm(rows, dtype=torch.float64) ** 2)
        if self.moments.ndim == 1:
            return float((self.moments[:, None] * rows.square()).sum())
        narrow = rows.to(self.moments.dtype)
        if self.moments.ndim == 3:
            narrow = narrow.view(len(self.moments), -1, narrow.shape[1])
        return max(float((narrow @ self.moments * narrow).sum()), 0.0)


def moments_missing(label: str) -> str:
    """What to say where an option is asked of a weight without the moments that it needs."""
    return (
        f"{label!r} needs the second moments of the layer's input: measure() collects them, and the Measurement that "
        "it gives keeps them for apply()"
    )


@dataclass(frozen=True)
class Offer(ABC):
    """What is on offer for every weight. Subclasses are frozen dataclasses whose fields are plain values or offers."""

    kind: ClassVar[str]

    @property
    @abstractmethod
    def label(self) -> str:
        """Short name, unique among the options of a group, as ``"4 bits, 50 % sparse"``."""

    @abstractmethod
    def resolve(self, weight: Weight) -> "Transform | None":
        """The transform of this weight, or None where it does not fit or saves nothing."""

    @abstractmethod
    def least_use(self, target: Target) -> tuple[float, float] | None:
        """Bytes and macs that it takes at least, whatever the numbers of the weight; None where it does not fit."""

    def needs_moments(self, target: Target) -> bool:  # noqa: ARG002
        """Whether it takes the moments of the layer's input to fit there."""
        return False

    @property
    def uncalibrated(self) -> "Offer":
        """The same without the moments of the layer's input."""
        return self

    def needs_squares(self, target: Target) -> bool:  # noqa: ARG002
        """Whether it takes the mean squares of the layer's input columns into account there."""
        return False

    def needs_ranges(self, target: Target) -> bool:  # noqa: ARG002
        """Whether it takes the ranges of the layer's activations to fit there."""
        return False

    def to_json(self) -> dict[str, Any]:
        """The offer as plain JSON, with its kind."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"kind": self.kind, **{name: _plain(value) for name, value in values.items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, Offer):
        return value.to_json()
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Transform(Offer):
    """One way to store a weight. Subclasses are frozen dataclasses."""

    @abstractmethod
    def why_not(self, target: Target) -> str:
        """Why the transform does not fit or saves nothing there, or an empty string."""

    def resolve(self, weight: Weight) -> "Transform | None":
        """Itself, where it fits."""
        return None if self.why_not(weight.target) else self

    def least_use(self, target: Target) -> tuple[float, float] | None:
        """Its bytes and macs."""
        return None if self.why_not(target) else (self.size_bytes(target), self.macs(target))

    @abstractmethod
    def size_bytes(self, target: Target) -> int:
        """Bytes of everything that is written: codes, scales, masks."""

    def macs(self, target: Target) -> float:
        """Multiply-accumulates per sample afterwards."""
        return target.macs

    @property
    def activations(self) -> Activations | None:
        """How the layer's inputs and outputs are rounded when it runs, or None."""
        return None

    @property
    def nearest(self) -> "Transform":
        """The same without compensation: how to store weights that were trained as what they are stored as."""
        return self

    @property
    def uncalibrated(self) -> "Offer":
        """The same without the moments of the layer's input."""
        return self.nearest

    @abstractmethod
    def encode(self, weight: Weight) -> dict[str, Tensor]:
        """The arrays to write for ``weight``, by a short name each."""

    @abstractmethod
    def decode(self, stored: dict[str, Tensor], target: Target) -> Tensor:
        """The rows again, ``(channels, per_channel)`` in the target's dtype."""

    def factors(self, stored: dict[str, Tensor], target: Target) -> dict[str, Tensor]:  # noqa: ARG002
        """Weights (as rows) of the smaller layers in the layer's place, or {} when it stays and its weight changes."""
        return {}

    def factor_targets(self, target: Target) -> dict[str, Target]:  # noqa: ARG002
        """What `factors` gives there, without the numbers."""
        return {}

    def approximate(self, weight: Weight) -> Tensor:
        """What the rows become, in the target's dtype."""
        return self.decode(self.encode(weight), weight.target)


@dataclass(frozen=True)
class Keep(Transform):
    """Leave the weight as it is."""

    kind: ClassVar[str] = "keep"

    @property
    def label(self) -> str:
        """The option's name."""
        return "keep"

    def why_not(self, target: Target) -> str:  # noqa: ARG002
        """It always fits."""
        return ""

    def size_bytes(self, target: Target) -> int:
        """The dense weight in its own dtype."""
        return target.dense_bytes

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        """The rows themselves."""
        return {"rows": weight.rows.detach().to(weight.target.dtype).contiguous().clone()}

    def decode(self, stored: dict[str, Tensor], target: Target) -> Tensor:  # noqa: ARG002
        """The rows themselves."""
        return stored["rows"]
