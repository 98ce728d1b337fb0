"""A compressed model as one file of real bytes: safetensors, codes packed, nothing stored twice.

The file holds the arrays of every part (``<part>/codes``, ``<part>/scales`` …), every other parameter and buffer of
the state dict under its own name, and a JSON header that says how to put them together. No pickle is written or
read. What always holds: the arrays take exactly the predicted bytes, and the loaded model's state dict equals
the saved one's bit for bit.
"""

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from formulations.files import AnyPath, replacing
from qcompress.compressed.record import CompressedPart, Compression, attach, install_, record_of, require_unchanged
from qcompress.errors import ArtefactError
from qcompress.model import layers
from qcompress.model.parts import Part
from qcompress.options import transform_from_json
from qcompress.transforms.base import Keep, Weight

FILE_KIND = "qcompress compressed model"
FILE_VERSION = 2
_HEADER = "qcompress"

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedFile:
    """What `save_compressed` wrote.

    Attributes:
        payload_bytes: of all arrays, as predicted.
        file_bytes: with the header.
    """

    path: Path
    payload_bytes: int
    file_bytes: int


def save_compressed(model: nn.Module, path: AnyPath) -> SavedFile:
    """Write a model that `apply` or `load_compressed` gave, whole or not at all.

    Raises:
        ArtefactError: the model was not compressed, or a compressed weight was changed since.

    >>> import tempfile
    >>> from qcompress import compress
    >>> make = lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> result = compress(make(), [torch.randn(32, 64)], budget={"bytes": 0.2}, solver="greedy")
    >>> saved = save_compressed(result.model, Path(tempfile.mkdtemp()) / "small.safetensors")
    >>> saved.payload_bytes == result.report.usage["bytes"]
    True
    >>> torch.equal(load_compressed(saved.path, make)[0].weight, result.model[0].weight)
    True
    """
    record = record_of(model)
    if record is None:
        raise ArtefactError(
            f"this {type(model).__name__} carries no record of a compression: save what apply(), compress() or "
            "load_compressed() gave"
        )
    written = {id(weight) for weight in require_unchanged(record, model)}
    tensors: dict[str, Tensor] = {}
    parts = []
    for item in record.parts:
        stored = item.stored or item.transform.encode(Weight(item.part.weight(model).cpu(), item.part.target))
        tensors |= {f"{item.part.name}/{name}": value for name, value in stored.items()}
        parts.append({"part": item.part.to_json(), "transform": item.transform.to_json(), "arrays": sorted(stored)})
    state = _state(model)
    plain = [name for name, (first, tensor) in state.items() if name == first and id(tensor) not in written]
    tensors |= {name: state[name][1].detach().cpu().contiguous().clone() for name in plain}
    header = {
        "crc32": _checksum(tensors),
        "kind": FILE_KIND, "version": FILE_VERSION, "parts": parts, "plain": plain, "state": _described(state)
    }  # fmt: skip
    metadata = {_HEADER: json.dumps(header, separators=(",", ":"))}  # one entry: several have no fixed order
    try:
        content = safetensors.torch.save(tensors, metadata)
    except (KeyError, ValueError, safetensors.SafetensorError) as error:
        raise ArtefactError(f"cannot write the model's tensors: {error!r}") from error
    with replacing(path) as file:
        file.write(content)
    payload_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return SavedFile(path=Path(path), payload_bytes=payload_bytes, file_bytes=len(content))


