"""Run a model on calibration data: batches in, one output tensor out.

A batch is a tensor, a tuple or list of the model's inputs (optionally followed by a target), or a mapping of keyword
arguments. Anything else needs a ``forward(model, batch) -> tensor`` from the caller.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.errors import DataError, ModelError, NotFiniteError, QcompressError, found
from qcompress.model import plain_state
from qcompress.model.batches import own, require_samples
from qcompress.model.decoder_inputs import require_decoder_mask
from qcompress.model.modes import full_precision, not_compiled
from qcompress.model.passes import Passes

RULED_OUT = -1e30  # replaces minus infinity: the softmax is the same, and differences are finite
Forward = Callable[[nn.Module, Any], Tensor]


def checked_data(data: Any, name: str = "data") -> Iterable[Any]:
    """Return the data called ``name``, which can be read more than once as far as can be seen without reading it.

    Anything but a list, tuple or other sequence is returned as `Passes`, which notices on the way if it cannot.

    Raises:
        DataError: it is a single tensor, a generator, or not iterable; or a batch in a list holds no sample.
    """
    if isinstance(data, Passes):
        return data
    require_iterable(data, name)
    if isinstance(data, Iterator) or (not isinstance(data, Sized) and iter(data) is iter(data)):
        raise DataError(
            f"{name} is read more than once, but a generator lasts for one pass: pass a list or a DataLoader"
        )
    require_samples_in(data, name)
    return data if isinstance(data, Sequence) else Passes(data, name)


def require_iterable(data: Any, name: str) -> None:
    """Check that data may be batches.

    Raises:
        DataError: it is a single tensor, or not iterable.
    """
    if isinstance(data, Tensor):
        raise DataError(
            f"{name} must be an iterable of batches, found one tensor of shape {tuple(data.shape)}; pass [tensor]"
        )
    if not isinstance(data, Iterable):
        raise DataError(f"{name} must be an iterable of batches (a list, a DataLoader), found {type(data).__name__}")


def require_module(model: object, name: str = "model") -> None:
    """Check that what is called ``name`` is a module.

    Raises:
        ModelError: it is not.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} must be a torch.nn.Module, found {found(model, nn.Module)}")


def read_data(data: Any, name: str) -> Iterable[Any]:
    """Return the same as `checked_data`, after reading all of anything but a list to see whether it can be read again.

    This is for data that are not read in full before something long begins.

    Raises:
        DataError: same as in `checked_data` and `first_batch`, or it can be read only once.
    """
    checked = checked_data(data, name)
    if isinstance(checked, Passes):
        for _ in checked:
            pass
    first_batch(checked, name)
    return checked


def require_samples_in(data: Iterable[Any] | None, name: str) -> None:
    """Check that every batch in a list holds a sample; those of anything else are checked when they are run.

    Raises:
        DataError: one does not; the message names it.
    """
    for index, batch in enumerate(data if isinstance(data, (list, tuple)) else ()):
        require_samples(batch, f"{name}[{index}]")


def first_batch(data: Iterable[Any], name: str = "the calibration data") -> Any:
    """Return the first batch of the data called ``name``.

    Raises:
        DataError: there is none, or it holds no sample.
    """
    for batch in data:
        require_samples(batch, f"the first batch of {name}")
        return batch
    raise DataError(f"{name} is empty: give at least one batch")


def of_every_shape(data: Iterable[Any], name: str) -> list[Any]:
    """Return a batch of every shape in a list of batches, or else the first batch, of the data called ``name``.

    Raises:
        DataError: there is none.
    """
    first = first_batch(data, name)
    return list({described(batch): batch for batch in data}.values()) if isinstance(data, Sequence) else [first]


def run(model: nn.Module, batch: Any, forward: Forward | None = None) -> Tensor:
    """Return a copy of the model's output ``(samples, …)`` for one batch, in float32 unless it is wider.

    The model is given a copy of the batch, which it may change. The output is a copy, because the model may return a
    buffer that the next pass overwrites, or state that is restored. Plain attributes that the pass changed are restored
    (see `qcompress.model.plain_state`).

    Raises:
        ModelError: the output is not a tensor with a sample dimension, or is not finite; or a plain attribute changed
            that cannot be restored.
        DataError: the batch has another dtype than the weights, and the model does not accept it; or it holds no
            sample, or does not say which positions of a decoder are padding.
    """
    with plain_state.kept(model):
        return run_on(model, batch, forward)


