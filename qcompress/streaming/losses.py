"""The true loss of several choices in an opened model; all choices share each load of a block."""

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qcompress.errors import ModelError
from qcompress.measurement import Measurement
from qcompress.measuring.candidates import EncodeProgress
from qcompress.measuring.streamed.hidden_states import HiddenStates
from qcompress.measuring.streamed.sweep import BlockSweep
from qcompress.model import forward as forwards
from qcompress.model.chain import without_cache
from qcompress.model.losses import Loss
from qcompress.model.opened import Opened, opened_of
from qcompress.model.padding import padding_named
from qcompress.model.steady import steady
from qcompress.streaming.encoding import Codes, Unit, encoded, loaded, need_inputs, reporter, units_of
from qcompress.transforms.base import Keep, Transform

Choice = tuple[Transform, ...]
Weights = dict[tuple[str, str], nn.Parameter]
"""(path of a module, name of its parameter) → its new parameter."""


def losses_of(
    model: nn.Module,
    measurement: Measurement,
    choices: Sequence[Choice],
    kept: Iterable[Any],
    data: Iterable[Any],
    *,
    loss: Loss,
    forward: forwards.Forward | None = None,
    on_encode: Callable[[EncodeProgress], None] | None = None,
) -> list[NDArray[np.float64] | None]:
    """For every choice, ``(samples,)`` loss increases; None where an output is not finite.

    Args:
        model: the original, opened model.
        measurement: measurement of the model.
        choices: choices, each with one transform for every part.
        kept: held-out samples to evaluate the loss on.
        data: batches that compensated codes are fitted to.
        loss: the loss, relative to the original's outputs.
        forward: how to run a batch.
        on_encode: called after every block has been encoded and run.
    """
    opened, run = opened_of(model), steady(forward)
    assert opened is not None  # noqa: S101
    wanted = {part: tuple(choice[part] for choice in choices) for part in range(len(measurement.parts))}
    with (
        padding_named(kept),
        tempfile.TemporaryDirectory(prefix="qcompress.") as folder,
        forwards.evaluating(model),
        forwards.layer_by_layer(),
        without_cache(model),
        torch.no_grad(),
    ):
        calibrating = None
        if need_inputs(measurement, wanted):
            (Path(folder) / "data").mkdir()
            calibrating = BlockSweep(model, opened, data, run, Path(folder) / "data")
            for _ in calibrating.forward():
                pass
        sweep = BlockSweep(model, opened, kept, run, Path(folder))
        outside, *blocks = units_of(opened, measurement)
        report = reporter(measurement, [outside, *blocks], on_encode)
        around = encoded(model, measurement, outside, wanted, calibrating)
        report(outside, around)
        runs: list[Choice | None] = [None, *choices]
        for number, choice in enumerate(runs):
            weights = weights_of_choice(model, measurement, outside, around, choice)
            with placed(model, weights), _states(sweep, 0, number).writing() as put:
                for sample in range(len(sweep)):
                    put(sweep.hidden(0, sample))
        for unit in blocks:
            report(unit, _through(model, opened, measurement, unit, wanted, calibrating, sweep, runs))
        return [
            _rises(model, sweep, number, weights_of_choice(model, measurement, outside, around, choice), loss)
            for number, choice in enumerate(choices, start=1)
        ]


def _through(
    model: nn.Module,
    opened: Opened,
    measurement: Measurement,
    unit: Unit,
    wanted: Mapping[int, Sequence[Transform]],
    calibrating: BlockSweep | None,
    sweep: BlockSweep,
    runs: Sequence[Choice | None],
) -> Codes:
    """Run the samples of all choices, and of the original, through one block; return the codes of all choices."""
    assert unit.block is not None  # noqa: S101
    with loaded(opened, unit):
        codes = encoded(model, measurement, unit, wanted, calibrating)
        for number, choice in enumerate(runs):
            weights = weights_of_choice(model, measurement, unit, codes, choice)
            before = _states(sweep, unit.block, number)
            with placed(model, weights), _states(sweep, unit.block + 1, number).writing() as put:
                for sample in range(len(sweep)):
                    put(sweep.through(unit.block, sample, before.read(sample)))
            before.delete()
    return codes


def _rises(
    model: nn.Module, sweep: BlockSweep, number: int, weights: Weights, loss: Loss
) -> NDArray[np.float64] | None:
    """Return ``(samples,)`` loss increases of a choice."""
    last, rises = len(sweep.chain), []
    for sample, given in enumerate(sweep.samples):
        reference = sweep.output(sample, _states(sweep, last, 0).read(sample))
        try:
            with placed(model, weights):
                output = sweep.output(sample, _states(sweep, last, number).read(sample))
        except ModelError:  # the output is not finite: the choice is unusable
            return None
        rises.append(loss.rise(output, reference, given.inputs).double().cpu().numpy())
    return np.concatenate(rises)


def _states(sweep: BlockSweep, boundary: int, number: int) -> HiddenStates:
    return sweep.states(boundary, f"choice_{number:03}")


def weights_of_choice(
    model: nn.Module, measurement: Measurement, unit: Unit, codes: Codes, choice: Choice | None
) -> Weights:
    """Return the weights that a choice changes; empty if ``choice`` is None."""
    weights: Weights = {}
    if choice is None:
        return weights
    holders: dict[int, list[tuple[str, str]]] = {}
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            holders.setdefault(id(parameter), []).append((path, key))
    for index in unit.parts:
        part, transform = measurement.parts[index], choice[index]
        if isinstance(transform, Keep):
            continue
        site = part.site(model)
        rows = transform.decode(codes[index, transform], part.target)
        if part.rows is not None:  # of several parts of a weight, such as experts
            changed = weights.get((part.modules[0], part.parameter), site.weight)
            whole = site.to_rows(changed.detach()).clone()
            whole[slice(*part.rows)] = rows
            rows = whole
        new = nn.Parameter(site.from_rows(rows).contiguous().to(site.weight), requires_grad=False)
        weights |= dict.fromkeys(holders[id(site.weight)], new)
    return weights


@contextlib.contextmanager
def placed(model: nn.Module, weights: Weights) -> Iterator[None]:
    """Set the weights of the model's modules; restore the old ones on exit."""
    places = [(model.get_submodule(path)._parameters, name, new) for (path, name), new in weights.items()]
    before = [parameters[name] for parameters, name, _ in places]
    try:
        for parameters, name, new in places:
            parameters[name] = new
        yield
    finally:
        for (parameters, name, _), weight in zip(places, before, strict=True):
            parameters[name] = weight
