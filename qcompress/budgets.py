"""Budgets: convert numbers and text such as ``{"bytes": "15%", "latency_s": "0.5 s"}`` to a measurement's units.

A number up to 1 is a share of the original, a number above 1 an amount. Text is explicit: ``"15%"`` is a share,
``"0.5 s"`` an amount. A plain number for ``bits_per_weight`` is never a share: it is the number of bits of all weights
that have a choice, scales and zero points included, divided by the number of these weights.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formulations import Problem
from formulations.formatting import amount
from qcompress.errors import OptionsError
from qcompress.measurement import Measurement
from qcompress.model.parts import Survey
from qcompress.model.weights import Skipped
from qcompress.scalars import as_number

BITS_PER_WEIGHT = "bits_per_weight"
FILE_BYTES = "file_bytes"  # size of the whole file, in the package's format or an engine's
LATENCY = "latency_s"
FRACTIONAL = (LATENCY, BITS_PER_WEIGHT)  # a share of these need not be a whole number
LOSS = "loss"  # not a resource: the limit on the loss when a resource is minimized
MEMORY = "memory"  # not a resource: bytes for the weights, keys and values of a language model (see `memory_budget`)
KNOWN = ("bytes", "macs", LATENCY, BITS_PER_WEIGHT, FILE_BYTES)
"""Resources known to `qcompress.measure`, `qcompress.time_options` and this module."""

_SIZES = {
    "B": 1, "bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
_UNITS: Mapping[str, Mapping[str, float]] = {
    "bytes": _SIZES,
    FILE_BYTES: _SIZES,
    MEMORY: _SIZES,
    "macs": {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12},
    LATENCY: {"s": 1, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6},
    BITS_PER_WEIGHT: {"bit": 1, "bits": 1},
    LOSS: {"nats": 1},
}
_HINTS = {
    LATENCY: "; `time_options` measures it",
    FILE_BYTES: "; `compress` works it out from the model",
    LOSS: "; a limit on the loss needs a resource to minimize: compress(minimize='bytes', budget={'loss': 0.02}), or "
    "'qcompress compress --minimize bytes --budget loss=0.02'",
    MEMORY: "; `memory_budget` works out what it leaves for file_bytes, as 'qcompress compress' does with --context",
}
_LOWERED_BY = {
    "macs": ": fewer bits do not, low-rank factors (low_rank, --low-rank) and removed channels (prune_channels, "
    "--channels) do"
}
ROUNDING = 1e-9  # relative; sums of whole numbers per sample
_WORDS = re.compile(r"\s*([+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(%|[^\W\d_]*)\s*")


@dataclass(frozen=True, slots=True)
class Limit:
    """One budget: a share of the original's use, or an amount."""

    value: float
    is_share: bool

    def amount(self, original: float, *, whole: bool = True) -> float:
        """Return the maximum use; a share of a resource that comes in ``whole`` numbers is rounded down to one."""
        if not self.is_share:
            return self.value
        if whole and float(original).is_integer():
            return float(math.floor(Fraction(repr(self.value)) * int(original)))  # 0.29 of 100 is 29
        return self.value * original


Amount = float | str | Limit
"""A budget as given by the user: a number, or text such as ``"15%"`` and ``"120 kB"``; or a `Limit`, which is
unambiguous whatever its size: computed budgets are passed on in this form."""


def parse(resource: str, asked: Amount) -> Limit:
    """Return the limit that a number or text asks for; a limit is returned unchanged.

    Raises:
        OptionsError: the value is not positive, or the resource does not have this unit.

    >>> parse("bytes", "120 kB"), parse("bytes", "15%"), parse("latency_s", "250 ms")
    (Limit(value=120000.0, is_share=False), Limit(value=0.15, is_share=True), Limit(value=0.25, is_share=False))
    >>> parse("bytes", 0.15), parse("bytes", 120_000), parse("bits_per_weight", 1)
    (Limit(value=0.15, is_share=True), Limit(value=120000.0, is_share=False), Limit(value=1.0, is_share=False))
    """
    if isinstance(asked, Limit):
        return asked
    name, wanted = f"the budget for {'the loss' if resource == LOSS else resource}", _wanted(resource)
    words = _WORDS.fullmatch(asked) if isinstance(asked, str) else None
    if isinstance(asked, str) and words is None:
        raise OptionsError(f"{name} must be {wanted}, found {asked!r}")
    value = as_number(asked if words is None else float(words[1]), name, above=0, wanted=wanted)
    unit = "" if words is None else words[2]
    if not unit:
        return _limit(resource, value)
    if unit == "%" and resource != LOSS:
        return Limit(float(Fraction(repr(value)) / 100), is_share=True)
    units = _UNITS.get(resource, {})
    if unit not in units:
        known = ", ".join([*(() if resource == LOSS else "%"), *units])
        hint = "; kB is 1,000 bytes, KiB 1,024" if unit.lower() in ("k", "kb", "kib") and "kB" in units else ""
        raise OptionsError(f"{name} has no unit {unit!r}; known: {known}{hint}")
    return Limit(value * units[unit], is_share=False)