def load_compressed(path: AnyPath, model_factory: Callable[[], Model]) -> Model:
    """The compressed model from its file, in evaluation mode, on the device that ``model_factory`` gives.

    Args:
        path: what `save_compressed` wrote.
        model_factory: makes the original, uncompressed architecture; its weights do not matter.

    Raises:
        FileNotFoundError: there is no such file.
        ArtefactError: the file is cut short, of another kind or newer, or the architecture differs; says where.
    """
    header, tensors = _read(path)
    model = model_factory()
    if not isinstance(model, nn.Module):
        raise ArtefactError(f"model_factory must return a torch module, found {type(model).__name__}")
    try:
        parts = [_part(value, tensors) for value in header["parts"]]
        plain = {name: tensors[name] for name in header["plain"]}
        expected = header["state"]
        shapes = {name: [_dtype_name(tensor), list(tensor.shape)] for name, tensor in plain.items()}
        if wrong := [name for name in plain if shapes[name] != expected[name][:2]]:
            raise ValueError(f"{wrong[0]!r} is {shapes[wrong[0]]}, expected {expected[wrong[0]]}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtefactError(f"{path} is damaged: its header does not fit its arrays ({error!r})") from error
    _refuse(path, [difference for item in parts for difference in _part_differences(item.part, model)])
    try:
        install_(model, parts)
    except (KeyError, RuntimeError) as error:
        raise ArtefactError(f"{path} is damaged: its arrays do not give the weights back ({error})") from error
    state = _state(model)
    _refuse(path, _state_differences(expected, _described(state)))
    with torch.no_grad():
        for name, value in plain.items():
            state[name][1].copy_(value)
    record = (replace(item, stored={}) if isinstance(item.transform, Keep) else item for item in parts)
    attach(model, Compression(parts=tuple(record)))
    return model.eval()


def stored_parts(path: AnyPath) -> tuple[CompressedPart, ...]:
    """How every compressed part of a file is stored; takes no model.

    Raises:
        FileNotFoundError: there is no such file.
        ArtefactError: the file is cut short, damaged, of another kind or newer.
    """
    header, tensors = _read(path)
    try:
        return tuple(_part(value, tensors) for value in header["parts"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtefactError(f"{path} is damaged: its header does not fit its arrays ({error!r})") from error


def _read(path: AnyPath) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file.

    Raises:
        ArtefactError: it is no whole file of this kind.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        with Path(path).open("rb") as file:
            start = file.read(8)  # of a safetensors file the length of its header, which ends in zeros
        if start[:2] == b"PK" or (start[:1] == b"\x80" and any(start[2:])):
            raise ArtefactError(
                f"{path} is a pickle (as torch.save writes), which is never loaded; give a file of save_compressed()"
            ) from error
        raise ArtefactError(
            f"{path} is no whole compressed model: cut short, damaged or of another kind ({error})"
        ) from error
    if _HEADER not in metadata:
        raise ArtefactError(f"{path} is a safetensors file, but no {FILE_KIND}: it has no {_HEADER!r} header")
    try:
        header = json.loads(metadata[_HEADER])
        kind, version = header["kind"], header["version"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ArtefactError(f"{path} is damaged: no readable header in it ({error!r})") from error
    if kind != FILE_KIND or not isinstance(version, int) or version > FILE_VERSION:
        raise ArtefactError(
            f"{path} holds a {kind!r} of version {version!r}; "
            f"this program reads {FILE_KIND!r} up to version {FILE_VERSION}"
        )
    if header.get("crc32") != _checksum(tensors):
        raise ArtefactError(f"{path} is damaged: its arrays do not have the checksum they were written with")
    return header, tensors


def _checksum(tensors: dict[str, Tensor]) -> int:
    """CRC-32 over the bytes of all tensors, by name."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, value)
    return value


def _part(value: dict[str, Any], tensors: dict[str, Tensor]) -> CompressedPart:
    part, transform = Part.from_json(value["part"]), transform_from_json(value["transform"])
    stored = {name: tensors[f"{part.name}/{name}"] for name in value["arrays"]}
    found = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    if found != transform.size_bytes(part.target):
        raise ValueError(
            f"{part.name!r} has {found} bytes, {transform.label} takes {transform.size_bytes(part.target)}"
        )
    return CompressedPart(part=part, transform=transform, stored=stored)


State = dict[str, tuple[str, Tensor]]


def _state(model: nn.Module) -> State:
    """Every name of the state dict → the first name of the same tensor, and the tensor itself.

    Raises:
        ArtefactError: the state dict holds something that is no tensor.
    """
    first: dict[int, str] = {}
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise ArtefactError(
                f"the state dict's {name!r} is {type(tensor).__name__}, not a tensor: it cannot be stored"
            )
        state[name] = (first.setdefault(id(tensor), name), tensor)
    return state


def _described(state: State) -> dict[str, Any]:
    """Name → type, shape and, for a shared tensor, its first name; plain JSON."""
    return {name: [_dtype_name(tensor), list(tensor.shape), first] for name, (first, tensor) in state.items()}


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _part_differences(part: Part, model: nn.Module) -> list[str]:
    """What of ``model`` does not fit a part of the file."""
    target = part.target
    try:
        module = model.get_submodule(part.modules[0])
    except AttributeError:
        return [f"it has no layer {part.modules[0]!r}"]
    reason = layers.why_unsupported(module)
    if reason or type(module).__name__ != target.layer:
        return [f"{part.modules[0]!r} is {type(module).__name__}, in the file {target.layer}"]
    if target.window is not None:
        kernel, expected = (*module.kernel_size, module.groups), (*target.window.kernel, 1)  # type: ignore[misc]
        if kernel != expected:
            words = ["a kernel of {}×{} in {} groups".format(*own) for own in (kernel, expected)]
            return [f"{part.modules[0]!r} has {words[0]}, in the file {words[1]}"]
    rows = layers.to_rows(module, layers.weight_of(module).detach())
    start, stop = part.rows or (0, len(rows))
    if stop > len(rows) or (stop - start, rows.shape[1]) != (target.channels, target.per_channel):
        size = f"{len(rows)} channels of {rows.shape[1]} weights"
        return [f"{part.name!r} has {size}, in the file {target.channels} of {target.per_channel}"]
    return []


def _state_differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What of a state dict, as `_described`, does not fit the file's."""
    differences = [f"it lacks {name!r}" for name in expected if name not in found]
    differences += [f"it has {name!r}, the file has not" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        if expected[name] != found[name]:
            differences.append(f"{name!r} is {_words(name, found[name])}, in the file {_words(name, expected[name])}")
    return sorted(differences)


def _words(name: str, description: list[Any]) -> str:
    dtype, shape, first = description
    return f"{dtype} {tuple(shape)}" + ("" if first == name else f" shared with {first!r}")


def _refuse(path: AnyPath, differences: list[str]) -> None:
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ArtefactError(
            f"model_factory gives another architecture than {path} holds: {'; '.join(differences[:3])}{more}"
        )
