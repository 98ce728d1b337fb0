"""Ranges of layers' inputs and outputs, for rounding activations to 8 bits.

One pass over the data records the extremes and a sample of the values of every tensor. The range is clipped so that
rounding the sample has the least squared error. If an output is read only by one clamp, such as ReLU or ReLU6, values
that the clamp would cut off anyway need no codes.

Ranges exist for layers whose weight has known inputs: Linear layers and convolutions that are called and do nothing to
their input except pad it with zeros or copies. Where Linear layers share the weight of an Embedding, they are theirs.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qcompress.errors import DataError
from qcompress.function_transforms import outside_transforms
from qcompress.model import forward as forwards
from qcompress.model import layers
from qcompress.model.captured import products_of
from qcompress.model.dispatch import Watching
from qcompress.model.padding import real_inputs
from qcompress.model.parts import Part
from qcompress.transforms.activations import LEVELS
from qcompress.transforms.base import Ranges

SAMPLE = 1 << 13  # values sampled per tensor
MOST = 1 << 16  # values sampled per layer
CUTS = tuple(0.97**step for step in range(40))  # fractions of the largest value to try, down to 0.3


def activation_ranges(
    model: nn.Module, parts: Iterable[Part], data: Iterable[Any], forward: forwards.Forward | None
) -> dict[str, Ranges]:
    """Compute ``(low, high)`` of inputs and of outputs, by the path of a part's first module.

    Args:
        model: same as in `measure`.
        parts: parts of the model.
        data: batches.
        forward: how to run a batch.

    Raises:
        DataError: activations are not finite.

    >>> from qcompress.model.parts import survey
    >>> model, data = nn.Sequential(nn.Linear(2, 1, bias=False)), [torch.tensor([[0.0, 1.0], [2.0, 0.0]])]
    >>> activation_ranges(model, survey(model, data).parts, data, None)["0"][0]
    (0.0, 2.0)
    """
    seen: dict[str, tuple[_Numbers, _Numbers]] = {}
    odd: set[str] = set()
    clamps = _Clamps()
    hooks = []
    batch: Any = None
    for modules, head in dict.fromkeys((part.modules, part.target.head) for part in parts):
        members = [model.get_submodule(path) for path in modules]
        members = [member for member in members if isinstance(member, nn.Linear)] if head else members
        if not all(isinstance(member, (nn.Linear, *layers.CONVOLUTIONS)) for member in members):
            continue

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = modules[0]) -> None:
            given = args[0] if args else kwargs["input"]
            plain = isinstance(output, Tensor) and given.layout == torch.strided and not given.is_nested
            if not plain or not _is_known(module, args, kwargs, output):
                odd.add(name)
                return
            inputs, outputs = seen.setdefault(name, (_Numbers(), _Numbers()))
            with outside_transforms(given, output) as (seen_input, seen_output):
                real = real_inputs(batch, module, seen_input)
                inputs.add(seen_input if real is None else seen_input[real])
                outputs.add(seen_output if real is None else seen_output[real])
            clamps.follow(name, output)  # last, so that only the model reads what is followed

        hooks += [member.register_forward_hook(note, with_kwargs=True, prepend=True) for member in members]
    try:
        with torch.no_grad():
            for batch in data:
                with clamps:
                    forwards.run(model, batch, forward)
                clamps.forget()
    finally:
        for hook in hooks:
            hook.remove()
    ranges = {}
    for name, (inputs, outputs) in seen.items():
        if name not in odd:
            ranges[name] = inputs.range(name), outputs.range(name, clamps.of(name))
    return ranges


def _is_known(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> bool:
    """Whether the layer multiplies its input, possibly padded, and returns exactly the product."""
    if layers.is_plain(module):
        return True
    products = products_of(module, args, kwargs)
    if len(products) != 1 or isinstance(module, nn.Linear):
        return False
    given, product = (args[0] if args else kwargs["input"]), products[0]
    weight, bias = layers.weight_of(module), getattr(module, "bias", None)
    convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[weight.ndim - 3]
    product_alone = convolve(
        product.input, weight, bias, product.stride, product.padding, product.dilation, product.groups
    )
    same_sum = torch.isclose(product.input.abs().double().sum(), given.abs().double().sum(), rtol=1e-6)
    return bool(same_sum) and product_alone.shape == output.shape and bool(torch.equal(product_alone, output))


@dataclass(slots=True)
class _Numbers:
    """The extremes and a sample of the values of tensors."""

    low: float = 0.0
    high: float = 0.0
    sample: list[Tensor] = field(default_factory=list)

    def add(self, values: Tensor) -> None:
        flat = values.detach().float().flatten()
        if not len(flat):
            return
        low, high = (float(end) for end in torch.aminmax(flat))
        self.low, self.high = min(self.low, low), max(self.high, high)
        if sum(map(len, self.sample)) < MOST:
            places = torch.linspace(0, len(flat) - 1, min(SAMPLE, len(flat)), dtype=torch.float64).long()
            self.sample.append(flat[places].cpu())

    def range(self, name: str, clamp: tuple[float, float] = (-math.inf, math.inf)) -> tuple[float, float]:
        """Return the range that minimises the squared error."""
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            raise DataError(f"activations of {name!r} are not finite on the calibration data")
        low, high = min(max(self.low, clamp[0]), 0.0), max(min(self.high, clamp[1]), 0.0)
        values = torch.cat([*self.sample, torch.tensor([low, high])]).clamp_(low, high)
        most = max(-low, high) * torch.tensor(CUTS)[:, None]
        lows, highs = (-most).clamp_min(low), most.clamp_max(high)
        steps = ((highs - lows) / LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
        zeros = (-lows / steps).round()
        codes = (values / steps).round_().clamp_(-zeros, LEVELS - zeros)
        best = max(-low, high) * CUTS[int((codes * steps - values).square_().sum(1).argmin())]
        return max(low, -best), min(high, best)


class _Clamps(Watching):
    """Records what reads the outputs of layers and, where all readers are the same clamp, its limits."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._followed: dict[int, tuple[str, Tensor]] = {}
        self._ends: dict[str, set[tuple[float, float]]] = {}

    def follow(self, name: str, output: Tensor) -> None:
        """Start to observe the readers of an output."""
        self._followed[id(output)] = name, output

    def forget(self) -> None:
        """Release the outputs of a batch."""
        self._followed.clear()

    def of(self, name: str) -> tuple[float, float]:
        """Return the limits beyond which the layer's output has no effect."""
        ends = self._ends.get(name, set())
        return ends.copy().pop() if len(ends) == 1 else (-math.inf, math.inf)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs or {})):
            if isinstance(value, Tensor) and id(value) in self._followed and func is not torch.ops.aten.detach.default:
                self._ends.setdefault(self._followed[id(value)][0], set()).add(_ends(func, args))
        return func(*args, **(kwargs or {}))


def _ends(func: Any, args: Any) -> tuple[float, float]:
    """Return the limits of a clamp; infinite for any other operation."""
    name = func.overloadpacket.__name__.removesuffix("_")
    if name == "relu":
        return 0.0, math.inf
    if name == "hardtanh":
        return (float(args[1]), float(args[2])) if len(args) > 2 else (-1.0, 1.0)
    if name == "clamp_min":
        return float(args[1]), math.inf
    if name == "clamp":
        low, high = (*args[1:], None, None)[:2]
        return -math.inf if low is None else float(low), math.inf if high is None else float(high)
    return -math.inf, math.inf
