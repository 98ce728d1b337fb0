"""How much memory a streamed measurement takes, said before it starts.

The most that is held at once: what the process and the model outside its blocks take already, one block's weights, and
on top of these either the working-out of a layer's options or one sample's pass with a layer's gradient. The constants
are bytes a weight, measured (`benchmarks.streaming`), of the working arrays of the encoders.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qcompress.budgets import parse
from qcompress.errors import OptionsError
from qcompress.measuring.moments import forecast_bytes
from qcompress.model.parts import Part
from qcompress.options import Options
from qcompress.transforms.base import Transform

ENCODING, COMPENSATING, PASSING = 36, 80, 16
COMPILING = 300_000_000  # what is compiled on first use
SHOWN = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitForecast:
    """Bytes that a unit takes at most, beside the process.

    Attributes:
        name: of the block, or what else it is.
        weights: of its own.
        options: all of them as they would be stored, with the moments that they are fitted to.
        working: the largest of what is held for a moment.
    """

    name: str
    weights: int
    options: int
    working: int

    @property
    def total(self) -> int:
        """All at once."""
        return self.weights + self.options + self.working


def forecast_of(
    name: str, weights: int, parts: Sequence[Part], options: Mapping[str, Options], passing: int
) -> UnitForecast:
    """What a unit with those parts takes.

    Args:
        name: of it.
        weights: bytes of its weights.
        parts: of it.
        options: on offer, by the name of a part.
        passing: bytes of one sample's pass through it, without gradients of weights.
    """
    calibrated = [part for part in parts if options[part.name].need_moments(part.target)]
    names = {part.name for part in calibrated}
    stored = sum(
        offer.size_bytes(part.target) if isinstance(offer, Transform) else part.target.dense_bytes
        for part in parts
        for offer in options[part.name].offers
    )
    encoding = [
        part.target.num_weights * (COMPENSATING if part.name in names else ENCODING)
        + (24 * part.target.per_channel**2 if part.name in names and part.target.common_input else 0)
        for part in parts
    ]
    largest = max((part.target.num_weights for part in parts), default=0)
    return UnitForecast(
        name=name,
        weights=weights,
        options=stored + sum(forecast_bytes(calibrated).values()),
        working=max(max(encoding, default=0), passing + PASSING * largest),
    )


def room_for_decoded(memory: int | None, base: int, units: Sequence[UnitForecast], most: int) -> int:
    """Bytes that decoded options may take beside everything else.

    Args:
        memory: the most that the process may hold, or None.
        base: what it holds already.
        units: of the model.
        most: what would be of use.

    Raises:
        OptionsError: not even the largest unit fits; says what would.
    """
    if memory is None:
        return most
    largest = max(units, key=lambda unit: unit.total)
    needed = base + COMPILING + largest.total
    if needed > memory:
        raise OptionsError(
            f"memory={memory / SHOWN:.3g} GB was given, but about {needed / SHOWN:.3g} GB are needed: the process and "
            f"everything outside the blocks hold {(base + COMPILING) / SHOWN:.3g}, {largest.name} takes "
            f"{largest.weights / SHOWN:.3g} for weights, {largest.options / SHOWN:.3g} for its options and "
            f"{largest.working / SHOWN:.3g} to work them out; give more memory, enable fewer options, or use "
            "shorter samples"
        )
    return min(most, memory - needed)


def as_bytes(memory: int | str | None) -> int | None:
    """The bytes that ``memory`` of `measure` stands for.

    Raises:
        OptionsError: no amount.

    >>> as_bytes("4 GB"), as_bytes(1_000_000)
    (4000000000, 1000000)
    """
    if memory is None:
        return None
    limit = parse("bytes", memory)
    if limit.is_share:
        raise OptionsError(f"memory must be an amount, such as '4 GB', found {memory!r}")
    return int(limit.value)


def resident_bytes() -> int:
    """What the process holds, as Linux tells it; 0 elsewhere."""
    file = Path("/proc/self/status")
    if not file.exists():
        return 0
    lines = (line.split() for line in file.read_text().splitlines())
    return next((1024 * int(words[1]) for words in lines if words[0] == "VmRSS:"), 0)
