"""A model as a chain: the computation before its blocks, the blocks in order, and the computation after them.

The model's code is not duplicated: its forward pass runs with stubs in place of the blocks. The stubs record their
arguments, stop the pass, or return hidden states that were computed elsewhere. Everything around the blocks (masks,
positions, scaling, a final norm) is therefore computed by the model itself.

Requirements, which are checked: the blocks are called once each and in order, and the first argument of each is the
output of the previous one.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qcompress.errors import ChainError, QcompressError
from qcompress.model import forward as forwards
from qcompress.model.opened import opened_of


@dataclass(frozen=True, slots=True)
class BlockCall:
    """Arguments of a block's call besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def leaves(self) -> list[Any]:
        """All values in them."""
        return tree_leaves((self.args, self.kwargs))


class _StopError(Exception):
    """Stops a forward pass early."""


class BlockSequence:
    """The blocks of a model, run separately.

    Args:
        model: the model in evaluation mode.
        blocks: paths of its blocks in order.
        forward: how to run a batch.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], forward: forwards.Forward | None) -> None:
        self.model, self.blocks, self._forward = model, tuple(blocks), forward
        self._wrapped: type | None = None  # type of a block's output, if it is not a tensor
        self._num_values = 1  # that a block returns, of which the first are the hidden states
        self._order: list[int] = []  # indices of the blocks that the last pass with stubs called

    def __len__(self) -> int:
        return len(self.blocks)

    def call(self, index: int, batch: Any) -> tuple[Tensor, BlockCall]:
        """Return the initial hidden states of the model, and the other arguments of block ``index``.

        With gradients enabled, the hidden states of block 0 have a graph back to the model's weights.
        """
        caught: list[tuple[Tensor, BlockCall]] = []

        def catch(hidden: Tensor, call: BlockCall) -> Tensor:
            caught.append((hidden, call))
            raise _StopError

        with self._stubs({index: catch}), contextlib.suppress(_StopError):
            forwards.run(self.model, batch, self._forward)
        if not caught:
            raise ChainError(f"the forward pass does not call {self.blocks[index]!r}: its blocks do not form a chain")
        return caught[0]

    def calls(self, batch: Any) -> tuple[Tensor, list[BlockCall]]:
        """Return the initial hidden states of the model, and the other arguments of every block; no block is run."""
        caught: dict[int, tuple[Tensor, BlockCall]] = {}

        def catching(index: int) -> Callable[[Tensor, BlockCall], Tensor]:
            def catch(hidden: Tensor, call: BlockCall) -> Tensor:
                caught[index] = hidden, call
                if index == len(self) - 1:
                    raise _StopError
                return hidden

            return catch

        with self._stubs({index: catching(index) for index in range(len(self))}), contextlib.suppress(_StopError):
            forwards.run(self.model, batch, self._forward)
        for index, path in enumerate(self.blocks):
            if index not in caught:
                raise ChainError(f"the forward pass does not call {path!r}: its blocks do not form a chain")
        return caught[0][0], [caught[index][1] for index in range(len(self))]

    def block(self, index: int, hidden: Tensor, call: BlockCall) -> Tensor:
        """Return the output of a block, whose weights are in memory, for hidden states."""
        output = self.model.get_submodule(self.blocks[index])(hidden, *call.args, **call.kwargs)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            self._wrapped, self._num_values, output = tuple, len(output), output[0]
        if not isinstance(output, Tensor) or output.shape != hidden.shape:
            raise ChainError(
                f"{self.blocks[index]!r} does not return hidden states of the shape of its input "
                f"({tuple(hidden.shape)}): the blocks do not form a chain"
            )
        return output

    def rest(self, batch: Any, hidden: Tensor) -> Tensor:
        """Return the model's output if the last block returns ``hidden``."""
        with self._stubs({len(self) - 1: lambda *_: hidden}):
            return forwards.run(self.model, batch, self._forward)

    def calls_of_rest(self, batch: Any, hidden: Tensor) -> tuple[set[str], set[str]]:
        """Return the paths of the modules called before the blocks, and of those called after them.

        Raises:
            ChainError: the model needs more of its blocks than the hidden states that they return, or does not call
                each of them once and in order.
        """
        called: tuple[set[str], set[str]] = set(), set()
        inside = tuple(f"{path}." for path in self.blocks)
        stage, hooks = 0, []

        def give(*_: Any) -> Tensor:
            nonlocal stage
            stage = 1
            return hidden

        for path, module in self.model.named_modules():
            if path not in self.blocks and not path.startswith(inside):
                note = lambda *_, path=path: called[stage].add(path)  # noqa: E731
                hooks.append(module.register_forward_pre_hook(note))
        try:
            with self._stubs({len(self) - 1: give}), torch.no_grad():
                forwards.run(self.model, batch, self._forward)
        except (ValueError, TypeError, IndexError, AttributeError) as error:
            if isinstance(error, QcompressError) or self._num_values == 1:
                raise
            raise ChainError(
                f"{self.blocks[0]!r} returns {self._num_values} values, and the model cannot go on with its hidden "
                f"states alone ({error}): its blocks do not form a chain; load the model whole"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        self._require_once()
        return called

    def _require_once(self) -> None:
        """Check that the last pass called every block once and in order.

        Raises:
            ChainError: it did not; the message says what it did instead.
        """
        if self._order == list(range(len(self))):
            return
        repeated = [index for index in self._order if self._order.count(index) > 1]
        if repeated:
            what = f"runs {self.blocks[repeated[0]]!r} {self._order.count(repeated[0])} times, as one of several layers"
        else:
            what = f"runs its blocks in the order {', '.join(self.blocks[index] for index in self._order)}"
        raise ChainError(
            f"the forward pass {what}, but a model can be read block by block only if each block is run once and in "
            "order: load it whole (a model of transformers with from_pretrained()); measure(), apply() and compress() "
            "take the module as it is"
        )

    @contextlib.contextmanager
    def _stubs(self, special: dict[int, Callable[[Tensor, BlockCall], Tensor]]) -> Iterator[None]:
        """Replace the blocks by stubs that return their input, except for ``special`` ones."""
        opened = opened_of(self.model)
        modules = [self.model.get_submodule(path) for path in self.blocks]
        try:
            for index, module in enumerate(modules):
                module.forward = self._stub(index, special.get(index))
            self._order.clear()
            with contextlib.nullcontext() if opened is None else opened.unread():
                yield
        finally:
            for module in modules:
                vars(module).pop("forward", None)

    def _stub(self, index: int, special: Callable[[Tensor, BlockCall], Tensor] | None) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._order.append(index)
            states = hidden_states if special is None else special(hidden_states, BlockCall(args, kwargs))
            return states if self._wrapped is None else (states,)

        return forward


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Disable a language model's cache of keys and values inside the block."""
    config = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if not before:
        yield
        return
    config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        config.use_cache = before  # type: ignore[union-attr]
