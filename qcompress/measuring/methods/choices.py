"""Keep a network's discrete choices fixed while its weights are moved slightly.

A router sends a token to other experts, a maximum moves to another index, a threshold is crossed: the outputs then jump
however small the move, and with many tokens and layers one of these is almost certain to happen. The gradient is right
nevertheless: it describes the outputs as long as the choices stay the same. So it is compared with outputs at the
choices of the unmoved network: the results of all operations that turn numbers into indices (``topk``, ``sort``,
``argmax`` …) or booleans (comparisons) are recorded in one run and reused in the next ones. Rounding is not a choice:
conversions to integers, ``round``, ``bucketize`` and the like are computed as usual, and so is everything in numpy.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompress.model.dispatch import Watching

CONVERSIONS = {"aten::_to_copy", "aten::bucketize", "aten::searchsorted"}
"""Operations whose integers are rounded numbers, not choices."""


class HeldChoices:
    """A function that repeats the discrete choices of its first call in every later call.

    Args:
        run: function that returns the outputs of a network. If a call runs other operations than the first, its
            remaining choices are not fixed.

    >>> scores = torch.tensor([2.0, 1.0])
    >>> largest = HeldChoices(lambda: scores.max(0).values)
    >>> float(largest()), float(scores.copy_(torch.tensor([3.0, 4.0])).max()), float(largest())
    (2.0, 4.0, 3.0)
    """

    def __init__(self, run: Callable[[], Tensor]) -> None:
        self._run = run
        self._made: list[_Choice] | None = None

    def __call__(self) -> Tensor:
        """Return the outputs."""
        if self._made is not None:
            with _Choosing(iter(self._made)):
                return self._run()
        with _Choosing(None) as choosing:
            output = self._run()
        self._made = choosing.made
        return output


@dataclass(frozen=True, slots=True)
class _Choice:
    """An operation on tensors of some shapes, and the places or truth values that it gave."""

    operation: object
    shapes: list[torch.Size]
    places: Tensor


class _Choosing(Watching):  # type: ignore[no-untyped-call]
    """Mode in which choices are noted in ``made``, or those given are made again."""

    def __init__(self, again: Iterator[_Choice] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[_Choice] = []
        self._again = again

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [value for value in args if isinstance(value, Tensor)]
        places = _places(func, result) if tensors and tensors[0].is_floating_point() else None
        if places is None:
            return result
        shapes = [value.shape for value in tensors]
        if self._again is None:
            self.made.append(_Choice(func, shapes, places.clone()))
            return result
        before = next(self._again, None)
        if before is None or before.operation is not func or before.shapes != shapes:
            self._again = iter(())
            return result
        places = before.places.clone()
        return places if isinstance(result, Tensor) else (_values(func, args, kwargs, places), places)


def _places(func: Any, result: Any) -> Tensor | None:
    """Return the indices or booleans in the result of an operation; None if it holds numbers or converted numbers."""
    places = result[-1] if isinstance(result, tuple) and result else result
    if not isinstance(places, Tensor) or places.dtype not in {torch.bool, torch.int32, torch.int64}:
        return None
    schema = func._schema
    if schema.name in CONVERSIONS or any(value.alias_info is not None for value in schema.returns):
        return None
    alone = places is result or [value.name for value in schema.returns] == ["values", "indices"]
    return places if alone else None


def _values(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], places: Tensor) -> Tensor:
    """Return the values of an operation along a dimension at other indices than its own."""
    named = {argument.name: argument.default_value for argument in func._schema.arguments}
    named |= {**dict(zip(named, args, strict=False)), **kwargs}
    numbers: Tensor = named["self"]
    dim: int = named["dim"]
    if named.get("keepdim", True) or not numbers.ndim:
        return numbers.gather(dim, places)
    return numbers.gather(dim, places.unsqueeze(dim)).squeeze(dim)
