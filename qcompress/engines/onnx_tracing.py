"""Export a model as an ONNX graph without any rewriting, so that every weight is an initializer under its own name."""

import contextlib
import copy
import functools
import inspect
import io
import json
import logging
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qcompress.engines.onnx_graph import OPSET, has_branches
from qcompress.errors import BatchError, DataError, EngineError, ModelError
from qcompress.model import forward as forwards
from qcompress.transforms.activations import unrounded

EXAMPLE = "example"
"""Key of the shapes of the example in the file's metadata: by name if it was a mapping, else in order."""


class Traced(nn.Module):
    """A model as a function of tensors, whatever form its batches have."""

    def __init__(self, model: nn.Module, batch: Any) -> None:
        super().__init__()
        self.model = model
        self.names = list(batch) if isinstance(batch, Mapping) else None
        self.alone = isinstance(batch, Tensor)

    def forward(self, *tensors: Tensor) -> Tensor:
        """Return the model's output.

        Raises:
            EngineError: it is not one tensor.
        """
        batch = dict(zip(self.names, tensors, strict=True)) if self.names is not None else list(tensors)
        try:
            return forwards.default_forward(self.model, tensors[0] if self.alone else batch)
        except ModelError as error:  # its advice, forward=, is for PyTorch only
            why = str(error).partition(";")[0]
            raise EngineError(
                f"{why}. Wrap it in a module that returns one tensor, such as 'return self.model(x)[0]' in its forward"
            ) from None


def inputs_of(batch: Any, count: int | None = None) -> list[Tensor]:
    """Return the tensors of a batch that the graph takes as inputs; for a list the first ``count``.

    Raises:
        BatchError: the batch is not a tensor, nor a list or dict of tensors.
    """
    tensors = [batch] if isinstance(batch, Tensor) else list(batch.values() if isinstance(batch, Mapping) else batch)
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        found = type(batch).__name__ + (
            f" of {', '.join(type(tensor).__name__ for tensor in tensors)}" if tensors else ""
        )
        raise BatchError(f"engine 'onnxruntime' traces tensors, lists and dicts of tensors, found {found}")
    return tensors if isinstance(batch, Mapping) or count is None else tensors[:count]


def feed_of(session: Any, batch: Any) -> dict[str, Any]:
    """Return a batch as the inputs of an ONNX Runtime session: a mapping by its keys, others in order.

    Raises:
        BatchError: inputs are missing.
    """
    names = [entry.name for entry in session.get_inputs()]
    return {name: tensor.detach().cpu().numpy() for name, tensor in _by_name(batch, names, names).items()}


def _by_name(batch: Any, names: Collection[str], wanted: Iterable[str]) -> dict[str, Tensor]:
    """Return the wanted tensors of a batch, whose tensors have these names if it is not a mapping.

    Raises:
        BatchError: some are missing.
    """
    tensors = inputs_of(list(batch) if isinstance(batch, tuple) else batch, len(names))
    given = dict(zip(batch if isinstance(batch, Mapping) else names, tensors, strict=False))
    if missing := [name for name in wanted if name not in given]:
        found = ", ".join(map(repr, batch)) if isinstance(batch, Mapping) else f"{len(tensors)} tensors"
        raise BatchError(
            f"the file's inputs are {', '.join(map(repr, wanted))}, but {', '.join(map(repr, missing))} "
            f"is missing in the batch, which has {found}"
        )
    return {name: given[name] for name in wanted}


def like_the_example(session: Any, batch: Any) -> Any:
    """Return a batch in the form of the example that a file was traced with; itself if the file does not state it.

    The graph depends on the names and the order of the inputs, and on sizes that the model looks at.

    Raises:
        BatchError: an input of the example is missing, or has another number of dimensions.
    """
    shapes = json.loads(session.get_modelmeta().custom_metadata_map.get(EXAMPLE, "null"))
    if shapes is None:
        return batch
    names = [entry.name for entry in session.get_inputs()]
    wanted = shapes if isinstance(shapes, dict) else dict(zip(names, shapes, strict=True))
    given = _by_name(batch, names, wanted)
    example = {name: _of_shape(name, given[name], shape) for name, shape in wanted.items()}
    return example if isinstance(shapes, dict) else list(example.values())


