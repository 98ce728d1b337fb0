"""Which parts of a model take a decision, and what the rest costs.

A part is a weight (or a block of its output channels) that is stored in one way. Modules that share a weight are one
part; a module that is called several times is one part. What cannot be compressed is counted and named.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.errors import ModelError, OptionsError
from qcompress.model import forward as forwards
from qcompress.model import layers
from qcompress.model.counting import Calls, Counted, count
from qcompress.model.losses import Loss
from qcompress.model.steady import steady
from qcompress.model.tensors import held_tensors, overlapping, size_bytes, total_bytes, unregistered_modules
from qcompress.transforms.base import Ranges, Target, Weight, Window

UNCALLED = "no calibration input: no batch calls it with anything, so that nothing is known of what its options do"
USED_OTHERWISE = "its weight is used without calling the layer"
UNREGISTERED = "in a plain list or dict, where PyTorch does not see it: use nn.ModuleList or nn.ModuleDict"
REPLACEABLE = (nn.Linear, nn.Conv2d, nn.Embedding)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A weight, or a block of its output channels, that takes one decision.

    Attributes:
        name: unique; the first module's path, with ``[start:stop]`` for a block.
        modules: paths of all modules that share this weight, in the model's order.
        rows: the block of output channels, or None for all of them.
        target: shape, type and macs of the rows.
    """

    name: str
    modules: tuple[str, ...]
    rows: tuple[int, int] | None
    target: Target

    def weight(self, model: nn.Module) -> Tensor:
        """The part's rows ``(channels, weights per channel)`` in ``model``, detached."""
        module = model.get_submodule(self.modules[0])
        rows = layers.to_rows(module, layers.weight_of(module).detach())
        return rows if self.rows is None else rows[self.rows[0] : self.rows[1]]

    def to_json(self) -> dict[str, Any]:
        """The part as plain JSON."""
        value = asdict(self)
        value["target"]["dtype"] = str(self.target.dtype).removeprefix("torch.")
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Part":
        """Undo `to_json`; KeyError, TypeError or AttributeError when it is not what that gives."""
        own = dict(value["target"])
        if window := own.get("window"):
            own["window"] = Window(**{**window, "kernel": tuple(window["kernel"])})
        target = Target(**{**own, "dtype": getattr(torch, own["dtype"])})
        rows = None if value["rows"] is None else (int(value["rows"][0]), int(value["rows"][1]))
        return cls(name=value["name"], modules=tuple(value["modules"]), rows=rows, target=target)


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """Something with parameters that stays as it is, and why."""

    name: str
    size_bytes: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """The parts of a model and the cost of everything.

    Attributes:
        original: resource → use of the whole original model (``bytes``, ``macs`` per sample).
        fixed: resource → use of what is no part.
        skipped: what was left out, by name.
        tried: name of a part → why its calls do not show what its options do.
        num_batches: in the data.
    """

    parts: tuple[Part, ...]
    original: dict[str, float]
    fixed: dict[str, float]
    skipped: tuple[Skipped, ...]
    tried: dict[str, str]
    num_batches: int


def survey(
    model: nn.Module,
    data: Iterable[Any],
    forward: forwards.Forward | None = None,
    granularity: str | int = "layer",
    *,
    loss: Loss | None = None,
    left_out: Callable[[str], str] = lambda name: "",  # noqa: ARG005
) -> Survey:
    """Run all batches once and list the parts of ``model``.

    A layer that no batch gives an input is no part: nothing is known of what its options do. It stays as it is.

    Args:
        model: any module.
        data: batches.
        forward: how to run a batch, where `qcompress.model.forward.default_forward` does not fit.
        granularity: ``"layer"``, or the number of output channels per block.
        loss: whose demands on the outputs are checked.
        left_out: path of a layer → why it is to stay as it is, or an empty string.

    Raises:
        ModelError: nothing in the model can be compressed; says what was found.
        OptionsError: an unknown granularity.
        DataError: there is no sample.
    """
    if granularity != "layer" and not (isinstance(granularity, int) and granularity >= 1):
        raise OptionsError(f"granularity must be 'layer' or a number of channels per block, found {granularity!r}")
    for name, module in model.named_modules():
        if layers.why_unsupported(module) or layers.weight_of(module).is_meta:  # an opened model's are seen when read
            continue
        if not bool(torch.isfinite(layers.weight_of(module)).all()):
            raise ModelError(f"the weight of {name!r} ({type(module).__name__}) holds NaN or infinity")
    counted = count(model, data, forward, loss)
    groups, reasons, sizes = _groups(model)
    for modules in groups:
        if modules not in reasons and (reason := left_out(modules[0])):
            reasons[modules] = reason
    silent = [modules for modules in groups if modules not in reasons and not _rows_of(counted, modules)]
    effective = _effective(model, [modules[0] for modules in silent], data, forward)
    reasons |= {modules: UNCALLED for modules in silent if modules[0] not in effective}
    parts: list[Part] = []
    tried: dict[str, str] = {}
    for modules in groups:
        if modules not in reasons:
            own = [counted.calls.get(path, Calls()) for path in modules]
            blocks = _blocks(model, modules, own, granularity)
            parts += blocks
            odd = next((calls.odd for calls in own if calls.odd), "")
            if odd or modules in silent:
                tried |= dict.fromkeys((part.name for part in blocks), odd or USED_OTHERWISE)
    skipped = tuple(
        Skipped(name=modules[0], size_bytes=sizes[modules], reason=reason) for modules, reason in reasons.items()
    )
    if not parts:
        found = (
            "; ".join(f"{item.name or 'the model itself'}: {item.reason}" for item in skipped[:5]) or "no parameters"
        )
        supported = ", ".join(layer.__name__ for layer in layers.SUPPORTED)
        raise ModelError(f"nothing in the model can be compressed ({found}). Supported layers: {supported}")
    original = {"bytes": float(total_bytes(model)), "macs": counted.macs}
    dense = {
        "bytes": sum(part.target.num_weights * part.target.dtype.itemsize for part in parts),
        "macs": sum(part.target.macs for part in parts),
    }
    fixed = {name: max(original[name] - dense[name], 0.0) for name in original}
    return Survey(
        parts=tuple(parts),
        original=original,
        fixed=fixed,
        skipped=skipped,
        tried=tried,
        num_batches=counted.num_batches,
    )


