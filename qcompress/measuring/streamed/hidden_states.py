"""Hidden states of all samples between two blocks, in a file: written once in order, read in any order."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from formulations.files import replacing
from qcompress.model.tensors import bytes_of


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
        sizes = (shape.numel() * dtype.itemsize for shape in self._shapes)
        self._starts = [0, *itertools.accumulate(sizes)]

    @property
    def complete(self) -> bool:
        """Whether the file holds all samples."""
        return self.path.exists() and self.path.stat().st_size == self._starts[-1]

    @contextlib.contextmanager
    def writing(self) -> Iterator[Callable[[Tensor], None]]:
        """Context manager with a function that takes the samples' tensors in order; creates the file at its end."""
        with replacing(self.path) as file:
            shapes = iter(self._shapes)

            def put(states: Tensor) -> None:
                assert states.shape == next(shapes)  # noqa: S101
                file.write(bytes_of(states.to(self._dtype)))

            yield put

    def read(self, sample: int) -> Tensor:
        """Read the tensor of a sample."""
        start, stop = self._starts[sample : sample + 2]
        with self.path.open("rb") as file:
            file.seek(start)
            numbers = bytearray(file.read(stop - start))
        return torch.frombuffer(numbers, dtype=self._dtype).view(self._shapes[sample])

    def delete(self) -> None:
        """Delete the file if it exists."""
        self.path.unlink(missing_ok=True)
