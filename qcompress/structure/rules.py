"""The effect of operations on channels, one rule per kind; an operation without a rule blocks the channels it reads."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from qcompress.structure import products
from qcompress.structure.tracing import Rule, TracedTensor, Tracer, aten, distinct, split_dims

Args = Sequence[Any]


def rule_of(func: Any) -> Rule | None:
    """Return the rule of an operation, or None."""
    packet = func._overloadpacket
    if packet in RULES:
        return RULES[packet]
    if torch.Tag.pointwise in func.tags:
        return pointwise
    return None


def pointwise(tracer: Tracer, func: Any, args: Args, kwargs: dict[str, Any], output: Any) -> None:
    """Join values at the same position; values that are not channels must not vary along channels."""
    if not isinstance(output, Tensor):
        for value in tree_leaves((args, kwargs)):
            tracer.block(value, f"the operation {func} is not supported")
        return
    operands = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor) and value.numel() > 1]
    labelled = [value for value in operands if tracer.labels(value) is not None]
    sources = [seen for value in operands if (seen := tracer.seen(value)) is not None and seen.places]
    if not labelled:
        if len(operands) == 1 and len(sources) == 1 and output.shape == operands[0].shape:
            tracer.mark_source(output, sources[0].source, sources[0].places)
        else:
            for value in operands:
                tracer.block(value, "weights are computed with before they are used")
        return
    merged = torch.zeros((), dtype=torch.int64).expand(output.shape)
    for value in labelled:
        merged = _merge(tracer, merged, tracer.labels(value).expand(output.shape))  # type: ignore[union-attr]
    for seen in sources:
        source_labels = labels_of_source(tracer, seen, merged)
        if source_labels is None:
            tracer.block(seen.tensor, "it is combined with channels in a way that is not supported")
            tracer.nodes.block(distinct(merged), "combined with a weight in a way that is not supported")
        elif any(
            products.varies(merged, dim) and not products.varies(source_labels, dim) for dim in range(merged.ndim)
        ):
            tracer.shared.append((merged, source_labels))
        else:
            merged = _merge(tracer, merged, source_labels)
    for value in operands:
        seen = tracer.seen(value)
        if seen is not None and seen.places:
            continue
        lead = output.ndim - value.ndim
        dims = [lead + dim for dim, size in enumerate(value.shape) if size > 1]
        labels = None if seen is None else seen.labels
        if labels is None:
            tracer.constant(merged, dims, "combined with values that are not channels")
        elif bool((missing := (labels.expand(output.shape) == 0) & (merged != 0)).any()):
            tracer.constant(merged, dims, "combined with values that are not channels (padding)", missing)
    tracer.mark(output, merged)


def _merge(tracer: Tracer, first: Tensor, second: Tensor) -> Tensor:
    shrunk = [
        dim for dim in range(first.ndim) if first.stride(dim) == 0 and second.stride(dim) == 0 and first.shape[dim] > 1
    ]
    shape = first.shape
    for dim in shrunk:
        first, second = first.narrow(dim, 0, 1), second.narrow(dim, 0, 1)
    tracer.nodes.join(first.numpy(), second.numpy())
    return torch.where(first > 0, first, second).expand(shape)


def labels_of_source(tracer: Tracer, seen: TracedTensor, labels: Tensor) -> Tensor | None:
    """Return the nodes of a parameter combined elementwise with channels ``labels``; None if they are ambiguous."""
    along = [dim for dim in range(labels.ndim) if products.varies(labels, dim)]
    lead = labels.ndim - seen.tensor.ndim
    fitting = []
    for dim, places in enumerate(seen.places):
        varying = [lead + place for place in range(places.ndim) if products.varies(places, place)]
        if varying and set(varying) <= set(along):
            fitting.append(dim)
    if len(fitting) != 1:
        return None
    start = tracer.nodes.starts[seen.source, fitting[0]]
    return (seen.places[fitting[0]] + start).expand(labels.shape)


def move(tracer: Tracer, func: Any, args: Args, kwargs: dict[str, Any], output: Any) -> None:
    """Move values, and their nodes with them."""
    outputs = [output] if isinstance(output, Tensor) else list(output)
    given = [value for value in tree_leaves((args, kwargs)) if tracer.seen(value) is not None]
    if any(not isinstance(item, Tensor) or item.is_complex() for item in outputs):
        for value in given:
            tracer.block(value, f"the operation {func} is not supported")
        return
    listed = isinstance(args[0], (list, tuple))
    if listed and any(tracer.labels(value) is not None for value in args[0]):
        nodes = [_or_zeros(tracer, value) for value in args[0]]
        tracer.mark(outputs[0], func(nodes, *args[1:], **kwargs))
        for value in given:
            if tracer.seen(value).places:  # type: ignore[union-attr]
                tracer.block(value, "weights are concatenated with channels")
        return
    seen = None if listed else tracer.seen(args[0])
    if seen is None or any(tracer.seen(value) is not None for value in tree_leaves(args[1:])):
        for value in given:
            tracer.block(value, f"the operation {func} is not supported here")
        return

    def moved(nodes: Tensor) -> list[Tensor]:
        pieces = repeated(func, nodes, args[1:], kwargs, outputs)
        return [pieces] if isinstance(pieces, Tensor) else list(pieces)

    if seen.places:
        for item, places in zip(outputs, zip(*map(moved, seen.places), strict=True), strict=True):
            tracer.mark_source(item, seen.source, places)
    else:
        assert seen.labels is not None  # noqa: S101
        for item, labels in zip(outputs, moved(seen.labels), strict=True):
            tracer.mark(item, labels)


def repeated(func: Any, nodes: Tensor, rest: Args, kwargs: dict[str, Any], outputs: list[Tensor]) -> Any:
    """Apply the same move to the nodes."""
    packet = func._overloadpacket
    if packet in (aten.view, aten._unsafe_view, aten.reshape):
        return nodes.reshape(outputs[0].shape)
    if packet in (aten.clone, aten._to_copy, aten.detach, aten.alias, aten.lift_fresh, aten.contiguous):
        return nodes
    if packet is aten.constant_pad_nd:
        return func(nodes, rest[0])
    on_cpu = partial(tree_map, lambda value: value.cpu() if isinstance(value, Tensor) else value)  # where the nodes are
    rest, kwargs = on_cpu(rest), on_cpu(kwargs)
    return func(nodes, *rest, **kwargs)


def _or_zeros(tracer: Tracer, value: Tensor) -> Tensor:
    labels = tracer.labels(value)
    return torch.zeros((), dtype=torch.int64).expand(value.shape) if labels is None else labels


def pad(tracer: Tracer, func: Any, args: Args, kwargs: dict[str, Any], output: Any) -> None:
    """Pad with constants: along positions (even one) they belong to the channel, along channels to no channel."""
    labels, pads = tracer.labels(args[0]), list(args[1])
    if labels is None:
        move(tracer, func, args, kwargs, output)
        return
    several = any(products.varies(labels, dim) for dim in range(labels.ndim))
    for dim, size in enumerate(labels.shape):
        if labels.stride(dim) == 0 if size > 1 else several:
            labels, place = labels.narrow(dim, 0, 1), 2 * (labels.ndim - 1 - dim)
            pads[place : place + 2] = [0] * len(pads[place : place + 2])
    tracer.mark(output, func(labels, pads).expand(output.shape))


def view(tracer: Tracer, func: Any, args: Args, kwargs: dict[str, Any], output: Any) -> None:
    """Move values by a view, which may split a dimension; the remaining channels must form a complete grid."""
    if not isinstance(args[1], (list, tuple)):  # to another type
        tracer.block(args[0], f"the operation {func} is not supported")
        return
    move(tracer, func, args, kwargs, output)
    labels = tracer.labels(output)
    if labels is not None:
        for dims in split_dims(args[0].shape, output.shape):
            tracer.splits.append((labels, dims))


def piece(tracer: Tracer, func: Any, args: Args, kwargs: dict[str, Any], output: Any) -> None:
    """Move some indices of a dimension, hard-coded in the model's code."""
    labels = tracer.labels(args[0])
    move(tracer, func, args, kwargs, output)
    if labels is None:
        return
    for dim, start, length, step in pieces_of(func, args, kwargs, output):
        dim %= labels.ndim
        if length < labels.shape[dim] or step != 1:
            known = tracer.pieces.setdefault((id(args[0]), dim), (labels, set()))
            known[1].add((start % labels.shape[dim], length, step))


