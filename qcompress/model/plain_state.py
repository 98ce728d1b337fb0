"""Plain attributes of a model's modules: what a forward pass may store besides parameters and buffers.

Activations kept for a plot, counters, values computed from the weights in the first pass: they would tie a pass to
earlier ones, keep the graph of a backward pass alive, and outlast the weights that they were computed from. So every
pass starts from the attributes that the model had before (`kept`).

Lists, dicts, sets, deques, arrays, tensors and objects in attributes are followed to a depth of `DEPTH`; only their
references are recorded, and the numbers of tensors and arrays of up to `MOST_NUMBERS`. Containers of more than
`MOST_ITEMS` items are left alone, and so are objects of PyTorch's own.
"""

import contextlib
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qcompress.errors import ModelError
from qcompress.model.tensors import Memory, extent_of, held_tensors, same_values

DEPTH = 4
MOST_ITEMS = 1000
MOST_NUMBERS = 2**20

_PYTORCH = frozenset(vars(nn.Module())) | {"forward", "_flat_weights", "_flat_weight_refs"}
"""Attributes that PyTorch keeps itself: tensors, submodules, hooks, the mode."""

_SCALARS = (type(None), bool, int, float, complex, str, bytes)
_PLAIN = frozenset(_SCALARS)
_CONTAINERS = (list, dict, set, deque)
_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType)
"""Code of a module, not its state: libraries that patch ``forward`` in the first pass keep the original beside it."""

_OPAQUE = (type, types.ModuleType, *_FUNCTIONS, torch.Generator, nn.Parameter, BaseException)

Place = tuple[Any, Any, Any] | None
"""Place of what holds a value, that holder, and the value's key in it; None for the model. Few are ever named."""


@contextlib.contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Restore all plain attributes of ``model`` on exit, after a forward pass.

    Raises:
        ModelError: a tensor or array of more than `MOST_NUMBERS` numbers changed in place.

    >>> model = nn.Linear(2, 2)
    >>> model.seen = []
    >>> with kept(model):
    ...     model.last = model.seen.append(model(torch.ones(1, 2)))
    >>> model.seen, hasattr(model, "last")
    ([], False)
    """
    state = PlainState(model)
    try:
        yield
    except BaseException:
        state.put_back()
        raise
    state.put_back()
    if state.lost:
        raise ModelError(
            f"running the model changed {', '.join(sorted(state.lost))} in place, so that the next pass would give "
            "something else; make it a buffer, or assign a new tensor"
        )


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name → tensor of all tensors in plain attributes of ``model``, parameters included.

    >>> model = nn.Linear(2, 2)
    >>> model.seen = [torch.ones(1)]
    >>> list(plain_tensors(model))
    ['seen[0]']
    """
    contents = PlainContents(model)
    arrays = {name: value for name, value in contents.arrays.items() if isinstance(value, Tensor)}
    return {**arrays, **contents.parameters}


class PlainState:
    """The plain attributes of a model at one time.

    Attributes:
        lost: names of what changed in place and was too large to be recorded, after `put_back`.
    """

    def __init__(self, model: nn.Module) -> None:
        contents = PlainContents(model)
        self._before = contents.holders
        self._structure = {id(module): _structure(module) for module in contents.modules}
        self._arrays = [
            (name, array, _version(array), _copy(array)) for name, array in _own_arrays(model, contents.arrays).items()
        ]
        self._loose = {id(array) for _, array, *_ in self._arrays if isinstance(array, Tensor) and array.is_leaf}
        self.lost: set[str] = set()

    def put_back(self) -> set[str]:
        """Restore all plain attributes, and return the names of those that had changed.

        Attributes of a module that got or lost parameters, buffers or submodules belong to these, and stay.
        """
        changed = set()
        for place, holder, before in self._before:
            if isinstance(holder, nn.Module) and _structure(holder) != self._structure[id(holder)]:
                continue
            if different := _different(before, _content(holder)):
                changed |= {name_of((place, holder, key)) for key in different}
                _restore(holder, before)
        for name, array, version, copy in self._arrays:
            if id(array) in self._loose:
                release(array)
            if copy is None:
                if _version(array) != version:
                    self.lost.add(name)
            elif not _equal(array, copy):
                changed.add(name)
                _write(array, copy)
        return changed


def release(tensor: Tensor) -> None:
    """Take a tensor that a pass wrote to out of the graph of that pass, unless it is a view."""
    if tensor.grad_fn is not None and not tensor._is_view():
        tensor.detach_()


