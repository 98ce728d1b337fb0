"""All tensors of a model, and which of them share memory.

A state dict is not enough: hooks may rename, drop or clone its entries, buffers may be non-persistent, and layers in a
plain list are missing. Therefore bytes are counted, files written and copies checked by walking the modules and
comparing storages. Two tensors that share all their memory count once, under the name of the first.

Plain tensors that are neither parameters nor buffers (a stored activation, a constant) do not count, because they
cannot be distinguished from leftovers of a forward pass.
"""

import bisect
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Held:
    """A tensor that a module of the model holds.

    Attributes:
        name: name in the state dict; ``experts[1].weight`` for a module in a plain list called ``experts``.
        tensor: the tensor itself, not a copy.
        module: the module that holds it.
        key: its name in this module.
        persistent: whether it is part of the state dict; buffers may be non-persistent.
    """

    name: str
    tensor: Tensor
    module: nn.Module
    key: str
    persistent: bool = True


def held_tensors(model: nn.Module) -> tuple[Held, ...]:
    """Return all parameters and buffers of ``model``, persistent or not, in the order of its modules.

    >>> [held.name for held in held_tensors(nn.BatchNorm1d(2))]
    ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
    """
    held = []
    for path, module in _all_modules(model):
        tensors: dict[str, Any] = {**module._parameters, **module._buffers}
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            tensors[EXTRA_STATE] = module.get_extra_state()
        held += [
            Held(
                name=f"{path}.{key}" if path else key,
                tensor=tensor,
                module=module,
                key=key,
                persistent=key not in module._non_persistent_buffers_set,
            )
            for key, tensor in tensors.items()
            if isinstance(tensor, Tensor)
        ]
    return tuple(held)


EXTRA_STATE = "_extra_state"
"""Name of the result of `nn.Module.get_extra_state` in a state dict."""


def all_names(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the state dict themselves, a shared one under each of its names.

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
    >>> model.append(model[0])[2] is model[0], list(all_names(model))
    (True, ['0.weight', '2.weight'])
    """
    return {name: item for name, item in model.state_dict(keep_vars=True).items() if isinstance(item, Tensor)}


def unregistered_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules in plain lists, tuples and dicts of the modules of ``model``, by names such as ``layers[0]``.

    >>> model = nn.Linear(2, 2)
    >>> model.others = [nn.Linear(2, 2), nn.ReLU()]
    >>> list(unregistered_modules(model))
    ['others[0]', 'others[1]']
    """
    known = {id(module) for module in model.modules()}
    modules: dict[str, nn.Module] = {}
    waiting = [(path, module) for path, module in model.named_modules()]
    while waiting:
        path, module = waiting.pop(0)
        if isinstance(module, torch.jit.ScriptModule):  # contains itself again, without its Python class
            continue
        attributes = {
            name: value for name, value in vars(module).items() if name not in ("_parameters", "_buffers", "_modules")
        }
        for name, value in attributes.items():
            for place, child in _modules_in(value, f"{path}.{name}" if path else name):
                for below, inner in child.named_modules(prefix=place):
                    if id(inner) not in known:
                        known.add(id(inner))
                        modules[below] = inner
                        waiting.append((below, inner))
    return modules


def _all_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield from model.named_modules(remove_duplicate=False)
    yield from unregistered_modules(model).items()


def _modules_in(value: Any, name: str, depth: int = 3) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(value, nn.Module):
        yield name, value
    elif depth and isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _modules_in(item, f"{name}[{index}]", depth - 1)
    elif depth and isinstance(value, dict):
        for key, item in value.items():
            yield from _modules_in(item, f"{name}[{key!r}]", depth - 1)


Extent = tuple[torch.device, int, int]


def dense(tensor: Tensor) -> Tensor:
    """Return a sparse tensor as a dense one, and any other itself.

    >>> dense(torch.eye(2).to_sparse()).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    return tensor if tensor.layout == torch.strided or tensor.is_nested else tensor.to_dense()


def extent_of(tensor: Tensor) -> Extent | None:
    """Return the device, first and last address of a tensor's memory, or None without memory (empty, sparse, meta)."""
    if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.is_nested or tensor.numel() == 0:
        return None
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return tensor.device, start, start + (reach + 1) * tensor.element_size()


def first_names(held: Iterable[Held]) -> dict[str, str]:
    """Name → name of the first tensor with exactly the same memory, whatever its layout.

    Non-persistent buffers (masks, tables of angles) are often created again in every layer; those with the same values
    count as one.
    """
    first: dict[Any, str] = {}
    names = {}
    for item in held:
        extent = extent_of(item.tensor)
        key: Any = id(item.tensor)
        if not item.persistent:
            key = (item.tensor.dtype, tuple(item.tensor.shape), hashlib.sha256(bytes_of(item.tensor)).digest())
        elif extent is not None and extent[2] - extent[1] == size_bytes(item.tensor):
            key = (item.tensor.dtype, *extent)
        names[item.name] = first.setdefault(key, item.name)
    return names


class Memory:
    """The storages of some tensors, to find out whether another tensor lies in one of them.

    They are kept alive, since the memory of one that a model made only for its state would soon be another's.
    """

    def __init__(self, held: Iterable[Held]) -> None:
        spans: dict[tuple[str, int], tuple[int, str]] = {}
        self._storages: list[torch.UntypedStorage] = []
        for item in held:
            if extent_of(item.tensor) is not None:
                storage = item.tensor.untyped_storage()
                start = storage.data_ptr()
                self._storages.append(storage)
                spans.setdefault((str(item.tensor.device), start), (start + storage.nbytes(), item.name))
        self._starts = sorted(spans)
        self._ends = [spans[start] for start in self._starts]

    def owner_of(self, tensor: Tensor) -> str | None:
        """Return the name of the tensor whose storage contains this one, or None."""
        extent = extent_of(tensor)
        if extent is None:
            return None
        device, start, stop = str(extent[0]), *extent[1:]
        place = bisect.bisect_left(self._starts, (device, stop)) - 1
        if place < 0 or self._starts[place][0] != device or self._ends[place][0] <= start:
            return None
        return self._ends[place][1]


def byte_tensor(tensor: Tensor) -> Tensor:
    """Return the values of a tensor as a flat uint8 tensor on the CPU, in the order of its dimensions.

    Memory is shared if possible.

    >>> byte_tensor(torch.tensor([[1, 2]], dtype=torch.int16).T[:1])  # a single number, two apart from the next
    tensor([1, 0], dtype=torch.uint8)
    """
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)  # a tensor of one element may have any stride


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of `byte_tensor`, for files and digests."""
    return byte_tensor(tensor).numpy().data


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits: 0 differs from -0, and NaN equals itself."""
    return (
        first.dtype == second.dtype
        and first.shape == second.shape
        and torch.equal(byte_tensor(first), byte_tensor(second))
    )