def require_known(budget: Mapping[str, Amount], resources: Collection[str] = KNOWN) -> None:
    """Check budgets as far as this is possible without a measurement.

    Raises:
        OptionsError: there is no budget, a resource or unit is unknown, or a value is not positive.
    """
    _require_mapping(budget)
    if not budget:
        raise OptionsError(f"give at least one budget, as {{'bytes': 0.25}}; measured are: {', '.join(resources)}")
    for name, asked in budget.items():
        if name not in resources:
            hint = _HINTS.get(name, "")
            raise OptionsError(f"no resource is called {name!r}; measured are: {', '.join(resources)}{hint}")
        parse(name, asked)


def _require_mapping(budget: object) -> None:
    if not isinstance(budget, Mapping):
        raise OptionsError(f"budgets are a mapping such as {{'bytes': '15%'}}, found {budget!r}")


def split_loss(
    budget: Mapping[str, Amount], minimize: str | None, measured: str = "kl"
) -> tuple[dict[str, Amount], float | None]:
    """Split the budgets into those of resources and the limit on the loss ``measured``.

    The resource to minimize gets a budget of 100 % of the original.

    Raises:
        OptionsError: there is a limit on the loss but no resource to minimize, or the other way round; or the limit has
            a unit that this loss does not have.

    >>> split_loss({"loss": 0.02, "macs": "50%"}, "bytes")
    ({'bytes': '100%', 'macs': '50%'}, 0.02)
    >>> split_loss({"loss": "2e-2 nats"}, "bytes")
    ({'bytes': '100%'}, 0.02)
    """
    _require_mapping(budget)
    if minimize is not None and not isinstance(minimize, str):
        raise OptionsError(f"minimize must be the name of a resource, such as 'bytes', found {minimize!r}")
    others = {name: asked for name, asked in budget.items() if name != LOSS}
    if minimize is None:
        if LOSS in budget:
            raise OptionsError("a budget for the loss needs a resource to minimize, for example minimize='bytes'")
        return others, None
    if LOSS not in budget:
        raise OptionsError(
            f"minimize={minimize!r} needs a limit for the predicted loss, for example budget={{'loss': 0.02}}"
        )
    limit = parse(LOSS, budget[LOSS])
    if limit.is_share:
        raise OptionsError(f"the budget for the loss must be {_wanted(LOSS)}, found a share, {limit.value:g}")
    if isinstance(asked := budget[LOSS], str) and "nats" in asked and measured == "mse":
        raise OptionsError(f"the loss 'mse' is not in nats: give a number, {limit.value:g}")
    return {minimize: "100%", **others}, limit.value


def limits(measurement: Measurement, budget: Mapping[str, Amount]) -> dict[str, float]:
    """Resource → maximum use, in the measurement's unit.

    Args:
        measurement: measurement with every resource of the budget (see `with_resources`).
        budget: resource → number or text.

    Raises:
        OptionsError: same as in `require_known`.
    """
    require_known(budget, measurement.resources)
    return {
        name: parse(name, asked).amount(measurement.original[name], whole=name not in FRACTIONAL)
        for name, asked in budget.items()
    }


def loose(budgets: Mapping[str, float], original: Mapping[str, float]) -> list[str]:
    """Say which budgets the original meets already, which is legal; a sentence each.

    >>> loose({"bytes": 120.0, "macs": 50.0}, {"bytes": 100.0, "macs": 90.0})
    ['the budget for bytes is 120, which the original meets already with 100']
    >>> loose({"latency_s": 0.02}, {"latency_s": 0.01})
    ['the budget for latency_s is 20 ms, which the original meets already with 10 ms']
    """

    def stated(name: str, use: float) -> str:
        return f"{1000 * use:.4g} ms" if name == LATENCY else amount(use)

    return [
        f"the budget for {name} is {stated(name, limit)}, which the original meets already with "
        f"{stated(name, original[name])}"
        for name, limit in budgets.items()
        if name in original and limit >= original[name]
    ]


