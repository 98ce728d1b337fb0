"""A transform is one way to store a layer's weight in fewer bytes, as a frozen value that can be written as JSON.

It answers three questions about a weight: what the weight becomes (`approximate`), what it costs (`size_bytes`,
`macs`), and which arrays are written to disk (`encode`, `decode`). Invariants: ``decode(encode(w))`` equals
``approximate(w)`` bit for bit, and the arrays of ``encode`` take exactly ``size_bytes``.

A weight is seen as rows ``(channels, weights per channel)`` (see `qcompress.model.layers`), possibly a block of them.
An option that applies to all weights alike, such as "the rank that keeps 95 % of the energy", is an `Offer`: each
weight resolves it to a transform. A transform is its own offer.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from qcompress.errors import ModelError
from qcompress.transforms.activations import Activations
from qcompress.transforms.column_blocks import times

Found = TypeVar("Found")
Ranges = tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """How an ungrouped Conv2d scans its input; positions are counted per sample, over all calls.

    Attributes:
        kernel: height and width of the kernel.
        inputs: positions of the input, height times width.
        halfway: output height times input width.
    """

    kernel: tuple[int, int]
    inputs: float
    halfway: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The description of a weight's rows, without the numbers.

    Attributes:
        layer: type of the layer, such as ``"Linear"`` or ``"Conv2d"``; of another module also the parameter's name.
        channels, per_channel: shape of the rows.
        dtype: dtype of the weight.
        macs: multiply-accumulates per sample through these rows when dense.
        whole: whether the rows are all rows of the layer.
        replaceable: whether the layer can be replaced by other layers (it is called as a module, is not grouped, its
            weight is not shared with another module, and the network asks nothing else of it).
        window: the window of a replaceable Conv2d, else None.
        lookups: rows looked up per sample in a replaceable Embedding.
        common_input: whether all rows are multiplied with the same input, so that `measure` can collect its second
            moments (a Linear layer or an ungrouped convolution).
        input_groups: number of groups of rows that have different inputs (grouped convolutions), else 1.
        head: whether the weight is shared by an Embedding and Linear layers (tied weights) whose inputs are known.
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
        """Number of weights in the rows."""
        return self.channels * self.per_channel

    @property
    def owner(self) -> str:
        """Type of the module that holds the weight."""
        return self.layer.partition(".")[0]

    @property
    def dense_bytes(self) -> int:
        """Bytes of the uncompressed rows."""
        return self.num_weights * self.dtype.itemsize

    def of_shape(self, channels: int, per_channel: int, input_groups: int = 1) -> "Target":
        """Return the target of the layer with another shape of its rows."""
        macs = self.macs * channels * per_channel / self.num_weights
        return replace(self, channels=channels, per_channel=per_channel, macs=macs, input_groups=input_groups)


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A weight as a transform sees it: its numbers, its description and, where calibrated, statistics of its inputs.

    Attributes:
        rows: ``(channels, per_channel)``, any float dtype, any strides, any device.
        target: description of the rows.
        moments: ``(per_channel, per_channel)`` second moments ``E[x xᵀ]`` of the layer's (unfolded) input, or None. For
            an Embedding, whose inputs are unit vectors, the diagonal: ``(channels,)`` frequencies of the words. For a
            grouped convolution one matrix for each group, ``(input_groups, per_channel, per_channel)``. For another
            layer of three dimensions: blocks of columns (`qcompress.transforms.column_blocks`).
        num_inputs: number of inputs that the moments are averaged over.
        squares: ``(per_channel,)`` mean square of each input column of the layer, or None.
        ranges: ``(low, high)`` of the layer's inputs and of its outputs (see `qcompress.measuring.inputs.ranges`), or
            None.
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
        """Return ``find()``, computed only once per key; caches what several transforms need of one weight."""
        if key not in self._found:
            self._found[key] = find()
        value: Found = self._found[key]
        return value

    def once_of_inputs(self, key: Any, find: Callable[[], Found]) -> Found:
        """Like `once`, for results that depend on the moments alone; shared by all blocks of a layer."""
        if key not in self._found_of_inputs:
            self._found_of_inputs[key] = find()
        value: Found = self._found_of_inputs[key]
        return value

    def block(self, rows: Tensor, target: Target, ranges: Ranges | None = None) -> "Weight":
        """Return another weight with the same inputs."""
        known = self.moments, self.num_inputs, self.squares
        return Weight(rows, target, *known, ranges, _found_of_inputs=self._found_of_inputs)

    def exact(self) -> Tensor:
        """Return the rows on the CPU in float64.

        Raises:
            ModelError: a number is not finite.
        """
        exact = self.rows.detach().cpu().double()
        if not bool(torch.isfinite(exact).all()):
            raise ModelError("the weight holds NaN or infinity")
        return exact

    def relative_error(self, approximation: Tensor) -> float:
        """Return the squared error of an approximation relative to the squared norm of the weight.

        With moments it is the error of the layer's output, ``E‖(W - W')x‖²`` relative to ``E‖Wx‖²``. With only the mean
        squares of the inputs, it is the same for uncorrelated inputs.
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
        if self.moments.ndim == 3 and not self.has_blocks:
            narrow = narrow.view(len(self.moments), -1, narrow.shape[1])
            return max(float((narrow @ self.moments * narrow).sum()), 0.0)
        return max(float((times(narrow, self.moments) * narrow).sum()), 0.0)

    @property
    def has_blocks(self) -> bool:
        """Whether the moments are those of blocks of columns."""
        return self.moments is not None and self.moments.ndim == 3 and self.target.input_groups == 1


