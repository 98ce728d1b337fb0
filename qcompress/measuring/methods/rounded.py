"""What a network rounds, whose gradient is nought or, behind a straight-through estimator, that of other numbers.

If nothing of a weight passes but what is rounded, it has no gradient, which shows. Beside a path that is not rounded,
such as that of a residual network, it has one, and a step that is small enough for it to be right is too small to round
anything otherwise. So rounding is found by its operations: from the weights on, it is followed which numbers depend on
which weights, also where a path is detached (`rounded`). Truth values and places are not followed: what a network
chooses by comparing is not rounded (see `choices`). Then the gradients must be those of a network that rounds by the
same amount wherever its weights are (`Smoothed`), as rounding does on average. Where whole numbers come out, there is
no such network.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from qcompress.model.dispatch import Watching

aten = torch.ops.aten
WHOLE = {aten.round, aten.floor, aten.ceil, aten.trunc, aten.fix}
QUOTIENTS = {aten.floor_divide, aten.div}
"""Division, if it rounds."""

REMAINDERS = {aten.fmod, aten.remainder, aten.frac}
PLACES = {aten.bucketize, aten.searchsorted}
CONVERSIONS = {aten._to_copy, aten.copy, aten.copy_}
QUANTIZING = "quantize_per_", "fake_quantize_", "_fake_quantize_"


@torch.no_grad()
def rounded(run: Callable[[], object], weights: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Return the indices of weights that numbers depend on which are rounded while ``run`` is called once.

    Returns:
        Those that are rounded to floating-point numbers, and those of which whole numbers are made.

    >>> layer, x = torch.nn.Linear(3, 2), torch.ones(1, 3)
    >>> rounded(lambda: torch.round(layer(x)), [layer.weight]), rounded(lambda: layer(x).int(), [layer.weight])
    (([0], []), ([], [0]))
    """
    with _Following(weights) as following:
        run()
    number = range(len(weights))
    return [i for i in number if following.rounded >> i & 1], [i for i in number if following.whole >> i & 1]


class Smoothed:
    """A function that rounds by the amounts of its first call in every call.

    Args:
        run: function that returns the outputs of a network. Where a call does other operations than the first, later
            numbers are rounded as they are.

    >>> number = torch.tensor(2.4)
    >>> half = Smoothed(lambda: torch.round(number) / 2)
    >>> float(half()), float(number.add_(1.0)), float(half()), float(number.add_(0.5)), float(half())
    (1.0, 3.4000000953674316, 1.5, 3.9000000953674316, 1.75)
    """

    def __init__(self, run: Callable[[], Tensor]) -> None:
        self._run = run
        self._amounts: list[Tensor] | None = None

    def __call__(self) -> Tensor:
        """Return the outputs."""
        with _Smoothing(None if self._amounts is None else iter(self._amounts)) as smoothing:
            output = self._run()
        if self._amounts is None:
            self._amounts = smoothing.amounts
        return output


class _Smoothing(Watching):  # type: ignore[no-untyped-call]
    """Mode that notes in ``amounts`` by how much numbers are rounded, or rounds them by the given amounts."""

    def __init__(self, again: Iterator[Tensor] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.amounts: list[Tensor] = []
        self._again = again

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operation = _rounding(func, kwargs)
        if operation is None or not (isinstance(args[0], Tensor) and args[0].is_floating_point()):
            return func(*args, **kwargs)
        smooth = _smooth(operation, args)
        result = func(*args, **kwargs)
        if self._again is None:
            self.amounts.append(result - smooth)
            return result
        amount = next(self._again, None)
        if amount is None or amount.shape != result.shape:
            self._again = iter(())
            return result
        return result.copy_(smooth + amount)


class _Following(Watching):  # type: ignore[no-untyped-call]
    """Mode that follows what depends on weights.

    Attributes:
        rounded, whole: a bit for every weight whose effect is rounded, or made a whole number.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rounded = self.whole = 0
        self._bits: Any = WeakIdKeyDictionary()  # memory of tensors → bits of the weights that they depend on
        for index, weight in enumerate(weights):
            self._add(weight, 1 << index)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [value for value in tree_leaves((args, kwargs)) if _is_followed(value)]
        result = func(*args, **kwargs)
        bits = 0
        for value in given:
            bits |= self._bits.get(value.untyped_storage(), 0)
        if bits:
            if _rounding(func, kwargs) is not None:
                self.rounded |= bits
            elif _makes_whole(func, result):
                self.whole |= bits
            for value in tree_leaves(result):
                if _is_followed(value):
                    self._add(value, bits)
        return result

    def _add(self, tensor: Tensor, bits: int) -> None:
        memory = tensor.untyped_storage()
        self._bits[memory] = self._bits.get(memory, 0) | bits


def _is_followed(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.dtype.is_floating_point


def _rounding(func: Any, kwargs: Mapping[str, Any]) -> object | None:
    """The operation, without its form in place, if it rounds floating-point numbers; else None."""
    operation = getattr(aten, func._overloadpacket.__name__.removesuffix("_"), None)
    if operation is aten.div and not kwargs.get("rounding_mode"):
        return None
    return operation if operation in WHOLE | QUOTIENTS | REMAINDERS else None


def _smooth(operation: object, args: Sequence[Any]) -> Tensor:
    """What an operation returns on average, but for a constant."""
    numbers: Tensor = args[0]
    if operation in REMAINDERS:
        return torch.zeros_like(numbers)
    return numbers / args[1] if operation in QUOTIENTS else numbers.clone()


def _makes_whole(func: Any, result: object) -> bool:
    """Whether an operation makes whole numbers, or others of few values, of floating-point ones."""
    packet = func._overloadpacket
    if packet in CONVERSIONS:
        dtype = result.dtype if isinstance(result, Tensor) else torch.bool
        return dtype != torch.bool and (not dtype.is_floating_point or dtype.itemsize == 1)
    return packet in PLACES or packet.__name__.startswith(QUANTIZING)
