"""What the options of every part come to, kept on disk while a measurement is on its way.

Working out compensated codes takes minutes to hours, before the first batch is measured. A cut measurement finds them
again, part by part, in a folder beside its cache. What always holds: they are taken again only where everything that
they were worked out from is the same, the numbers of the weight and of its inputs included.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from formulations import FileFormatError
from formulations.file_kinds import FileKind
from qcompress.options import Fitted, Options, transform_from_json
from qcompress.run_folder import remove
from qcompress.transforms.base import Weight

FILE_KIND = FileKind("qcompress codes", version=1)


class KeptCodes:
    """A folder of codes, or none.

    Args:
        folder: made when there is something to keep; None keeps nothing.

    >>> import tempfile
    >>> from qcompress.options import prune_quantize
    >>> from qcompress.transforms.base import Target
    >>> target = Target(layer="Linear", channels=2, per_channel=4, dtype=torch.float32, macs=8.0)
    >>> weight, kept = Weight(torch.eye(2, 4), target), KeptCodes(Path(tempfile.mkdtemp()))
    >>> offered = prune_quantize(bits=(4,), sparsity=(0,))
    >>> [own.transform.label for own in kept.once(0, offered, weight, lambda: offered.for_weight(weight))]
    ['keep', '4 bits']
    >>> [own.transform.label for own in kept.once(0, offered, weight, lambda: ())]
    ['keep', '4 bits']
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def once(
        self, index: int, offered: Options, weight: Weight, make: Callable[[], tuple[Fitted, ...]]
    ) -> tuple[Fitted, ...]:
        """What ``make`` gives for a part's weight: from the folder, or made and kept there.

        Args:
            index: of the part.
            offered: what is on offer for it.
            weight: with what is known of its inputs.
            make: works it out.
        """
        if self._folder is None:
            return make()
        file, key = self._folder / f"{index}.npz", _key(offered, weight)
        if file.exists() and (found := _read(file, key)) is not None:
            return found
        made = make()
        self._folder.mkdir(parents=True, exist_ok=True)
        _write(file, key, made)
        return made

    def done(self) -> None:
        """Delete the folder."""
        if self._folder is not None:
            remove(self._folder)


NOTHING_KEPT = KeptCodes(None)


def _key(offered: Options, weight: Weight) -> str:
    """A digest of all that codes depend on."""
    target = weight.target
    described = [offered.to_json(), repr(target), float(weight.num_inputs), repr(weight.ranges)]
    digest = hashlib.sha256(json.dumps(described).encode())
    for values in (weight.rows, weight.moments, weight.squares):
        digest.update(b"none" if values is None else f"{values.dtype} {tuple(values.shape)}".encode())
        if values is not None:
            digest.update(_bytes_of(values).data)
    return digest.hexdigest()


def _bytes_of(values: Tensor) -> Any:
    return values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _write(file: Path, key: str, found: tuple[Fitted, ...]) -> None:
    header = {
        "key": key,
        "transforms": [own.transform.to_json() for own in found],
        "errors": [own.error for own in found],
        "stored": [
            {
                name: [str(values.dtype).removeprefix("torch."), list(values.shape)]
                for name, values in own.stored.items()
            }
            for own in found
        ],
    }
    arrays = {
        f"{option}.{name}": _bytes_of(values) for option, own in enumerate(found) for name, values in own.stored.items()
    }
    FILE_KIND.write_arrays(file, header, arrays)


def _read(file: Path, key: str) -> tuple[Fitted, ...] | None:
    """What is in a file of that key; None where it is of another, or is damaged."""
    try:
        header, arrays = FILE_KIND.read_arrays(file)
        with FILE_KIND.building(file):
            if header["key"] != key:
                return None
            return tuple(
                Fitted(
                    transform=transform_from_json(transform),
                    stored={
                        name: torch.from_numpy(np.array(arrays[f"{option}.{name}"]))
                        .view(getattr(torch, dtype))
                        .reshape(shape)
                        for name, (dtype, shape) in stored.items()
                    },
                    error=error,
                )
                for option, (transform, error, stored) in enumerate(
                    zip(header["transforms"], header["errors"], header["stored"], strict=True)
                )
            )
    except FileFormatError:
        return None  # made anew
