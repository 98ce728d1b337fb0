"""Memory that one sample's pass through a block takes, forward and backward.

It does not follow from the sizes of the layers: attention may store its scores for every head, and their number grows
with the square of the tokens. So one block of each kind runs on the longest sample as in the gradient check, in float32
and with everything that the backward pass needs, while the live tensors are counted. It runs on tensors without values.
A block that reads values, such as a router of experts, runs with real ones, and is stopped if it exceeds the limit.
"""

import contextlib
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qcompress.measuring.methods.choices import HeldChoices
from qcompress.measuring.methods.gradient_check import widened
from qcompress.measuring.streamed.sweep import BlockSweep
from qcompress.model import forward as forwards
from qcompress.model.batches import as_float32
from qcompress.model.chain import BlockCall
from qcompress.model.dispatch import Watching
from qcompress.model.modes import differentiable
from qcompress.model.parts import Part


def pass_bytes(sweep: BlockSweep, block: int, parts: Sequence[Part], most: float) -> tuple[int, bool]:
    """Return the peak memory in bytes of a pass of the longest sample through a block, without its weights.

    Args:
        sweep: the samples.
        block: index of the block.
        parts: its parts, whose weights receive gradients.
        most: bytes at which a pass with real values is stopped.

    Returns:
        The bytes, and whether the pass was stopped.
    """
    path = sweep.opened.blocks[block]
    weights = [part.site(sweep.model).weight for part in parts]
    sample = max(range(len(sweep)), key=lambda index: sweep.shapes[index].numel())
    with torch.no_grad():
        hidden, call = sweep.hidden(0, sample), sweep.chain.call(block, sweep.samples[sample].inputs)[1]
    given = sum(value.nbytes for value in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(value, Tensor))

    def run(entering: Tensor, *, wide: bool) -> None:
        with torch.enable_grad():
            entering = (as_float32(entering) if wide else entering).detach().requires_grad_()
            other = BlockCall(as_float32(call.args), as_float32(call.kwargs)) if wide else call
            output = HeldChoices(lambda: sweep.chain.block(block, entering, other))()
            torch.autograd.grad(output, entering, torch.ones_like(output), retain_graph=True)

    with sweep.opened.loaded(path), differentiable(weights):
        for widening in (True, False):
            with widened(sweep.model.get_submodule(path)) if widening else contextlib.nullcontext(False) as wide:
                if (counted := _without_values(hidden, partial(run, wide=wide))) is not None:
                    return given + counted, False
                living = _Living(most - given)
                try:
                    with living:
                        run(hidden, wide=wide)
                except _TooMuchError:
                    return given + living.peak, True
                except RuntimeError as error:  # as in the check: the block's own code may ask for half precision
                    if not wide or forwards.is_out_of_memory(error):
                        raise
                    continue
                return given + living.peak, False
    raise AssertionError  # without widening it returns or raises


def _without_values(hidden: Tensor, run: Callable[[Tensor], None]) -> int | None:
    """Count the bytes of a function of tensors without values; None if it looks at values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        mode, living = FakeTensorMode(allow_non_fake_inputs=True), _Living(float("inf"))
        hidden = mode.from_tensor(hidden)
        with mode, living:
            run(hidden)
    except Exception:  # of many kinds, by operation
        return None
    finally:
        logger.disabled = before
    return living.peak


class _TooMuchError(Exception):
    """A pass takes more memory than it may."""


class _Living(Watching):  # type: ignore[no-untyped-call]
    """Mode that counts the bytes of all living tensors that operations made; ``peak`` is the most so far."""

    def __init__(self, most: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._alive = 0
        self._most = most
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {_place(value) for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        result = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(result):
            if isinstance(value, Tensor) and (place := _place(value)) not in given | self._known:
                storage = value.untyped_storage()
                self._known.add(place)
                self._alive += storage.nbytes()
                weakref.finalize(storage, self._release, place, storage.nbytes())
        self.peak = max(self.peak, self._alive)
        if self._alive > self._most:
            raise _TooMuchError
        return result

    def _release(self, place: int, nbytes: int) -> None:
        self._known.discard(place)
        self._alive -= nbytes


def _place(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)
