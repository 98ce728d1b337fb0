"""Checkpoints of encoded options, kept on disk until a measurement is complete.

Encoding compensated options takes minutes to hours, before the first batch is measured. An interrupted measurement
reads the codes of each part from a folder beside its cache. They are reused only if everything that they depend on is
unchanged, including the values of the weight and the statistics of its inputs.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from formulations import FileFormatError
from formulations.file_kinds import FileKind
from qcompress.errors import DataError
from qcompress.model.tensors import byte_tensor, bytes_of
from qcompress.options import Fitted, Options, transform_from_json
from qcompress.run_folder import remove
from qcompress.transforms.base import Weight

FILE_KIND = FileKind("qcompress codes", version=1)


class KeptCodes:
    """A folder with the codes of each part.

    Args:
        folder: created when the first codes are written; None keeps nothing.
        code: digest of the code of all options before any of it ran.

    Raises:
        DataError: ``folder`` is a file.

    >>> import tempfile
    >>> from qcompress.options import prune_quantize
    >>> from qcompress.transforms.base import Target
    >>> target = Target(layer="Linear", channels=2, per_channel=4, dtype=torch.float32, macs=8.0)
    >>> weight, kept = Weight(torch.eye(2, 4), target), KeptCodes(Path(tempfile.mkdtemp()), "")
    >>> offered = prune_quantize(bits=(4,), sparsity=(0,))
    >>> [fitted.transform.label for fitted in kept.once(0, offered, weight, lambda: offered.for_weight(weight))]
    ['keep', '4 bits']
    >>> [fitted.transform.label for fitted in kept.once(0, offered, weight, lambda: ())]
    ['keep', '4 bits']
    """

    def __init__(self, folder: Path | None, code: str) -> None:
        if folder is not None and folder.is_file():
            raise DataError(f"encoded options are kept in a folder {folder}, which is a file: choose another cache")
        self._folder, self._code = folder, code

    def once(
        self, index: int, offered: Options, weight: Weight, make: Callable[[], tuple[Fitted, ...]]
    ) -> tuple[Fitted, ...]:
        """Return the encoded options of a part from the folder, or encode them and keep them there.

        Args:
            index: index of the part.
            offered: options of the part.
            weight: its weight, with the statistics of its inputs.
            make: function that encodes the options.
        """
        if self._folder is None:
            return make()
        file, key = self._folder / f"{index}.npz", _key(offered, self._code, weight)
        if file.exists() and (codes := _read(file, key)) is not None:
            return codes
        made = make()
        self._folder.mkdir(parents=True, exist_ok=True)
        _write(file, key, made)
        return made

    def done(self) -> None:
        """Delete the folder."""
        if self._folder is not None:
            remove(self._folder)


NOTHING_KEPT = KeptCodes(None, "")


def _key(offered: Options, code: str, weight: Weight) -> str:
    """Return a digest of everything that codes depend on."""
    target = weight.target
    described = [
        offered.to_json(),
        code,
        repr(target),
        float(weight.num_inputs),
        repr(weight.ranges),
    ]
    digest = hashlib.sha256(json.dumps(described).encode())
    for values in (weight.rows, weight.moments, weight.squares):
        digest.update(b"none" if values is None else f"{values.dtype} {tuple(values.shape)}".encode())
        if values is not None:
            digest.update(bytes_of(values))
    return digest.hexdigest()


def _write(file: Path, key: str, options: tuple[Fitted, ...]) -> None:
    header = {
        "key": key,
        "transforms": [option.transform.to_json() for option in options],
        "errors": [option.error for option in options],
        "stored": [
            {
                name: [str(values.dtype).removeprefix("torch."), list(values.shape)]
                for name, values in option.stored.items()
            }
            for option in options
        ],
    }
    arrays = {
        f"{number}.{name}": byte_tensor(values).numpy()
        for number, option in enumerate(options)
        for name, values in option.stored.items()
    }
    FILE_KIND.write_arrays(file, header, arrays)


def _read(file: Path, key: str) -> tuple[Fitted, ...] | None:
    """Return the codes in a file; None if they belong to another key or the file is damaged."""
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
        return None  # the codes are computed again
