"""Weights of a compressed opened model: codes in a folder of files, decoded when a weight is read.

Every file holds the arrays of one block's parts (``PART:ARRAY`` in a safetensors file). Weights that are not compressed
are read from the original's files.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from formulations.files import replacing
from qcompress.compressed.record import CompressedPart, Compression, attach
from qcompress.measurement import Measurement
from qcompress.model.composed import compose_
from qcompress.model.opened import opened_from, opened_of
from qcompress.model.tensors import all_names
from qcompress.model.weight_files import StoredTensor, WeightFiles
from qcompress.transforms.base import Keep, Transform


class StoredArrays(Mapping[str, Tensor]):
    """The arrays of a part, read from their file on every access."""

    def __init__(self, files: WeightFiles, part: str) -> None:
        self._files = files
        self._names = {name.rpartition(":")[2]: name for name in files if name.rpartition(":")[0] == part}

    def __getitem__(self, key: str) -> Tensor:
        return self._files.read(self._names[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class ChosenWeights(WeightFiles):
    """Weight files in which every compressed weight is decoded from its codes.

    Args:
        files: files of the original.
        parts: how each part is stored.
        model: the original model, whose modules determine how weights are viewed as rows.
    """

    def __init__(self, files: WeightFiles, parts: Sequence[CompressedPart], model: nn.Module) -> None:
        self.folder, self._original, self._model = files.folder, files, model
        self._of: dict[str, list[CompressedPart]] = {}
        names: dict[int, list[str]] = {}  # a weight that modules share under different names has all of them
        for name, tensor in all_names(model).items():
            names.setdefault(id(tensor), []).append(name)
        for item in parts:
            for name in names[id(item.part.site(model).weight)] if item.stored else ():
                self._of.setdefault(name, []).append(item)

    def __getitem__(self, name: str) -> StoredTensor:
        return self._original[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._original)

    def __len__(self) -> int:
        return len(self._original)

    def read(self, name: str) -> Tensor:
        """Return the values of a tensor; those of a compressed part are decoded from its codes."""
        items = self._of.get(name)
        if items is None:
            return self._original.read(name)
        site = items[0].part.site(self._model)
        shape = site.weight.shape
        if items[0].part.rows is None:
            return site.restored(items[0].rows(), shape)
        rows = site.to_rows(self._original.read(name) if name in self._original else site.weight.detach()).clone()
        for item in items:
            assert item.part.rows is not None  # noqa: S101
            rows[slice(*item.part.rows)] = item.rows().to(rows)
        return site.restored(rows, shape)

    def put_computed_(self, model: nn.Module) -> None:
        """Decode those weights of a copy of the model that the original computes from others in its files."""
        compose_(model)
        model.requires_grad_(False)
        for name in self._of.keys() - self._original.keys():
            if not (weight := model.get_parameter(name)).is_meta:
                weight.data.copy_(self.read(name))


def write_codes(path: Path, codes: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write the arrays of parts by their names, atomically."""
    from safetensors.torch import save

    arrays = {
        f"{part}:{key}": array.contiguous()
        for part, arrays_of_part in codes.items()
        for key, array in arrays_of_part.items()
    }
    with replacing(path) as file:
        file.write(save(arrays))


def chosen_model(
    model: nn.Module, measurement: Measurement, transforms: Sequence[Transform], folder: Path
) -> nn.Module:
    """Return an opened model with the weights decoded from a folder of codes, with its record.

    Args:
        model: the original, opened model.
        measurement: measurement of ``model``.
        transforms: the chosen transform of every part.
        folder: folder with the codes of all parts that are not kept.
    """
    opened = opened_of(model)
    assert opened is not None  # noqa: S101
    files = WeightFiles(folder) if any(folder.glob("*.safetensors")) else None
    parts = []
    for part, transform in zip(measurement.parts, transforms, strict=True):
        kept = isinstance(transform, Keep) or files is None
        stored = {} if kept or files is None else StoredArrays(files, part.name)
        parts.append(CompressedPart(part=part, transform=transform, stored=cast("dict[str, Tensor]", stored)))
    weights = ChosenWeights(opened.files, parts, model)
    chosen = opened_from(weights, dtype=opened.dtype, make=opened.make, blocks=opened.blocks, like=model)
    weights.put_computed_(chosen)
    for name in ("config", "generation_config"):
        if hasattr(model, name):
            setattr(chosen, name, getattr(model, name))
    chosen_bytes = sum(item.transform.size_bytes(item.part.target) for item in parts)
    attach(chosen, Compression(parts=tuple(parts), payload_bytes=int(measurement.fixed["bytes"]) + chosen_bytes))
    return chosen