def with_resources(
    measurement: Measurement, names: Iterable[str], weight_bytes: NDArray[np.float64] | None = None
) -> Measurement:
    """Return the measurement with those of the named resources added that can be computed from it.

    Args:
        measurement: the measurement.
        names: names of resources.
        weight_bytes: ``(V,)`` bytes of the options' numbers in an engine's file, where they are not ``bytes``.

    >>> import torch
    >>> from qcompress import measure, prune_quantize
    >>> measurement = measure(torch.nn.Linear(64, 4), [torch.randn(32, 64)], prune_quantize(bits=(4,), sparsity=(0,)))
    >>> with_resources(measurement, ["bits_per_weight"]).resources["bits_per_weight"].tolist()  # a scale for 64 weights
    [32.0, 4.5]
    """
    if BITS_PER_WEIGHT in names and BITS_PER_WEIGHT not in measurement.resources:
        own = measurement.resources["bytes"] if weight_bytes is None else weight_bytes
        return _with_bits_per_weight(measurement, own)
    return measurement


def without_resources(measurement: Measurement, names: Iterable[str]) -> Measurement:
    """Return the measurement without the named resources; those that it lacks are ignored.

    >>> import torch
    >>> from qcompress import measure, prune_quantize
    >>> measurement = measure(torch.nn.Linear(64, 4), [torch.randn(32, 64)], prune_quantize(bits=(4,), sparsity=(0,)))
    >>> sorted(without_resources(measurement, ["macs", "latency_s"]).original)
    ['bytes']
    """
    dropped = set(names)

    def rest(values: Mapping[str, Any]) -> MappingProxyType[str, Any]:
        return MappingProxyType({name: value for name, value in values.items() if name not in dropped})

    return replace(
        measurement,
        resources=rest(measurement.resources),
        fixed=rest(measurement.fixed),
        original=rest(measurement.original),
        resource_pairs=rest(measurement.resource_pairs),
    )


def _with_bits_per_weight(measurement: Measurement, weight_bytes: NDArray[np.float64]) -> Measurement:
    """Add a resource: the bits of all weights that have a choice, divided by their number."""
    has_choice = np.array([len(options) > 1 for options in measurement.transforms])
    num_weights = sum(
        part.target.num_weights for part, counts in zip(measurement.parts, has_choice, strict=True) if counts
    )
    if not num_weights:
        raise OptionsError(f"no part has more than one option, so there is no {BITS_PER_WEIGHT} to choose")
    sizes = [len(options) for options in measurement.transforms]
    use = np.where(np.repeat(has_choice, sizes), 8.0 * weight_bytes / num_weights, 0.0)
    original = float(use[np.cumsum([0, *sizes[:-1]])].sum())  # option 0 leaves a part unchanged
    return replace(
        measurement,
        resources=MappingProxyType({**measurement.resources, BITS_PER_WEIGHT: use}),
        fixed=MappingProxyType({**measurement.fixed, BITS_PER_WEIGHT: 0.0}),
        original=MappingProxyType({**measurement.original, BITS_PER_WEIGHT: original}),
    )


def remedy(problem: Problem, budget: Mapping[str, Amount], original: Mapping[str, float]) -> str:
    """Say which budgets would be reachable, or that no option helps; empty if there is nothing to add.

    Args:
        problem: the problem with unreachable budgets.
        budget: resource → number or text, as asked.
        original: resource → use of the original.
    """
    hints, smallest = [], problem.minimum_usage()
    for name, asked in budget.items():
        limit = parse(name, asked)
        if name not in problem.budgets or smallest[name] <= problem.budgets[name] or not original[name]:
            continue
        if smallest[name] >= (1 - ROUNDING) * original[name]:
            hints.append(f"; no enabled option lowers {name}{_LOWERED_BY.get(name, '')}")
            continue
        share = math.ceil(100 * smallest[name] / original[name])
        if limit.is_share:
            hints.append(f"; {name} needs at least {share}%")
        elif share <= limit.value < 100 and name not in FRACTIONAL and _is_bare(asked):
            hints.append(f"; if a share of the original was meant, write '{limit.value:g}%'")
    return "".join(hints)


