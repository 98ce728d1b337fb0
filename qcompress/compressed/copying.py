"""Copy a model so that the copy is independent of the original.

`copy.deepcopy` copies what a model holds, but not what its functions capture: a ``forward`` or hook that is a closure
keeps using the original's weights, and a module may return itself as its copy. A compressed copy would then run the
original's weights. So every copy is checked before anything is written to it, and for a model that cannot be copied
the error names the cause.
"""

import contextlib
import copy
import dis
import functools
import inspect
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qcompress.errors import ModelError
from qcompress.model import forward as forwards
from qcompress.model.composed import composed
from qcompress.model.dispatch import Reading
from qcompress.model.plain_state import plain_tensors
from qcompress.model.tensors import Held, Memory, held_tensors, overlapping

Model = TypeVar("Model", bound=nn.Module)

_IN_PLACE = "compress it in place instead: measure() it, solve, and apply_(model, measurement, solution)"


def own_copy(model: Model, batch: Any = None, forward: forwards.Forward | None = None) -> Model:
    """Return a copy that shares nothing with ``model``; computed weights are plain parameters in it.

    Args:
        model: the model; it is not modified.
        batch: if given, a second copy is run on it in evaluation mode to check that it reads none of the original's
            weights; otherwise the functions that the model holds are searched for them.
        forward: how to run the batch, if `qcompress.model.forward.default_forward` does not fit.

    Raises:
        ModelError: something in the model cannot be copied, or the copy still uses the original; the message says what.

    >>> model = nn.Linear(2, 2)
    >>> own_copy(model).weight.data_ptr() == model.weight.data_ptr()
    False
    >>> old = model.forward
    >>> model.forward = lambda x: 2 * old(x)
    >>> own_copy(model)
    Traceback (most recent call last):
    qcompress.errors.ModelError: a copy of the model goes on using the original: its 'forward' holds on to ...
    """
    with composed(model):
        copied, original = _copied(model), Memory(held_tensors(model))
        for item in held_tensors(copied):
            if original.owner_of(item.tensor) is not None:
                raise _shared(f"{item.name!r} of the copy is the original's own memory")
        if batch is None:
            _require_own_functions(copied, model, original)
        else:
            _require_own_run(_copied(model), original, batch, forward)
        return copied


def _copied(model: Model) -> Model:
    try:
        with torch.no_grad():  # scripted layers record the copy of their parameters for autograd
            copied = copy.deepcopy(model, _detached(model))
    except Exception as error:  # objects in the model may raise anything
        raise ModelError(f"the model cannot be copied: {_culprit(model) or repr(error)}; {_IN_PLACE}") from error
    original, twins = held_tensors(model), {item.name: item for item in held_tensors(copied)}
    if lost := [item.name for item in original if item.name not in twins]:
        raise ModelError(f"the model cannot be copied: the copy has no {lost[0]!r}; {_IN_PLACE}")
    for item in original:
        twins[item.name].tensor.requires_grad_(item.tensor.requires_grad)
    _share_as_before(original, twins)
    return copied


def _detached(model: nn.Module) -> dict[int, Any]:
    """Memo for `copy.deepcopy` with copies of stored activations, without the graph that they are part of."""
    stored = [tensor for tensor in plain_tensors(model).values() if not tensor.is_leaf]
    copies: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in stored}
    return copies


def _share_as_before(original: tuple[Held, ...], twins: dict[str, Held]) -> None:
    """Let the copy's tensors share memory where the original's do; `copy.deepcopy` preserves only identical objects."""
    shared = overlapping(original)
    storages: dict[int, torch.UntypedStorage] = {}
    for item in original:
        if id(item.tensor) in shared:
            storage = item.tensor.untyped_storage()
            if storage.data_ptr() not in storages:
                storages[storage.data_ptr()] = storage.clone()  # type: ignore[no-untyped-call]
            storage_of_copy, old = storages[storage.data_ptr()], item.tensor
            view = torch.empty(0, dtype=old.dtype, device=old.device)
            twins[item.name].tensor.data = view.set_(storage_of_copy, old.storage_offset(), old.shape, old.stride())


def _culprit(model: nn.Module) -> str:
    """Describe the attribute that cannot be copied."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name == "_modules":
                continue
            try:
                copy.deepcopy(value)
            except Exception as error:  # objects in the model may raise anything (see above)
                where = f"{path}.{name}" if path else name
                return f"its attribute {where!r} ({type(value).__name__}) refuses ({error})"
    return ""


def _shared(what: str) -> ModelError:
    return ModelError(f"a copy of the model goes on using the original: {what}; {_IN_PLACE}")


def _require_own_run(trial: nn.Module, original: Memory, batch: Any, forward: forwards.Forward | None) -> None:
    reading = Reading(original)
    with (
        torch.random.fork_rng(devices=()),
        forwards.evaluating(trial),
        torch.no_grad(),
        reading,
        forwards.first_pass(batch),
    ):
        forwards.run(trial, batch, forward)
    for name in reading.names:
        raise _shared(
            f"its forward pass reads the original's {name!r} (a forward, a hook or the given forward= refers to the "
            "original instead of the model that it is called with)"
        )


def _require_own_functions(copied: nn.Module, model: nn.Module, original: Memory) -> None:
    modules = {id(module) for module in model.modules()}
    for path, module in copied.named_modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            for held in _remembered(value):
                if id(held) in modules or (isinstance(held, Tensor) and original.owner_of(held)):
                    where = f"{path}.{name}" if path else name
                    raise _shared(f"its {where!r} holds on to the original's {type(held).__name__}")


def _remembered(value: Any, depth: int = 6) -> Iterator[nn.Module | Tensor]:
    """Yield modules and tensors that functions in ``value`` reach by closures, defaults or bound arguments."""
    for item in _inside(value) if depth else ():
        if isinstance(item, (nn.Module, Tensor)):
            yield item
        else:
            yield from _remembered(item, depth - 1)


def _inside(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if inspect.ismethod(value):
        return [value.__self__, value.__func__]
    if not inspect.isfunction(value):
        return []
    inside = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), vars(value)]
    for cell in value.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            inside.append(cell.cell_contents)
    loads = {word.argval for word in dis.get_instructions(value) if word.opname == "LOAD_GLOBAL"}
    named = [value.__globals__[name] for name in loads if name in value.__globals__]
    return inside + [item for item in named if isinstance(item, (nn.Module, Tensor)) or inspect.ismethod(item)]
