"""Layers of an ONNX graph that multiply 8-bit weights with 8-bit activations, with ONNX Runtime's integer operators.

A Linear layer becomes `MatMulIntegerToFloat` after a `QuantizeLinear` (static) or `DynamicQuantizeMatMul` (dynamic), a
convolution becomes `QLinearConv` between `QuantizeLinear` and `DequantizeLinear`. The operators are written in their
final form, so that nothing depends on the fusions of ONNX Runtime. If a layer's output codes are on the grid that the
next layer reads, they are passed on directly: the pair between them is removed, and so is a clamp that the range of the
codes implies. If an embedding shares the weight of a Linear layer, its rows are looked up in the same codes.

Weights of 8 bits are unsigned, with 128 for 0: x86 processors without VNNI add pairs of products with signed weights in
16 bits, which saturate. Weights of 7 bits are too small for that and are signed, which is faster. Depthwise
convolutions have a kernel that adds in 32 bits, and is faster with signed weights.
"""

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qcompress.engines import onnx_graph
from qcompress.transforms.activations import Range
from qcompress.transforms.base import Target
from qcompress.transforms.quantize.integer import BITS, IntegerProduct
from qcompress.transforms.quantize.packing import unpack

SAME_STEP = 1e-5  # relative tolerance for ranges of one tensor that was measured as an output and as an input
LARGEST_BIAS = 2.0**30  # largest bias in steps of an int32
MIDDLE = 128
"""The unsigned number that stands for a weight of 0."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class IntegerLayer:
    """A layer to multiply in integers.

    Attributes:
        name: name of its weight's initializer.
        transform: how it is stored.
        target: description of its rows.
        stored: the stored arrays; None if only sizes matter.
    """

    name: str
    transform: IntegerProduct
    target: Target
    stored: Mapping[str, Tensor] | None = None

    def numbers(self) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Return signed codes ``(channels, per_channel)`` and scales ``(channels,)``."""
        rows, columns = self.target.channels, self.target.per_channel
        if self.stored is None:
            return np.zeros((rows, columns), np.int8), np.ones(rows, np.float32)
        bits = self.transform.bits
        codes = unpack(self.stored["codes"], bits, rows * columns).numpy().reshape(rows, columns) - (1 << bits - 1)
        return codes.astype(np.int8), self.stored["scales"].numpy().astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Use:
    """A product with a weight, or a lookup of its rows.

    Attributes:
        operator: ``"Conv"``, ``"Linear"`` or ``"Lookup"``.
        given: the input, or the indices of rows.
        bias: initializer of the bias or "".
        output: the output.
        node: the node itself.
    """

    operator: str
    given: str
    bias: str
    output: str
    node: Any


def refused(proto: Any, name: str) -> str:
    """Return why a weight's products cannot be computed in integers, or an empty string."""
    return "" if uses(proto, name) else "the graph does not only multiply its weight with the layer's input"


def room(proto: Any, layer: IntegerLayer) -> tuple[int, int]:
    """Return an upper bound on a layer's bytes in the file, and the bytes of its codes, scales and zero points."""
    writer = _Writer(proto)
    products = uses(proto, layer.name)
    nodes = [node for use in products for node in writer.nodes(layer, use)]
    readers = _readers(proto)  # each may be a clamp, which becomes another DequantizeLinear
    again = sum((len(use.output) + 64) * max(1, len(readers.get(use.output, ()))) for use in products)
    total = sum(int(item.ByteSize()) + 8 for item in (*nodes, *writer.initializers))
    numbers = {f"{layer.name}.{part}" for part in ("codes", "scales", "zeros")}
    return total + again, sum(len(item.raw_data) for item in writer.initializers if item.name in numbers)


def put_(proto: Any, integers: Sequence[IntegerLayer]) -> None:
    """Make the graph multiply these layers in integers, in place."""
    writer = _Writer(proto)
    by_output = {use.output: (layer, use) for layer in integers for use in uses(proto, layer.name)}
    gone = {id(use.node) for _, use in by_output.values()}
    nodes: list[Any] = []
    for node in proto.graph.node:
        product = by_output.get(node.output[0])
        if product is not None:
            nodes += writer.nodes(*product)
        elif id(node) not in gone:
            nodes += [*writer.behind(node), node]
    initializers = [*proto.graph.initializer, *writer.initializers]
    outputs = {item.name for item in proto.graph.output}
    while True:
        read = outputs.union(*(node.input for node in nodes))
        needed = [node for node in nodes if read.intersection(node.output)]
        if len(needed) == len(nodes):
            break
        nodes = needed
    kept_nodes = [_copy(node) for node in nodes]
    kept_initializers = [_copy(item) for item in initializers if item.name in read]
    del proto.graph.node[:], proto.graph.initializer[:]
    proto.graph.node.extend(kept_nodes)
    proto.graph.initializer.extend(kept_initializers)