def pieces_of(func: Any, args: Args, kwargs: dict[str, Any], output: Any) -> list[tuple[int, int, int, int]]:
    """Return dimension, first index, length and step of every piece."""
    packet, size = func._overloadpacket, args[0].shape
    names = {"slice": ("dim", "start", "end", "step"), "select": ("dim", "index"), "unbind": ("dim",)}
    given = dict(zip(names.get(packet.__name__, ("size", "dim")), args[1:], strict=False)) | kwargs
    dim = given.get("dim", 0)
    if packet is aten.select:
        return [(dim, given["index"], 1, 1)]
    if packet is aten.slice:
        start = min(given.get("start") or 0, size[dim])
        return [(dim, start, output.shape[dim], given.get("step", 1))]
    if packet is aten.unbind:
        return [(dim, index, 1, 1) for index in range(size[dim])]
    pieces, start = [], 0
    for item in output:
        pieces.append((dim, start, item.shape[dim], 1))
        start += item.shape[dim]
    return pieces


def pick(tracer: Tracer, func: Any, args: Args, kwargs: dict[str, Any], output: Any) -> None:
    """Move by index tensors, which is not supported along channels."""
    labels, seen = tracer.labels(args[0]), tracer.seen(args[0])
    if seen is not None and seen.places and func._overloadpacket is not aten.index_select:
        tracer.block(args[0], f"the operation {func} is not supported on weights")
        return
    move(tracer, func, args, kwargs, output)
    if labels is None:
        return
    if func._overloadpacket is aten.index:
        dims = [dim for dim, index in enumerate(args[1]) if index is not None]
    else:
        dims = [args[1] % labels.ndim]
    tracer.constant(labels, dims, f"picked by the indices of {func._overloadpacket}")


