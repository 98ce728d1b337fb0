"""The parts of a model that options are chosen for, and the cost of the rest.

A part is a weight, or a block of its output channels, that is stored in one way. Weights are all parameters of two
dimensions or more (`qcompress.model.sites`). Modules that share a weight form one part, and so does a module that is
called several times; each matrix of a stack (such as experts) is a part. What cannot be compressed is counted and
listed.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.errors import ModelError, OptionsError
from qcompress.model import forward as forwards
from qcompress.model import layers
from qcompress.model.class_dimension import require_classes_last
from qcompress.model.counting import Calls, Counted, count
from qcompress.model.losses import Loss
from qcompress.model.opened import opened_of
from qcompress.model.sites import WEIGHT, Site, path_of
from qcompress.model.tensors import total_bytes
from qcompress.model.weights import ModelWeight, Skipped, effective_paths, find_weights
from qcompress.transforms.base import Ranges, Target, Weight, Window

UNCALLED = "no calibration input: no batch reaches it, so the effect of its options is unknown"
USED_OTHERWISE = "its weight is used without calling the layer"
USED_BY_BLOCK = f"{USED_OTHERWISE}, which is not measured block by block: load the model whole to compress it"
NOT_LINEAR = "the output of its module is not linear in it"
WORDS_IN_BLOCKS = "blocks of words whose rows are summed"
REPLACEABLE = (nn.Linear, nn.Conv2d, nn.Embedding)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A weight, or a block of its output channels, that one option is chosen for.

    Attributes:
        name: unique name: its `path`, with ``[start:stop]`` for a block.
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
        """Path of the weight: the first module's path, followed by the parameter's name unless that is ``weight``.

        >>> target = Target(layer="LSTM", channels=4, per_channel=2, dtype=torch.float32, macs=0)
        >>> Part(name="", modules=("rnn",), rows=None, target=target, parameter="weight_hh_l0").path
        'rnn.weight_hh_l0'
        """
        return path_of(self.modules[0], self.parameter)

    @property
    def state_name(self) -> str:
        """The weight's name in the state dict."""
        return self.state_names[0]

    @property
    def state_names(self) -> list[str]:
        """The names that the weight has in the state dict of the original."""
        return [f"{module}.{self.parameter}".lstrip(".") for module in self.modules]

    def site(self, model: nn.Module) -> Site:
        """Return the weight's site in ``model``.

        Raises:
            AttributeError: ``model`` has no such module.
        """
        return Site(model.get_submodule(self.modules[0]), self.parameter)

    def weight(self, model: nn.Module) -> Tensor:
        """Return the part's rows ``(channels, weights per channel)`` in ``model``, detached."""
        rows = self.site(model).rows
        return rows if self.rows is None else rows[self.rows[0] : self.rows[1]]

    def to_json(self) -> dict[str, Any]:
        """Return the part as plain JSON."""
        value = asdict(self)
        value["target"]["dtype"] = str(self.target.dtype).removeprefix("torch.")
        if self.parameter == WEIGHT:
            del value["parameter"]
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Part":
        """Undo `to_json`; KeyError, TypeError or AttributeError if ``value`` is not such JSON."""
        fields = dict(value["target"])
        if window := fields["window"]:
            fields["window"] = Window(**{**window, "kernel": tuple(window["kernel"])})
        target = Target(**{**fields, "dtype": getattr(torch, fields["dtype"])})
        rows = None if value["rows"] is None else (int(value["rows"][0]), int(value["rows"][1]))
        parameter = str(value.get("parameter", WEIGHT))
        return cls(name=value["name"], modules=tuple(value["modules"]), rows=rows, target=target, parameter=parameter)


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """The parts of a model, and the resource use of the whole model and the rest.

    Attributes:
        parts: the parts.
        original: resource → use of the whole original model (``bytes``, ``macs`` per sample).
        fixed: resource → use of everything that is not part of ``parts``.
        skipped: weights that were left out, and why.
        tried: name of a part → why calls of its layer do not show the effect of its options.
        num_batches: number of batches in the data.
        selecting: paths of the modules that select by the largest of computed numbers (`qcompress.model.selections`).
        counted: what was counted in a pass over the data; in an opened model, over its first sample, or block by block
            over all samples if others may call more layers.
        needed: name of a part → why the network needs its layer itself, so that no other can replace it.
    """

    parts: tuple[Part, ...]
    original: dict[str, float]
    fixed: dict[str, float]
    skipped: tuple[Skipped, ...]
    tried: dict[str, str]
    num_batches: int
    selecting: tuple[str, ...]
    counted: Counted
    needed: dict[str, str] = field(default_factory=dict)


