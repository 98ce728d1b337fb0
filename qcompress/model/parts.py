"""Which parts of a model take a decision, and what the rest costs.

A part is a weight (or a block of its output channels) that is stored in one way: any parameter of two dimensions or
more (`qcompress.model.sites`). Modules that share a weight are one part; a module that is called several times is one
part; of a stack of matrices, as of experts, each is one. What cannot be compressed is counted and named.
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
from qcompress.model.sites import WEIGHT, Site, sites_of
from qcompress.model.steady import steady
from qcompress.model.tensors import held_tensors, overlapping, size_bytes, total_bytes, unregistered_modules
from qcompress.transforms.base import Ranges, Target, Weight, Window

UNCALLED = "no calibration input: no batch calls it with anything, so that nothing is known of what its options do"
USED_OTHERWISE = "its weight is used without calling the layer"
NOT_LINEAR = "the output of its module is not linear in it"
WORDS_IN_BLOCKS = "blocks of words whose rows are added up"
UNREGISTERED = "in a plain list or dict, where PyTorch does not see it: use nn.ModuleList or nn.ModuleDict"
REPLACEABLE = (nn.Linear, nn.Conv2d, nn.Embedding)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A weight, or a block of its output channels, that takes one decision.

    Attributes:
        name: unique; its `path`, with ``[start:stop]`` for a block.
        modules: paths of all modules that share this weight, in the model's order.
        rows: the block of output channels, or None for all of them.
        target: shape, type and macs of the rows.
        parameter: the weight's name in its modules.
    """

    name: str
    modules: tuple[str, ...]
    rows: tuple[int, int] | None
    target: Target
    parameter: str = WEIGHT

    @property
    def path(self) -> str:
        """Where the weight is: the first module's path, with the parameter's name where that is not ``weight``.

        >>> target = Target(layer="LSTM", channels=4, per_channel=2, dtype=torch.float32, macs=0)
        >>> Part(name="", modules=("rnn",), rows=None, target=target, parameter="weight_hh_l0").path
        'rnn.weight_hh_l0'
        """
        return path_of(self.modules[0], self.parameter)

    @property
    def state_name(self) -> str:
        """The weight's name in the state dict."""
        return f"{self.modules[0]}.{self.parameter}".lstrip(".")

    def site(self, model: nn.Module) -> Site:
        """Where the weight is in ``model``.

        Raises:
            AttributeError: it has no such module.
        """
        return Site(model.get_submodule(self.modules[0]), self.parameter)

    def weight(self, model: nn.Module) -> Tensor:
        """The part's rows ``(channels, weights per channel)`` in ``model``, detached."""
        rows = self.site(model).rows
        return rows if self.rows is None else rows[self.rows[0] : self.rows[1]]

    def to_json(self) -> dict[str, Any]:
        """The part as plain JSON."""
        value = asdict(self)
        value["target"]["dtype"] = str(self.target.dtype).removeprefix("torch.")
        if self.parameter == WEIGHT:
            del value["parameter"]
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Part":
        """Undo `to_json`; KeyError, TypeError or AttributeError when it is not what that gives."""
        own = dict(value["target"])
        if window := own.get("window"):
            own["window"] = Window(**{**window, "kernel": tuple(window["kernel"])})
        target = Target(**{**own, "dtype": getattr(torch, own["dtype"])})
        rows = None if value["rows"] is None else (int(value["rows"][0]), int(value["rows"][1]))
        parameter = str(value.get("parameter", WEIGHT))
        return cls(name=value["name"], modules=tuple(value["modules"]), rows=rows, target=target, parameter=parameter)