def run_on(model: nn.Module, batch: Any, forward: Forward | None = None) -> Tensor:
    """Return the same as `run`, but leave the model's plain attributes as they are after the pass."""
    require_decoder_mask(model, batch)
    require_samples(batch)
    try:
        given = batch if getattr(forward, "keeps_batches", False) else own(batch)
        output = (forward or default_forward)(model, given)
    except RuntimeError as error:
        held, computes = _dtypes_in(batch), _dtypes_in(list(model.parameters()))
        if held and computes and held != computes and "type" in str(error):
            raise DataError(
                f"the model does not run on a batch of {_listed(held)}, because its weights are {_listed(computes)}: "
                f"convert the batches or the model ({error})"
            ) from error
        raise
    if not isinstance(output, Tensor):
        raise ModelError(f"forward(model, batch) must return a tensor, found {type(output).__name__}")
    if output.ndim == 0 or not output.is_floating_point():
        raise ModelError(
            f"the model's output must be floating-point with the samples along its first dimension, "
            f"found {output.dtype} of shape {tuple(output.shape)}; pass forward=(model, batch) -> tensor"
        )
    if not output.numel():
        raise DataError(
            f"the model's output for a batch ({described(batch)}) has the shape {tuple(output.shape)}, without any "
            "number: leave this batch out"
        )
    output = output.to(
        torch.promote_types(output.dtype, torch.float32), copy=not getattr(forward, "gives_copies", False)
    )
    least, most = map(float, output.detach().aminmax())  # no comparison of tensors, which would count as a choice
    if least == -math.inf:  # logits of excluded classes
        output, least = output.clamp(min=RULED_OUT), RULED_OUT
    if not (math.isfinite(least) and math.isfinite(most)):
        raise NotFiniteError(
            f"the model's output for a batch ({described(batch)}) holds NaN or infinity; check the weights and this "
            "batch"
        )
    return output.as_subclass(Tensor) if type(output) is not Tensor else output


