"""Restrict a measurement to an engine: only options that it runs, with the bytes of its file as a resource."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import nn

from qcompress.budgets import FILE_BYTES, with_resources
from qcompress.engines.base import Engine
from qcompress.errors import EngineError
from qcompress.measurement import Measurement, has_choice
from qcompress.model.parts import Part
from qcompress.transforms.base import Transform

NOTHING_IN_COMMON = "the layers that the engine ties to it have no option in common with it"


def for_engine(
    engine: Engine, model: nn.Module, measurement: Measurement, example: Any = None, budget: Iterable[str] = ()
) -> Measurement:
    """Return the measurement with only the options that the engine runs, and their bytes in its file as ``file_bytes``.

    Parts that the engine ties keep only the options that all of them have, in the order of the first part.

    Args:
        engine: the engine that the choice is made for.
        model: the model that was measured.
        measurement: its measurement.
        example: a batch, for engines that trace the model.
        budget: names of resources that are added where they follow from the others, such as ``bits_per_weight`` of the
            file; see `qcompress.budgets.with_resources`.

    Raises:
        EngineError: the engine does not support the model, or none of the measured options except keeping all parts.
    """
    refused: dict[tuple[int, int], str] = {}
    while True:
        options = _restricted(engine, measurement, refused)
        _require_some(engine, measurement, options, refused)
        restricted = measurement.restricted(options)
        sizes = engine.sizes(model, measurement.parts, restricted.transforms, example)
        if not sizes.refused:
            break
        refused |= {(part, options[part][option]): why for (part, option), why in sizes.refused.items()}
    file_bytes = np.array([size for part_sizes in sizes.options for size in part_sizes], dtype=np.float64)
    whole = sizes.of([0] * len(options))
    restricted = replace(
        restricted,
        resources=MappingProxyType({**restricted.resources, FILE_BYTES: file_bytes}),
        fixed=MappingProxyType({**measurement.fixed, FILE_BYTES: float(sizes.overhead)}),
        original=MappingProxyType({**measurement.original, FILE_BYTES: float(whole)}),
        no_choice=MappingProxyType({**_no_choice(engine, measurement, options, refused), **measurement.no_choice}),
    )
    weights = None if sizes.weights is None else np.array([*itertools.chain(*sizes.weights)], dtype=np.float64)
    return with_resources(restricted, budget, weights)


def by_number(reasons: Mapping[str, str], most: int = 3) -> str:
    """Describe why parts are refused: each reason with the number of parts that it holds for, most frequent first.

    Args:
        reasons: name of a part → reason.
        most: maximum number of reasons.

    >>> by_number({"a": "not Conv1D", "b": "not Embedding", "c": "not Conv1D"})
    "not Conv1D (2 parts, such as 'a'); not Embedding ('b')"
    """
    names: dict[str, list[str]] = {}
    for name, why in reasons.items():
        names.setdefault(why, []).append(name)
    ranked = sorted(names.items(), key=lambda item: -len(item[1]))
    counted = (
        f"{why} ({f'{len(parts)} parts, such as ' if len(parts) > 1 else ''}{parts[0]!r})" for why, parts in ranked
    )
    return "; ".join([*islice(counted, most), *(["…"] if len(ranked) > most else [])])


def why_not(engine: Engine, part: Part, transforms: Iterable[Transform]) -> str:
    """Return the most frequent reason why the engine refuses a part with these transforms, or an empty string."""
    reasons = Counter(filter(None, (engine.refuse(part, transform) for transform in transforms)))
    return reasons.most_common(1)[0][0] if reasons else ""


def _no_choice(
    engine: Engine,
    measurement: Measurement,
    options: Sequence[Sequence[int]],
    refused: Mapping[tuple[int, int], str],
) -> dict[str, str]:
    """Name of each part that is left with only its original weight → why.

    For parts that had no choice before, it is the reason why the engine runs none of its own options there, if any.
    """
    reasons = {}
    offered = [offer for offer in engine.options().offers if isinstance(offer, Transform)]
    for index, (part, part_options) in enumerate(zip(measurement.parts, measurement.transforms, strict=True)):
        if has_choice([part_options[option] for option in options[index]]):
            continue
        why = why_not(engine, part, part_options if has_choice(part_options) else offered)
        why = why or next((why for (place, _), why in refused.items() if place == index), "")
        if why or has_choice(part_options):
            reasons[part.name] = why or NOTHING_IN_COMMON
    return reasons


def _require_some(
    engine: Engine, measurement: Measurement, options: Sequence[Sequence[int]], refused: Mapping[tuple[int, int], str]
) -> None:
    """Raise an error, with the reasons, if the engine runs none of the options except keeping all parts."""
    if any(len(kept) > 1 for kept in options):
        return
    why = by_number(_no_choice(engine, measurement, options, refused)) or "only 'keep' was on offer"
    raise EngineError(f"engine {engine.name!r} runs none of the measured options: {why}")


def _restricted(engine: Engine, measurement: Measurement, refused: Mapping[tuple[int, int], str]) -> list[list[int]]:
    """Return the remaining options of each part: legal ones and, for tied parts, those that all have."""
    options = [
        [
            option
            for option, transform in enumerate(part_options)
            if option == standing or not (engine.refuse(part, transform) or (index, option) in refused)
        ]
        for index, (part, part_options, standing) in enumerate(
            zip(measurement.parts, measurement.transforms, measurement.standing, strict=True)
        )
    ]
    place = {part.name: index for index, part in enumerate(measurement.parts)}
    for names in engine.ties(measurement.parts):
        members = [place[name] for name in names]
        common = _common([[measurement.transforms[index][option] for option in options[index]] for index in members])
        for index in members:
            part_options = measurement.transforms[index]
            options[index] = sorted((option for option in options[index] if part_options[option] in common),
                                    key=lambda option, part_options=part_options: common.index(part_options[option]))  # type: ignore[misc]  # fmt: skip
    return options


def _common(lists: Sequence[Sequence[Any]]) -> list[Any]:
    """Return the items that are in all lists, in the order of the first."""
    return [item for item in lists[0] if all(item in other for other in lists[1:])]