def path_of(module: str, parameter: str) -> str:
    """What a weight is called by: its module's path, and the parameter's name where that is not ``weight``."""
    return module if parameter == WEIGHT else f"{module}.{parameter}".lstrip(".")


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
    left_out: Callable[[str, str], str] = lambda path, module: "",  # noqa: ARG005
) -> Survey:
    """Run all batches once and list the parts of ``model``.

    A layer that no batch gives an input is no part: nothing is known of what its options do. It stays as it is.

    Args:
        model: any module.
        data: batches.
        forward: how to run a batch, where `qcompress.model.forward.default_forward` does not fit.
        granularity: ``"layer"``, or the number of output channels per block.
        loss: whose demands on the outputs are checked.
        left_out: `Part.path` and the module's path → why a weight is to stay as it is, or an empty string.

    Raises:
        ModelError: nothing in the model can be compressed; says what was found.
        OptionsError: an unknown granularity.
        DataError: there is no sample.
    """
    if granularity != "layer" and not (isinstance(granularity, int) and granularity >= 1):
        raise OptionsError(f"granularity must be 'layer' or a number of channels per block, found {granularity!r}")
    weights, skipped = _weights(model)
    for weight in weights:
        tensor = weight.site.weight
        if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):  # an opened model's are seen when read
            raise ModelError(f"the weight of {weight.path!r} ({weight.kind}) holds NaN or infinity")
    counted = count(model, data, forward, loss)
    chosen, left = [], list(skipped)
    for weight in weights:
        if reason := left_out(weight.path, weight.modules[0]):
            left.append(weight.skipped(reason))
        else:
            chosen.append(weight)
    silent = [weight for weight in chosen if not _rows_of(counted, weight)]
    effective = _effective(silent, model, data, forward)
    left += [weight.skipped(UNCALLED) for weight in silent if weight.path not in effective]
    parts: list[Part] = []
    tried: dict[str, str] = {}
    for weight in chosen:
        if weight in silent and weight.path not in effective:
            continue
        calls = [counted.calls.get(path, Calls()) for path in weight.modules] if weight.site.is_layer else [Calls()]
        blocks = _blocks(model, weight, calls, granularity)
        parts += blocks
        if reason := _why_tried(weight, calls, blocks, silent=weight in silent):
            tried |= dict.fromkeys((part.name for part in blocks), reason)
    skipped = tuple(left)
    if not parts:
        found = (
            "; ".join(f"{item.name or 'the model itself'}: {item.reason}" for item in skipped[:5]) or "no parameters"
        )
        raise ModelError(
            f"nothing in the model can be compressed ({found}). Parts are floating-point weights of two dimensions or "
            "more that have an effect on the outputs"
        )
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


@dataclass(frozen=True, slots=True, eq=False)
class _Weight:
    """A weight of a model that can be compressed, with all modules that have it under this name."""

    modules: tuple[str, ...]
    site: Site

    @property
    def path(self) -> str:
        return path_of(self.modules[0], self.site.parameter)

    @property
    def kind(self) -> str:
        """The layer's, or one that no layer has."""
        module = self.site.module
        return layers.kind_name(module) if self.site.is_layer else f"{type(module).__name__}.{self.site.parameter}"

    def skipped(self, reason: str) -> Skipped:
        return Skipped(name=self.path, size_bytes=size_bytes(self.site.weight), reason=reason)


def layer_names(model: nn.Module) -> list[str]:
    """Paths of all weights and of their modules, of those that modules share the first: what parts are called by."""
    weights, skipped = _weights(model)
    names = [name for weight in weights for name in (weight.modules[0], weight.path)]
    return list(dict.fromkeys([*names, *(item.name for item in skipped)]))


def _weights(model: nn.Module) -> tuple[list[_Weight], tuple[Skipped, ...]]:
    """Weights that can be compressed, in the model's order, and what else has parameters."""
    owners, shared = _owners(model), overlapping(held_tensors(model))
    weights, skipped = [], []
    for path, module in model.named_modules():
        rest: dict[str, list[Tensor]] = {}  # why not → parameters
        for site in sites_of(module):
            holders = owners[id(site.weight)]
            name = WEIGHT if any(parameter == WEIGHT for _, parameter in holders) else holders[0][1]
            modules = tuple(own for own, parameter in holders if parameter == name)
            if (path, site.parameter) != (modules[0], name):
                continue  # listed where it is first
            reasons = [Site(model.get_submodule(own), name).why_not() for own in modules]
            reason = next(filter(None, reasons), "")
            if not reason and id(site.weight) in shared:
                reason = f"its weight lies in the memory of {shared[id(site.weight)]!r}, which would change with it"
            if reason and "bias" not in site.parameter:
                rest.setdefault(reason, []).append(site.weight)
            elif not reason:
                weights.append(_Weight(modules, site))
        skipped += [
            Skipped(name=path, size_bytes=sum(map(size_bytes, own)), reason=reason) for reason, own in rest.items()
        ]
    for path, module in unregistered_modules(model).items():
        if own := list(module.parameters(recurse=False)):
            skipped.append(Skipped(name=path, size_bytes=sum(map(size_bytes, own)), reason=UNREGISTERED))
    return weights, tuple(skipped)


def _why_tried(weight: _Weight, calls: list[Calls], blocks: list[Part], *, silent: bool) -> str:
    """Why calls of the layer do not show what the options of its weight do, or an empty string."""
    if not weight.site.is_layer:
        return NOT_LINEAR
    if odd := next((own.odd for own in calls if own.odd), ""):
        return odd
    if len(blocks) > 1 and isinstance(weight.site.module, nn.EmbeddingBag):
        return WORDS_IN_BLOCKS
    return USED_OTHERWISE if silent else ""


def _rows_of(counted: Counted, weight: _Weight) -> float:
    if not weight.site.is_layer:
        return 0.0
    return sum(counted.calls[path].rows for path in weight.modules if path in counted.calls)


