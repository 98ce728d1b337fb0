"""Count a model's multiply-accumulates and the calls of its layers in one pass over the data."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from qcompress.errors import DataError
from qcompress.model import forward as forwards
from qcompress.model import layers
from qcompress.model.captured import products_of
from qcompress.model.dispatch import Watching
from qcompress.model.losses import Loss
from qcompress.model.opened import opened_of
from qcompress.model.selections import Selections
from qcompress.model.tensors import held_tensors

aten = torch.ops.aten
MATRIX_PRODUCTS = (aten.mm, aten.bmm, aten.addmm, aten.baddbmm)
COPIES = (aten.clone, aten._to_copy, aten._unsafe_view, aten.contiguous)


@dataclass(slots=True)
class Calls:
    """All calls of a layer, per sample.

    Attributes:
        macs: multiply-accumulates.
        rows: numbers in the inputs.
        inputs, halfway: positions, see `qcompress.transforms.base.Window`.
        lookups: lookups of an embedding.
        odd: why a call could not be counted, or an empty string.
        common_input: whether each call was one product of the weight with a single input for all its rows.
    """

    macs: float = 0.0
    rows: float = 0.0
    inputs: float = 0.0
    halfway: float = 0.0
    lookups: float = 0.0
    odd: str = ""
    common_input: bool = True

    def add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Add one call, with all its samples."""
        given = args[0] if args else kwargs.get("input")
        if not layers.is_plain(module):
            self.common_input = self.common_input and len(products_of(module, args, kwargs)) == 1
        if not isinstance(given, Tensor) or not isinstance(output, Tensor):
            self.odd = f"it takes a {type(given).__name__} and returns a {type(output).__name__}"
            self.rows += given.numel() if isinstance(given, Tensor) else 1
            return
        self.rows += given.numel()
        if given.numel() == 0 or given.is_nested:
            return
        self.macs += layers.macs_of_call(module, given, output)
        if given.layout != torch.strided:
            self.odd, self.common_input = "its inputs are sparse", False
        if isinstance(module, nn.Embedding):
            self.lookups += given.numel()
        elif isinstance(module, nn.Conv2d):
            images = output.numel() // (output.shape[-1] * output.shape[-2] * module.out_channels)
            self.inputs += images * given.shape[-2] * given.shape[-1]
            self.halfway += images * output.shape[-2] * given.shape[-1]

    def per_sample(self, samples: int) -> "Calls":
        """Return the averages per sample."""
        means = {name: getattr(self, name) / samples for name in ("macs", "rows", "inputs", "halfway", "lookups")}
        return replace(self, **means)


@dataclass(slots=True)
class Counted:
    """Counts of the whole pass.

    Attributes:
        calls: path of a supported layer → its calls, if any.
        weights: name of a parameter → multiply-accumulates per sample of its products outside of supported layers.
        between: multiply-accumulates per sample of products of activations with each other, as in attention.
        macs: multiply-accumulates per sample of everything: the above, layers, recurrent cells, computed weights.
        num_batches, num_samples: size of the data.
        guesses_dim: whether the loss leaves it to the network which dimension of the outputs holds the classes.
        selecting: paths of the modules that select by the largest of computed numbers.
        used: names of the parameters that are used outside of calls of supported layers.
    """

    calls: dict[str, Calls] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    between: float = 0.0
    macs: float = 0.0
    num_batches: int = 0
    num_samples: int = 0
    guesses_dim: bool = False
    selecting: tuple[str, ...] = ()
    used: frozenset[str] = frozenset()


def count(model: nn.Module, data: Iterable[Any], forward: forwards.Forward | None, loss: Loss | None = None) -> Counted:
    """Run all batches once.

    Raises:
        DataError: there is no batch, or no sample in any.
        ModelError: the loss cannot compare such outputs.
    """
    counted, products = Counted(), _Products(model)
    hooks: list[RemovableHandle] = []
    for name, module in model.named_modules():
        if layers.why_unsupported(module):
            hooks += products.selections.follow(name, module)
            continue

        def add(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, name: str = name
        ) -> None:
            products.layers -= 1
            with products.paused():
                counted.calls.setdefault(name, Calls()).add(module, args, kwargs, output)

        hooks.append(module.register_forward_pre_hook(products.enter))
        hooks.append(module.register_forward_hook(add, with_kwargs=True, prepend=True))
    if (opened := opened_of(model)) is not None:
        hooks += [model.get_submodule(path).register_forward_pre_hook(products.read(path)) for path in opened.blocks]
    try:
        with forwards.evaluating(model), forwards.layer_by_layer(), torch.no_grad():
            for batch in data:
                name = f"batch {counted.num_batches + 1} of the data" if counted.num_batches else "the first batch"
                with products, forwards.first_pass(batch, name):
                    output = forwards.run(model, batch, forward)
                if loss is not None:
                    loss.require(output, batch)
                    counted.guesses_dim |= loss.guesses_dim(output)
                counted.num_batches += 1
                counted.num_samples += len(output)
    finally:
        for hook in hooks:
            hook.remove()
    if not counted.num_batches:
        raise DataError(
            "the calibration data is empty, or an iterator that is already exhausted: give at least one batch"
        )
    if not counted.num_samples:
        raise DataError("the calibration data holds no sample")
    counted.calls = {
        name: calls_of_layer.per_sample(counted.num_samples) for name, calls_of_layer in counted.calls.items()
    }
    counted.weights = {name: macs / counted.num_samples for name, macs in products.weights.items()}
    counted.between = products.between / counted.num_samples
    counted.selecting, counted.used = tuple(products.selections.paths), frozenset(products.used)
    known = [calls_of_layer.macs for calls_of_layer in counted.calls.values()] + [*counted.weights.values()]
    counted.macs = max(products.flops / 2 / counted.num_samples, sum(known) + counted.between)
    return counted


