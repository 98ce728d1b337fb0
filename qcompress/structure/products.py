"""Products: a weight reads channels and produces others; attention treats a head as one unit."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompress.structure.nodes import Nodes
from qcompress.structure.tracing import TracedTensor, Tracer, aten, compacted, distinct

Args = Sequence[Any]

INPUT = "it reads the input"


def varies(labels: Tensor, dim: int) -> bool:
    """Whether the nodes differ along a dimension."""
    if labels.shape[dim] < 2 or labels.stride(dim) == 0:
        return False
    for other in range(labels.ndim):
        if other != dim and labels.stride(other) == 0 and labels.shape[other] > 1:
            labels = labels.narrow(other, 0, 1)
    return bool((labels != labels.narrow(dim, 0, 1)).any())


def axis(seen: TracedTensor, dim: int, taken: Sequence[int] = ()) -> int | None:
    """Return the only dimension of a parameter along ``dim`` of the tensor derived from it, and along no other."""
    size = seen.tensor.shape[dim]
    fitting = []
    for dimension, places in enumerate(seen.places):
        along = [place for place in range(places.ndim) if varies(places, place)]
        if dimension not in taken and (along == [dim] or (not along and size == 1)):
            fitting.append(dimension)
    return fitting[0] if fitting else None


def nodes_along(tracer: Tracer, seen: TracedTensor, dimension: int, dim: int) -> Nodes:
    """Return the nodes of a parameter's dimension along ``dim`` of the tensor derived from it, such as a slice."""
    places = seen.places[dimension].movedim(dim, -1)
    while places.ndim > 1:
        places = places[0]
    nodes: Nodes = tracer.nodes.of(seen.source, dimension)[places.numpy()]
    return nodes


def read_nodes(tracer: Tracer, labels: Tensor | None, dim: int, nodes: Nodes) -> None:
    """Join the channels read along a dimension with the weight's ``nodes``; block nodes that read no channel."""
    if labels is None:
        tracer.nodes.block(nodes, INPUT)
        return
    flat = np.moveaxis(compacted(labels, whole=dim), dim, 0).reshape(len(nodes), -1)
    some, every = (flat > 0).any(axis=1), (flat > 0).all(axis=1)
    tracer.nodes.join(nodes[:, None], flat)
    tracer.nodes.block(nodes[~some], INPUT)
    tracer.nodes.block(nodes[some & ~every], "read together with values that are not channels")


