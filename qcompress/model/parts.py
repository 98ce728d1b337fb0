"""Which parts of a model take a decision, and what the rest costs.

A part is a weight (or a block of its output channels) that is stored in one way. Modules that share a weight are one
part; a module that is called several times is one part. What cannot be compressed is counted and named.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.errors import ModelError, OptionsError
from qcompress.model import forward as forwards
from qcompress.model import layers
from qcompress.model.tensors import held_tensors, overlapping, size_bytes, total_bytes, unregistered_modules
from qcompress.transforms.base import Target, Weight, Window

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
    """

    parts: tuple[Part, ...]
    original: dict[str, float]
    fixed: dict[str, float]
    skipped: tuple[Skipped, ...]


def survey(
    model: nn.Module, data: Iterable[Any], forward: forwards.Forward | None = None, granularity: str | int = "layer"
) -> Survey:
    """Run the first batch once and list the parts of ``model``.

    Args:
        model: any module.
        data: batches.
        forward: how to run a batch, where `qcompress.model.forward.default_forward` does not fit.
        granularity: ``"layer"``, or the number of output channels per block.

    Raises:
        ModelError: nothing in the model can be compressed; says what was found.
        OptionsError: an unknown granularity.
    """
    if granularity != "layer" and not (isinstance(granularity, int) and granularity >= 1):
        raise OptionsError(f"granularity must be 'layer' or a number of channels per block, found {granularity!r}")
    for name, module in model.named_modules():
        if not layers.why_unsupported(module) and not bool(torch.isfinite(layers.weight_of(module)).all()):
            raise ModelError(f"the weight of {name!r} ({type(module).__name__}) holds NaN or infinity")
    owners, shared = _weight_owners(model), overlapping(held_tensors(model))
    calls = _count_calls(model, data, forward)
    parts: list[Part] = []
    skipped: list[Skipped] = []
    for name, module in model.named_modules():
        own = [parameter for key, parameter in module.named_parameters(recurse=False) if key != "bias"]
        if not own:
            continue
        modules = owners.get(id(own[0]), (name,))
        if modules[0] != name:
            continue  # the weight is listed under the first module that owns it
        reason = layers.why_unsupported(module)
        if not reason and not all(path in calls for path in modules):
            reason = "never called as a module; its weight is used in some other way, if at all"
        if not reason and id(own[0]) in shared:
            reason = f"its weight lies in the memory of {shared[id(own[0])]!r}, which would change with it"
        if reason:
            skipped.append(Skipped(name=name, size_bytes=sum(map(size_bytes, own)), reason=reason))
        else:
            parts += _blocks(model, modules, [calls[path] for path in modules], granularity)
    for name, module in unregistered_modules(model).items():
        if own := list(module.parameters(recurse=False)):
            reason = "in a plain list or dict, where PyTorch does not see it: use nn.ModuleList or nn.ModuleDict"
            skipped.append(Skipped(name=name, size_bytes=sum(map(size_bytes, own)), reason=reason))
    if not parts:
        found = (
            "; ".join(f"{item.name or 'the model itself'}: {item.reason}" for item in skipped[:5]) or "no parameters"
        )
        supported = ", ".join(layer.__name__ for layer in layers.SUPPORTED)
        raise ModelError(f"nothing in the model can be compressed ({found}). Supported layers: {supported}")
    original = {"bytes": float(total_bytes(model)), "macs": float(sum(own.macs for own in calls.values()))}
    dense = {
        "bytes": sum(part.target.num_weights * part.target.dtype.itemsize for part in parts),
        "macs": sum(part.target.macs for part in parts),
    }
    fixed = {name: max(original[name] - dense[name], 0.0) for name in original}
    return Survey(parts=tuple(parts), original=original, fixed=fixed, skipped=tuple(skipped))


def weights_of(
    model: nn.Module, parts: Iterable[Part], moments: Mapping[str, Tensor], num_inputs: Mapping[str, float]
) -> Iterator[Weight]:
    """The weights of parts of ``model``; the blocks of a layer share what is found of its inputs.

    Args:
        model: with these parts.
        parts: in the model's order, so that the blocks of a layer follow each other.
        moments: second moments of the inputs of layers, by the path of a part's first module, as far as there are any.
        num_inputs: of how many inputs they are.
    """
    layer: tuple[str, Weight] | None = None
    for part in parts:
        rows, path = part.weight(model), part.modules[0]
        if layer is None or layer[0] != path:
            layer = path, Weight(rows, part.target, moments.get(path), num_inputs.get(path, math.inf))
            yield layer[1]
        else:
            yield layer[1].block(rows, part.target)


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


@dataclass(slots=True)
class _Calls:
    """Per sample, over all calls of a module: its macs, positions of `Window`, lookups."""

    macs: float = 0.0
    inputs: float = 0.0
    halfway: float = 0.0
    lookups: float = 0.0


def _count_calls(model: nn.Module, data: Iterable[Any], forward: forwards.Forward | None) -> dict[str, _Calls]:
    """The calls of every supported module that was called."""
    calls: dict[str, _Calls] = {}
    hooks = []
    for name, module in model.named_modules():
        if layers.why_unsupported(module):
            continue

        def count(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, name: str = name
        ) -> None:
            own, given = calls.setdefault(name, _Calls()), args[0] if args else kwargs.get("input")
            if isinstance(given, Tensor):
                own.macs += layers.macs_of_call(module, given, output)
                if isinstance(module, nn.Embedding):
                    own.lookups += given.numel()
                elif isinstance(module, nn.Conv2d):
                    images = output.numel() // (output.shape[-1] * output.shape[-2] * module.out_channels)
                    own.inputs += images * given.shape[-2] * given.shape[-1]
                    own.halfway += images * output.shape[-2] * given.shape[-1]

        hooks.append(module.register_forward_hook(count, with_kwargs=True))
    try:
        with forwards.evaluating(model), torch.no_grad():
            output = forwards.run(model, forwards.first_batch(data), forward)
    finally:
        for hook in hooks:
            hook.remove()
    samples = len(output)
    return {
        name: _Calls(own.macs / samples, own.inputs / samples, own.halfway / samples, own.lookups / samples)
        for name, own in calls.items()
    }


def _blocks(model: nn.Module, modules: tuple[str, ...], calls: list[_Calls], granularity: str | int) -> list[Part]:
    module = model.get_submodule(modules[0])
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
            and type(module) in REPLACEABLE
            and len(modules) == 1
            and getattr(module, "groups", 1) == 1
        )
        window = None
        if replaceable and isinstance(module, nn.Conv2d):
            height, width = module.kernel_size
            window = Window(kernel=(height, width), inputs=calls[0].inputs, halfway=calls[0].halfway)
        target = Target(
            layer=type(module).__name__,
            channels=stop - start,
            per_channel=per_channel,
            dtype=layers.weight_of(module).dtype,
            macs=macs * (stop - start) / channels,
            whole=whole,
            replaceable=replaceable,
            window=window,
            lookups=calls[0].lookups if replaceable else 0.0,
            common_input=all(map(_has_common_input, map(model.get_submodule, modules))),
        )
        name = modules[0] if whole else f"{modules[0]}[{start}:{stop}]"
        parts.append(Part(name=name, modules=modules, rows=None if whole else (start, stop), target=target))
    return parts


def _has_common_input(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, *layers.CONVOLUTIONS) and getattr(module, "groups", 1) == 1