class PlainContents:
    """Everything that is reached from the plain attributes of a model.

    Attributes:
        modules: the model's modules, and modules in plain lists and dicts.
        holders: place, object and shallow copy of the content of everything that holds other values.
        arrays: name → tensor or array.
        parameters: name → parameter in a plain attribute.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules: list[nn.Module] = []
        self.holders: list[tuple[Place, Any, Any]] = []
        self.arrays: dict[str, Any] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        self._known: set[int] = set()
        self._add(None, model, DEPTH)

    def _add(self, place: Place, value: Any, depth: int) -> None:
        if id(value) in self._known or isinstance(value, _SCALARS):
            return
        self._known.add(id(value))
        if isinstance(value, nn.Module):
            if isinstance(value, torch.jit.ScriptModule):
                return  # it has no attributes in Python
            self.modules.append(value)
            for path, child in value._modules.items():
                self._add((place, value, path), child, DEPTH)
        elif isinstance(value, nn.Parameter):
            self.parameters[name_of(place)] = value
            return
        elif isinstance(value, (Tensor, np.ndarray)):
            self.arrays[name_of(place)] = value
            return
        if isinstance(value, tuple):
            content: Any = list(value)
        elif (content := _content(value)) is None:
            return
        else:
            self.holders.append((place, value, content))
        items = content.items() if isinstance(content, dict) else enumerate(content)
        for key, item in items if depth else ():
            if type(item) not in _PLAIN:
                self._add((place, value, key), item, depth - 1)


def _content(value: Any) -> Any:
    """Return a shallow copy of what ``value`` holds, or None if it holds nothing that is followed."""
    if isinstance(value, nn.Module):
        return {
            name: item
            for name, item in vars(value).items()
            if name not in _PYTORCH and (type(item) in _PLAIN or not isinstance(item, _FUNCTIONS))
        }
    if isinstance(value, _CONTAINERS):
        if len(value) > MOST_ITEMS:
            return None
        return dict(value) if isinstance(value, dict) else set(value) if isinstance(value, set) else list(value)
    if isinstance(value, _OPAQUE) or type(value).__module__.partition(".")[0] == "torch":
        return None
    own = getattr(value, "__dict__", None)
    return dict(own) if isinstance(own, dict) and len(own) <= MOST_ITEMS else None


def _restore(holder: Any, before: Any) -> None:
    if isinstance(holder, nn.Module):
        for name in _content(holder).keys() - before.keys():
            del vars(holder)[name]
        vars(holder).update(before)
        return
    target = holder if isinstance(holder, _CONTAINERS) else vars(holder)
    target.clear()
    if isinstance(target, (dict, set)):
        target.update(before)
    else:
        target.extend(before)


def _different(before: Any, now: Any) -> set[object]:
    """Return the keys under which two contents of the same object differ."""
    if now is None:  # it has grown
        return {""}
    if isinstance(before, set):
        return set() if before == now else {""}
    if isinstance(before, list):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if [*map(id, before), *map(id, before.values())] == [*map(id, now), *map(id, now.values())]:
        return set()
    unlike: set[object] = {key for key in before.keys() & now.keys() if not _same(before[key], now[key])}
    return unlike.union(before.keys() ^ now.keys())


def _same(before: Any, now: Any) -> bool:
    if before is now:
        return True
    return type(before) is type(now) and isinstance(before, _SCALARS) and bool(before == now)


def name_of(place: Place) -> str:
    """Return the path of a value, such as ``"encoder.seen[0]"``."""
    if place is None:
        return ""
    around, holder, key = place
    if isinstance(holder, (*_CONTAINERS, tuple)):
        return f"{name_of(around)}[{key!r}]"
    return f"{name_of(around)}.{key}" if around else str(key)


def _structure(module: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    return tuple(module._parameters), tuple(module._buffers), tuple(module._modules)


def _own_arrays(model: nn.Module, arrays: dict[str, Any]) -> dict[str, Any]:
    """Return those that are not views of parameters or buffers."""
    if not arrays:
        return {}
    memory = Memory(held_tensors(model))
    return {
        name: array
        for name, array in arrays.items()
        if isinstance(array, np.ndarray)
        or (extent_of(array) is not None and not array.is_inference() and memory.owner_of(array) is None)
    }


def _version(array: Any) -> int:
    return array._version if isinstance(array, Tensor) else 0


def _copy(array: Any) -> Any:
    if isinstance(array, Tensor):
        return array.detach().clone() if array.numel() <= MOST_NUMBERS else None
    return array.copy() if array.size <= MOST_NUMBERS else None


def _equal(array: Any, copy: Any) -> bool:
    if isinstance(array, Tensor):
        return same_values(array, copy)
    return bool(np.array_equal(array, copy))


def _write(array: Any, copy: Any) -> None:
    if not isinstance(array, Tensor):
        array[...] = copy
        return
    with torch.no_grad():
        if array.shape == copy.shape:
            array.copy_(copy)
        else:
            array.set_(copy)
