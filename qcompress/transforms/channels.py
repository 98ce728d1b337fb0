"""Removal of coupled channels: an offer says how many channels stay, a resolved option says which ones go.

A resolved option may also hold the codes of layers whose size depends on the channels of the set (`Jointly`).
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from qcompress.errors import OptionsError
from qcompress.transforms.base import Keep, Offer, Target, Transform, Weight

SCORES = ("obs", "fisher", "l1")
"""The scores that rank the channels for removal; see `qcompress.prune_channels`."""


@dataclass(frozen=True)
class KeepChannels(Offer):
    """Keep a share of the channels of every coupled set.

    Attributes:
        keep: share of the channels that stays, below 1; 0 removes whole sets where the network works without them.
        granularity: number of channels removed together; the number that stays is a multiple of it if the set is large
            enough.
        scores: one of `SCORES`.
        reconstructed: whether the remaining weights are refitted to compensate for the removal on the calibration data.
    """

    kind: ClassVar[str] = "keep_channels"
    keep: float
    granularity: int = 1
    scores: str = "obs"
    reconstructed: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not isinstance(self.keep, (int, float)) or not 0 <= self.keep < 1:
            raise OptionsError(f"keep must hold shares from 0 and below 1, found {self.keep!r}")
        if type(self.granularity) is not int or self.granularity < 1:
            raise OptionsError(f"granularity must be a number of channels of at least 1, found {self.granularity!r}")
        if self.scores not in SCORES:
            raise OptionsError(f"scores must be one of {', '.join(SCORES)}, found {self.scores!r}")
        if not isinstance(self.reconstructed, bool):
            raise OptionsError(f"reconstructed must be True or False, found {self.reconstructed!r}")

    @property
    def label(self) -> str:
        """Short name, such as ``"50 % of the channels"``."""
        return f"{100 * self.keep:g} % of the channels"

    def kept(self, units: int) -> int:
        """Return the number of units that stay, out of ``units``."""
        if not self.keep:
            return 0
        blocks = math.floor(self.keep * units / self.granularity + 0.5)
        return min(max(blocks, 1) * self.granularity, units)

    def resolve(self, weight: Weight) -> Transform | None:  # noqa: ARG002
        """Return None: a single weight has no channels that could be removed."""
        return None

    def least_use(self, target: Target) -> tuple[int, float] | None:  # noqa: ARG002
        """Return None: a single weight does not determine it."""
        return None


class _OfSet(Transform):
    """A transform of a whole coupled set: the weights of its layers are cut, stored and counted elsewhere."""

    def size_bytes(self, target: Target) -> int:  # noqa: ARG002
        """Return 0: the bytes are counted elsewhere."""
        return 0

    def encode(self, weight: Weight) -> dict[str, Tensor]:
        """Return the rows unchanged, as `Keep` does."""
        return Keep().encode(weight)

    def decode(self, stored: dict[str, Tensor], target: Target) -> Tensor:
        """Undo `encode`."""
        return Keep().decode(stored, target)


@dataclass(frozen=True)
class RemoveChannels(_OfSet):
    """Remove some units of a coupled set from the network.

    Attributes:
        units: number of units in the set.
        removed: indices of the units that are removed.
        reconstructed: whether the weights that read the set are refitted to compensate for the removal.
    """

    kind: ClassVar[str] = "remove_channels"
    units: int
    removed: tuple[int, ...]
    reconstructed: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "removed", tuple(self.removed))

    @property
    def label(self) -> str:
        """Short name, such as ``"12 of 16 channels"``."""
        return f"{self.units - len(self.removed)} of {self.units} channels"

    def why_not(self, target: Target) -> str:  # noqa: ARG002
        """Return a reason: the transform changes no weight by itself."""
        return "it removes channels of several layers and stores no weight"

    def to_json(self) -> dict[str, Any]:
        """Return the transform as plain JSON, with its kind."""
        return {
            "kind": self.kind, "units": self.units, "removed": list(self.removed), "reconstructed": self.reconstructed
        }  # fmt: skip


@dataclass(frozen=True)
class Jointly(_OfSet):
    """The units of a coupled set that stay, and how layers along the set are stored.

    Attributes:
        removal: `Keep`, or `RemoveChannels`.
        layers: names of layers.
        codes: transform of each of these layers.
    """

    kind: ClassVar[str] = "jointly"
    removal: Transform
    layers: tuple[str, ...]
    codes: tuple[Transform, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "codes", tuple(self.codes))
        if len(self.layers) != len(self.codes):
            raise OptionsError(f"{len(self.layers)} layers need as many transforms, found {len(self.codes)}")

    @property
    def label(self) -> str:
        """Short name, such as ``"12 of 16 channels; conv1: 4 bits"``."""
        pairs = zip(self.layers, self.codes, strict=True)
        coded = [f"{name}: {codes.label}" for name, codes in pairs if codes != Keep()]
        return "; ".join([*([] if self.removal == Keep() else [self.removal.label]), *coded]) or Keep().label

    @property
    def nearest(self) -> "Jointly":
        """The same with codes rounded to nearest."""
        return Jointly(self.removal, self.layers, tuple(codes.nearest for codes in self.codes))

    def why_not(self, target: Target) -> str:  # noqa: ARG002
        """Return a reason: the transform changes several layers."""
        return "it removes channels of several layers and stores several weights"