def layer_names(model: nn.Module) -> list[str]:
    """Names of all layers that have weights, of those that share one the first: what parts are called by."""
    return [modules[0] for modules in _groups(model)[0]]


def _groups(model: nn.Module) -> tuple[list[tuple[str, ...]], dict[tuple[str, ...], str], dict[tuple[str, ...], int]]:
    """Modules with parameters, those that share a weight together; why some are no parts; bytes of all."""
    owners, shared, groups = _weight_owners(model), overlapping(held_tensors(model)), []
    reasons: dict[tuple[str, ...], str] = {}
    sizes: dict[tuple[str, ...], int] = {}
    for name, module in model.named_modules():
        own = [parameter for key, parameter in module.named_parameters(recurse=False) if key != "bias"]
        if not own:
            continue
        modules = owners.get(id(own[0]), (name,))
        if modules[0] != name:
            continue  # the weight is listed under the first module that owns it
        groups.append(modules)
        sizes[modules] = sum(map(size_bytes, own))
        if reason := next((why for path in modules if (why := layers.why_unsupported(model.get_submodule(path)))), ""):
            reasons[modules] = reason
        elif id(own[0]) in shared:
            reasons[modules] = f"its weight lies in the memory of {shared[id(own[0])]!r}, which would change with it"
    for name, module in unregistered_modules(model).items():
        if own := list(module.parameters(recurse=False)):
            groups.append((name,))
            sizes[name,] = sum(map(size_bytes, own))
            reasons[name,] = (
                "in a plain list or dict, where PyTorch does not see it: use nn.ModuleList or nn.ModuleDict"
            )
    return groups, reasons, sizes


def _rows_of(counted: Counted, modules: tuple[str, ...]) -> float:
    return sum(counted.calls[path].rows for path in modules if path in counted.calls)


def _effective(model: nn.Module, paths: list[str], data: Iterable[Any], forward: forwards.Forward | None) -> set[str]:
    """The layers, of those never called, whose weight has an effect on outputs nevertheless."""
    found: set[str] = set()
    paths = [path for path in paths if not layers.weight_of(model.get_submodule(path)).is_meta]
    if not paths:
        return found
    run = steady(forward)
    generator = torch.Generator().manual_seed(0)
    weights = {path: layers.weight_of(model.get_submodule(path)) for path in paths}
    moved = {
        path: weight.detach() + torch.randn(weight.shape, generator=generator).to(weight) * weight.detach().abs().mean()
        for path, weight in weights.items()
    }

    def changes(chosen: list[str], batch: Any, output: Tensor) -> bool:
        before = {path: weights[path].detach().clone() for path in chosen}
        try:
            for path in chosen:
                weights[path].copy_(moved[path])
            changed = forwards.run(model, batch, run)
        finally:
            for path in chosen:
                weights[path].copy_(before[path])
        return changed.shape != output.shape or not torch.equal(changed, output)

    with forwards.evaluating(model), torch.no_grad():
        for batch in data:
            left = [path for path in paths if path not in found]
            output = forwards.run(model, batch, run)
            if left and changes(left, batch, output):
                found |= {path for path in left if changes([path], batch, output)}
    return found