def _copy(item: Any) -> Any:
    copied = type(item)()
    copied.CopyFrom(item)
    return copied


@dataclass(slots=True)
class _Writer:
    """Writes nodes, and remembers which tensors have codes.

    Attributes:
        codes: tensor → name and range of codes that represent it exactly.
    """

    proto: Any
    initializers: list[Any] = field(default_factory=list)
    codes: dict[str, list[tuple[str, Range]]] = field(default_factory=dict)
    _known: dict[str, Any] = field(default_factory=dict)

    def nodes(self, layer: IntegerLayer, use: Use) -> Iterator[Any]:
        """Yield the operators of one product."""
        from onnx import helper

        if use.operator == "Conv":
            yield from self._convolution(layer, use)
            return
        if use.operator == "Lookup":
            yield from self._lookup(layer, use)
            return
        _, scales = layer.numbers()
        weight = yield from self._columns(layer)
        scale, middle = self._constant(f"{layer.name}.scales", scales), self._middle(layer)
        inputs = layer.transform.activations.inputs
        if inputs is None:
            names, operator = [use.given, weight, scale, middle, use.bias], "DynamicQuantizeMatMul"
        else:
            given, step, zero = yield from self._quantized(use.given, inputs)
            names, operator = [given, weight, step, scale, zero, middle, use.bias], "MatMulIntegerToFloat"
        while not names[-1]:
            names.pop()
        yield helper.make_node(operator, names, [use.output], domain="com.microsoft", name=f"{use.output}.product")

    def _columns(self, layer: IntegerLayer) -> Generator[Any, None, str]:
        """Return the name of the codes ``(per_channel, channels)``; rows that are looked up too are stored once."""
        from onnx import helper

        codes, name = unsigned(layer.numbers()[0]), f"{layer.name}.codes"
        if not any(onnx_graph.is_lookup(node, layer.name) for node in self.proto.graph.node):
            return self._constant(name, np.ascontiguousarray(codes.T))
        if (turned := f"{name}.turned") not in self._known:
            self._known[turned] = None
            yield helper.make_node("Transpose", [self._constant(name, codes)], [turned], perm=[1, 0])
        return turned

    def _lookup(self, layer: IntegerLayer, use: Use) -> Iterator[Any]:
        """Look up rows of codes and their scales, and multiply them."""
        from onnx import TensorProto, helper

        codes, scales = layer.numbers()
        names = {
            step: f"{use.output}.{step}" for step in ("codes", "wide", "middle", "steps", "scale", "axis", "scales")
        }
        rows = self._constant(f"{layer.name}.codes", unsigned(codes))
        yield helper.make_node("Gather", [rows, use.given], [names["codes"]])
        yield helper.make_node("Cast", [names["codes"]], [names["wide"]], to=TensorProto.FLOAT)
        yield helper.make_node("Constant", [], [names["middle"]], value_float=float(MIDDLE))
        yield helper.make_node("Sub", [names["wide"], names["middle"]], [names["steps"]])
        yield helper.make_node(
            "Gather", [self._constant(f"{layer.name}.scales", scales), use.given], [names["scale"]]
        )  # fmt: skip
        yield helper.make_node("Constant", [], [names["axis"]], value_ints=[-1])
        yield helper.make_node("Unsqueeze", [names["scale"], names["axis"]], [names["scales"]])
        yield helper.make_node("Mul", [names["steps"], names["scales"]], [use.output])

    def behind(self, node: Any) -> Iterator[Any]:
        """For a clamp that the range of the codes implies, yield nodes that replace it under the clamp's name."""
        if not node.input or node.input[0] not in self.codes or not self._is_done(node):
            return
        for name, span in self.codes[node.input[0]]:
            yield self._dense(name, span, node.output[0])
            self.codes.setdefault(node.output[0], []).append((name, span))
        node.output[0] = f"{node.output[0]}.unread"

    def _is_done(self, node: Any) -> bool:
        """Whether a clamp changes none of the values that its input's codes can represent."""
        span = self.codes[node.input[0]][0][1]
        low, high = -span.zero * span.step, (255 - span.zero) * span.step
        if node.op_type == "Relu":
            return low >= 0
        if node.op_type != "Clip":
            return False
        ends = [self._scalar(name) for name in (*node.input[1:], "", "")[:2]]
        least, most = -math.inf if ends[0] is None else ends[0], math.inf if ends[1] is None else ends[1]
        return least <= low and high <= most * (1 + SAME_STEP)

    def _scalar(self, name: str) -> float | None:
        """Return the value of a constant; None if there is none; NaN, which fails all comparisons, if it is unknown."""
        from onnx import numpy_helper

        if not name:
            return None
        for item in self.proto.graph.initializer:
            if item.name == name:
                return float(numpy_helper.to_array(item))
        for node in self.proto.graph.node:
            if name in node.output:
                if node.op_type in ("Cast", "CastLike", "Identity"):
                    return self._scalar(node.input[0])
                values = {attribute.name: attribute for attribute in node.attribute}
                if node.op_type == "Constant" and "value" in values:
                    return float(numpy_helper.to_array(values["value"].t))
                for kind, field_name in (("value_float", "f"), ("value_int", "i")):
                    if node.op_type == "Constant" and kind in values:
                        return float(getattr(values[kind], field_name))
        return math.nan

    def _convolution(self, layer: IntegerLayer, use: Use) -> Iterator[Any]:
        from onnx import helper, numpy_helper

        inputs, outputs = layer.transform.activations.inputs, layer.transform.activations.outputs
        assert inputs is not None  # noqa: S101
        assert outputs is not None  # noqa: S101
        tensors = {item.name: item for item in self.proto.graph.initializer}
        codes, scales = layer.numbers()
        bias = np.zeros(len(scales)) if not use.bias else numpy_helper.to_array(tensors[use.bias]).astype(np.float64)
        codes, scales = with_room_for(bias, codes, scales, inputs.step)
        given, step, zero = yield from self._quantized(use.given, inputs)
        steps = np.round(bias / (np.float64(inputs.step) * scales)).astype(np.int32)
        shape = tuple(tensors[layer.name].dims)
        narrow = layer.transform.bits < max(BITS)
        signed = narrow or _is_depthwise(use.node, tensors[layer.name])
        zeros = np.zeros(() if narrow else len(scales), np.int8)
        names = [
            given, step, zero,
            self._constant(f"{layer.name}.codes", (codes if signed else unsigned(codes)).reshape(shape)),
            self._constant(f"{layer.name}.scales", scales),
            self._constant(f"{layer.name}.zeros", zeros) if signed else self._middle(layer),
            *self._grid(use.output, outputs),
            self._constant(f"{use.output}.bias", steps),
        ]  # fmt: skip
        product = helper.make_node("QLinearConv", names, [f"{use.output}.codes"], name=f"{use.output}.product")
        product.attribute.extend(use.node.attribute)
        yield product
        self.codes[use.output] = [(f"{use.output}.codes", outputs)]
        yield self._dense(f"{use.output}.codes", outputs, use.output)

    def _quantized(self, name: str, span: Range) -> Generator[Any, None, tuple[str, str, str]]:
        """Yield the nodes of a tensor's codes if they are new; return the names of codes, step and zero point."""
        from onnx import helper

        for codes, known in self.codes.get(name, ()):
            if known.zero == span.zero and abs(known.step - span.step) <= SAME_STEP * span.step:
                return codes, *self._grid(codes, known)
        codes = f"{name}.codes{len(self.codes.get(name, ()))}"
        self.codes.setdefault(name, []).append((codes, span))
        step, zero = self._grid(codes, span)
        yield helper.make_node("QuantizeLinear", [name, step, zero], [codes], name=codes)
        return codes, step, zero

    def _dense(self, codes: str, span: Range, output: str) -> Any:
        from onnx import helper

        return helper.make_node("DequantizeLinear", [codes, *self._grid(codes, span)], [output], name=f"{output}.dense")

    def _middle(self, layer: IntegerLayer) -> str:
        """Return the name of the zero point of unsigned weights."""
        return self._constant(f"{layer.name}.zeros", np.array(MIDDLE, np.uint8))

    def _grid(self, name: str, span: Range) -> tuple[str, str]:
        """Return the names of the constants for a range's step and zero point."""
        name = name.removesuffix(".codes")
        return (
            self._constant(f"{name}.step", np.array(span.step, np.float32)),
            self._constant(f"{name}.zero", np.array(span.zero, np.uint8)),
        )

    def _constant(self, name: str, value: NDArray[Any]) -> str:
        from onnx import numpy_helper

        if name not in self._known:
            self._known[name] = value
            self.initializers.append(numpy_helper.from_array(value, name))
        return name


