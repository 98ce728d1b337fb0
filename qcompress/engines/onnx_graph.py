"""An ONNX graph of a model, and the places where its weights are replaced by integer codes.

The graph is that of the dense model, as `qcompress.engines.onnx_tracing.trace` exports it. An `Encoding` replaces a
weight: if the operators for blocks of codes support its group size and only matrix products and lookups of rows read
it, by `MatMulNBits` and `GatherBlockQuantized`, which share one array of codes; else by arithmetic on codes, scales and
zero points, of the rows that are looked up in 8 bits by row, or of the whole weight (with a reshape for kernels). ONNX
Runtime computes that once, when it loads the file; `DequantizeLinear` of constants it computes at every run, or fuses
with a product whose inputs it then rounds, depending on the session's options.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qcompress.engines.integer_codes import IntegerCodes, Scheme
from qcompress.model import layers
from qcompress.transforms.base import Target

OPSET, OPSET_OF_2_BITS = 23, 25
MATRIX_BITS = (2, 4, 8)
LEAST_BLOCK = 16


def copied(proto: Any) -> Any:
    """Return a copy of a graph."""
    other = type(proto)()
    other.CopyFrom(proto)
    return other


def has_branches(graph: Any) -> bool:
    """Whether there are graphs inside the graph; what they read is not among the inputs of its nodes."""
    return any(item.HasField("g") for node in graph.node for item in node.attribute)


def initializer_of(model: nn.Module, path: str, names: Collection[str]) -> str | None:
    """Return the name of a layer's weight in the graph (the model may have several); None if it is unused."""
    weight = getattr(model.get_submodule(path), "weight", None)
    names_of_weight = [name for name, tensor in model.state_dict(keep_vars=True).items() if tensor is weight]
    return next((f"model.{name}" for name in names_of_weight if f"model.{name}" in names), None)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Array:
    """An initializer; ``numbers`` gives its content."""

    name: str
    onnx_type: int
    dims: tuple[int, ...]
    nbytes: int
    numbers: Callable[[IntegerCodes], NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Encoding:
    """The replacement of a weight.

    Attributes:
        name: name of the weight's initializer.
        module: the layer that the weight belongs to.
        scheme: how the weight is stored.
        target: description of its rows.
        products, lookups: nodes that multiply with the weight, and that look up its rows, if all of them compute with
            codes; else none.
    """

    name: str
    module: nn.Module
    scheme: Scheme
    target: Target
    products: tuple[Any, ...]
    lookups: tuple[Any, ...]

    @property
    def in_blocks(self) -> bool:
        """Whether operators compute with blocks of codes."""
        return takes_blocks(self.scheme) and bool(self.products or self.lookups)

    def arrays(self) -> Iterator[Array]:
        """Yield codes, scales and zero points."""
        from onnx import TensorProto

        bits, rows, groups = self.scheme.bits, self.target.channels, self.scheme.num_groups(self.target)
        scale_type = TensorProto.FLOAT16 if self.scheme.scale_type == torch.float16 else TensorProto.FLOAT
        per_byte = 8 // bits
        if self.in_blocks:
            size = self.scheme.group_size or 0
            shape = rows, groups, size * bits // 8
            yield Array(
                name=f"{self.name}.codes", onnx_type=TensorProto.UINT8, dims=shape, nbytes=rows * groups * shape[2],
                numbers=lambda stored: _packed(_padded(stored.codes, groups * size), bits),
            )  # fmt: skip
            zeros = rows, -(-groups // per_byte)
            zero = Array(
                name=f"{self.name}.zeros", onnx_type=TensorProto.UINT8, dims=zeros, nbytes=zeros[0] * zeros[1],
                numbers=lambda stored: _packed(_padded(stored.zeros, zeros[1] * per_byte), bits),
            )  # fmt: skip
        else:
            signed = "" if self.scheme.symmetric else "U"
            middle = 2 ** (bits - 1) if self.scheme.symmetric else 0
            kind = getattr(TensorProto, f"{signed}INT{bits}")
            yield Array(
                name=f"{self.name}.codes", onnx_type=kind, dims=(rows, self.target.per_channel),
                nbytes=-(-self.target.num_weights // per_byte),
                numbers=lambda stored: _packed(stored.codes - middle, bits),
            )  # fmt: skip
            zero = Array(
                name=f"{self.name}.zeros", onnx_type=kind, dims=(rows, groups), nbytes=-(-rows * groups // per_byte),
                numbers=lambda stored: _packed(stored.zeros, bits),
            )  # fmt: skip
        yield Array(
            name=f"{self.name}.scales", onnx_type=scale_type, dims=(rows, groups),
            nbytes=rows * groups * self.scheme.scale_type.itemsize, numbers=lambda stored: stored.scales.numpy(),
        )  # fmt: skip
        if not self.scheme.symmetric:
            yield zero

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points; blocks are whole in every row."""
        return sum(array.nbytes for array in self.arrays())

    def nodes(self, accuracy_level: int) -> "Nodes":
        """Return the operators that replace the weight, or the products with it and the lookups of its rows."""
        from onnx import TensorProto, helper

        if not self.in_blocks:
            instead = {node.output[0]: list(self._rows(node)) for node in self.lookups}
            return Nodes(first=[] if instead else list(self._dense_nodes()), instead=instead)
        first, scales = [], f"{self.name}.scales"
        if self.scheme.scale_type == torch.float16:
            first.append(helper.make_node("Cast", [scales], [f"{scales}.wide"], to=TensorProto.FLOAT))
            scales = f"{scales}.wide"
        instead = {
            node.output[0]: [self._product(index, node, scales, accuracy_level)]
            for index, node in enumerate(self.products)
        }
        if self.lookups:
            shape = [self.target.channels, self._padded_width * self.scheme.bits // 8]
            first += _reshaped(f"{self.name}.codes", shape, f"{self.name}.rows")
        instead |= {node.output[0]: list(self._lookup(node, scales)) for node in self.lookups}
        return Nodes(first=first, instead=instead)

    def _product(self, index: int, node: Any, scales: str, accuracy_level: int) -> Any:
        from onnx import helper

        zeros = "" if self.scheme.symmetric else f"{self.name}.zeros"
        bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
        inputs = [node.input[0], f"{self.name}.codes", scales, zeros, "", bias]
        while not inputs[-1]:
            inputs.pop()
        return helper.make_node(
            "MatMulNBits", inputs, list(node.output), domain="com.microsoft", name=f"{self.name}.{index}",
            K=self.target.per_channel, N=self.target.channels, bits=self.scheme.bits,
            block_size=self.scheme.group_size, accuracy_level=accuracy_level,
        )  # fmt: skip

    def _lookup(self, node: Any, scales: str) -> Iterator[Any]:
        """Look up rows of codes and scales, and cut off the padding of the last block."""
        from onnx import helper

        output, padded = node.output[0], self._padded_width != self.target.per_channel
        inputs = [
            f"{self.name}.rows",
            node.input[1],
            scales,
            *([] if self.scheme.symmetric else [f"{self.name}.zeros"]),
        ]
        yield helper.make_node(
            "GatherBlockQuantized", inputs, [f"{output}.padded" if padded else output], domain="com.microsoft",
            name=f"{output}.lookup", bits=self.scheme.bits, block_size=self.scheme.group_size,
            gather_axis=0, quantize_axis=1,
        )  # fmt: skip
        if padded:
            ends = {"start": 0, "stop": self.target.per_channel, "axis": -1}
            for name, value in ends.items():
                yield helper.make_node("Constant", [], [f"{output}.{name}"], value_ints=[value])
            yield helper.make_node("Slice", [f"{output}.padded", *(f"{output}.{name}" for name in ends)], [output])

    def _rows(self, node: Any) -> Iterator[Any]:
        """Look up rows of codes, scales and zero points, and expand them."""
        from onnx import helper

        output = node.output[0]
        for part in self._parts:
            yield helper.make_node("Gather", [f"{self.name}.{part}", node.input[1]], [f"{output}.{part}"])
        yield from self._expanded({part: f"{output}.{part}" for part in self._parts}, output)

    @property
    def _parts(self) -> list[str]:
        """The arrays that a weight consists of."""
        return ["codes", "scales", *([] if self.scheme.symmetric else ["zeros"])]

    def _expanded(self, names: Mapping[str, str], result: str, groups: str = "") -> Iterator[Any]:
        """Compute ``(codes - zeros) · scales`` in float32; ``groups`` names the group of every column, if any."""
        from onnx import TensorProto, helper

        wide = dict(names)
        for part, name in names.items():
            if part != "scales" or self.scheme.scale_type == torch.float16:
                wide[part] = f"{name}.wide"
                yield helper.make_node("Cast", [name], [wide[part]], to=TensorProto.FLOAT)
            if groups and part != "codes":
                yield helper.make_node("Gather", [wide[part], groups], [f"{name}.columns"], axis=1)
                wide[part] = f"{name}.columns"
        if "zeros" in wide:
            yield helper.make_node("Sub", [wide["codes"], wide["zeros"]], [f"{result}.steps"])
            wide["codes"] = f"{result}.steps"
        yield helper.make_node("Mul", [wide["codes"], wide["scales"]], [result])

    @property
    def _padded_width(self) -> int:
        """Codes in a row, with those that fill up the last block."""
        return self.scheme.num_groups(self.target) * (self.scheme.group_size or 0)

    def _dense_nodes(self) -> Iterator[Any]:
        from onnx import helper

        groups = "" if self.scheme.group_size is None else f"{self.name}.groups"
        if groups:
            yield from self._groups_of_columns(groups)
        steps = self._reshaping()
        names = [f"{self.name}.{index}" for index in range(len(steps))] + [self.name]
        yield from self._expanded({part: f"{self.name}.{part}" for part in self._parts}, names[0], groups)
        for index, (operator, value) in enumerate(steps):
            if operator == "Transpose":
                yield helper.make_node("Transpose", [names[index]], [names[index + 1]], perm=value)
            else:
                yield from _reshaped(names[index], value, names[index + 1])

    def _groups_of_columns(self, result: str) -> Iterator[Any]:
        """Number the groups of columns: 0, 0, …, 1, 1, … for each column."""
        from onnx import helper

        values = {"first": 0, "end": self.target.per_channel, "step": 1, "size": self.scheme.group_size}
        first, end, step, size = names = [f"{result}.{key}" for key in values]
        for name, value in zip(names, values.values(), strict=True):
            yield helper.make_node("Constant", [], [name], value_int=value)
        yield helper.make_node("Range", [first, end, step], [f"{result}.columns"])
        yield helper.make_node("Div", [f"{result}.columns", size], [result])

    def _reshaping(self) -> list[tuple[str, list[int]]]:
        """Return the steps from rows to the weight, as in `qcompress.model.layers.from_rows`."""
        shape = list(layers.weight_of(self.module).shape)
        if layers.is_by_rows(self.module):
            return []
        if layers.has_inputs_first(self.module):
            return [("Transpose", [1, 0])]
        if not isinstance(self.module, layers.TRANSPOSED):
            return [("Reshape", shape)]
        inputs, outputs, *kernel = shape
        groups = int(self.module.groups)
        turned = [0, 2, 1, *range(3, 3 + len(kernel))]
        return [
            ("Reshape", [groups, outputs, inputs // groups, *kernel]), ("Transpose", turned), ("Reshape", shape)
        ]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """Operators of a replaced weight.

    Attributes:
        first: those that come before all others.
        instead: output of an operator of the dense model → those that replace it.
    """

    first: list[Any]
    instead: dict[str, list[Any]]

    @property
    def all(self) -> list[Any]:
        """All of them."""
        return [*self.first, *itertools.chain.from_iterable(self.instead.values())]


def encoding(proto: Any, name: str, modules: Sequence[nn.Module], scheme: Scheme, target: Target) -> Encoding:
    """Return the encoding of a weight.

    Args:
        proto: graph of the dense model.
        name: name of the weight's initializer.
        modules: the layers that the weight belongs to.
        scheme: how to store it.
        target: description of its rows.
    """
    by_row = scheme.bits == 8 and scheme.group_size is None
    by_rows = all(map(layers.is_by_rows, modules))  # else whatever reads the weight does not read rows
    products, lookups = _uses(proto, name) if by_rows and (takes_blocks(scheme) or by_row) else ((), ())
    functional = bool(products and lookups) and not any(map(is_linear, modules))  # the emulation sees no such product
    if (by_row and products) or functional:
        products, lookups = (), ()
    return Encoding(name=name, module=modules[0], scheme=scheme, target=target, products=products, lookups=lookups)


def _uses(proto: Any, name: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the nodes that multiply with a weight ``(out, in)`` or look up its rows; none if it has other uses."""
    products: list[Any] = []
    lookups: list[Any] = []
    for node in _readers(proto, name):
        if node.op_type == "Gemm" and list(node.input[1:2]) == [name] and is_product(node):
            products.append(node)
        elif is_lookup(node, name):
            lookups.append(node)
        elif node.op_type == "Transpose":
            inner = list(_readers(proto, node.output[0]))
            if not all(use.op_type == "MatMul" and use.input[1] == node.output[0] for use in inner):
                return (), ()
            products += inner
        else:
            return (), ()
    return tuple(products), tuple(lookups)


def _readers(proto: Any, name: str) -> Iterator[Any]:
    return (node for node in proto.graph.node if name in node.input)


def _reshaped(name: str, shape: list[int], result: str) -> Iterator[Any]:
    from onnx import helper

    yield helper.make_node("Constant", [], [f"{result}.shape"], value_ints=shape)
    yield helper.make_node("Reshape", [name, f"{result}.shape"], [result])


def is_lookup(node: Any, name: str) -> bool:
    """Whether a node looks up rows of an initializer."""
    return node.op_type == "Gather" and node.input[0] == name and not any(item.i for item in node.attribute)  # axis 0


def is_product(node: Any) -> bool:
    """Whether a ``Gemm`` is the product of a Linear layer."""
    values = {item.name: item.f if item.name in ("alpha", "beta") else item.i for item in node.attribute}
    return values == {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}


def is_linear(module: nn.Module) -> bool:
    """Whether a layer is multiplied by `MatMulNBits` if its weight is in blocks."""
    return layers.kind_name(module) == "Linear"


def takes_blocks(scheme: Scheme) -> bool:
    """Whether `MatMulNBits` and `GatherBlockQuantized` support the bits and group size."""
    size = scheme.group_size or 0
    return scheme.bits in MATRIX_BITS and size >= LEAST_BLOCK and size & (size - 1) == 0


def replace(proto: Any, encodings: Sequence[tuple[Encoding, IntegerCodes]], accuracy_level: int) -> None:
    """Replace weights by their encodings, in place."""
    from onnx import TensorProto, helper

    graph, gone = proto.graph, {encoding.name for encoding, _ in encodings}
    kept = [item for item in graph.initializer if item.name not in gone]
    first: list[Any] = []
    instead: dict[str, list[Any]] = {}
    for encoding, numbers in encodings:
        for array in encoding.arrays():
            content = array.numbers(numbers).tobytes()
            assert len(content) == array.nbytes  # noqa: S101
            kept.append(TensorProto(name=array.name, dims=array.dims, data_type=array.onnx_type, raw_data=content))
        nodes = encoding.nodes(accuracy_level)
        first += nodes.first
        instead |= nodes.instead
    turned = {
        node.output[0] for encoding, _ in encodings if encoding.products for node in graph.node
        if node.op_type == "Transpose" and node.input[0] == encoding.name
    }  # fmt: skip
    others = [new for node in graph.node if node.output[0] not in turned for new in instead.get(node.output[0], [node])]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(first + others)
    narrow = any(encoding.scheme.bits == 2 and not encoding.in_blocks for encoding, _ in encodings)
    del proto.opset_import[:]
    proto.opset_import.append(helper.make_opsetid("", OPSET_OF_2_BITS if narrow else OPSET))
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    proto.ir_version = 13 if narrow else 11


def _padded(codes: Tensor, width: int) -> Tensor:
    return nn.functional.pad(codes, (0, width - codes.shape[1]))


def _packed(codes: Tensor, bits: int) -> NDArray[np.uint8]:
    """Pack codes of 2, 4 or 8 bits into bytes, row after row, the first code in the lowest bits."""
    flat = codes.reshape(-1).numpy().astype(np.int64) & (2**bits - 1)
    per_byte = 8 // bits
    parts = np.pad(flat, (0, -len(flat) % per_byte)).reshape(-1, per_byte) << (bits * np.arange(per_byte))
    packed: NDArray[np.uint8] = parts.sum(axis=1).astype(np.uint8)
    return packed