def _effective(
    weights: list[_Weight], model: nn.Module, data: Iterable[Any], forward: forwards.Forward | None
) -> set[str]:
    """Paths of the weights, of those that no call shows, that have an effect on outputs nevertheless."""
    found: set[str] = set()
    weights = [weight for weight in weights if not weight.site.weight.is_meta]  # an opened model's cannot be moved
    if not weights:
        return found
    run = steady(forward)
    generator = torch.Generator().manual_seed(0)
    sites = {weight.path: weight.site for weight in weights}
    moved = {path: _moved(site.weight, generator) for path, site in sites.items()}

    def changes(chosen: list[str], batch: Any, output: Tensor) -> bool:
        before = {path: sites[path].weight.detach().clone() for path in chosen}
        try:
            for path in chosen:
                sites[path].weight.copy_(moved[path])
            changed = forwards.run(model, batch, run)
        finally:
            for path in chosen:
                sites[path].weight.copy_(before[path])
        return changed.shape != output.shape or not torch.equal(changed, output)

    with forwards.evaluating(model), torch.no_grad():
        for batch in data:
            left = [path for path in sites if path not in found]
            output = forwards.run(model, batch, run)
            if left and changes(left, batch, output):
                found |= {path for path in left if changes([path], batch, output)}
    return found


def _moved(weight: Tensor, generator: torch.Generator) -> Tensor:
    """A weight with noise of its own size added."""
    noise = torch.randn(weight.shape, generator=generator).to(weight)
    return weight.detach() + noise * weight.detach().abs().mean()


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
        moments: second moments of the inputs of layers, by `Part.path`, as far as there are any.
        num_inputs: of how many inputs they are.
        squares: mean squares of the input columns, by the same path.
        ranges: of the activations, by the same path.
    """
    layer: tuple[str, Weight] | None = None
    for part in parts:
        rows, path = part.weight(model), part.path
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


def _owners(model: nn.Module) -> dict[int, list[tuple[str, str]]]:
    """Id of a parameter → all its places: paths of modules and its name there."""
    owners: dict[int, list[tuple[str, str]]] = {}
    for path, module in model.named_modules():
        for site in sites_of(module):
            owners.setdefault(id(site.weight), []).append((path, site.parameter))
    return owners


def _blocks(model: nn.Module, weight: _Weight, calls: list[Calls], granularity: str | int) -> list[Part]:
    module, site, modules = weight.site.module, weight.site, weight.modules
    sharing = [model.get_submodule(path) for path in modules]
    channels, per_channel = site.rows.shape
    macs = sum(own.macs for own in calls)
    height = channels // site.num_matrices
    step = height if granularity == "layer" else min(int(granularity), height)
    parts = []
    for start, stop in _ranges(channels, height, step):
        whole = stop - start == channels
        replaceable = (
            whole
            and site.is_layer
            and modules != ("",)  # the model itself has no parent to be swapped in
            and isinstance(module, REPLACEABLE)
            and layers.is_plain(module)
            and calls[0].rows > 0
            and len(modules) == 1
            and getattr(module, "groups", 1) == 1
        )
        window = None
        if replaceable and isinstance(module, nn.Conv2d):
            kernel = module.kernel_size
            window = Window(kernel=(kernel[0], kernel[1]), inputs=calls[0].inputs, halfway=calls[0].halfway)
        known = site.is_layer
        target = Target(
            layer=weight.kind,
            channels=stop - start,
            per_channel=per_channel,
            dtype=site.weight.dtype,
            macs=macs * (stop - start) / channels,
            whole=whole,
            replaceable=replaceable,
            window=window,
            lookups=calls[0].lookups if replaceable else 0.0,
            common_input=known and layers.same_rows(sharing) and all(map(_has_common_input, sharing, calls)),
            input_groups=_input_groups(module, calls[0]) if known and whole and len(modules) == 1 else 1,
            head=known and _is_head(sharing, calls),
        )
        name = weight.path if whole else f"{weight.path}[{start}:{stop}]"
        rows = None if whole else (start, stop)
        parts.append(Part(name=name, modules=modules, rows=rows, target=target, parameter=site.parameter))
    return parts


def _ranges(channels: int, height: int, step: int) -> Iterator[tuple[int, int]]:
    """Blocks of up to ``step`` rows, each within one of the matrices of ``height`` rows."""
    for first in range(0, channels, height):
        for start in range(first, first + height, step):
            yield start, min(start + step, first + height)


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
        (isinstance(module, layers.TRANSPOSED) or layers.has_inputs_first(module)) and layers.is_plain(module)
    )
    return known and calls.rows > 0 and calls.common_input