def unsigned(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Return codes as numbers with `MIDDLE` for 0.

    >>> unsigned(np.array([-128, 0, 127], np.int8)).tolist()
    [0, 128, 255]
    """
    return (codes.astype(np.int16) + MIDDLE).astype(np.uint8)


def _is_depthwise(node: Any, weight: Any) -> bool:
    """Whether every group of a convolution has one input and one output."""
    groups = next((item.i for item in node.attribute if item.name == "group"), 1)
    return groups > 1 and groups == weight.dims[0] and weight.dims[1] == 1


def with_room_for(
    bias: NDArray[np.float64], codes: NDArray[np.int8], scales: NDArray[np.float32], step: float
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Enlarge the steps of weights that are negligible beside a bias, so that the bias fits into an int32."""
    least = np.maximum(np.abs(bias) / (step * LARGEST_BIAS), np.finfo(np.float32).tiny).astype(np.float32)
    wider = np.where(scales == 0, np.maximum(least, np.float32(1e-6)), np.maximum(np.abs(scales), least))
    wider = (wider * np.where(scales < 0, -1, 1)).astype(np.float32)
    moved = np.round(codes * (scales / wider)[:, None]).astype(np.int8)
    return moved, wider


def uses(proto: Any, name: str) -> list[Use]:
    """Return the products with a weight, and the lookups of its rows; none if the weight has other uses."""
    readers = _readers(proto)
    uses = []
    for node in readers.get(name, ()):
        if node.op_type == "Conv" and node.input[1] == name and node.input[0] != name:
            uses.append(_use("Conv", node, _initializer(proto, node, 2)))
        elif node.op_type == "Gemm" and node.input[1] == name and onnx_graph.is_product(node):
            uses.append(_use("Linear", node, _initializer(proto, node, 2)))
        elif onnx_graph.is_lookup(node, name):
            uses.append(Use(operator="Lookup", given=node.input[1], bias="", output=node.output[0], node=node))
        elif node.op_type == "Transpose":
            inner = readers.get(node.output[0], [])
            if not all(use.op_type == "MatMul" and use.input[1] == node.output[0] for use in inner):
                return []
            uses += [_with_bias(proto, use, readers) for use in inner]
        else:
            return []
    return [] if None in uses else uses  # type: ignore[return-value]


def _use(operator: str, node: Any, bias: str | None) -> Use | None:
    if bias is None:
        return None
    return Use(operator=operator, given=node.input[0], bias=bias, output=node.output[0], node=node)


def _with_bias(proto: Any, product: Any, readers: Mapping[str, list[Any]]) -> Use:
    """Return a product, including the addition of a bias after it if that is the only reader."""
    behind = readers.get(product.output[0], [])
    vectors = {item.name for item in proto.graph.initializer if len(item.dims) == 1}
    outputs = {item.name for item in proto.graph.output}
    if len(behind) == 1 and behind[0].op_type == "Add" and product.output[0] not in outputs:
        others = [name for name in behind[0].input if name != product.output[0]]
        if len(others) == 1 and others[0] in vectors:
            return Use(
                operator="Linear", given=product.input[0], bias=others[0], output=behind[0].output[0], node=product
            )
    return Use(operator="Linear", given=product.input[0], bias="", output=product.output[0], node=product)


def _readers(proto: Any) -> dict[str, list[Any]]:
    readers: dict[str, list[Any]] = {}
    for node in proto.graph.node:
        for name in dict.fromkeys(node.input):
            readers.setdefault(name, []).append(node)
    return readers


def _initializer(proto: Any, node: Any, place: int) -> str | None:
    """Return the name of an input that is an initializer; "" if the input is absent, None if it is computed."""
    name = node.input[place] if len(node.input) > place else ""
    if not name or any(item.name == name for item in proto.graph.initializer):
        return name
    return None