def copy(tracer: Tracer, func: Any, args: Args, kwargs: dict[str, Any], output: Any) -> None:  # noqa: ARG001
    """Overwrite values by others."""
    labels = tracer.labels(args[1])
    if tracer.labels(args[0]) is not None or (tracer.seen(args[0]) is not None):
        tracer.block(args[0], "overwritten")
        tracer.block(args[1], "written over other values")
    elif args[0]._base is not None:
        tracer.block(args[1], "written into a part of a tensor")
    elif labels is not None:
        tracer.mark(output, labels.expand(output.shape))


def reduce(tracer: Tracer, func: Any, args: Args, kwargs: dict[str, Any], output: Any) -> None:
    """Reduce many values to one; they must belong to one channel."""
    labels = tracer.labels(args[0])
    if labels is None or not isinstance(output, (Tensor, tuple)):
        tracer.block(args[0], f"the operation {func} is not supported on weights")
        return
    given = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if func._overloadpacket is aten.linalg_vector_norm:
        given = kwargs.get("dim", args[2] if len(args) > 2 else None)
    numbers = [given] if type(given) is int else given if isinstance(given, (list, tuple)) else []
    dims = [dim % labels.ndim for dim in (numbers or range(labels.ndim))]
    tracer.constant(labels, dims, f"{func._overloadpacket} reduces over them")
    for dim in dims:
        labels = labels.narrow(dim, 0, 1)
    for item in [output] if isinstance(output, Tensor) else output:
        tracer.mark(item, labels.reshape(item.shape) if item.numel() == labels.numel() else None)