def weights_of(
    model: nn.Module,
    parts: Iterable[Part],
    moments: Mapping[str, Tensor],
    num_inputs: Mapping[str, float],
    squares: Mapping[str, Tensor] = MappingProxyType({}),
    ranges: Mapping[str, Ranges] = MappingProxyType({}),
) -> Iterator[Weight]:
    """The weights of parts of ``model``.

    Blocks of a layer, and layers in a row with the same inputs, share what is found of these.

    Args:
        model: with these parts.
        parts: in the model's order, so that the blocks of a layer follow each other.
        moments: second moments of the inputs of layers, by the path of a part's first module, as far as there are any.
        num_inputs: of how many inputs they are.
        squares: mean squares of the input columns, by the same path.
        ranges: of the activations, by the same path.
    """
    layer: tuple[str, Weight] | None = None
    for part in parts:
        rows, path = part.weight(model), part.modules[0]
        own = moments.get(path)
        if layer is not None and (layer[0] == path or (own is not None and own is layer[1].moments)):
            layer = path, layer[1].block(rows, part.target, ranges.get(path))
        else:
            known = num_inputs.get(path, math.inf), squares.get(path), ranges.get(path)
            layer = path, Weight(rows, part.target, own, *known)
        yield layer[1]


def unique_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with every shared parameter or buffer under its first name only."""
    seen: set[int] = set()
    unique = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            unique[name] = tensor.detach()
    return unique


def _weight_owners(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """Id of a weight parameter → paths of the modules that have it as ``weight``."""
    owners: dict[int, tuple[str, ...]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners[id(weight)] = (*owners.get(id(weight), ()), name)
    return owners


def _blocks(model: nn.Module, modules: tuple[str, ...], calls: list[Calls], granularity: str | int) -> list[Part]:
    sharing = [model.get_submodule(path) for path in modules]
    module = sharing[0]
    channels, per_channel = layers.to_rows(module, layers.weight_of(module).detach()).shape
    macs = sum(own.macs for own in calls)
    step = channels if granularity == "layer" else int(granularity)
    parts = []
    for start in range(0, channels, step):
        stop = min(start + step, channels)
        whole = stop - start == channels
        replaceable = (
            whole
            and modules != ("",)  # the model itself has no parent to be swapped in
            and isinstance(module, REPLACEABLE)
            and layers.is_plain(module)
            and calls[0].rows > 0
            and len(modules) == 1
            and getattr(module, "groups", 1) == 1
        )
        window = None
        if replaceable and isinstance(module, nn.Conv2d):
            height, width = module.kernel_size
            window = Window(kernel=(height, width), inputs=calls[0].inputs, halfway=calls[0].halfway)
        target = Target(
            layer=(layers.kind_of(module) if layers.is_plain(module) else type(module)).__name__,
            channels=stop - start,
            per_channel=per_channel,
            dtype=layers.weight_of(module).dtype,
            macs=macs * (stop - start) / channels,
            whole=whole,
            replaceable=replaceable,
            window=window,
            lookups=calls[0].lookups if replaceable else 0.0,
            common_input=layers.same_rows(sharing) and all(map(_has_common_input, sharing, calls)),
            input_groups=_input_groups(module, calls[0]) if whole and len(modules) == 1 else 1,
            head=_is_head(sharing, calls),
        )
        name = modules[0] if whole else f"{modules[0]}[{start}:{stop}]"
        parts.append(Part(name=name, modules=modules, rows=None if whole else (start, stop), target=target))
    return parts


def _has_common_input(module: nn.Module, calls: Calls) -> bool:
    return _has_inputs(module, calls) and getattr(module, "groups", 1) == 1


def _is_head(sharing: list[nn.Module], calls: list[Calls]) -> bool:
    """Whether an Embedding and Linear layers share the weight, and it is known what goes into these."""
    dense = [own for own in zip(sharing, calls, strict=True) if not isinstance(own[0], nn.Embedding)]
    return 0 < len(dense) < len(sharing) and layers.same_rows(sharing) and all(
        isinstance(module, nn.Linear) and _has_common_input(module, own) for module, own in dense
    )  # fmt: skip


def _input_groups(module: nn.Module, calls: Calls) -> int:
    return int(getattr(module, "groups", 1)) if _has_inputs(module, calls) else 1


def _has_inputs(module: nn.Module, calls: Calls) -> bool:
    """Whether it is known what the weight's rows are multiplied with."""
    known = isinstance(module, (nn.Linear, *layers.CONVOLUTIONS)) or (
        isinstance(module, layers.TRANSPOSED) and layers.is_plain(module)
    )
    return known and calls.rows > 0 and calls.common_input
