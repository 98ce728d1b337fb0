"""A folder of compressed-tensors that is read one weight at a time, unpacked by compressed-tensors itself."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from qcompress.errors import ModelError
from qcompress.model.hugging_face import CONFIG, read_json
from qcompress.model.weight_files import FLOATS, StoredTensor, WeightFiles


class PackedFiles(WeightFiles):
    """A folder's files presented as if all weights were dense; compressed-tensors itself unpacks the packed ones.

    Args:
        folder: a folder written by the engine.

    Raises:
        ModelError: its ``config.json`` or its weights are missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        config = read_json(folder / CONFIG)
        groups = config.get("quantization_config", {}).get("config_groups", {}).values()
        dtype = getattr(torch, str(config.get("dtype")), None)
        if dtype not in FLOATS:
            raise ModelError(f"{folder / CONFIG} names no dtype of the model: write the folder again")
        self._dtype: torch.dtype = dtype
        self._schemes = {f"{module}.weight": group["weights"] for group in groups for module in group["targets"]}

    @property
    def has_zero_points(self) -> bool:
        """Whether any weight has zero points."""
        return any(not scheme["symmetric"] for scheme in self._schemes.values())

    def __getitem__(self, name: str) -> StoredTensor:
        if name not in self._schemes:
            return super().__getitem__(name)
        packed = super().__getitem__(f"{name}_packed")
        shape = tuple(super().read(f"{name}_shape").tolist())
        return dataclasses.replace(packed, shape=shape, dtype=self._dtype)

    def __iter__(self) -> Iterator[str]:
        yield from self._schemes
        yield from super().__iter__()

    def __len__(self) -> int:
        return super().__len__() + len(self._schemes)

    def read(self, name: str) -> Tensor:
        """Read a tensor; a packed weight is returned in the dtype that the model computes in."""
        if name not in self._schemes:
            return super().read(name)
        from compressed_tensors.compressors import PackedQuantizationCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        scheme = QuantizationScheme(targets=[name], weights=QuantizationArgs(**self._schemes[name]))
        keys = ("packed", "scale", "shape") + (() if self._schemes[name]["symmetric"] else ("zero_point",))
        arrays = {f"weight_{key}": super(PackedFiles, self).read(f"{name}_{key}") for key in keys}
        arrays["weight_scale"] = arrays["weight_scale"].to(self._dtype)
        numbers: Tensor = PackedQuantizationCompressor.decompress(arrays, scheme)["weight"]
        return numbers