def _is_bare(asked: Amount) -> bool:
    """Whether an amount is a number without a unit, which may have been meant as a percentage."""
    if isinstance(asked, str):
        words = _WORDS.fullmatch(asked)
        return words is not None and not words[2]
    return not isinstance(asked, Limit)


def fixed_use(problem: Problem, measurement: Measurement | Survey, kept: Sequence[Skipped] = (), most: int = 5) -> str:
    """Describe what takes bytes whatever is chosen, largest first; empty if the budget for bytes is reachable.

    Args:
        problem: the problem with unreachable budgets.
        measurement: where the problem comes from.
        kept: its parts that have no choice.
        most: maximum number of layers to name.
    """
    smallest = problem.minimum_usage()
    if not any(
        smallest[name] > problem.budgets.get(name, math.inf) for name in ("bytes", FILE_BYTES) if name in smallest
    ):
        return ""
    whole = measurement.fixed["bytes"] + sum(item.size_bytes for item in kept)
    layers = sorted([*measurement.skipped, *kept], key=lambda item: -item.size_bytes)
    named = [
        f"{f'part {item.name!r}' if item.name else 'the model itself'}: {item.size_bytes:,} bytes ({item.reason})"
        for item in layers[:most]
    ]
    rest = whole - sum(item.size_bytes for item in layers[:most])
    if rest > 0:
        named.append(f"everything else, such as biases and buffers: {rest:,.0f} bytes")
    words = f": {'; '.join(named)}" if named else ""
    return f". Of the model's {measurement.original['bytes']:,.0f} bytes, {whole:,.0f} are fixed{words}"


def not_lowered(
    problem: Problem, measurement: Measurement | Survey, kept: Sequence[Skipped] = (), most: int = 5
) -> str:
    """Describe the parts of which no option lowers a resource whose budget is unreachable; empty without such parts.

    Args:
        problem: the problem with unreachable budgets; the first option of each group leaves it unchanged.
        measurement: where the problem comes from.
        kept: its parts that have no choice, whose bytes `fixed_use` names already.
        most: maximum number of parts to name.
    """
    smallest, message, named = problem.minimum_usage(), "", {item.name for item in kept}
    kinds = {part.name: part.target.layer for part in measurement.parts}
    starts = problem.group_offsets
    for name, limit in problem.budgets.items():
        use = problem.resources[name]
        whole = float(use[starts[:-1]].sum()) + problem.fixed.get(name, 0.0)
        if smallest[name] <= limit or smallest[name] >= (1 - ROUNDING) * whole:  # the latter is what `remedy` says
            continue
        counted = kinds.keys() - (named if name in ("bytes", FILE_BYTES) else set())
        stuck = {
            group: use[first]
            for group, first, end in zip(problem.groups, starts[:-1], starts[1:], strict=True)
            if use[first] > 0 and use[first:end].min() >= (1 - ROUNDING) * use[first] and group in counted
        }
        if stuck:
            largest = sorted(stuck, key=lambda group: -stuck[group])
            listed = [f"{group!r} ({kinds[group]}) {stuck[group] / whole:.0%}" for group in largest[:most]]
            more = f" and {len(stuck) - most} more" if len(stuck) > most else ""
            message += (
                f". No option on offer lowers the {name} of {', '.join(listed)}{more}: together "
                f"{sum(stuck.values()) / whole:.0%} of the model's {name}"
            )
    return message


def _limit(resource: str, value: float) -> Limit:
    return Limit(value, is_share=value <= 1 and resource not in (BITS_PER_WEIGHT, LOSS))


def _wanted(resource: str) -> str:
    """Describe which values a budget may take."""
    if resource == BITS_PER_WEIGHT:
        return 'a positive number of bits (4.25) or a share of the original ("15%")'
    if resource == LOSS:
        return 'a number above 0, for "kl" in nats per sample (0.02, "0.02 nats")'
    units = [unit for unit in _UNITS.get(resource, ()) if unit not in ("B", "bytes")]
    example = f', "2 {units[0]}"' if units else ""
    return (
        f'a positive number (up to 1 a share of the original, above 1 an amount) or text with a unit ("15%"{example})'
    )