def convolution(tracer: Tracer, func: Any, args: Args, kwargs: dict[str, Any], output: Any) -> None:  # noqa: ARG001
    """Read channels along dimension 1; groups keep equal numbers of channels, in a depthwise convolution one each."""
    given, weight, bias = args[0], tracer.seen(args[1]), tracer.seen(args[2])
    transposed, groups = args[6], args[8]
    labels = tracer.labels(given)
    first = second = None
    if weight is not None and weight.places:
        first = axis(weight, 0)
        second = None if first is None else axis(weight, 1, (first,))
    if weight is None or first is None or second is None or given.ndim != args[1].ndim:
        for value in args[:3]:
            tracer.block(value, "a convolution with computed weights")
        return
    nodes = tracer.nodes
    rows, columns = nodes_along(tracer, weight, first, 0), nodes_along(tracer, weight, second, 1)
    num_in, num_out = given.shape[1], output.shape[1]
    made = columns if transposed else rows
    if groups == 1:
        tracer.reads.add((weight.source, first if transposed else second))
        read_nodes(tracer, labels, 1, rows if transposed else columns)
    elif groups == num_in:
        nodes.block(columns, "one per group")
        repeats = num_out // num_in
        each = rows if transposed else rows[::repeats]
        read_nodes(tracer, labels, 1, each)
        made = each.repeat(repeats)
        if not transposed:
            nodes.join(rows, made)
    else:
        in_nodes, out_nodes = (rows, columns) if transposed else (columns, rows)
        per_group = num_in // groups
        if transposed:
            tracer.reads.add((weight.source, first))
            read_nodes(tracer, labels, 1, in_nodes)
            nodes.join(in_nodes.reshape(groups, per_group), in_nodes[None, :per_group])
            made = np.tile(out_nodes, groups)
        else:
            tracer.reads.add((weight.source, second))
            read_nodes(tracer, labels, 1, np.tile(in_nodes, groups))
            nodes.join(out_nodes.reshape(groups, -1), out_nodes[None, : num_out // groups])
            made = out_nodes
    result = torch.from_numpy(made).view(1, -1, *[1] * (output.ndim - 2)).expand(output.shape)
    tracer.mark(output, result)
    if bias is not None and bias.places:
        nodes.join(nodes_along(tracer, bias, 0, 0), made)


def matrix_product(tracer: Tracer, func: Any, args: Args, kwargs: dict[str, Any], output: Any) -> None:  # noqa: ARG001
    """Multiply activations with a weight or with other activations, batched or not; with a bias."""
    added = func._overloadpacket in (aten.addmm, aten.baddbmm)
    bias, first, second = args[:3] if added else (None, *args[:2])
    left, right = tracer.seen(first), tracer.seen(second)
    if right is not None and right.places and not (left is not None and left.places):
        weighted(tracer, first, right, output, bias, turned=False)
    elif left is not None and left.places and not (right is not None and right.places):
        weighted(tracer, second, left, output, bias, turned=True)
    elif left is not None and left.places:
        for value in (bias, first, second):
            tracer.block(value, "a product of two weights")
    else:
        batched(tracer, first, second, output)
        if bias is not None and (tracer.seen(bias) is not None or tracer.labels(output) is not None):
            tracer.block(bias, "added to a product of activations")
            tracer.block(output, "added to a product of activations")


def weighted(
    tracer: Tracer, given: Tensor, weight: TracedTensor, output: Tensor, bias: Tensor | None, *, turned: bool
) -> None:
    """Multiply channels by a weight ``(inputs, outputs)``; if turned, a weight ``(outputs, inputs)`` by channels."""
    inner, outer = (-1, -2) if turned else (-2, -1)
    rank, labels, nodes = weight.tensor.ndim, tracer.labels(given), tracer.nodes
    read = axis(weight, rank + inner)
    made = None if read is None else axis(weight, rank + outer, (read,))
    if read is None or made is None:
        for value in (bias, given, weight.tensor):
            tracer.block(value, "a product with computed weights")
        return
    read_by = nodes_along(tracer, weight, read, rank + inner)
    made_by = nodes_along(tracer, weight, made, rank + outer)
    along, across = outer % given.ndim, inner % given.ndim  # of channels: the summed dimension, and the other
    if labels is not None and not varies(labels, along) and varies(labels, across):
        nodes.block(np.concatenate([read_by, made_by]), "it mixes positions")
        tracer.block(bias, "it mixes positions")
        made_labels = labels.narrow(along, 0, 1).expand(output.shape)
        tracer.mark(output, made_labels)
        tracer.work.append((made_labels, len(read_by), weight.source))
        return
    tracer.work.append((torch.zeros((), dtype=torch.int64).expand(output.shape), len(read_by), weight.source))
    tracer.reads.add((weight.source, read))
    read_nodes(tracer, labels, along, read_by)
    shape = [1] * output.ndim
    shape[outer] = len(made_by)
    result = torch.from_numpy(made_by).view(shape).expand(output.shape)
    tracer.mark(output, result)
    if bias is None:
        return
    added = tracer.seen(bias)
    place = axis(added, added.tensor.ndim - 1) if added is not None and added.places and not turned else None
    if added is not None and place is not None:
        nodes.join(nodes_along(tracer, added, place, added.tensor.ndim - 1), made_by)
    elif added is not None and added.labels is not None:
        nodes.join(added.labels.expand(output.shape).numpy(), result.numpy())
    else:
        tracer.block(bias, "a computed bias")
        nodes.block(made_by, "a computed bias")


def batched(tracer: Tracer, first: Tensor, second: Tensor, output: Tensor) -> None:
    """Join all channels in a product of two activations (a head); if only one operand has channels, keep its nodes."""
    left, right = tracer.labels(first), tracer.labels(second)
    if left is not None and right is not None:
        heads = 1 if left.ndim == 2 else len(left)
        both = torch.cat([left.reshape(heads, -1), right.reshape(heads, -1)], dim=1)
        for head in both:
            tracer.nodes.join_all(distinct(head))
        tracer.mark(output, both.amax(dim=1).view(heads, 1, 1).expand(heads, *output.shape[-2:]).reshape(output.shape))
    elif left is not None:
        tracer.constant(left, [left.ndim - 1], "multiplied by values that are not channels")
        tracer.mark(output, left[..., :1].expand(output.shape))
    elif right is not None:
        tracer.constant(right, [right.ndim - 2], "multiplied by values that are not channels")
        tracer.mark(output, right[..., :1, :].expand(output.shape))
    made = tracer.labels(output)
    tracer.work.append(
        (torch.zeros((), dtype=torch.int64).expand(output.shape) if made is None else made, first.shape[-1], "")
    )


def attention(tracer: Tracer, func: Any, args: Args, kwargs: dict[str, Any], output: Any) -> None:  # noqa: ARG001
    """Join queries, keys, values and biases of each head; several query heads may share keys and values."""
    given = [tracer.labels(value) for value in args[:3]]
    share = args[1].shape[-2] * (args[0].shape[-1] + args[2].shape[-1]) / args[2].shape[-1]
    none = torch.zeros((), dtype=torch.int64).expand(output[0].shape)
    if any(labels is None for labels in given):
        for value in args[:3]:
            tracer.block(value, "attention over values that are not channels")
        tracer.work.append((none, share, ""))
        return
    heads = args[0].shape[1]
    query, key, value = (
        labels.repeat_interleave(heads // labels.shape[1], dim=1) for labels in given if labels is not None
    )
    bias = tracer.labels(kwargs.get("attn_mask", args[3] if len(args) > 3 else None))
    joined = [query, key, value]
    if bias is not None:
        joined.append(bias[(None,) * (4 - bias.ndim)].expand(-1, heads, -1, -1))
    for head in range(heads):
        tracer.nodes.join_all(np.concatenate([distinct(labels[:, head]) for labels in joined]))
    tracer.mark(output[0], value[:, :, :1].expand(output[0].shape))
    tracer.work.append((value[:, :, :1].expand(output[0].shape), share, ""))


def embedding(tracer: Tracer, func: Any, args: Args, kwargs: dict[str, Any], output: Any) -> None:  # noqa: ARG001
    """Look up a row of the table for every index; the columns are channels."""
    table = tracer.seen(args[0])
    if table is None or len(table.places) != 2:
        tracer.block(args[0], "a computed table")
        return
    tracer.nodes.block(tracer.nodes.of(table.source, 0), "an entry of a table")
    tracer.mark(output, torch.from_numpy(tracer.nodes.of(table.source, 1)).expand(output.shape))