class _Products(Watching):
    """Sum the operations of matrix products and convolutions, two per multiply-accumulate.

    Attributes:
        flops: operations of all products.
        weights: name of a parameter → multiply-accumulates of its products outside of layers.
        between: multiply-accumulates of products of activations outside of layers.
        layers: number of supported layers that are running.
        selections: where the model selects.
        used: names of the parameters that are used outside of layers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops, self.between, self.layers = 0.0, 0.0, 0
        self.weights: dict[str, float] = {}
        self.selections, self.used = Selections(), set[str]()
        self._source: MutableMapping[Tensor, str] = (
            WeakIdKeyDictionary()
        )  # a tensor → name of the only parameter that its values come from
        for item in reversed(held_tensors(model)):  # of two names of one tensor the first counts
            self._source[item.tensor] = item.name

    def enter(self, module: nn.Module, args: Any) -> None:  # noqa: ARG002
        """Note that a supported layer begins to run; a hook."""
        self.layers += 1

    def read(self, path: str) -> Callable[[nn.Module, Any], None]:
        """Return a hook that notes the parameters of an opened model's block, whose weights have just been read."""

        def note(block: nn.Module, args: Any) -> None:  # noqa: ARG001
            self._source.update({parameter: name for name, parameter in block.named_parameters(prefix=path)})

        return note

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count operations inside the block."""
        before = self.flops, self.between, dict(self.weights)
        yield
        self.flops, self.between, self.weights = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._overloadpacket not in flop_registry:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        output = func(*args, **kwargs)
        self.selections.see(func, (*args, *kwargs.values()), output)
        packet, before = func._overloadpacket, self.flops
        if "_scaled_dot_product" in str(packet):
            self.flops += attention_flops(*(value.shape for value in args[:3]))
        elif packet in flop_registry:
            self.flops += float(flop_registry[packet](*args, **kwargs, out_val=output))
        elif packet is aten.mkldnn_rnn_layer:
            steps = args[0].numel() // args[0].shape[-1]
            self.flops += 2.0 * steps * (args[1].numel() + args[2].numel())
        if not self.layers:
            given = (self._source.get(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor))
            self.used.update(name for name in given if name is not None)
            if self.flops > before:
                self._attribute(packet, args, (self.flops - before) / 2)
            else:
                self._derive(func, args, kwargs, output)
        return output

    def _attribute(self, packet: Any, args: Any, macs: float) -> None:
        """Add a product to those with its parameter, or to those of activations; other products are in neither."""
        if packet in MATRIX_PRODUCTS:
            operands = args[1:3] if packet in (aten.addmm, aten.baddbmm) else args[:2]
        else:
            operands = args[1:2] if packet is aten.convolution else ()
        sources = [name for value in operands if (name := self._source.get(value)) is not None]
        if len(sources) == 1:
            self.weights[sources[0]] = self.weights.get(sources[0], 0.0) + macs
        elif multiplies(packet) and not sources:
            self.between += macs

    def _derive(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Note what is a view, copy or function of a single parameter."""
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        source = self._source.get(given[0]) if len(given) == 1 else None
        if source is not None and (func.is_view or torch.Tag.pointwise in func.tags or func._overloadpacket in COPIES):
            for value in tree_leaves(output):
                if isinstance(value, Tensor):
                    self._source[value] = source


def multiplies(packet: Any) -> bool:
    """Whether an operation multiplies two matrices, one of which may be a parameter, or is attention."""
    return packet in MATRIX_PRODUCTS or "_scaled_dot_product" in str(packet)


def attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> float:
    """Return the operations of attention from the shapes ``(…, positions, width)``, two per multiply-accumulate.

    Several heads of queries may share keys and values; this saves memory, but no multiplications.

    >>> attention_flops((1, 8, 10, 64), (1, 2, 10, 64), (1, 2, 10, 64)) == 2 * 8 * 10 * 10 * (64 + 64)
    True
    """
    return 2.0 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