def survey(
    model: nn.Module,
    data: Iterable[Any],
    forward: forwards.Forward | None = None,
    granularity: str | int = "layer",
    *,
    loss: Loss | None = None,
    counted: Counted | None = None,
    left_out: Callable[[str, str], str] = lambda path, module: "",  # noqa: ARG005
) -> Survey:
    """Run all batches once and list the parts of ``model``.

    A layer that receives no input from any batch is not a part, because the effect of its options is unknown. It stays
    unchanged.

    Args:
        model: any module.
        data: batches.
        forward: how to run a batch, if `qcompress.model.forward.default_forward` does not fit.
        granularity: ``"layer"``, or the number of output channels per block.
        loss: loss whose requirements on the outputs are checked.
        counted: what is known of the calls in the data; None to run all batches once.
        left_out: function of `Part.path` and the module's path that returns why to leave a weight unchanged, or an
            empty string.

    Raises:
        ModelError: nothing in the model can be compressed; the message says what was found.
        OptionsError: the granularity is invalid.
        DataError: there is no sample.
    """
    if granularity != "layer" and (type(granularity) is not int or granularity < 1):
        raise OptionsError(f"granularity must be 'layer' or a number of channels per block, found {granularity!r}")
    weights, skipped = find_weights(model)
    _require_finite(weights)
    if counted is None:
        counted = count(model, data, forward, loss)
    if loss is not None and counted.guesses_dim and opened_of(model) is None:
        require_classes_last(model, forwards.first_batch(data), forward, loss.name)
    chosen, left = [], list(skipped)
    for weight in weights:
        if reason := left_out(weight.path, weight.modules[0]):
            left.append(weight.skipped(reason))
        else:
            chosen.append(weight)
    silent = [weight for weight in chosen if not _rows_of(counted, weight)]
    by_block = [] if opened_of(model) is None else [weight for weight in silent if weight.site.is_layer]
    effective = effective_paths([weight for weight in silent if weight not in by_block], model, data, forward)
    left += [
        weight.skipped(_used_by_block(weight, counted) if weight in by_block else UNCALLED)
        for weight in silent
        if weight.path not in effective
    ]
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
    _require_parts(parts, left)
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
        skipped=tuple(left),
        tried=tried,
        num_batches=counted.num_batches,
        selecting=counted.selecting,
        counted=counted,
    )


def _require_finite(weights: Iterable[ModelWeight]) -> None:
    """Raise `ModelError` if a weight holds NaN or infinity. Weights of opened models are checked on reading."""
    for weight in weights:
        tensor = weight.site.weight
        if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"the weight of {weight.path!r} ({weight.kind}) holds NaN or infinity")


def _require_parts(parts: Sequence[Part], skipped: Sequence[Skipped]) -> None:
    """Raise `ModelError` with the reasons if nothing can be compressed."""
    if not parts:
        reasons = (
            "; ".join(f"{item.name or 'the model itself'}: {item.reason}" for item in skipped[:5]) or "no parameters"
        )
        raise ModelError(
            f"nothing in the model can be compressed ({reasons}). Parts are floating-point weights of two dimensions "
            "or more that have an effect on the outputs"
        )


def _why_tried(weight: ModelWeight, calls: list[Calls], blocks: list[Part], *, silent: bool) -> str:
    """Return why calls of the layer do not show the effect of its weight's options, or an empty string."""
    if not weight.site.is_layer:
        return NOT_LINEAR
    if odd := next((call.odd for call in calls if call.odd), ""):
        return odd
    if len(blocks) > 1 and isinstance(weight.site.module, nn.EmbeddingBag):
        return WORDS_IN_BLOCKS
    return USED_OTHERWISE if silent else ""