def moments_missing(label: str) -> str:
    """Return the error message for an option that needs moments which the weight does not have."""
    return (
        f"{label!r} needs the second moments of the layer's input: measure() collects them, and the Measurement it "
        "returns keeps them for apply()"
    )


@dataclass(frozen=True)
class Offer(ABC):
    """An option that is offered for every weight. Subclasses are frozen dataclasses of plain values or offers."""

    kind: ClassVar[str]

    @property
    @abstractmethod
    def label(self) -> str:
        """Short name, unique among the options of a group, such as ``"4 bits, 50 % sparse"``."""

    @abstractmethod
    def resolve(self, weight: Weight) -> "Transform | None":
        """Return the transform for this weight, or None where it does not fit or saves nothing."""

    @abstractmethod
    def least_use(self, target: Target) -> tuple[float, float] | None:
        """Return a lower bound on its bytes and macs for any numbers of the weight; None where it does not fit."""

    def unfit(self, target: Target) -> str:  # noqa: ARG002
        """Return why no weight of this shape can be stored so, whether that saves something or not; or ""."""
        return ""

    def by_shape(self, target: Target) -> bool:  # noqa: ARG002
        """Whether the sizes of what it resolves to follow from the shape of the weight."""
        return isinstance(self, Transform)

    def needs_moments(self, target: Target) -> bool:  # noqa: ARG002
        """Whether the option needs the second moments of the layer's input."""
        return False

    def takes_blocks(self, target: Target) -> bool:
        """Whether moments in blocks of columns are enough for a layer with too many inputs for one matrix."""
        return not self.needs_moments(target)

    @property
    def uncalibrated(self) -> "Offer":
        """The option without second moments of the layer's input."""
        return self

    def needs_squares(self, target: Target) -> bool:  # noqa: ARG002
        """Whether the option uses the mean squares of the layer's input columns."""
        return False

    def needs_ranges(self, target: Target) -> bool:  # noqa: ARG002
        """Whether the option needs the ranges of the layer's activations."""
        return False

    def replaces_layer(self, target: Target) -> bool:  # noqa: ARG002
        """Whether a layer with this target would be replaced by smaller ones."""
        return False

    def to_json(self) -> dict[str, Any]:
        """Return the offer as plain JSON, with its kind."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"kind": self.kind, **{name: _plain(value) for name, value in values.items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, Offer):
        return value.to_json()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Transform(Offer):
    """One way to store a weight. Subclasses are frozen dataclasses.

    Attributes:
        decodes_anywhere: whether `decode` also takes arrays on an accelerator, and restores the rows there.
    """

    decodes_anywhere: ClassVar[bool] = False

    @abstractmethod
    def why_not(self, target: Target) -> str:
        """Return why the transform does not fit or saves nothing for this target, or an empty string."""

    def resolve(self, weight: Weight) -> "Transform | None":
        """Return itself where it fits, else None."""
        return None if self.why_not(weight.target) else self

    def least_use(self, target: Target) -> tuple[float, float] | None:
        """Its bytes and macs."""
        return None if self.why_not(target) else (self.size_bytes(target), self.macs(target))

    @abstractmethod
    def size_bytes(self, target: Target) -> int:
        """Return the bytes of everything that is written: codes, scales, masks."""

    def macs(self, target: Target) -> float:
        """Multiply-accumulates per sample after compression."""
        return target.macs

    @property
    def activations(self) -> Activations | None:
        """How the layer's inputs and outputs are rounded at run time, or None."""
        return None

    @property
    def nearest(self) -> "Transform":
        """The same transform without compensation; used for weights that were trained in their stored form."""
        return self

    @property
    def wider(self) -> "Transform":
        """What layers take in a uniform setting if this transform does not fit them; itself if there is nothing."""
        return self

    @property
    def uncalibrated(self) -> "Offer":
        """The same transform without the second moments of the layer's input."""
        return self.nearest

    @abstractmethod
    def encode(self, weight: Weight) -> dict[str, Tensor]:
        """Return the arrays to write for ``weight``, each under a short name."""

    @abstractmethod
    def decode(self, stored: dict[str, Tensor], target: Target) -> Tensor:
        """Restore the rows, ``(channels, per_channel)`` in the target's dtype."""

    def factors(self, stored: dict[str, Tensor], target: Target) -> dict[str, Tensor]:  # noqa: ARG002
        """Weights (as rows) of the smaller layers that replace the layer, or {} if the layer itself stays."""
        return {}

    def factor_targets(self, target: Target) -> dict[str, Target]:  # noqa: ARG002
        """Return the targets of what `factors` returns, without the numbers."""
        return {}

    def replaces_layer(self, target: Target) -> bool:
        """Whether the transform fits the target and has factors."""
        return not self.why_not(target) and bool(self.factor_targets(target))

    def approximate(self, weight: Weight) -> Tensor:
        """Return what the rows become, in the target's dtype."""
        return self.decode(self.encode(weight), weight.target)


@dataclass(frozen=True)
class Keep(Transform):
    """Leave the weight unchanged."""

    kind: ClassVar[str] = "keep"

    @property
    def label(self) -> str:
        """The option's name."""
        return "keep"

    def why_not(self, target: Target) -> str:  # noqa: ARG002
        """Return an empty string: it always fits."""
        return ""

    def size_bytes(self, target: Target) -> int:
        """Return the bytes of the dense weight in its own dtype."""
        return target.dense_bytes

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        """Return the rows themselves."""
        return {"rows": weight.rows.detach().to(weight.target.dtype).contiguous().clone()}

    def decode(self, stored: dict[str, Tensor], target: Target) -> Tensor:  # noqa: ARG002
        """Return the rows themselves."""
        return stored["rows"]