@contextlib.contextmanager
def failing_as(kind: type[QcompressError], what: str) -> Iterator[None]:
    """Run code of the caller inside the block; raise an error of another kind as ``kind``, after ``what``."""
    try:
        yield
    except QcompressError:
        raise
    except Exception as error:  # the caller's code may raise anything
        if is_out_of_memory(error):
            raise
        raise kind(f"{what}: {type(error).__name__}: {error}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def first_pass(batch: Any, name: str = "the first batch") -> contextlib.AbstractContextManager[None]:
    """Return a context for the first run of a model on a batch called ``name``.

    Raises:
        DataError: the model raised an error, which is the cause.
    """
    return failing_as(DataError, f"the model does not accept {name} ({described(batch)})")


def described(batch: Any) -> str:
    """Describe a batch by the shapes of its tensors.

    >>> described([torch.zeros(8, 3), torch.zeros(8)]), described({"x": torch.zeros(2, 5)})
    ('a list of (8, 3), (8,)', 'a dict of x (2, 5)')
    """
    if isinstance(batch, Tensor):
        return f"a tensor of shape {_shape(batch)}"
    named = [(f"{key} ", item) for key, item in batch.items()] if isinstance(batch, Mapping) else None
    items = [("", item) for item in batch] if isinstance(batch, (tuple, list)) else named
    if items is None:
        return f"of type {type(batch).__name__}"
    shapes = [f"{key}{_shape(item)}" for key, item in items]
    return f"a {type(batch).__name__} of {', '.join(shapes)}"


def _shape(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"({value.size(0)}, nested)" if value.is_nested else str(tuple(value.shape))


def _dtypes_in(value: Any) -> set[torch.dtype]:
    """Return the dtypes of all floating-point tensors inside ``value``."""
    if isinstance(value, Tensor):
        return {value.dtype} if value.is_floating_point() else set()
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return {dtype for item in items for dtype in _dtypes_in(item)}


def _listed(dtypes: Iterable[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def default_forward(model: nn.Module, batch: Any) -> Tensor:
    """Call the model on a batch, see `called`, and return its output, or the output's ``logits``.

    Raises:
        ModelError: the output is not a tensor and has no ``logits``.
        DataError: same as in `called`.
    """
    return tensor_of(called(model, batch))


def tensor_of(output: Any) -> Tensor:
    """Return a model's output if it is a tensor, else its ``logits``.

    Raises:
        ModelError: it is not a tensor and has no ``logits``.
    """
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    raise ModelError(
        f"the model returned {type(output).__name__}, which is not a tensor and has no logits; "
        "pass forward=(model, batch) -> tensor to pick the output"
    )


def called(model: nn.Module, batch: Any) -> Any:
    """Call the model on a tensor, on the inputs in a tuple, or on a mapping of keyword arguments.

    From a tuple it takes as many entries as the model's ``forward`` requires, at least one; one further entry is a
    target.

    Raises:
        DataError: the batch has another form, or contains entries that the model does not accept.
    """
    batch = to_device(batch, device_of(model))
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, list) and batch and isinstance(batch[0], Tensor):
        return model(*_inputs(model, batch))
    if isinstance(batch, dict):
        _require_taken(model, batch)
        return model(**batch)
    raise DataError(
        f"a batch must be a tensor, (inputs, targets) or a dict, found {type(batch).__name__}; "
        "for anything else pass forward=(model, batch) -> tensor"
    )


def _parameters_of(model: nn.Module) -> list[inspect.Parameter]:
    """Return the parameters of the model's ``forward``, also behind ``torch.compile`` and ``DataParallel``."""
    inner = getattr(model, "_orig_mod", getattr(model, "module", model))
    owner = inner if isinstance(inner, nn.Module) else model
    return list(inspect.signature(owner.forward).parameters.values())


def _inputs(model: nn.Module, batch: list[Any]) -> list[Any]:
    """Return the entries of a batch that the model needs.

    Raises:
        DataError: there are too few, or more than one extra.
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
    """Check that the model has a parameter for every entry of the batch.

    Raises:
        DataError: names the other entries.
    """
    parameters = _parameters_of(model)
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters if parameter.kind is not inspect.Parameter.VAR_POSITIONAL]
    if surplus := [str(key) for key in batch if key not in known]:
        raise DataError(
            f"the batch holds {', '.join(surplus)}, which the model's forward does not accept (it accepts: "
            f"{', '.join(known)}); omit that, or pass forward=(model, batch) -> tensor"
        )


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter that has values (without one: the CPU)."""
    return next((parameter.device for parameter in model.parameters() if not parameter.is_meta), torch.device("cpu"))


def to_device(value: Any, device: torch.device) -> Any:
    """Move all tensors inside ``value`` to ``device``; tuples become lists, and mappings become dicts."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_device(item, device) for item in value]
    return value


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without parameter gradients inside; every flag and gradient is restored afterwards.

    Compiled code runs uncompiled, so that every layer is called. Accelerators compute float32 operations in full
    float32: losses are small differences of outputs, for which TensorFloat-32 is too coarse. See also
    `recurrent_gradients`.
    """
    training = [(module, module.training) for module in model.modules()]
    needed = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        model.eval()
    except NotImplementedError as error:
        raise ModelError(f"the model has no evaluation mode ({error}): give the module it was exported from") from error
    for parameter, _, _ in needed:
        parameter.requires_grad_(False)
        parameter.grad = None  # a backward pass would add to it
    try:
        with not_compiled(), full_precision(), recurrent_gradients(model):
            yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter, flag, gradient in needed:
            parameter.requires_grad_(flag)
            if gradient is not None:
                parameter.grad = gradient


@contextlib.contextmanager
def recurrent_gradients(model: nn.Module) -> Iterator[None]:
    """Let gradients pass through recurrent layers in evaluation mode, for which cuDNN has no backward pass."""
    enabled = torch.backends.cudnn.enabled
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


@contextlib.contextmanager
def layer_by_layer() -> Iterator[None]:
    """Make PyTorch's attention blocks call their layers, instead of one function with the layers' weights."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
