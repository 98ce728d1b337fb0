"""Running a model on calibration data: batches in, one output tensor out.

A batch is a tensor, a tuple or list whose first entry is the input, or a dict of keyword arguments. What does not
fit is run by the caller's own ``forward(model, batch) -> tensor``.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from qcompress.errors import DataError, ModelError

Forward = Callable[[nn.Module, Any], Tensor]
Given = ParamSpec("Given")
Found = TypeVar("Found")


def seeded(function: Callable[Given, Found]) -> Callable[Given, Found]:
    """``function`` with torch's generator set by its keyword ``seed`` (0 where it is not given), and put back after.

    A DataLoader that shuffles then gives the same batches again when a call that was cut is made again.

    >>> draw = seeded(lambda seed=0: torch.rand(()).item())
    >>> draw() == draw(seed=0) != draw(seed=1)
    True
    """

    @functools.wraps(function)
    def run(*given: Given.args, **named: Given.kwargs) -> Found:
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(int(named.get("seed", 0)))  # type: ignore[call-overload]
            return function(*given, **named)

    return run


def checked_data(data: Any) -> Iterable[Any]:
    """``data`` if it can be read more than once.

    Raises:
        DataError: a single tensor, a generator, or nothing that can be iterated.
    """
    if isinstance(data, Tensor):
        raise DataError(
            f"data must be an iterable of batches, found one tensor of shape {tuple(data.shape)}; pass [tensor]"
        )
    if not isinstance(data, Iterable):
        raise DataError(f"data must be an iterable of batches (a list, a DataLoader), found {type(data).__name__}")
    if isinstance(data, Iterator):
        raise DataError("data is read more than once, a generator only lasts for one pass: pass a list or a DataLoader")
    return data


def first_batch(data: Iterable[Any]) -> Any:
    """The first batch.

    Raises:
        DataError: there is none.
    """
    for batch in data:
        return batch
    raise DataError("the calibration data is empty: give at least one batch")


def run(model: nn.Module, batch: Any, forward: Forward | None = None) -> Tensor:
    """The model's output ``(samples, …)`` for one batch, of whatever dtype the model computes in, in float32 or wider.

    Raises:
        ModelError: the output is no tensor with a sample dimension, or holds numbers that are not finite.
    """
    output = (forward or default_forward)(model, batch)
    if not isinstance(output, Tensor):
        raise ModelError(f"forward(model, batch) must return a tensor, found {type(output).__name__}")
    if output.ndim == 0 or not output.is_floating_point():
        raise ModelError(
            f"the model's output must be floating-point with the samples along its first dimension, "
            f"found {output.dtype} of shape {tuple(output.shape)}; pass forward=(model, batch) -> tensor"
        )
    if not bool(torch.isfinite(output.detach()).all()):
        raise ModelError("the model's output holds NaN or infinity; check the weights and the calibration data")
    return output.to(torch.promote_types(output.dtype, torch.float32))


def default_forward(model: nn.Module, batch: Any) -> Tensor:
    """Call the model on a tensor, on the first entry of a tuple, or on a dict of keyword arguments.

    Raises:
        ModelError: the output is neither a tensor nor has ``logits``.
        DataError: the batch is of another kind.
    """
    batch = to_device(batch, device_of(model))
    if isinstance(batch, Tensor):
        output = model(batch)
    elif isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        output = model(batch[0])
    elif isinstance(batch, dict):
        output = model(**batch)
    else:
        raise DataError(
            f"a batch must be a tensor, (inputs, targets) or a dict, found {type(batch).__name__}; "
            "for anything else pass forward=(model, batch) -> tensor"
        )
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    raise ModelError(
        f"the model returned {type(output).__name__}, which is no tensor and has no logits; "
        "pass forward=(model, batch) -> tensor to pick the output"
    )


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lives (a model without one: the CPU)."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors inside ``value`` (tuples, lists, dicts) moved to ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_device(item, device) for item in value]
    return value


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter gradients inside; every flag is put back after."""
    training = [(module, module.training) for module in model.modules()]
    needed = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    for parameter, _ in needed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter, flag in needed:
            parameter.requires_grad_(flag)