def same_values(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same shape and values: 0 equals -0, and NaN equals itself."""
    if first.shape != second.shape:
        return False
    first, second = (value if value.layout == torch.strided else value.to_dense() for value in (first, second))
    return bool(((first == second) | ((first != first) & (second != second))).all())


def digest_of(model: nn.Module) -> str:
    """Return the SHA-256 over the names, types, shapes and bits of all tensors that ``model`` holds."""
    digest = hashlib.sha256()
    for item in _once(model):
        digest.update(f"{item.name} {item.tensor.dtype} {tuple(item.tensor.shape)}\n".encode())
        digest.update(bytes_of(item.tensor))
    return digest.hexdigest()


def total_bytes(model: nn.Module) -> int:
    """Return the bytes of everything that ``model`` holds; shared memory counts once.

    Raises:
        ModelError: a tensor is sparse.

    >>> total_bytes(nn.Linear(3, 2))
    32
    """
    return sum(size_bytes(item.tensor) for item in _once(model))


def left_out_bytes(model: nn.Module) -> int:
    """Return the bytes of the non-persistent buffers in `total_bytes`."""
    return sum(size_bytes(item.tensor) for item in _once(model) if not item.persistent)


def _once(model: nn.Module) -> list[Held]:
    held = held_tensors(model)
    if sparse := [item.name for item in held if item.tensor.layout != torch.strided]:
        raise ModelError(f"{sparse[0]!r} is a sparse tensor, which cannot be stored: convert it to a dense one")
    first = first_names(held)
    return [item for item in held if first[item.name] == item.name]


def size_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's values."""
    return tensor.numel() * tensor.element_size()


def overlapping(held: Iterable[Held]) -> dict[int, str]:
    """Id of each tensor that shares some of its memory with another one → name of the other."""
    items = {id(item.tensor): item for item in held}
    spans = [(extent, item) for item in items.values() if (extent := extent_of(item.tensor)) is not None]
    spans.sort(key=lambda span: (str(span[0][0]), *span[0][1:]))
    overlaps: dict[int, str] = {}
    longest: tuple[Extent, Held] | None = None  # the one so far with the highest end address
    for extent, item in spans:
        if longest is not None and longest[0][0] == extent[0] and extent[1] < longest[0][2]:
            overlaps[id(item.tensor)] = longest[1].name
            overlaps.setdefault(id(longest[1].tensor), item.name)
        if longest is None or longest[0][0] != extent[0] or extent[2] > longest[0][2]:
            longest = extent, item
    return overlaps