def along(tracer: Tracer, func: Any, args: Args, kwargs: dict[str, Any], output: Any) -> None:
    """Combine the values along a dimension without moving them: softmax, cumulative sums."""
    labels = tracer.labels(args[0])
    if labels is None:
        tracer.block(args[0], f"the operation {func} is not supported on weights")
        return
    dim = int(args[1] if len(args) > 1 else kwargs["dim"])
    tracer.constant(labels, [dim % labels.ndim], f"{func._overloadpacket} combines them")
    for item in [output] if isinstance(output, Tensor) else output:
        tracer.mark(item, labels)


def pool(tracer: Tracer, func: Any, args: Args, kwargs: dict[str, Any], output: Any) -> None:  # noqa: ARG001
    """Reduce windows over positions, which are the trailing dimensions after the channels."""
    labels, item = tracer.labels(args[0]), output if isinstance(output, Tensor) else output[0]
    if labels is None:
        return
    dims = [dim for dim in range(-SPACE.get(func._overloadpacket, 2), 0) if -dim <= labels.ndim]
    tracer.constant(labels, [dim % labels.ndim for dim in dims], f"{func._overloadpacket} combines them")
    for dim in dims:
        labels = labels.narrow(dim, 0, 1)
    tracer.mark(item, labels.expand(item.shape))


def _normalised(tracer: Tracer, item: Any, values: Sequence[Any]) -> tuple[Tensor | None, list[TracedTensor]]:
    """Return labels of the normalised tensor, and parameters among ``values``; block them if it has no labels."""
    labels, parameters = tracer.labels(item), [seen for value in values if (seen := tracer.seen(value)) is not None]
    if labels is None:
        for seen in parameters:
            tracer.block(seen.tensor, "it reads the input")
    return labels, parameters


def batch_norm(tracer: Tracer, func: Any, args: Args, kwargs: dict[str, Any], output: Any) -> None:  # noqa: ARG001
    """Normalise every channel separately, with one number of each parameter."""
    labels, parameters = _normalised(tracer, args[0], args[1:5])
    if labels is None:
        return
    for seen in parameters:
        shape = [1, len(seen.tensor), *[1] * (labels.ndim - 2)]
        if len(seen.places) != 1:
            tracer.block(seen.tensor, "not one number per channel")
            continue
        parameter_labels = (seen.places[0] + tracer.nodes.starts[seen.source, 0]).view(shape).expand(labels.shape)
        labels = _merge(tracer, labels, parameter_labels)
    tracer.mark(output[0], labels)


def layer_norm(tracer: Tracer, func: Any, args: Args, kwargs: dict[str, Any], output: Any) -> None:  # noqa: ARG001
    """Normalise the last dimensions together, so they must belong to one unit (such as a head)."""
    labels, parameters = _normalised(tracer, args[0], args[2:4])
    if labels is None:
        return
    dims = range(labels.ndim - len(args[1]), labels.ndim)
    tracer.constant(labels, list(dims), "normalised together")
    for seen in parameters:
        tracer.block(seen.tensor, "normalised together")
    tracer.mark(output[0] if isinstance(output, (tuple, list)) else output, labels)


def group_norm(tracer: Tracer, func: Any, args: Args, kwargs: dict[str, Any], output: Any) -> None:  # noqa: ARG001
    """Normalise channels in groups; a group is kept or removed as a whole."""
    labels = tracer.labels(args[0])
    parameters = [seen for value in args[1:3] if (seen := tracer.seen(value)) is not None]
    groups = next(value for value in reversed(args) if isinstance(value, int) and not isinstance(value, bool))
    if labels is None:
        for seen in parameters:
            tracer.block(seen.tensor, "it reads the input")
        return
    for seen in parameters:
        shape = [1, len(seen.tensor), *[1] * (labels.ndim - 2)]
        parameter_labels = (seen.places[0] + tracer.nodes.starts[seen.source, 0]).view(shape).expand(labels.shape)
        labels = _merge(tracer, labels, parameter_labels)
    for group in labels.chunk(groups, dim=1):
        tracer.nodes.join_all(distinct(group))
    tracer.mark(output[0], labels)


