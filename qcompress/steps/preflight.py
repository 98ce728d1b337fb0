"""Checks before measuring: batches that do not fit the model, and budgets that no choice can meet.

The smallest use of the options follows from the layers' shapes, for which one batch is enough. Quantities that depend
on the weights or on other batches enter with their lower bound (rank 1 for a rank by energy, zero for a layer that the
batch does not reach), so no feasible budget is refused here. `formulate_problem` checks again after measuring.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from formulations import InfeasibleBudgetError
from formulations.generators.prune_quantize import prune_quantize
from qcompress.budgets import (
    BITS_PER_WEIGHT,
    FILE_BYTES,
    FRACTIONAL,
    LATENCY,
    LOSS,
    fixed_use,
    not_lowered,
    parse,
    remedy,
)
from qcompress.compressed.container import require_tensors
from qcompress.engines.base import Engine, FileSizes
from qcompress.engines.legal import by_number, why_not
from qcompress.errors import DataError, EngineError, NotFiniteError, OptionsError
from qcompress.measurement import without_choice
from qcompress.measuring.channel_latency import factored_in, require_separate
from qcompress.measuring.channels import offers_channels
from qcompress.measuring.codes_beside import RANKS
from qcompress.measuring.options_by_layer import Offered, calibrated_options
from qcompress.measuring.replacing import not_replaced, tried_out
from qcompress.model import forward as forwards
from qcompress.model.opened import opened_of
from qcompress.model.parts import UNCALLED, Part, Survey, survey
from qcompress.model.steady import steady
from qcompress.model.weights import Skipped
from qcompress.scalars import as_whole
from qcompress.steps.opened import first_of
from qcompress.steps.request import Arguments, Request
from qcompress.structure.find import trace_few
from qcompress.transforms.base import Keep, Transform, Weight


def require_fitting(request: Request, validation: Iterable[Any]) -> None:
    """Check that the model accepts ``validation`` and returns outputs like those for the data.

    Of a list a batch of every shape is run, of anything else the first batch.

    Raises:
        DataError: the check failed; the message says why.
    """
    calibration, model = request.calibration, request.copied
    run = steady(calibration.forward, calibration.seed)
    batches = forwards.of_every_shape(validation, "validation")
    with forwards.evaluating(model), torch.no_grad():
        expected = forwards.run(model, first_of(model, calibration.first_batch()), run)
        for batch in batches:
            with forwards.first_pass(batch, "a batch of validation"):
                try:
                    output = forwards.run(model, first_of(model, batch), run)
                except NotFiniteError as error:
                    raise NotFiniteError(f"validation: {error}") from error
            if output.ndim != expected.ndim:
                raise DataError(
                    f"a batch of validation ({forwards.described(batch)}) gives outputs of shape "
                    f"{tuple(output.shape)}, the first of data {tuple(expected.shape)}: validation has to be of the "
                    "same kind as data"
                )


def require_for_channels(asked_for: Arguments) -> None:
    """Check that nothing is requested that does not work together with channels, before any pass.

    Raises:
        OptionsError: something is not supported; the message names it.
    """
    given, rounds = asked_for.measurement, as_whole(asked_for.rounds, "rounds", least=1)
    if not _has_channels(asked_for):
        if rounds > 1 and opened_of(asked_for.model) is not None:
            raise OptionsError("rounds= is for channels, which are removed from models in memory: load the model whole")
        if rounds > 1:
            raise OptionsError("rounds= is for channels: put prune_channels() on offer, or use refine_rounds=")
        return
    if rounds > 1 and given is not None:
        raise OptionsError("rounds= measures again after every round: give options=, not measurement=")
    budgets = "give budgets for bytes, macs and latency_s"
    further = "the smaller model can be compressed further, and export() writes it for an engine"
    again = f"rounds={'' if given is None else ' (with options=, not measurement=)'} measures again between removals"
    other = [name for name in asked_for.budget if name not in ("bytes", "macs", LATENCY, LOSS)]
    ranked = LATENCY in asked_for.budget and _has_ranks(asked_for)
    asked = [(f"a budget for {name}", True, budgets) for name in other] + [
        (f"a budget for {LATENCY} with ranks", ranked, "give one for macs, or offer no low_rank()"),
        ("minimize=", asked_for.minimize is not None, budgets),
        ("target=", asked_for.target is not None, further),
        ("refine_rounds=", asked_for.refine_rounds != 0, again),
        ("granularity=", asked_for.granularity != "layer", "prune_channels(granularity=...) removes blocks"),
    ]
    if wrong := {name: works for name, meant, works in asked if meant}:
        works = "; ".join(dict.fromkeys(wrong.values()))
        raise OptionsError(f"{', '.join(wrong)} is not supported for channels: {works}")


def require_storable(asked_for: Arguments) -> None:
    """Check that a file can hold the result if one is written, or its bytes are counted, before any pass.

    Raises:
        ArtefactError: it cannot.
    """
    stored = asked_for.folder is not None or FILE_BYTES in asked_for.budget or _has_channels(asked_for)
    if stored and opened_of(asked_for.model) is None:
        require_tensors(asked_for.model)


def _has_channels(asked: Arguments) -> bool:
    """Whether channels are on offer or measured; the defaults offer none."""
    if asked.measurement is not None:
        return bool(asked.measurement.sets)
    return asked.options is not None and offers_channels(Offered.of(asked.options, skip=asked.skip, only=asked.only))


def _has_ranks(asked: Arguments) -> bool:
    """Whether ranks are on offer, or measured, beside channels."""
    if asked.measurement is not None:
        return bool(factored_in(asked.measurement))
    offered = Offered.of(asked.options, skip=asked.skip, only=asked.only)
    return any(isinstance(offer, RANKS) for options in offered.by_pattern.values() for offer in options.offers)


def require_times_that_add_up(request: Request) -> None:
    """Check that channels have times of their own if their budget is in seconds.

    Raises:
        OptionsError: a weight lies along two coupled sets.
    """
    if LATENCY in request.budget and _has_channels(request):
        calibration = request.calibration
        require_separate(trace_few(request.copied, calibration.first_batch(), calibration.forward).sets)


def require_possible(request: Request) -> None:
    """Check that the budgets are not below the smallest use of the options, and that the engine runs some of them.

    Raises:
        InfeasibleBudgetError: names each such resource, the requested budget and the smallest possible use.
        EngineError: the engine runs none of the options; the message says why.
    """
    if not is_surveyed(request):
        return
    calibration, inventory = request.calibration, _surveyed(request)
    resources, limits, asked_of = _resources(request, inventory), {}, {}
    unreached = sum(item.size_bytes for item in inventory.skipped if item.reason == UNCALLED)
    fixed = {**inventory.fixed, "bytes": inventory.fixed["bytes"] - unreached}
    original = dict(inventory.original)
    transforms, kept = _run_by(request.engine, request, inventory)
    if not unreached and (further := {FILE_BYTES, BITS_PER_WEIGHT}.intersection(request.budget)):
        sizes = None if request.engine is None else _in_file(request.engine, request, inventory, transforms)
        if BITS_PER_WEIGHT in further and None not in transforms:
            resources[BITS_PER_WEIGHT], fixed[BITS_PER_WEIGHT] = _bits_per_weight(inventory, transforms, sizes), 0.0
        if FILE_BYTES in further and sizes is not None:
            resources[FILE_BYTES], fixed[FILE_BYTES] = _least(sizes.options, transforms, sizes), float(sizes.overhead)
        for name in further.intersection(resources):
            original[name] = fixed[name] + float(resources[name][::2].sum())
    for name, asked in request.budget.items():
        resource = "bytes" if name == FILE_BYTES and request.engine is None else name
        if resource not in resources or (resource == "macs" and unreached):
            continue
        limit, use = parse(name, asked), resources[resource]
        unlowered = bool((use[1::2] >= use[::2]).all())  # then a share of it holds whatever the other batches are
        if resource != "macs" or _alike(calibration.data) or (unlowered and limit.is_share):
            limits[resource] = limit.amount(original[resource], whole=name not in FRACTIONAL)
            asked_of[resource] = asked
    if not limits:
        return
    problem = prune_quantize(
        [part.name for part in inventory.parts],
        [("keep", "smallest")] * len(inventory.parts),
        np.zeros(2 * len(inventory.parts)),
        resources,
        limits,
        fixed={name: fixed[name] for name in resources},
    )
    try:
        problem.require_reachable_budgets()
    except InfeasibleBudgetError as error:
        if None in transforms:  # their ranks are only known after measuring
            error.args = (str(error).replace("the smallest possible use is", "every choice uses at least"),)
        hint = remedy(problem, asked_of, original) + fixed_use(problem, inventory, kept)
        hint += not_lowered(problem, inventory, kept)
        error.args = (f"{error}{hint}{not_replaced(inventory, hint)}{_not_fitting(request, inventory)}",)
        raise


def _surveyed(request: Request) -> Survey:
    """Return the parts that one batch reaches, as `measure` would make them."""
    calibration, model = request.calibration, request.copied
    batch, run = first_of(calibration.model, calibration.first_batch()), steady(calibration.forward, calibration.seed)
    inventory = survey(
        model, [batch], run, request.granularity, loss=calibration.loss, left_out=request.offered.left_out
    )
    if opened_of(model) is not None:
        return inventory
    options, _ = calibrated_options(inventory.parts, request.offered)
    with forwards.evaluating(model):
        return tried_out(model, inventory, options, batch, run)


def is_surveyed(request: Request) -> bool:
    """Whether `require_possible` looks at the first batch."""
    return request.measurement is None and not offers_channels(request.offered)


def _run_by(
    engine: Engine | None, request: Request, inventory: Survey
) -> tuple[list[list[Transform] | None], list[Skipped]]:
    """Return the options of each part that the engine, if any, runs, or None if they depend on the weight's values.

    Parts that have none are also returned as what stays unchanged.

    Raises:
        EngineError: the engine runs no option of any part.
    """
    supported: list[list[Transform] | None] = []
    reasons = {} if engine is None else dict(engine.refuse_in(request.copied, inventory.parts))
    ruled: set[str] = set()
    for part in inventory.parts:
        blank, offers = _blank(part), request.offered.options(part.path, part.modules[0]).offers
        if part.name in reasons:
            supported.append([])
            continue
        if not all(offer.by_shape(part.target) for offer in offers):
            supported.append(None)
            continue
        rules = [offer for offer in offers if not isinstance(offer, Transform)]
        offers = tuple(offer.uncalibrated if offer in rules else offer for offer in offers)  # of the same sizes
        resolved = [transform for offer in offers if (transform := offer.resolve(blank)) is not None]
        refused = ["" if engine is None else engine.refuse(part, transform) for transform in resolved]
        supported.append([transform for transform, why in zip(resolved, refused, strict=True) if not why])
        if engine is not None and (why := why_not(engine, part, resolved)):
            reasons[part.name] = why
        if rules:
            ruled.add(part.name)
    if engine is not None and reasons and not any(transforms is None or transforms for transforms in supported):
        raise EngineError(f"engine {engine.name!r} runs none of the options on offer: {by_number(reasons)}")
    kept = [
        without_choice(part, reasons.get(part.name, ""))
        for part, transforms in zip(inventory.parts, supported, strict=True)
        if transforms == [] and part.name not in ruled  # `not_lowered` names those
    ]
    return supported, kept


def _blank(part: Part) -> Weight:
    """Return a weight without values, for options that depend on its shape alone."""
    return Weight(rows=torch.zeros(1, 1), target=part.target, squares=torch.ones(1), ranges=((0.0, 1.0), (0.0, 1.0)))


def _not_fitting(request: Request, inventory: Survey, most: int = 3) -> str:
    """Name options that do not fit all parts, those that fit fewest first; empty if there are none."""
    whys: dict[str, list[str]] = {}
    for part in inventory.parts:
        for offer in request.offered.options(part.path, part.modules[0]).offers:
            if not isinstance(offer, Transform) or offer.resolve(_blank(part)) is not None:
                continue
            if why := offer.why_not(part.target):
                whys.setdefault(offer.label, []).append(f"{part.name!r}: {why}")
    reasons = [
        f"{label!r} does not fit {len(own)} of {len(inventory.parts)} parts ({own[0]})"
        for label, own in sorted(whys.items(), key=lambda entry: -len(entry[1]))[:most]
    ]
    return f". {'; '.join(reasons)}" if reasons else ""


def _in_file(
    engine: Engine, request: Request, inventory: Survey, transforms: Sequence[Sequence[Transform] | None]
) -> FileSizes:
    """Return the sizes in the engine's file of each part's original weight and of its options."""
    options = [[Keep(), *(supported or ())] for supported in transforms]
    return engine.sizes(request.copied, inventory.parts, options, request.calibration.first_batch())


def _least(
    sizes: Sequence[Sequence[int]], transforms: Sequence[Sequence[Transform] | None], in_file: FileSizes | None = None
) -> NDArray[np.float64]:
    """Return the original and smallest size of each part; 0 if its options depend on the weight's values."""
    refused = {} if in_file is None else in_file.refused
    least = [
        (
            own[0],
            0 if supported is None else min(size for option, size in enumerate(own) if (index, option) not in refused),
        )
        for index, (own, supported) in enumerate(zip(sizes, transforms, strict=True))
    ]
    return np.array(least, dtype=np.float64).ravel()