def _of_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Cut or repeat a tensor along its dimensions.

    >>> _of_shape("x", torch.tensor([[1, 2, 3]]), (2, 4)).tolist()
    [[1, 2, 3, 1], [1, 2, 3, 1]]
    """
    if tensor.ndim != len(shape) or 0 in tensor.shape:
        raise BatchError(f"{name!r} has the shape {list(tensor.shape)}, and {list(shape)} in the file's example")
    for dim, size in enumerate(shape):
        tensor = tensor.index_select(dim, torch.arange(size, device=tensor.device) % tensor.shape[dim])
    return tensor


def trace(model: nn.Module, example: Any) -> Any:
    """Export the dense model as an ONNX ModelProto without comments; weights are named ``model.`` plus state-dict name.

    The batch dimension is dynamic, and so are all dimensions of integer inputs (tokens). Inputs have the keys of a
    mapping, of which the graph takes those that it reads, or else the names of the model's parameters.

    Raises:
        EngineError: there is no example, the model itself does not run on it or on two samples like it, or the model
            cannot be exported; the message says why.
    """
    if example is None:
        raise EngineError("engine 'onnxruntime' traces the model: give example=, a batch (--data on the command line)")
    bags = (name for name, module in model.named_modules() if isinstance(module, nn.EmbeddingBag))
    if (bag := next(bags, None)) is not None:
        raise EngineError(
            f"{bag!r} is an EmbeddingBag, and ONNX Runtime does not load what PyTorch exports of it: use an Embedding, "
            "and sum or average over its words"
        )
    needed = _num_inputs(model) if isinstance(example, (list, tuple)) else None
    tensors = inputs_of(list(example) if isinstance(example, tuple) else example, needed)
    batch = example if isinstance(example, (Mapping, Tensor)) else tensors
    pair = tuple(  # a dimension of 1 would be fixed, and a tensor that is given twice would be one input
        (torch.cat([tensor, tensor]) if tensor.ndim and len(tensor) == 1 else tensor).detach().clone()
        for tensor in tensors
    )
    auto = torch.export.Dim.AUTO
    shapes = tuple(
        dict.fromkeys(range(min(1, tensor.ndim) if tensor.is_floating_point() else tensor.ndim), auto)
        for tensor in tensors
    )
    with _inference(model), unrounded(), _quietly(), _translations_kept(), torch.no_grad():
        try:
            program = torch.onnx.export(
                Traced(model, batch), pair, dynamo=True, opset_version=OPSET, optimize=False, verbose=False,
                dynamic_shapes=(shapes,),
            )  # fmt: skip
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            _require_running(model, batch, tensors, pair)
            raise EngineError(f"PyTorch cannot export {type(model).__name__} to ONNX: {_reason(error)}") from error
    assert program is not None  # noqa: S101
    proto = program.model_proto
    _state_known_sizes(proto.graph)
    proto = _bare(proto)
    _leave_out_zero_biases(proto.graph)
    _name_ends(proto.graph, _names(model, batch, len(tensors)))
    given: Any = [list(tensor.shape) for tensor in tensors]
    if isinstance(example, Mapping):
        _leave_out_unread_inputs(proto.graph)
        given = dict(zip(example, given, strict=True))
    proto.metadata_props.add(key=EXAMPLE, value=json.dumps(given))
    return proto


def _require_running(model: nn.Module, batch: Any, tensors: Iterable[Tensor], pair: Iterable[Tensor]) -> None:
    """Check that a model runs on a batch, and on two samples like the one in it: no exporter is to blame if not.

    Raises:
        BatchError: the model's own error.
    """
    run = Traced(model, batch)
    try:
        with forwards.first_pass(batch, "the example"):
            run(*tensors)
        with forwards.first_pass(list(pair), "the example's sample twice, which exporting needs"):
            run(*pair)
    except DataError as error:
        raise BatchError(str(error)) from error


@contextlib.contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode. `forwards.evaluating` would set accelerator flags in a way that the exporter cannot read."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silence PyTorch, whose exporter logs notes about torchvision and prints the graphs that it cannot export."""
    logger = logging.getLogger("torch")
    others = [
        each
        for name in list(logging.root.manager.loggerDict)
        if name.startswith("torch.")
        if (each := logging.getLogger(name)).level != logging.NOTSET
    ]  # the rest have the level of "torch"
    levels = {each: each.level for each in (logger, *others)}
    for each in levels:
        each.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in levels.items():
            each.setLevel(level)


