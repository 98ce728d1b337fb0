"""The index of a compressed model's file: the arrays of each part, and the layout of the state.

The index consists of tables without repetition (a transform, shape or store used by many parts is written once and
numbered), written as JSON and compressed with zlib. Names and shapes of a network take a few bytes per tensor. The size
of the index depends only on names, shapes and the choice, not on the weights.
"""

import base64
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qcompress.compressed.cutting import Cuts
from qcompress.compressed.record import CompressedPart
from qcompress.errors import ArtefactError
from qcompress.model.coupled import Bypass
from qcompress.model.parts import Part
from qcompress.model.sites import WEIGHT, path_of
from qcompress.model.tensors import Held, first_names, size_bytes
from qcompress.options import transform_from_json
from qcompress.transforms.base import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """A tensor of the state without its values.

    Attributes:
        dtype: name of its type, for example ``"float32"``.
        shape: its shape.
        first: name of the first tensor with the same memory; its own name if it is the first.
        persistent: whether it is part of the state dict.
    """

    dtype: str
    shape: tuple[int, ...]
    first: str
    persistent: bool = True

    def words(self, name: str) -> str:
        """Return a readable description."""
        return f"{self.dtype} {self.shape}" + ("" if self.first == name else f" shared with {self.first!r}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contents:
    """Everything that a file holds.

    Attributes:
        parts: how each part is stored, with its arrays (here, a kept part has its rows as an array).
        plain: all other tensors by name; shared ones once.
        state: description of the whole state.
        cuts: indices removed from the original's tensors.
        bypasses: modules of the original that are replaced by their constant output.
    """

    parts: tuple[CompressedPart, ...]
    plain: dict[str, Tensor]
    state: dict[str, Described]
    cuts: Cuts = field(default_factory=dict)
    bypasses: tuple[Bypass, ...] = ()

    @property
    def arrays(self) -> list[Tensor]:
        """All arrays, in the order of the file."""
        stored = [item.stored[name] for item in self.parts for name in sorted(item.stored)]
        return [*stored, *self.plain.values()]

    @property
    def payload_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(map(size_bytes, self.arrays))

    @property
    def left_out_bytes(self) -> int:
        """Bytes of the non-persistent buffers in `arrays`."""
        return sum(size_bytes(tensor) for name, tensor in self.plain.items() if not self.state[name].persistent)


def described(held: Sequence[Held]) -> dict[str, Described]:
    """Describe the state that consists of the given tensors."""
    first = first_names(held)
    return {
        item.name: Described(
            dtype=dtype_name(item.tensor),
            shape=tuple(item.tensor.shape),
            first=first[item.name],
            persistent=item.persistent,
        )
        for item in held
    }


def dtype_name(tensor: Tensor) -> str:
    """Return the name of a tensor's type, for example ``"float32"``."""
    return str(tensor.dtype).removeprefix("torch.")


class _Table:
    """Numbered values without repetition."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._places: dict[str, int] = {}

    def number(self, value: Any) -> int:
        place = self._places.setdefault(json.dumps(value), len(self.values))
        if place == len(self.values):
            self.values.append(value)
        return place


def pack_index(contents: Contents) -> str:
    """Return the tables as text.

    Raises:
        ArtefactError: the blocks of a layer are not consecutive.
    """
    transforms, stores, shapes = _Table(), _Table(), _Table()
    layers: list[tuple[list[str], list[int], str]] = []
    for item in contents.parts:
        arrays = [[name, dtype_name(array), list(array.shape)] for name, array in sorted(item.stored.items())]
        target = item.part.to_json()["target"]
        store = stores.number([transforms.number(item.transform.to_json()), target, arrays])
        if layers and (layers[-1][0], layers[-1][2]) == (list(item.part.modules), item.part.parameter):
            layers[-1][1].append(store)
        else:
            layers.append((list(item.part.modules), [store], item.part.parameter))
    derived = [
        part
        for modules, numbers, parameter in layers
        for part in _blocks(modules, [_target(stores.values[number]) for number in numbers], parameter)
    ]
    if wrong := [item.part.name for item, part in zip(contents.parts, derived, strict=True) if item.part != part]:
        raise ArtefactError(
            f"{wrong[0]!r} does not follow its previous block: a file cannot hold the parts in this order"
        )
    names = list(contents.state)
    places = {name: place for place, name in enumerate(names)}
    state = contents.state.values()
    value = {
        "transforms": transforms.values,
        "stores": stores.values,
        "layers": [layer if layer[2] != WEIGHT else layer[:2] for layer in layers],
        "names": names,
        "tensors": [shapes.number([entry.dtype, list(entry.shape)]) for entry in state],
        "shapes": shapes.values,
        "shared": [
            [place, places[described.first]]
            for place, (name, described) in enumerate(contents.state.items())
            if described.first != name
        ],
        "left_out": [place for place, entry in enumerate(state) if not entry.persistent],
        "plain": _ranges([places[name] for name in contents.plain]),
    }
    if contents.cuts:
        # a weight that smaller layers replace is not in the state: its name is written in place of a number
        cuts = contents.cuts.items()
        value["cuts"] = [[places.get(name, name), dim, _ranges(indices)] for (name, dim), indices in cuts]
    if contents.bypasses:
        value["bypasses"] = [item.to_json() for item in contents.bypasses]
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    return base64.b85encode(zlib.compress(text, 9)).decode()


def unpack_index(text: str, payload: Tensor) -> Contents:
    """Undo `pack_index`: return the contents, with arrays taken from ``payload``.

    Raises:
        KeyError, IndexError, TypeError, ValueError, AttributeError, zlib.error: ``text`` is not a valid index.
    """
    value = json.loads(zlib.decompress(base64.b85decode(text)))
    transforms = [transform_from_json(stated) for stated in value["transforms"]]
    cut, parts = _Cut(payload), []
    for modules, numbers, *parameter in value["layers"]:
        stores = [value["stores"][number] for number in numbers]
        blocks = _blocks(modules, list(map(_target, stores)), *parameter)
        for part, (transform, _, arrays) in zip(blocks, stores, strict=True):
            stored = {name: cut.next(dtype, shape) for name, dtype, shape in arrays}
            parts.append(CompressedPart(part=part, transform=transforms[transform], stored=stored))
    names, first, left_out = value["names"], dict(value["shared"]), set(value["left_out"])
    state = {}
    for place, (name, shape) in enumerate(zip(names, value["tensors"], strict=True)):
        dtype, size = value["shapes"][shape]
        state[name] = Described(
            dtype=dtype, shape=tuple(size), first=names[first.get(place, place)], persistent=place not in left_out
        )
    plain = {
        names[place]: cut.next(state[names[place]].dtype, state[names[place]].shape)
        for start, stop in value["plain"]
        for place in range(start, stop)
    }
    cut.require_end()
    cuts = {
        (place if isinstance(place, str) else names[place], int(dim)): [
            index for start, stop in ranges for index in range(start, stop)
        ]
        for place, dim, ranges in value.get("cuts", ())
    }
    bypasses = tuple(map(Bypass.from_json, value.get("bypasses", ())))
    return Contents(parts=tuple(parts), plain=plain, state=state, cuts=cuts, bypasses=bypasses)


class _Cut:
    """Takes consecutive arrays from the payload."""

    def __init__(self, payload: Tensor) -> None:
        self._payload, self._place = payload, 0

    def next(self, dtype: str, shape: Iterable[int]) -> Tensor:
        torch_dtype, size = getattr(torch, dtype), torch.Size(shape)
        stop = self._place + size.numel() * torch_dtype.itemsize
        piece = self._payload[self._place : stop]
        self._place = stop
        return piece.clone().view(torch_dtype).reshape(size)  # a clone is aligned for any type

    def require_end(self) -> None:
        if self._place != len(self._payload):
            raise ValueError(f"its arrays take {self._place} bytes, it has {len(self._payload)}")


def _target(store: list[Any]) -> Target:
    return Part.from_json({"name": "", "modules": [], "rows": None, "target": store[1]}).target


def _blocks(modules: Sequence[str], targets: Sequence[Target], parameter: str = WEIGHT) -> list[Part]:
    """Return the parts of a weight, whose blocks are consecutive."""
    parts, start = [], 0
    for target in targets:
        stop = start + target.channels
        path = path_of(modules[0], parameter)
        name = path if target.whole else f"{path}[{start}:{stop}]"
        rows = None if target.whole else (start, stop)
        parts.append(Part(name=name, modules=tuple(modules), rows=rows, target=target, parameter=parameter))
        start = stop
    return parts


def _ranges(numbers: Iterable[int]) -> list[list[int]]:
    """Return ascending numbers as ranges.

    >>> _ranges([0, 1, 2, 5, 6])
    [[0, 3], [5, 7]]
    """
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number:
            ranges[-1][1] += 1
        else:
            ranges.append([number, number + 1])
    return ranges
