"""Uniform settings: choices in which all parts have the same option, as far as each part has it."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from qcompress.measurement import Measurement
from qcompress.transforms.base import Keep, Target, Transform
from qcompress.transforms.channels import Jointly, RemoveChannels

UNIFORM = "uniform: "
"""Beginning of the names of choices with the same setting for all parts."""


def settings_of(measurement: Measurement) -> dict[str, NDArray[np.int64]]:
    """Name → ``(parts,)`` choice for every setting, whatever it uses.

    Of codes, a part without the setting takes the one it rounds to nearest with, or the wider one, or else the smallest
    of its options that is not smaller. Where channels can be removed, a setting is a share of them that stays, and
    codes: every part takes the option with the fewest layers in other codes and, of these, with the closest share.
    """
    return dict(_with_channels(measurement) if measurement.sets else _of_codes(measurement))


def _of_codes(measurement: Measurement) -> Iterator[tuple[str, NDArray[np.int64]]]:
    exact: list[dict[str, int]] = []
    close: list[dict[str, int]] = []
    for options in measurement.transforms:
        exact.append({transform.label: index for index, transform in reversed(list(enumerate(options)))})
        close.append({transform.nearest.label: index for index, transform in reversed(list(enumerate(options)))})
    parts = list(zip(measurement.parts, measurement.transforms, exact, close, strict=True))
    settings = {option.label: option for options in measurement.transforms for option in options}
    for label, setting in settings.items():
        choice = []
        for part, options, numbers, rounded in parts:
            named = (numbers.get(label), rounded.get(setting.nearest.label), numbers.get(setting.wider.label))
            found = [option for option in named if option is not None]
            choice.append(found[0] if found else _not_smaller(setting, part.target, options))
        yield f"{UNIFORM}{label}", np.array(choice)


def _not_smaller(setting: Transform, target: Target, options: Sequence[Transform]) -> int:
    """Return the smallest option of a part with at least the bytes of a setting that it does not have."""
    if isinstance(setting, Keep) or setting.why_not(target):
        return 0
    least, sizes = setting.size_bytes(target), [option.size_bytes(target) for option in options]
    return min((option for option, size in enumerate(sizes) if size >= least), key=sizes.__getitem__, default=0)


def _with_channels(measurement: Measurement) -> Iterator[tuple[str, NDArray[np.int64]]]:
    shares = [np.array([share_of(option) for option in options]) for options in measurement.transforms]
    codes = [[_codes_of(option) for option in options] for options in measurement.transforms]
    labels = sorted({label for options in codes for own in options for label in own} | {Keep().label})
    for label in labels:
        strange = [np.array([sum(code != label for code in own) for own in options]) for options in codes]
        for share in np.unique(np.concatenate(shares).round(2)):
            choice = [np.lexsort((abs(own - share), wrong))[0] for own, wrong in zip(shares, strange, strict=True)]
            stored = "" if label == Keep().label else f", {label}"
            yield f"{UNIFORM}{100 * share:.0f} % of the channels{stored}", np.array(choice)


def share_of(option: Transform) -> float:
    """Return the share of a part's channels that stay with an option.

    >>> share_of(RemoveChannels(4, (0,), reconstructed=True)), share_of(Keep())
    (0.75, 1.0)
    """
    removal = option.removal if isinstance(option, Jointly) else option
    return 1 - len(removal.removed) / removal.units if isinstance(removal, RemoveChannels) else 1.0


def _codes_of(option: Transform) -> tuple[str, ...]:
    """Return the labels of the codes of a part's layers with an option; one for a part that is a layer."""
    if isinstance(option, Jointly):
        return tuple(code.label for code in option.codes)
    return (Keep().label if isinstance(option, RemoveChannels) else option.label,)
