"""Hidden states of all samples between two blocks, in a file: written once in order, read in any order.

The bytes of every sample are followed by their checksum (CRC-32), so that damage is found when they are read.
"""

import contextlib
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from formulations.errors import FileFormatError
from formulations.files import replacing
from qcompress.model.tensors import bytes_of

CHECKSUM_BYTES = 4


class HiddenStates:
    """A file with one tensor of known shape per sample.

    Args:
        path: path of the file, which appears once all samples are written.
        shapes: shapes of the samples' tensors.
        dtype: dtype of all tensors.

    >>> import tempfile
    >>> states = HiddenStates(Path(tempfile.mkdtemp()) / "states.bin", [(2,), (1, 3)], torch.bfloat16)
    >>> with states.writing() as put:
    ...     put(torch.ones(2))
    ...     put(torch.zeros(1, 3))
    >>> states.complete, states.read(1)
    (True, tensor([[0., 0., 0.]], dtype=torch.bfloat16))
    """

    def __init__(self, path: Path, shapes: Sequence[torch.Size | tuple[int, ...]], dtype: torch.dtype) -> None:
        self.path, self._dtype = path, dtype
        self._shapes = [torch.Size(shape) for shape in shapes]
        sizes = (shape.numel() * dtype.itemsize + CHECKSUM_BYTES for shape in self._shapes)
        self._starts = [0, *itertools.accumulate(sizes)]

    @property
    def complete(self) -> bool:
        """Whether the file holds all samples."""
        return self.path.exists() and self.path.stat().st_size == self._starts[-1]

    @contextlib.contextmanager
    def writing(self) -> Iterator[Callable[[Tensor], None]]:
        """Yield a function that takes the samples' tensors in order; create the file on exit."""
        with replacing(self.path) as file:
            shapes = iter(self._shapes)

            def put(states: Tensor) -> None:
                assert states.shape == next(shapes)  # noqa: S101
                numbers = bytes_of(states.to(self._dtype))
                file.write(numbers)
                file.write(zlib.crc32(numbers).to_bytes(CHECKSUM_BYTES))

            yield put

    def read(self, sample: int) -> Tensor:
        """Read the tensor of a sample.

        Raises:
            FileFormatError: the file is missing, truncated or damaged.
        """
        start, stop = self._starts[sample : sample + 2]
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                numbers, checksum = bytearray(file.read(stop - start - CHECKSUM_BYTES)), file.read(CHECKSUM_BYTES)
        except FileNotFoundError as error:
            raise FileFormatError(f"{self.path} is missing") from error
        if len(checksum) < CHECKSUM_BYTES or zlib.crc32(numbers) != int.from_bytes(checksum):
            raise FileFormatError(f"{self.path} is damaged: the checksum of sample {sample} does not match")
        return torch.frombuffer(numbers, dtype=self._dtype).view(self._shapes[sample])

    def delete(self) -> None:
        """Delete the file if it exists."""
        self.path.unlink(missing_ok=True)
