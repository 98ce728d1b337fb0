"""Values that depend on weights before the blocks, other than the hidden states.

There are two kinds. Other inputs of the blocks, such as an encoder's output: their gradients are kept in files while
the samples pass backward through the blocks, and continue from there through what comes before the blocks. And values
that go around the blocks to what follows them (`before_and_after`).
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qcompress.errors import ChainError
from qcompress.measuring.streamed.hidden_states import HiddenStates
from qcompress.measuring.streamed.sweep import BlockSweep
from qcompress.model.chain import BlockCall
from qcompress.model.modes import differentiable
from qcompress.model.parts import Part


class SideInputs:
    """The tensors among the other arguments of blocks that depend on some weights, and their gradients.

    Args:
        sweep: the samples.
        weights: the weights before the blocks.
        passes: how many times all samples pass backward, one after the other.

    Raises:
        ChainError: other arguments depend on them for some samples than for the first.
    """

    def __init__(self, sweep: BlockSweep, weights: Sequence[nn.Parameter], *, passes: int) -> None:
        self._sweep = sweep
        kinds: list[list[dict[int, tuple[torch.Size, torch.dtype]]]] = []
        for sample in sweep.samples:  # only shapes and dtypes are kept, as the tensors may be large
            with differentiable(weights), torch.enable_grad():
                _, calls = sweep.chain.calls(sample.inputs)
            kinds.append([_dependent(call) for call in calls])
        self._places = [list(of_block) for of_block in kinds[0]]
        for of_sample in kinds:
            for block, places in enumerate(self._places):
                if list(of_sample[block]) != places:
                    raise ChainError(
                        f"the model gives {sweep.opened.blocks[block]!r} other arguments that depend on its weights "
                        "for some samples, which cannot be followed block by block: load the model into memory"
                    )
        self._files = [
            [
                HiddenStates(
                    sweep.folder / f"side_{block:04}_{place}.bin",
                    [of_sample[block][place][0] for of_sample in kinds] * passes,
                    kinds[0][block][place][1],
                )
                for place in places
            ]
            for block, places in enumerate(self._places)
        ]

    def through(self, block: int, sample: int, hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run a sample through a block whose weights are in memory; also return its side inputs, as new leaves."""
        sweep = self._sweep
        with torch.no_grad():
            _, call = sweep.chain.call(block, sweep.samples[sample].inputs)
        leaves, tree = pytree.tree_flatten((call.args, call.kwargs))
        sides = [leaves[place].detach().requires_grad_() for place in self._places[block]]
        for place, side in zip(self._places[block], sides, strict=True):
            leaves[place] = side
        return sweep.chain.block(block, hidden, BlockCall(*pytree.tree_unflatten(leaves, tree))), sides

    @contextlib.contextmanager
    def writing(self, block: int) -> Iterator[Callable[[Sequence[Tensor]], None]]:
        """Yield a function that takes the side inputs of every sample and pass, with their gradients."""
        with contextlib.ExitStack() as stack:
            puts = [stack.enter_context(file.writing()) for file in self._files[block]]

            def put(sides: Sequence[Tensor]) -> None:
                for put_gradient, side in zip(puts, sides, strict=True):
                    put_gradient(torch.zeros_like(side) if side.grad is None else side.grad)

            yield put

    def given(self, sample: int) -> list[Tensor]:
        """Return everything that the blocks receive from before them: the hidden states, then all side inputs."""
        inputs = self._sweep.samples[sample].inputs
        if not any(self._places):
            return [self._sweep.chain.call(0, inputs)[0]]
        hidden, calls = self._sweep.chain.calls(inputs)
        return [
            hidden,
            *(call.leaves[place] for call, places in zip(calls, self._places, strict=True) for place in places),
        ]

    def gradients(self, column: int) -> list[Tensor]:
        """Return the gradients of the side inputs in a sample's pass, in the order of `given`."""
        return [file.read(column) for files in self._files for file in files]

    def delete(self) -> None:
        """Delete all files."""
        for files in self._files:
            for file in files:
                file.delete()


def before_and_after(sweep: BlockSweep, parts: Sequence[Part]) -> tuple[list[Part], list[Part]]:
    """Return the parts outside the blocks that are used before the blocks, and those that are used after them.

    A part is used where its layer is called, or where values depend on it: on one side or on both. One that the first
    sample does not use is in both lists, as others may use it on either side.
    """
    weights = {part.name: part.site(sweep.model).weight for part in parts}
    with differentiable(weights.values()), torch.enable_grad():
        hidden, calls = sweep.chain.calls(sweep.samples[0].inputs)
        before = _parameters_behind([hidden, *(leaf for call in calls for leaf in call.leaves)])
        after = _parameters_behind([sweep.output(0, torch.ones(sweep.shapes[0], dtype=sweep.dtype))])

    def used_in(called: set[str], behind: set[int]) -> set[str]:
        return {part.name for part in parts if called & {*part.modules} or id(weights[part.name]) in behind}

    used_before, used_after = used_in(sweep.before, before), used_in(sweep.after, after)
    return (
        [part for part in parts if part.name in used_before or part.name not in used_after],
        [part for part in parts if part.name in used_after or part.name not in used_before],
    )


def _parameters_behind(values: Iterable[Any]) -> set[int]:
    """Return the ids of the parameters that tensors depend on."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    waiting = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen, found = set(waiting), set(map(id, tensors))
    while waiting:
        node = waiting.pop()
        found.add(id(getattr(node, "variable", None)))
        new = {follower for follower, _ in node.next_functions if follower is not None} - seen
        seen |= new
        waiting += new
    return found


def _dependent(call: BlockCall) -> dict[int, tuple[torch.Size, torch.dtype]]:
    """Return the places of a block's arguments that depend on weights, with their shapes and types."""
    return {
        place: (leaf.shape, leaf.dtype)
        for place, leaf in enumerate(call.leaves)
        if isinstance(leaf, Tensor) and leaf.requires_grad
    }
