"""Find the weights whose effect is rounded: their gradient is zero or, with a straight-through estimator, misleading.

If every path from a weight is rounded, it has no gradient, which is easy to see. If another path is not rounded, such
as a residual connection, the weight has a gradient, and a step small enough for a linear prediction is too small to
change any rounded number. Therefore one run is observed: each operation passes on which weights its result depends on,
even where a path is detached. These weights are then checked with larger steps (`gradient_check`), because rounding
alone proves nothing: an interpolation rounds too, and its gradient is right. Booleans and indices are not followed:
what a network chooses by comparing is not rounded (see `choices`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from qcompress.model.dispatch import Watching

ROUNDING_OPERATIONS = {
    "round", "floor", "ceil", "trunc", "fix", "frac", "fmod", "remainder", "floor_divide", "sign", "sgn",
    "bucketize", "searchsorted",
}  # fmt: skip
CONVERTING = {"_to_copy", "copy", "copy_", "view"}
QUANTIZING = "quantize_per_", "fake_quantize_", "_fake_quantize_"
WITHOUT_VALUES = {"zero_", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"}
"""Operations whose result depends on no values, as those named ``new_…`` and ``fill_`` with a number."""


@torch.no_grad()
def rounded(run: Callable[[], object], weights: Sequence[Tensor]) -> tuple[list[int], bool]:
    """Return the indices of weights whose effect is rounded, and whether any effect is converted to half precision.

    Args:
        run: function that runs a network.
        weights: weights to follow.

    >>> layer, x = torch.nn.Linear(3, 2), torch.ones(1, 3)
    >>> rounded(lambda: 0.1 * layer(x) + torch.round(layer(x)), [layer.weight, layer.bias])
    ([0, 1], False)
    """
    with _Following(weights) as following:
        run()
    return [index for index in range(len(weights)) if following.bits >> index & 1], following.in_half


class _Following(Watching):  # type: ignore[no-untyped-call]
    """Mode that tracks which tensors depend on which weights.

    Attributes:
        bits: bit set of the weights whose effect is rounded.
        in_half: whether a tensor was converted to half precision.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bits, self.in_half = 0, False
        self._bits_of: Any = WeakIdKeyDictionary()  # memory of tensors → bits of the weights that they depend on
        for index, weight in enumerate(weights):
            self._bits_of[_memory(weight)] = self._of([weight]) | 1 << index

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [value for value in tree_leaves((args, kwargs)) if _has_values(value)]
        bits, dtype = self._of(given), given[0].dtype if given else None
        result = func(*args, **kwargs)
        made = [value for value in tree_leaves(args[0] if result is None else result) if isinstance(value, Tensor)]
        name = func._overloadpacket.__name__.removeprefix("_foreach_")
        if name in WITHOUT_VALUES or name.startswith("new_") or (name == "fill_" and len(given) == 1):
            for value in made:
                if value.layout != torch.strided or value.nbytes >= value.untyped_storage().nbytes():
                    self._bits_of.pop(_memory(value), None)
        elif bits and made:
            if _rounds(name, kwargs, dtype, made[0]):
                self.bits |= bits
            narrower = made[0].is_floating_point() and made[0].dtype.itemsize == 2 < given[0].dtype.itemsize
            self.in_half |= name == "_to_copy" and narrower
            for value in filter(_has_values, made):
                self._bits_of[_memory(value)] = self._of([value]) | bits
        return result

    def _of(self, tensors: Sequence[Tensor]) -> int:
        bits = 0
        for tensor in tensors:
            bits |= self._bits_of.get(_memory(tensor), 0)
        return bits


def _has_values(value: object) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex() or value.is_quantized)


def _memory(tensor: Tensor) -> object:
    return tensor.untyped_storage() if tensor.layout == torch.strided else tensor


def _rounds(name: str, kwargs: Mapping[str, Any], dtype: torch.dtype | None, result: Tensor) -> bool:
    """Whether an operation on floating-point numbers rounds them.

    Args:
        name: its name.
        kwargs: its named arguments.
        dtype: dtype of its first tensor.
        result: what it returned.
    """
    if name in CONVERTING:
        few_values = result.dtype.itemsize == 1 or not (result.is_floating_point() or result.is_complex())
        return few_values and result.dtype not in {dtype, torch.bool}
    plain = name.removesuffix("_")
    return plain in ROUNDING_OPERATIONS or bool(kwargs.get("rounding_mode")) or plain.startswith(QUANTIZING)
