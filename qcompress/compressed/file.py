"""A compressed model as one file of real bytes: codes packed, nothing stored twice, nothing left out.

The file holds the arrays of every part and every other tensor that the model holds (see `qcompress.model.tensors`). No
pickle is written or read. What always holds: the arrays take exactly the predicted bytes, what is around them a few
bytes a tensor, and the loaded model holds the saved one's tensors bit for bit, which a digest in the file proves.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from torch import nn

from formulations.files import AnyPath, replacing
from qcompress.compressed import container
from qcompress.compressed.cutting import cut_
from qcompress.compressed.fitting import cut_differences, part_differences, put_, refuse, state_differences
from qcompress.compressed.index import Contents, described
from qcompress.compressed.packed import is_packed, pack_
from qcompress.compressed.record import CompressedPart, Compression, attach, install_, record_of, require_unchanged
from qcompress.errors import ArtefactError
from qcompress.model.composed import compose_
from qcompress.model.tensors import bytes_of, digest_of, held_tensors
from qcompress.transforms.base import Keep, Weight

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedSize:
    """How large the file of a compressed model is.

    Attributes:
        payload_bytes: of all arrays, as predicted.
        file_bytes: with the header.
    """

    payload_bytes: int
    file_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedFile(CompressedSize):
    """What `save_compressed` wrote."""

    path: Path


def save_compressed(model: nn.Module, path: AnyPath) -> SavedFile:
    """Write a model that `apply` or `load_compressed` gave, whole or not at all.

    Raises:
        ArtefactError: the model was not compressed, a compressed weight was changed since, or the model does not take
            the bytes that were predicted.

    >>> import tempfile, torch
    >>> from qcompress import compress
    >>> make = lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> result = compress(make(), [torch.randn(32, 64)], budget={"bytes": 0.2}, solver="greedy")
    >>> saved = save_compressed(result.model, Path(tempfile.mkdtemp()) / "small.safetensors")
    >>> saved.payload_bytes == result.report.usage["bytes"]
    True
    >>> torch.equal(load_compressed(saved.path, make)[0].weight, result.model[0].weight)
    True
    """
    contents = _contents(model)
    head = container.head(contents, digest_of(model))
    with replacing(path) as file:
        file.write(head)
        for array in contents.arrays:
            file.write(bytes_of(array))
    return SavedFile(
        path=Path(path), payload_bytes=contents.payload_bytes, file_bytes=len(head) + contents.payload_bytes
    )


def compressed_size(model: nn.Module) -> CompressedSize:
    """The exact size of the file that `save_compressed` would write.

    Raises:
        ArtefactError: as there.

    >>> import torch
    >>> from qcompress import compress
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> size = compressed_size(compress(model, [torch.randn(32, 64)], budget={"bytes": 0.2}, solver="greedy").model)
    >>> size.file_bytes - size.payload_bytes < 2000
    True
    """
    contents = _contents(model)
    head = container.head(contents, digest="0" * 64)  # every digest takes the same bytes
    return CompressedSize(payload_bytes=contents.payload_bytes, file_bytes=len(head) + contents.payload_bytes)


def load_compressed(path: AnyPath, model_factory: Callable[[], Model], *, packed: bool = False) -> Model:
    """The compressed model from its file, in evaluation mode, on the device that ``model_factory`` gives.

    Args:
        path: what `save_compressed` wrote.
        model_factory: makes the original, uncompressed architecture; its weights do not matter.
        packed: let the weights stay packed in memory and decode them where they are used, see `pack_`.

    Raises:
        FileNotFoundError: there is no such file.
        ArtefactError: the file is cut short, of another kind or newer, the architecture differs (says where), or the
            model that comes out is not the one that was saved.
    """
    contents, digest = container.read(path)
    model = model_factory()
    if not isinstance(model, nn.Module):
        raise ArtefactError(f"model_factory must return a torch module, found {type(model).__name__}")
    compose_(model, contents.state)
    if contents.cuts:
        refuse(path, cut_differences(contents, model))
        cut_(model, contents.cuts)
    refuse(path, [difference for item in contents.parts for difference in part_differences(item.part, model)])
    try:
        install_(model, contents.parts)
    except (KeyError, RuntimeError) as error:
        raise ArtefactError(f"{path} is damaged: its arrays do not give the weights back ({error})") from error
    refuse(path, state_differences(contents.state, described(held_tensors(model))))
    put_(model, contents)
    if digest is not None and digest_of(model) != digest:
        raise ArtefactError(
            f"the model loaded from {path} is not the one that was saved: its tensors have another digest. A tensor of "
            "what model_factory gives may lie in another one's memory, or change as it is set"
        )
    parts = tuple(replace(item, stored={}) if isinstance(item.transform, Keep) else item for item in contents.parts)
    attach(
        model,
        Compression(parts=parts, payload_bytes=contents.payload_bytes - contents.left_out_bytes, cuts=contents.cuts),
    )
    return pack_(model.eval()) if packed else model.eval()


def stored_parts(path: AnyPath) -> tuple[CompressedPart, ...]:
    """How every compressed part of a file is stored; takes no model.

    Raises:
        FileNotFoundError: there is no such file.
        ArtefactError: the file is cut short, damaged, of another kind or newer.
    """
    return container.read(path)[0].parts


def _contents(model: nn.Module) -> Contents:
    """What the file of ``model`` is to hold."""
    record = record_of(model)
    if record is None:
        raise ArtefactError(
            f"this {type(model).__name__} carries no record of a compression: save what apply(), compress() or "
            "load_compressed() gave"
        )
    if is_packed(model):
        raise ArtefactError(
            "the weights of this model are packed: save it before pack_(), or copy the file it came from"
        )
    written = {id(weight) for weight in require_unchanged(record, model)}
    parts = tuple(
        item
        if item.stored
        else replace(item, stored=item.transform.encode(Weight(item.part.weight(model).cpu(), item.part.target)))
        for item in record.parts
    )
    container.require_tensors(model)
    held = held_tensors(model)
    state = described(held)
    plain = {
        item.name: item.tensor
        for item in held
        if state[item.name].first == item.name and id(item.tensor) not in written
    }
    contents = Contents(parts=parts, plain=plain, state=state, cuts=record.cuts)
    predictable = contents.payload_bytes - contents.left_out_bytes
    if record.payload_bytes is not None and predictable != record.payload_bytes:
        raise ArtefactError(
            f"the model takes {predictable:,} bytes, not the {record.payload_bytes:,} that were "
            "predicted: tensors were added to it, removed from it, or no longer share memory since it was compressed"
        )
    return contents
