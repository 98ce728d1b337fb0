"""Save and load a compressed model as one file: codes packed, every tensor stored once, and none left out.

The file holds the arrays of every part and all other tensors of the model (see `qcompress.model.tensors`). No pickle is
written or read. The arrays take exactly the predicted number of bytes, and the rest of the file a few bytes per tensor.
The loaded model's tensors equal the saved ones bit for bit, which is verified by a digest in the file.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from torch import nn

from formulations.files import AnyPath, replacing
from qcompress.compressed import container
from qcompress.compressed.bypassed import bypass_
from qcompress.compressed.cutting import beyond, cut_
from qcompress.compressed.index import Contents, described
from qcompress.compressed.loading import (
    bypass_differences,
    cut_differences,
    part_differences,
    put_,
    refuse,
    state_differences,
)
from qcompress.compressed.packed import is_packed, pack_
from qcompress.compressed.record import (
    CompressedPart,
    Compression,
    attach,
    bypasses_in,
    install_,
    record_of,
    require_unchanged,
)
from qcompress.errors import ArtefactError, OptionsError, found
from qcompress.model.composed import compose_
from qcompress.model.modes import outside_modes
from qcompress.model.opened import require_in_memory
from qcompress.model.tensors import bytes_of, digest_of, held_tensors
from qcompress.scalars import as_flag
from qcompress.transforms.base import Keep, Weight

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedSize:
    """Size of a compressed model's file.

    Attributes:
        payload_bytes: bytes of all arrays, as predicted.
        file_bytes: bytes of the whole file, including the header.
    """

    payload_bytes: int
    file_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedFile(CompressedSize):
    """Result of `save_compressed`."""

    path: Path


def save_compressed(model: nn.Module, path: AnyPath) -> SavedFile:
    """Write a model returned by `apply`, `compress` or `load_compressed` to a file, atomically.

    Raises:
        ArtefactError: the model was not compressed, a compressed weight has changed since, or the model does not take
            the predicted number of bytes.

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
    """Return the exact size of the file that `save_compressed` would write.

    Raises:
        ArtefactError: same as in `save_compressed`.

    >>> import torch
    >>> from qcompress import compress
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> size = compressed_size(compress(model, [torch.randn(32, 64)], budget={"bytes": 0.2}, solver="greedy").model)
    >>> size.file_bytes - size.payload_bytes < 2000
    True
    """
    contents = _contents(model)
    head = container.head(contents, digest="0" * 64)  # all digests have the same length
    return CompressedSize(payload_bytes=contents.payload_bytes, file_bytes=len(head) + contents.payload_bytes)


@outside_modes
def load_compressed(path: AnyPath, model_factory: Callable[[], Model], *, packed: bool = False) -> Model:
    """Load a compressed model from its file, in evaluation mode, on the device that ``model_factory`` uses.

    Args:
        path: file written by `save_compressed`.
        model_factory: function that makes the original, uncompressed architecture; its weights do not matter.
        packed: whether to keep the weights packed in memory and decode them on use, see `pack_`. They are then no
            parameters any more: a model that takes them from ``named_parameters()``, or sets them, does not run.

    Raises:
        FileNotFoundError: the file does not exist.
        ArtefactError: the file is truncated, of another kind or version, the architecture differs (the
            message says where), or the loaded model differs from the saved one.
    """
    packed = as_flag(packed, "packed")
    if isinstance(model_factory, nn.Module) or not callable(model_factory):
        raise OptionsError(
            "load_compressed takes a function that makes the original model, such as its class or lambda: Net(), "
            f"found {type(model_factory).__name__}"
        )
    contents, digest = container.read(path)
    model = model_factory()
    if not isinstance(model, nn.Module):
        raise ArtefactError(
            f"the function for the original model must return a torch module, found {found(model, nn.Module)}"
        )
    if without := [item.name for item in held_tensors(model) if item.tensor.is_meta]:
        raise ArtefactError(
            f"{without[0]!r} of the given model is on the meta device, where nothing can be loaded: make the model on "
            "the CPU or an accelerator"
        )
    compose_(model, {*contents.state, *(name for item in contents.parts for name in item.part.state_names)})
    if contents.cuts or contents.bypasses:
        earlier = record_of(model)  # the given model may itself be the result of an earlier removal
        bypasses = tuple(item for item in contents.bypasses if item not in bypasses_in(model))
        refuse(path, bypass_differences(bypasses, model))
        bypass_(model, bypasses)
        cuts = contents.cuts if earlier is None else beyond(contents.cuts, earlier.cuts, model)
        refuse(path, cut_differences(contents, cuts, model))
        cut_(model, cuts)
    refuse(path, [difference for item in contents.parts for difference in part_differences(item.part, model)])
    try:
        install_(model, contents.parts)
    except (KeyError, RuntimeError) as error:
        raise ArtefactError(f"{path} is damaged: its arrays cannot be decoded to weights ({error})") from error
    refuse(path, state_differences(contents.state, described(held_tensors(model))))
    put_(model, contents)
    if digest_of(model) != digest:
        raise ArtefactError(
            f"the model loaded from {path} is not the one that was saved: its tensors have another digest. Tensors of "
            "the given model may share memory, or change when they are set"
        )
    parts = tuple(replace(item, stored={}) if isinstance(item.transform, Keep) else item for item in contents.parts)
    attach(
        model,
        Compression(
            parts=parts,
            payload_bytes=contents.payload_bytes - contents.left_out_bytes,
            cuts=contents.cuts,
            bypasses=contents.bypasses,
        ),
    )
    return pack_(model.eval()) if packed else model.eval()


def stored_parts(path: AnyPath) -> tuple[CompressedPart, ...]:
    """Return how every compressed part of a file is stored; no model is needed.

    Raises:
        FileNotFoundError: the file does not exist.
        ArtefactError: the file is truncated, damaged, of another kind or version.
    """
    return container.read(path)[0].parts


def _contents(model: nn.Module) -> Contents:
    """Return the contents of the file for ``model``."""
    require_in_memory(model, "save_compressed", "export() writes its folder")
    record = record_of(model)
    if record is None:
        raise ArtefactError(
            f"this {type(model).__name__} carries no record of a compression: save a model returned by apply(), "
            "compress() or load_compressed()"
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
    contents = Contents(parts=parts, plain=plain, state=state, cuts=record.cuts, bypasses=record.bypasses)
    predictable = contents.payload_bytes - contents.left_out_bytes
    if record.payload_bytes is not None and predictable != record.payload_bytes:
        raise ArtefactError(
            f"the model takes {predictable:,} bytes, not the {record.payload_bytes:,} that were "
            "predicted: tensors were added to it, removed from it, or no longer share memory since it was compressed"
        )
    return contents