def _used_by_block(weight: ModelWeight, counted: Counted) -> str:
    """Return why a weight of an opened model is not a part if its layer is never called."""
    names = {f"{path}.{weight.site.parameter}".lstrip(".") for path in weight.modules}
    return UNCALLED if counted.used.isdisjoint(names) else USED_BY_BLOCK


def _rows_of(counted: Counted, weight: ModelWeight) -> float:
    if not weight.site.is_layer:
        return 0.0
    return sum(counted.calls[path].rows for path in weight.modules if path in counted.calls)


def weights_of(
    model: nn.Module,
    parts: Iterable[Part],
    moments: Mapping[str, Tensor],
    num_inputs: Mapping[str, float],
    squares: Mapping[str, Tensor] = MappingProxyType({}),
    ranges: Mapping[str, Ranges] = MappingProxyType({}),
) -> Iterator[Weight]:
    """Yield the weights of parts of ``model``.

    Blocks of a layer, and consecutive layers with the same inputs, share the results computed from these inputs.

    Args:
        model: model with these parts.
        parts: parts in the model's order, so that the blocks of a layer are consecutive.
        moments: second moments of layers' inputs by `Part.path`, where available.
        num_inputs: number of inputs that the moments are averaged over, by `Part.path`.
        squares: mean squares of the input columns, by `Part.path`.
        ranges: ranges of the activations, by `Part.path`.
    """
    layer: tuple[str, Weight] | None = None
    for part in parts:
        rows, path = part.weight(model), part.path
        input_moments = moments.get(path)
        if layer is not None and (
            layer[0] == path or (input_moments is not None and input_moments is layer[1].moments)
        ):
            layer = path, layer[1].block(rows, part.target, ranges.get(path))
        else:
            known = num_inputs.get(path, math.inf), squares.get(path), ranges.get(path)
            layer = path, Weight(rows, part.target, input_moments, *known)
        yield layer[1]


def unique_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict with every shared parameter or buffer only under its first name."""
    seen: set[int] = set()
    unique = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            unique[name] = tensor.detach()
    return unique


def _blocks(model: nn.Module, weight: ModelWeight, calls: list[Calls], granularity: str | int) -> list[Part]:
    module, site, modules = weight.site.module, weight.site, weight.modules
    sharing = [model.get_submodule(path) for path in modules]
    channels, per_channel = site.rows.shape
    macs = sum(call.macs for call in calls)
    height = channels // site.num_matrices
    step = height if granularity == "layer" else min(int(granularity), height)
    parts = []
    for start, stop in _ranges(channels, height, step):
        whole = stop - start == channels
        replaceable = (
            whole
            and site.is_layer
            and modules != ("",)  # the model itself has no parent in which to replace it
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
    """Yield blocks of up to ``step`` rows, each within one of the matrices of ``height`` rows."""
    for first in range(0, channels, height):
        for start in range(first, first + height, step):
            yield start, min(start + step, first + height)


def _has_common_input(module: nn.Module, calls: Calls) -> bool:
    return _has_inputs(module, calls) and getattr(module, "groups", 1) == 1


def _is_head(sharing: list[nn.Module], calls: list[Calls]) -> bool:
    """Whether an Embedding and Linear layers share the weight, and the inputs of the Linear layers are known."""
    dense = [pair for pair in zip(sharing, calls, strict=True) if not isinstance(pair[0], nn.Embedding)]
    return 0 < len(dense) < len(sharing) and layers.same_rows(sharing) and all(
        isinstance(module, nn.Linear) and _has_common_input(module, of_module) for module, of_module in dense
    )  # fmt: skip


def _input_groups(module: nn.Module, calls: Calls) -> int:
    return int(getattr(module, "groups", 1)) if _has_inputs(module, calls) else 1


def _has_inputs(module: nn.Module, calls: Calls) -> bool:
    """Whether the inputs that the weight's rows are multiplied with are known."""
    known = isinstance(module, (nn.Linear, *layers.CONVOLUTIONS)) or (
        (isinstance(module, layers.TRANSPOSED) or layers.has_inputs_first(module)) and layers.is_plain(module)
    )
    return known and calls.rows > 0 and calls.common_input