def glu(tracer: Tracer, func: Any, args: Args, kwargs: dict[str, Any], output: Any) -> None:  # noqa: ARG001
    """Multiply one half by the sigmoid of the other."""
    labels = tracer.labels(args[0])
    if labels is None:
        tracer.block(args[0], "not supported on weights")
        return
    value, gate = labels.chunk(2, dim=int(args[1]) if len(args) > 1 else -1)
    tracer.mark(output, _merge(tracer, value, gate))


def like(tracer: Tracer, func: Any, args: Args, kwargs: dict[str, Any], output: Any) -> None:  # noqa: ARG001
    """Create constants: with another tensor's shape they have its channels, with a shape in numbers none."""
    labels = tracer.labels(args[0])
    if labels is not None and labels.shape == output.shape:
        tracer.mark(output, labels)


SPACE = {
    aten.max_pool2d_with_indices: 2, aten._adaptive_avg_pool2d: 2, aten.avg_pool2d: 2, aten.adaptive_max_pool2d: 2,
    aten.avg_pool1d: 1, aten._adaptive_avg_pool3d: 3, aten.avg_pool3d: 3, aten.max_pool3d_with_indices: 3,
    aten.upsample_nearest1d: 1, aten.upsample_nearest2d: 2, aten.upsample_bilinear2d: 2, aten.upsample_bicubic2d: 2,
    aten.upsample_nearest3d: 3, aten.reflection_pad1d: 1, aten.reflection_pad2d: 2, aten.replication_pad2d: 2,
}  # fmt: skip

_MOVES = (
    aten.permute, aten.transpose, aten.t, aten.expand, aten.unsqueeze, aten.squeeze, aten.clone, aten._to_copy,
    aten.detach, aten.alias, aten.lift_fresh, aten.repeat, aten.flip, aten.cat, aten.stack,
    aten.contiguous,
)  # fmt: skip

RULES: dict[Any, Rule] = {
    **dict.fromkeys(_MOVES, move),
    aten.constant_pad_nd: pad,
    **dict.fromkeys((aten.view, aten._unsafe_view, aten.reshape), view),
    **dict.fromkeys((aten.slice, aten.select, aten.split, aten.split_with_sizes, aten.unbind), piece),
    **dict.fromkeys((aten.index, aten.index_select, aten.gather), pick),
    **dict.fromkeys((aten.mean, aten.sum, aten.amax, aten.amin, aten.var, aten.std, aten.var_mean, aten.logsumexp,
                     aten.linalg_vector_norm, aten.argmax, aten.any, aten.all, aten.prod), reduce),
    **dict.fromkeys((aten._softmax, aten._log_softmax, aten._safe_softmax, aten.cumsum), along),
    **dict.fromkeys(SPACE, pool),
    aten.copy_: copy,
    **dict.fromkeys((aten.native_batch_norm, aten._native_batch_norm_legit_no_training, aten.cudnn_batch_norm,
                     aten.miopen_batch_norm), batch_norm),
    aten.native_layer_norm: layer_norm,
    aten._fused_rms_norm: layer_norm,
    aten.native_group_norm: group_norm,
    **dict.fromkeys((aten.zeros_like, aten.ones_like, aten.full_like, aten.new_zeros, aten.new_ones), like),
    aten.glu: glu,
    aten.hardswish: pointwise,
    aten.hardswish_: pointwise,
    aten._prelu_kernel: pointwise,
    aten.convolution: products.convolution,
    aten.mm: products.matrix_product,
    aten.addmm: products.matrix_product,
    aten.bmm: products.matrix_product,
    aten.baddbmm: products.matrix_product,
    aten.embedding: products.embedding,
    **dict.fromkeys((aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention,
                     aten._scaled_dot_product_efficient_attention, aten._scaled_dot_product_cudnn_attention),
                    products.attention),
}  # fmt: skip
