"""Samples that pass through a model block by block: forward once, then backward from the last block to the first.

Only the values passed between blocks are kept, in files; a block is in memory while all samples pass through it. Every
block whose file exists is a point to resume from.
"""

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.errors import ChainError, DataError, ModelError
from qcompress.measuring.streamed.hidden_states import HiddenStates
from qcompress.model import forward as forwards
from qcompress.model.alone import same_outputs
from qcompress.model.batches import as_float32, samples
from qcompress.model.blocks import Blocks
from qcompress.model.chain import BlockCall, BlockSequence, without_cache
from qcompress.model.opened import opened_of


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample as a batch of its own, and the index of the batch that it comes from."""

    inputs: Any
    batch: int


class BlockSweep:
    """The samples of some data on their way through a model, block by block.

    Args:
        model: a model in evaluation mode.
        opened: its blocks, and the source of their weights.
        data: re-iterable batches; a sample is a row of all tensors of a batch.
        forward: how to run a batch.
        folder: folder for the files.

    Attributes:
        samples: all samples.
        sizes: number of output rows of each sample.
        shapes, dtype: shapes and dtype of the samples' hidden states.
        before, after: paths of the modules that are called before the blocks, and after them.

    Raises:
        DataError: there is no sample, or the model does not accept one.
        ModelError: the blocks do not form a chain.
    """

    def __init__(
        self, model: nn.Module, opened: Blocks, data: Iterable[Any], forward: forwards.Forward | None, folder: Path
    ) -> None:
        self.model, self.opened, self.folder = model, opened, folder
        self.chain = BlockSequence(model, opened.blocks, forward)
        self.samples = [Sample(inputs, number) for number, batch in enumerate(data) for inputs in samples(batch)]
        if not self.samples:
            raise DataError("the calibration data holds no sample")
        with torch.no_grad():
            starts = [self._start(sample) for sample in self.samples]
            self.shapes = [start.shape for start in starts]
            self.sizes = [shape[0] for shape in self.shapes]
            with opened.loaded(opened.blocks[0]):  # finds out how a block wraps its output
                output = self.chain.block(0, starts[0], self.chain.call(0, self.samples[0].inputs)[1])
            self.dtype = output.dtype
            if torch.promote_types(output.dtype, starts[0].dtype) != output.dtype:
                raise ModelError(
                    f"{opened.blocks[0]!r} returns {output.dtype} for hidden states in {starts[0].dtype}, but blocks "
                    "that are read one by one must keep all digits: load the model into memory"
                )
            self.before, self.after = self.chain.calls_of_rest(self.samples[0].inputs, output)

    def __len__(self) -> int:
        return len(self.samples)

    def _start(self, sample: Sample) -> Tensor:
        """Return the hidden states before the first block."""
        with forwards.first_pass(sample.inputs, f"a sample of batch {sample.batch}"):
            return self.chain.call(0, sample.inputs)[0]

    def states(self, boundary: int, name: str = "states", passes: int = 1) -> HiddenStates:
        """Return the hidden states before block ``boundary`` (for the last boundary, after the last block).

        With several ``passes``, those of all samples are followed by those of all samples in the next one.
        """
        return HiddenStates(self.folder / f"{name}_{boundary:04}.bin", self.shapes * passes, self.dtype)

    def hidden(self, boundary: int, sample: int) -> Tensor:
        """Return the hidden states of a sample before block ``boundary``."""
        if boundary == 0:
            with torch.no_grad():
                return self.chain.call(0, self.samples[sample].inputs)[0]
        return self.states(boundary).read(sample)

    def through(self, block: int, sample: int, hidden: Tensor | None = None) -> Tensor:
        """Run a sample through a block whose weights are in memory, in the precision of the hidden states."""
        with torch.no_grad():
            _, call = self.chain.call(block, self.samples[sample].inputs)
        if hidden is not None and hidden.dtype != self.dtype:
            call = BlockCall(as_float32(call.args), as_float32(call.kwargs))
        return self.chain.block(block, self.hidden(block, sample) if hidden is None else hidden, call)

    def output(self, sample: int, hidden: Tensor | None = None) -> Tensor:
        """Return the model's output for a sample, from the output of the last block."""
        last = self.hidden(len(self.chain), sample) if hidden is None else hidden
        return self.chain.rest(self.samples[sample].inputs, last)

    def forward(self) -> Iterator[int]:
        """Run all samples through all blocks not yet done; yields the index of every finished block."""
        first = max((index for index in range(1, len(self.chain) + 1) if self.states(index).complete), default=0)
        for index in range(first, len(self.chain)):
            loaded, writing = self.opened.loaded(self.opened.blocks[index]), self.states(index + 1).writing()
            with loaded, writing as put, torch.no_grad():
                for sample in range(len(self)):
                    put(self.through(index, sample))
            yield index

    def require_chain(self, expected: Tensor) -> None:
        """Raise an error if running the blocks one after the other gives another output than the model's forward pass.

        Args:
            expected: the model's output for the first sample.

        Raises:
            ChainError: the outputs differ.
        """
        with torch.no_grad():
            chained = self.output(0)
        if not same_outputs(self.model, chained, expected):
            raise ChainError(
                "the model's blocks, run one after the other, do not reproduce its forward pass (it may change hidden "
                "states between them, or run them otherwise for other samples): load the model whole"
            )


@contextlib.contextmanager
def temporary_sweep(model: nn.Module, data: Iterable[Any], forward: forwards.Forward | None) -> Iterator[BlockSweep]:
    """Yield a sweep of an opened model, without gradients, in a temporary folder."""
    opened = opened_of(model)
    assert opened is not None  # noqa: S101
    with (
        tempfile.TemporaryDirectory(prefix="qcompress.") as folder,
        forwards.evaluating(model),
        without_cache(model),
        torch.no_grad(),
    ):
        yield BlockSweep(model, opened, data, forward, Path(folder))


@contextlib.contextmanager
def swept_outputs(
    model: nn.Module, data: Iterable[Any], forward: forwards.Forward | None
) -> Iterator[Iterator[tuple[Any, Tensor]]]:
    """Yield every sample of an opened model with its output, after one pass block by block."""
    with temporary_sweep(model, data, forward) as sweep:
        for done in sweep.forward():
            sweep.states(done).delete()
        yield ((sample.inputs, sweep.output(index)) for index, sample in enumerate(sweep.samples))