@contextlib.contextmanager
def _translations_kept() -> Iterator[None]:
    """Let PyTorch's exporter use one table of translations for all exports.

    The exporter makes it anew in every export. It depends on the opset and on which libraries of operators are loaded.
    Another version of PyTorch may keep it elsewhere; then nothing is saved.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        registry: Any = ONNXRegistry
        making, unchanged = registry.from_torchlib, vars(registry)["from_torchlib"]
    except (ImportError, AttributeError, KeyError):
        yield
        return

    def kept(*given: Any, **settings: Any) -> Any:
        if given:
            return making(*given, **settings)
        table = copy.copy(_translations(making, frozenset(torch.ops.loaded_libraries), **settings))
        table.functions = {target: list(functions) for target, functions in table.functions.items()}
        return table

    registry.from_torchlib = staticmethod(kept)
    try:
        yield
    finally:
        registry.from_torchlib = unchanged


@functools.cache
def _translations(make: Callable[..., Any], libraries: frozenset[str], **settings: Any) -> Any:  # noqa: ARG001
    return make(**settings)  # which of the operators there are depends on the libraries


def _reason(error: BaseException) -> str:
    """Return the first line of the error that the exporter's error goes back to."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _num_inputs(model: nn.Module) -> int:
    parameters = inspect.signature(model.forward).parameters.values()
    needed = [each for each in parameters if each.default is each.empty and each.kind is not each.VAR_KEYWORD]
    return max(len(needed), 1)


def _names(model: nn.Module, batch: Any, count: int) -> list[str]:
    """Return the names of the inputs."""
    if isinstance(batch, Mapping):
        return list(batch)
    parameters = inspect.signature(model.forward).parameters.values()
    named = [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    return [named[place] if place < len(named) else f"input_{place}" for place in range(count)]


def _name_ends(graph: Any, names: list[str]) -> None:
    """Give the inputs these names, and call the output ``output``; other values that have one of them get another."""
    ends = [entry.name for entry in (*graph.input, *graph.output)]
    wanted = [*names, "output" if "output" not in names else "output.1"]
    taken = {name: f"{name}.inside" for name in wanted}
    _rename(graph, {**taken, **dict(zip(ends, wanted, strict=True))})


def _rename(graph: Any, names: Mapping[str, str]) -> None:
    for entry in (*graph.input, *graph.output, *graph.initializer):
        entry.name = names.get(entry.name, entry.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                _rename(inner, names)


def _leave_out_unread_inputs(graph: Any) -> None:
    if has_branches(graph):
        return
    read = {name for node in graph.node for name in node.input} | {item.name for item in graph.output}
    for item in [item for item in graph.input if item.name not in read]:
        graph.input.remove(item)


def _state_known_sizes(graph: Any) -> None:
    """Replace sizes that are computed, but known from the shapes of values, by constants.

    The exporter cuts the weights of recurrent layers into gates at sizes that it takes from the initial state. With
    constants ONNX Runtime cuts them once, when it loads the file, instead of in every run.
    """
    from onnx import helper, numpy_helper

    shapes = {
        entry.name: [
            size.dim_value if size.HasField("dim_value") else None for size in entry.type.tensor_type.shape.dim
        ]
        for entry in (*graph.value_info, *graph.input)
        if entry.type.tensor_type.HasField("shape")
    }
    for node in graph.node:
        if node.op_type != "Shape" or node.input[0] not in shapes:
            continue
        ends = {attribute.name: attribute.i for attribute in node.attribute}
        sizes = shapes[node.input[0]][ends.get("start", 0) : ends.get("end")]
        if None not in sizes:
            value = numpy_helper.from_array(np.array(sizes, dtype=np.int64))
            node.CopyFrom(helper.make_node("Constant", [], list(node.output), name=node.name, value=value))


def _bare(proto: Any) -> Any:
    """Remove comments, stack traces and the shapes of intermediate values."""
    proto.ClearField("metadata_props")
    proto.ClearField("doc_string")
    for field in ("metadata_props", "doc_string", "value_info"):
        proto.graph.ClearField(field)
    for item in (*proto.graph.node, *proto.graph.initializer, *proto.graph.input, *proto.graph.output):
        for field in ("metadata_props", "doc_string"):
            item.ClearField(field)
    return proto


def _leave_out_zero_biases(graph: Any) -> None:
    """Remove the computed zero biases that convolutions without bias get and that prevent fusion with batch norm."""
    from onnx import numpy_helper

    if has_branches(graph):
        return
    by_output = {name: node for node in graph.node for name in node.output}

    def is_zero(name: str) -> bool:
        node = by_output.get(name)
        if node is None:
            return False
        if node.op_type in ("Expand", "CastLike"):
            return is_zero(node.input[0])
        return node.op_type == "Constant" and node.attribute[0].name == "value" and not (
            numpy_helper.to_array(node.attribute[0].t).any()
        )  # fmt: skip

    for node in graph.node:
        if node.op_type in ("Conv", "ConvTranspose") and len(node.input) == 3 and is_zero(node.input[2]):
            del node.input[2]
    outputs = {item.name for item in graph.output}
    while True:
        read = outputs | {name for node in graph.node for name in node.input}
        unread = [node for node in graph.node if not read & set(node.output)]
        if not unread:
            return
        for node in unread:
            graph.node.remove(node)
