"""What can be told before anything is measured: batches that do not fit the model, and budgets that no choice can meet.

The smallest use of the options follows from the shapes of the layers alone, which one batch shows. What only the
weights or other batches tell is taken at its least (a rank by energy as one, a layer that the batch does not reach as
nothing), so no budget that can be met is refused here; `formulated` looks again at what was measured.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from formulations import InfeasibleBudgetError
from formulations.generators.prune_quantize import prune_quantize
from qcompress.budgets import FILE_BYTES, fixed_use, parse
from qcompress.errors import DataError, OptionsError
from qcompress.measuring.channels import offers_channels
from qcompress.model import forward as forwards
from qcompress.model.parts import UNCALLED, Survey, survey
from qcompress.model.steady import steady
from qcompress.steps.opened import first_of
from qcompress.steps.request import Request
from qcompress.transforms.base import Keep


def require_fitting(request: Request, validation: Iterable[Any]) -> None:
    """Refuse ``validation`` whose first batch the model does not take, or takes for something else than the data's.

    Raises:
        DataError: says what the model made of it.
    """
    calibration, model = request.calibration, request.copied
    run = steady(calibration.forward, calibration.seed)
    batch = forwards.first_batch(forwards.checked_data(validation), "validation")
    with forwards.evaluating(model), torch.no_grad():
        expected = forwards.run(model, first_of(model, calibration.first_batch()), run)
        try:
            output = forwards.run(model, first_of(model, batch), run)
        except Exception as error:  # whatever a model raises that does not take it
            raise DataError(f"the model does not take the first batch of validation: {error}") from error
    if output.ndim != expected.ndim:
        raise DataError(
            f"the first batch of validation gives outputs of shape {tuple(output.shape)}, that of data "
            f"{tuple(expected.shape)}: validation has to be of the same kind as data"
        )


def require_for_channels(request: Request) -> None:
    """Refuse what cannot be asked for together with channels, whether they are on offer or measured.

    Raises:
        OptionsError: names it.
    """
    given = request.measurement
    if not (bool(given.sets) if given is not None else offers_channels(request.offered)):
        return
    asked = {
        f"a budget for {name}": name in request.budget and name not in ("bytes", "macs") for name in request.budget
    }
    asked |= {
        "minimize=": request.minimize is not None,
        "target=": request.engine is not None,
        "refine_rounds=": request.refine_rounds > 0,
        "granularity=": request.granularity != "layer",
    }
    if wrong := [name for name, meant in asked.items() if meant]:
        raise OptionsError(
            f"{', '.join(wrong)} is not for channels: they take budgets for bytes and macs, and blocks by "
            "prune_channels(granularity=...). The smaller model can be exported, or compressed further"
        )


def require_possible(request: Request) -> None:
    """Refuse budgets below what the smallest options take.

    Raises:
        InfeasibleBudgetError: names each such resource, the budget asked and the least that it takes.
    """
    if request.measurement is not None or request.minimize is not None or offers_channels(request.offered):
        return
    calibration = request.calibration
    inventory = survey(
        request.copied,
        [first_of(calibration.model, calibration.first_batch())],
        steady(calibration.forward, calibration.seed),
        request.granularity,
        loss=calibration.loss,
        left_out=request.offered.left_out,
    )
    resources, limits = _resources(request, inventory), {}
    unreached = sum(item.size_bytes for item in inventory.skipped if item.reason == UNCALLED)
    fixed = {**inventory.fixed, "bytes": inventory.fixed["bytes"] - unreached}
    for name, asked in request.budget.items():
        resource = "bytes" if name == FILE_BYTES and request.engine is None else name
        if resource in resources and not (resource == "macs" and (unreached or not _alike(calibration.data))):
            limits[resource] = parse(name, asked).amount(inventory.original[resource])
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
        if "bytes" in problem.budgets:
            error.args = (f"{error}. {fixed_use(inventory)}",)
        raise


def _resources(request: Request, inventory: Survey) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """Per part the use as it is and the least of what is on offer, each resource on its own."""
    bytes_, macs = [], []
    for part in inventory.parts:
        offers = [Keep(), *request.offered.options(part.path, part.modules[0]).offers]
        least = [use for offer in offers if (use := offer.least_use(part.target)) is not None]
        bytes_ += [least[0][0], min(use[0] for use in least)]
        macs += [least[0][1], min(use[1] for use in least)]
    return {"bytes": np.array(bytes_, dtype=np.float64), "macs": np.array(macs, dtype=np.float64)}


def _alike(data: Iterable[Any]) -> bool:
    """Whether one batch shows the macs per sample of all: they are in a list, and tensors of one shape."""
    if not isinstance(data, Sequence):
        return False
    shapes = {tuple(batch.shape[1:]) if isinstance(batch, torch.Tensor) else None for batch in data}
    return len(shapes) == 1 and None not in shapes