def _bits_per_weight(
    inventory: Survey, transforms: Sequence[Sequence[Transform] | None], in_file: FileSizes | None
) -> NDArray[np.float64]:
    """Return the bits of each part, unchanged and at least, over the number of all weights that have a choice."""
    has_choice = [bool(options) for options in transforms]
    num_weights = sum(
        part.target.num_weights for part, counts in zip(inventory.parts, has_choice, strict=True) if counts
    )
    sizes = in_file.weights if in_file is not None else None
    if sizes is None:
        sizes = tuple(
            tuple(transform.size_bytes(part.target) for transform in (Keep(), *(options or ())))
            for part, options in zip(inventory.parts, transforms, strict=True)
        )
    least = np.where(np.repeat(has_choice, 2), _least(sizes, transforms, in_file), 0.0)
    return 8.0 * least / max(num_weights, 1)


def _resources(request: Request, inventory: Survey) -> dict[str, NDArray[np.float64]]:
    """Return the use of each part unchanged and with its smallest option, for each resource separately."""
    bytes_, macs = [], []
    for part in inventory.parts:
        offers = [Keep(), *request.offered.options(part.path, part.modules[0]).offers]
        least = [use for offer in offers if (use := offer.least_use(part.target)) is not None]
        bytes_ += [least[0][0], min(use[0] for use in least)]
        macs += [least[0][1], min(use[1] for use in least)]
    return {"bytes": np.array(bytes_, dtype=np.float64), "macs": np.array(macs, dtype=np.float64)}


def _alike(data: Iterable[Any]) -> bool:
    """Whether one batch determines the macs per sample of all: the batches are a list of tensors of the same shape."""
    if not isinstance(data, Sequence):
        return False
    shapes = {tuple(batch.shape[1:]) if isinstance(batch, torch.Tensor) else None for batch in data}
    return len(shapes) == 1 and None not in shapes
