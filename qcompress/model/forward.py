"""Running a model on calibration data: batches in, one output tensor out.

A batch is a tensor; a tuple or list of the model's inputs, with a target after them or not; or a mapping of keyword
arguments. What does not fit is run by the caller's own ``forward(model, batch) -> tensor``.
"""

import contextlib
import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from qcompress.errors import DataError, ModelError

RULED_OUT = -1e30  # stands for minus infinity: the same softmax, and differences that are numbers
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
    if isinstance(data, Iterator) or (not isinstance(data, Sized) and iter(data) is iter(data)):
        raise DataError("data is read more than once, a generator only lasts for one pass: pass a list or a DataLoader")
    return data


def first_batch(data: Iterable[Any], name: str = "the calibration data") -> Any:
    """The first batch of the data of that name.

    Raises:
        DataError: there is none.
    """
    for batch in data:
        return batch
    raise DataError(f"{name} is empty: give at least one batch")


def run(model: nn.Module, batch: Any, forward: Forward | None = None) -> Tensor:
    """The model's output ``(samples, …)`` for one batch, of whatever dtype the model computes in, in float32 or wider.

    Raises:
        ModelError: the output is no tensor with a sample dimension, or holds numbers that are not finite.
        DataError: the batch is of another dtype than the weights, and the model does not take it.
    """
    try:
        output = (forward or default_forward)(model, batch)
    except RuntimeError as error:
        held, computes = _dtypes_in(batch), _dtypes_in(list(model.parameters()))
        if held and computes and held != computes and "type" in str(error):
            raise DataError(
                f"the model does not run on a batch of {_listed(held)}, its weights are {_listed(computes)}: convert "
                f"the batches, or the model ({error})"
            ) from error
        raise
    if not isinstance(output, Tensor):
        raise ModelError(f"forward(model, batch) must return a tensor, found {type(output).__name__}")
    if output.ndim == 0 or not output.is_floating_point():
        raise ModelError(
            f"the model's output must be floating-point with the samples along its first dimension, "
            f"found {output.dtype} of shape {tuple(output.shape)}; pass forward=(model, batch) -> tensor"
        )
    if output.is_inference():
        output = output.clone()
    output = output.to(torch.promote_types(output.dtype, torch.float32))
    if bool((output.detach() == -math.inf).any()):  # logits of classes that are left out
        output = output.clamp(min=RULED_OUT)
    if not bool(torch.isfinite(output.detach()).all()):
        raise ModelError("the model's output holds NaN or infinity; check the weights and the calibration data")
    return output.as_subclass(Tensor) if type(output) is not Tensor else output


def _dtypes_in(value: Any) -> set[torch.dtype]:
    """Of the floating-point tensors inside."""
    if isinstance(value, Tensor):
        return {value.dtype} if value.is_floating_point() else set()
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return {dtype for item in items for dtype in _dtypes_in(item)}


def _listed(dtypes: Iterable[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def default_forward(model: nn.Module, batch: Any) -> Tensor:
    """Call the model on a tensor, on the inputs in a tuple, or on a mapping of keyword arguments.

    Of a tuple it takes as many entries as the model's ``forward`` needs, one at least; one more is a target.

    Raises:
        ModelError: the output is neither a tensor nor has ``logits``.
        DataError: the batch is of another kind, or holds entries that the model does not take.
    """
    batch = to_device(batch, device_of(model))
    if isinstance(batch, Tensor):
        output = model(batch)
    elif isinstance(batch, list) and batch and isinstance(batch[0], Tensor):
        output = model(*_inputs(model, batch))
    elif isinstance(batch, dict):
        _require_taken(model, batch)
        output = model(**batch)
    else:
        raise DataError(
            f"a batch must be a tensor, (inputs, targets) or a dict, found {type(batch).__name__}; "
            "for anything else pass forward=(model, batch) -> tensor"
        )
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    raise ModelError(
        f"the model returned {type(output).__name__}, which is no tensor and has no logits; "
        "pass forward=(model, batch) -> tensor to pick the output"
    )


def _parameters_of(model: nn.Module) -> list[inspect.Parameter]:
    """What the model's ``forward`` takes, also behind ``torch.compile`` and ``DataParallel``."""
    inner = getattr(model, "_orig_mod", getattr(model, "module", model))
    owner = inner if isinstance(inner, nn.Module) else model
    return list(inspect.signature(owner.forward).parameters.values())


def _inputs(model: nn.Module, batch: list[Any]) -> list[Any]:
    """The entries that the model needs.

    Raises:
        DataError: there are too few, or more than one over.
    """
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [
        parameter.name
        for parameter in _parameters_of(model)
        if parameter.kind in positional and parameter.default is parameter.empty
    ]
    count = max(len(needed), 1)
    if not count <= len(batch) <= count + 1:
        raise DataError(
            f"a batch of {len(batch)} entries was given, the model's forward needs {count} ({', '.join(needed)}), and "
            "one target may follow; pass the inputs by name in a dict, or forward=(model, batch) -> tensor"
        )
    return batch[:count]


def _require_taken(model: nn.Module, batch: dict[str, Any]) -> None:
    """Refuse what the model has no parameter for.

    Raises:
        DataError: names the entries.
    """
    parameters = _parameters_of(model)
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters if parameter.kind is not inspect.Parameter.VAR_POSITIONAL]
    if surplus := [str(key) for key in batch if key not in known]:
        raise DataError(
            f"the batch holds {', '.join(surplus)}, which the model's forward does not take (it takes: "
            f"{', '.join(known)}); leave that out, or pass forward=(model, batch) -> tensor"
        )


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter that has numbers lives (a model without one: the CPU)."""
    return next((parameter.device for parameter in model.parameters() if not parameter.is_meta), torch.device("cpu"))


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors inside ``value`` (tuples, lists, mappings: as lists and dicts) moved to ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_device(item, device) for item in value]
    return value


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter gradients inside; every flag is put back after.

    What was compiled runs as it was written, so that every layer is called. Accelerators compute in float32 what is
    float32: losses are small differences of outputs, which TensorFloat-32 blurs.
    """
    training = [(module, module.training) for module in model.modules()]
    needed = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    for parameter, _ in needed:
        parameter.requires_grad_(False)
    try:
        with _not_compiled(), _full_precision():
            yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter, flag in needed:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def layer_by_layer() -> Iterator[None]:
    """PyTorch's attention blocks call their layers, instead of one function with the layers' weights."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """No TensorFloat-32 in products and convolutions."""
    if hasattr(torch.backends.cudnn, "conv"):  # since PyTorch 2.9
        places = [(torch.backends.cuda.matmul, "fp32_precision"), (torch.backends.cudnn.conv, "fp32_precision")]
        exact: str | bool = "ieee"
    else:
        places, exact = [(torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32")], False
    before = [getattr(place, name) for place, name in places]
    for place, name in places:
        setattr(place, name, exact)
    try:
        yield
    finally:
        for (place, name), value in zip(places, before, strict=True):
            setattr(place, name, value)


def _not_compiled() -> contextlib.AbstractContextManager[Any]:
    """Compiled functions and modules run as written."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and asking further would import the compiler
        return contextlib.nullcontext()
    eager: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager
