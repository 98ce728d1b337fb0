"""The caller's metric of a model: computed for the original before measuring, and for the result."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import nn

from qcompress.errors import OptionsError
from qcompress.model import forward as forwards
from qcompress.model.opened import opened_of
from qcompress.model.steady import changed_since, kept_state, versions_of
from qcompress.scalars import as_number
from qcompress.steps.request import Request


def with_metric_before(request: Request) -> Request:
    """Return the request with the caller's metric of the original, if there is one.

    Raises:
        OptionsError: same as in `metric_of`.
    """
    if request.evaluate is None:
        return request
    return replace(request, metric_before=metric_of(request.evaluate, request.calibration.goal, "the original"))


def metric_of(evaluate: Callable[[nn.Module], float], model: nn.Module, name: str) -> float:
    """Return the result of the caller's ``evaluate`` for the model ``name`` in evaluation mode; it keeps its own.

    Buffers that it changes, such as running statistics, are restored.

    Raises:
        OptionsError: it fails, its result is not a finite number, or it changes a parameter.
    """
    failing = forwards.failing_as(OptionsError, f"evaluate(model) failed on {name}")
    versions, kept = versions_of(model), nullcontext() if opened_of(model) is not None else kept_state(model)
    with forwards.evaluating(model), torch.random.fork_rng(devices=()), kept, failing:
        value = evaluate(model)
    if changed := changed_since(versions, model):
        raise OptionsError(
            f"evaluate(model) changed {', '.join(changed[:3])} of {name}: let it change a copy, copy.deepcopy(model)"
        )
    return as_number(value, f"what evaluate(model) returns for {name}", above=-math.inf, wanted="a finite number")
