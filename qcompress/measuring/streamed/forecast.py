"""Forecast of the memory that a streamed measurement needs, made before it starts.

The peak consists of what the process and the model outside its blocks already use, the weights of one block, and either
the encoding of a layer's options or one sample's pass with a layer's gradient. The constants are bytes per weight,
measured (`benchmarks.streaming`), of the encoders' working arrays.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qcompress.budgets import MEMORY, parse
from qcompress.errors import OptionsError
from qcompress.measuring.inputs.moments import forecast_bytes
from qcompress.model.parts import Part
from qcompress.options import Options
from qcompress.transforms.base import Transform

ENCODING, COMPENSATING, PASSING = 36, 80, 16
COMPILING = 300_000_000  # code that is compiled on first use
SHOWN = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitForecast:
    """Peak memory of a unit in bytes, in addition to the process.

    Attributes:
        name: name of the block, or a description of the unit.
        weights: bytes of its weights.
        options: bytes of all its options in stored form, of the moments that they are fitted to, and of other units'
            options that are held at the same time.
        working: the largest temporary allocation.
        at_least: whether it may be larger.
    """

    name: str
    weights: int
    options: int
    working: int
    at_least: bool = False

    @property
    def total(self) -> int:
        """Sum of all."""
        return self.weights + self.options + self.working


def forecast_of(
    name: str, weights: int, parts: Sequence[Part], options: Mapping[str, Options], passing: int, beside: int = 0
) -> UnitForecast:
    """Forecast the memory of a unit with the given parts.

    Args:
        name: name of the unit.
        weights: bytes of its weights.
        parts: its parts.
        options: options on offer, by part name.
        passing: bytes of one sample's pass through the unit, without gradients of weights.
        beside: bytes of options of other units that are held at the same time.
    """
    calibrated = [part for part in parts if options[part.name].need_moments(part.target)]
    names = {part.name for part in calibrated}
    encoding = [
        part.target.num_weights * (COMPENSATING if part.name in names else ENCODING)
        + (24 * part.target.per_channel**2 if part.name in names and part.target.common_input else 0)
        for part in parts
    ]
    largest = max((part.target.num_weights for part in parts), default=0)
    return UnitForecast(
        name=name,
        weights=weights,
        options=stored_bytes(parts, options) + sum(forecast_bytes(calibrated).values()) + beside,
        working=max(max(encoding, default=0), passing + PASSING * largest),
    )


def stored_bytes(parts: Sequence[Part], options: Mapping[str, Options]) -> int:
    """Return the bytes of all options of parts in stored form."""
    return sum(
        offer.size_bytes(part.target) if isinstance(offer, Transform) else part.target.dense_bytes
        for part in parts
        for offer in options[part.name].offers
    )


def needed_bytes(base: int, units: Sequence[UnitForecast]) -> int:
    """Return the memory that a process with ``base`` bytes in use needs for the largest of the units."""
    return base + COMPILING + max(unit.total for unit in units)


def room_left(memory: int | None, base: int, units: Sequence[UnitForecast], most: int) -> int:
    """Return the number of bytes that may be used to decode and multiply once for several samples.

    Args:
        memory: limit of the process's memory in bytes, or None.
        base: bytes that the process uses already.
        units: forecasts of the model's units.
        most: number of bytes beyond which more is of no use.

    Raises:
        OptionsError: even the largest unit does not fit; the message says how much is needed.
    """
    if memory is None:
        return most
    largest = max(units, key=lambda unit: unit.total)
    needed = needed_bytes(base, units)
    if needed > memory:
        uses = {
            "weights": largest.weights,
            "options": largest.options,
            "encoding them, or one sample's pass": largest.working,
        }
        listed = ", ".join(f"{_shown(use)} for {what}" for what, use in uses.items() if use)
        how = "more than" if any(unit.at_least for unit in units) else "about"
        raise OptionsError(
            f"memory={_shown(memory)} was given, but {how} {_shown(needed)} are needed: the process and what it holds "
            f"all the time use {_shown(base + COMPILING)}, and {largest.name} needs {listed}; give more memory, enable "
            "fewer options, or use shorter samples"
        )
    return min(most, memory - needed)


def as_bytes(memory: int | str | None) -> int | None:
    """Convert the ``memory`` argument of `measure` to bytes.

    Raises:
        OptionsError: it is not an amount of memory, or text without a unit.

    >>> as_bytes("4 GB"), as_bytes(1_000_000)
    (4000000000, 1000000)
    """
    if memory is None:
        return None
    wanted = f"memory must be an amount with its unit, such as '4 GB', or a number of bytes, found {memory!r}"
    try:
        limit = parse(MEMORY, memory)
    except OptionsError as error:
        raise OptionsError(wanted) from error
    if limit.is_share or (isinstance(memory, str) and not any(map(str.isalpha, memory.lower().replace("e", "")))):
        raise OptionsError(wanted)
    return int(limit.value)


def _shown(memory: int) -> str:
    """Return the memory in words.

    >>> _shown(46_100), _shown(938_000_000), _shown(16_500_000_000)
    ('46,100 bytes', '938 MB', '16.5 GB')
    """
    if memory < SHOWN / 1000:
        return f"{memory:,} bytes"
    return f"{memory / 1e6:.3g} MB" if memory < SHOWN else f"{memory / SHOWN:.3g} GB"


def resident_bytes() -> int:
    """Return the resident memory of the process as reported by Linux; 0 on other systems."""
    file = Path("/proc/self/status")
    if not file.exists():
        return 0
    lines = (line.split() for line in file.read_text().splitlines())
    return next((1024 * int(words[1]) for words in lines if words[0] == "VmRSS:"), 0)
