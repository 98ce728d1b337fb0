"""Uniform settings: every part takes the option with the given share of channels and codes, or the closest one."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from qcompress import Measurement, formulate, measure, prune_channels, prune_quantize
from qcompress.proposals import uniform_settings
from qcompress.settings import settings_of, share_of
from qcompress.transforms.base import Keep, Transform
from qcompress.transforms.channels import Jointly, RemoveChannels

CODES = prune_quantize(bits=(3, 4), sparsity=(0,))


def measured(options: object) -> Measurement:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
        return measure(model, [torch.randn(16, 6)], options, method="direct")


def described(measurement: Measurement, choice: np.ndarray) -> tuple[set[float], set[str]]:
    """Shares of channels that stay, of the sets, and the labels of all codes."""
    chosen = [options[option] for options, option in zip(measurement.transforms, choice, strict=True)]
    sets = {item.name for item in measurement.sets}
    shares = {share_of(own) for part, own in zip(measurement.parts, chosen, strict=True) if part.name in sets}
    codes = {label for own in chosen for label in labels(own)}
    return shares, codes


def labels(option: Transform) -> tuple[str, ...]:
    if isinstance(option, Jointly):
        return tuple(code.label for code in option.codes)
    return () if isinstance(option, (Keep, RemoveChannels)) else (option.label,)


def test_a_setting_of_channels_cuts_all_sets_alike() -> None:
    measurement = measured(prune_channels(keep=(0.75, 0.5)))
    found = settings_of(measurement)
    assert list(found) == [f"uniform: {share} % of the channels" for share in (50, 75, 100)]
    for share, choice in zip((0.5, 0.75, 1.0), found.values(), strict=True):
        assert described(measurement, choice)[0] == {share}


def test_a_setting_of_channels_and_codes_has_both_in_all_parts() -> None:
    measurement = measured(prune_channels(keep=(0.75, 0.5)) + CODES)
    found = settings_of(measurement)
    assert set(found) == {
        f"uniform: {share} % of the channels{codes}"
        for share in (50, 75, 100)
        for codes in ("", ", 3 bits", ", 4 bits")
    }
    for name, choice in found.items():
        kept, stored = described(measurement, choice)
        assert kept == {float(name.split()[1]) / 100}
        assert stored == set(filter(None, [name.partition(", ")[2]]))
    assert not found["uniform: 100 % of the channels"].any()


@pytest.mark.parametrize("share", [0.3, 0.2])
def test_uniform_settings_of_channels_are_tried_within_a_budget(share: float) -> None:
    measurement = measured(prune_channels(keep=(0.75, 0.5)) + CODES)
    problem = formulate(measurement, {"bytes": share})
    found = {own.name: own.choice for own in uniform_settings(measurement, problem)}
    fitting = {name for name, choice in settings_of(measurement).items() if problem.evaluate(choice).feasible}
    assert found
    assert found.keys() <= fitting
    costs = {name: problem.cost[problem.flat(choice)].sum() for name, choice in settings_of(measurement).items()}
    assert min(fitting, key=costs.__getitem__) in found


def test_a_part_without_a_setting_takes_its_smallest_option_that_is_not_smaller() -> None:
    whole = measured(CODES + prune_quantize(bits=(6,), sparsity=(0,)))
    options = whole.transforms[1]
    without = tuple(option for option in options if option.label != "4 bits")
    kept = [index for index, option in enumerate(options) if option.label != "4 bits"]
    flat = [*range(4), *(4 + index for index in kept), *range(8, 12)]
    measurement = replace(
        whole,
        transforms=(whole.transforms[0], without, whole.transforms[2]),
        cost=whole.cost[flat],
        factor=whole.factor[flat],
        error=whole.error[flat],
        resources={name: use[flat] for name, use in whole.resources.items()},
    )
    choice = settings_of(measurement)["uniform: 4 bits"]
    taken = [own[option].label for own, option in zip(measurement.transforms, choice, strict=True)]
    assert taken == ["4 bits", "6 bits", "4 bits"]
    assert settings_of(measurement)["uniform: keep"].tolist() == [0, 0, 0]
