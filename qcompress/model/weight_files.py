"""The tensors in a folder's safetensors files by name, read one at a time.

Tensors are read into memory, never memory-mapped, so that the process holds only what it asked for, even under a limit
on its address space.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qcompress.errors import ModelError

MAIN, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Location of a tensor: ``nbytes`` bytes of ``file`` from ``start`` on."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


class WeightFiles(Mapping[str, StoredTensor]):
    """The tensors in the safetensors files of a folder.

    Args:
        folder: folder of the files. As in transformers, the first of ``first`` that exists is read alone (an index
            stands for the files that it lists); without any, all files are.
        first: names of files, in their order.
        more: names of files that are read with it where they exist.

    Raises:
        ModelError: there are no such files, one is damaged, or two hold a tensor of the same name.

    >>> import tempfile
    >>> from safetensors.torch import save_file
    >>> folder = Path(tempfile.mkdtemp())
    >>> save_file({"weight": torch.eye(2)}, folder / "model.safetensors")
    >>> WeightFiles(folder).read("weight").tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """

    def __init__(self, folder: Path, first: Sequence[str] = (MAIN, INDEX), more: Sequence[str] = ()) -> None:
        self.folder = folder
        main = next((name for name in first if (folder / name).is_file()), "")
        files = [folder / main] if main else sorted(folder.glob("*.safetensors"))
        if main.endswith(".index.json"):
            files = _listed(folder / main)
        files += [folder / name for name in more if (folder / name).is_file() and folder / name not in files]
        if folder.is_file():
            raise ModelError(f"{folder} is a file; name the folder that holds the model's safetensors files")
        if not files:
            raise ModelError(f"{folder} has no safetensors files; save the model with save_pretrained(folder)")
        self._tensors: dict[str, StoredTensor] = {}
        for file in files:
            for name, stored in _header(file).items():
                if name in self._tensors:
                    raise ModelError(
                        f"both {self._tensors[name].file} and {file} hold {name!r}: leave only the model's own "
                        f"files in the folder, or call the one to read {MAIN}"
                    )
                self._tensors[name] = stored

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def dtype(self) -> torch.dtype | None:
        """The type of the first tensor of floating-point numbers, which transformers takes as the model's; or None."""
        return next((stored.dtype for stored in self.values() if stored.dtype in FLOATS), None)

    def read(self, name: str) -> Tensor:
        """Read a tensor in its stored type.

        Raises:
            ModelError: the file is truncated.
        """
        stored = self._tensors[name]
        numbers = torch.empty(stored.nbytes, dtype=torch.uint8)
        with stored.file.open("rb", buffering=0) as file:
            file.seek(stored.start)
            place, view = 0, numbers.numpy().data
            while place < stored.nbytes and (count := file.readinto(view[place:])):
                place += count
        if place < stored.nbytes:
            raise ModelError(f"{stored.file} ends within {name!r}: the file is truncated")
        return numbers.view(stored.dtype).view(stored.shape)


def _listed(index: Path) -> list[Path]:
    """Return the files that an index lists.

    Raises:
        ModelError: it is damaged, or a file is missing.
    """
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [index.parent / name for name in dict.fromkeys(listed.values())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not an index of safetensors files: {error!r}") from error
    if absent := [file.name for file in files if not file.is_file()]:
        raise ModelError(
            f"{index.parent} has no {absent[0]} ({len(absent)} of the {len(files)} files in {index.name} are missing): "
            "download or copy the folder again"
        )
    return files


def _header(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors listed in a file's header.

    Raises:
        ModelError: the file does not exist or is not a valid safetensors file.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= file.stat().st_size - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, stop = entry["data_offsets"]
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            if stop - start != math.prod(shape) * dtype.itemsize or 8 + length + stop > file.stat().st_size:
                raise ValueError(f"the data of {name!r} lies outside the file")
            tensors[name] = StoredTensor(
                file=file, dtype=dtype, shape=shape, start=8 + length + start, nbytes=stop - start
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file} is not a complete safetensors file: {error}") from error
    return tensors
