"""An ONNX graph of a model, and the places where its weights are replaced by integer codes.

The graph is that of the dense model, as `qcompress.engines.onnx_tracing.trace` exports it. An `Encoding` replaces a
weight: by `MatMulNBits` if only matrix products read the weight and the operator supports its group size, else by
`DequantizeLinear` (with a reshape for kernels). ONNX Runtime folds and fuses the rest when it loads the file.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
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


def initializer_of(model: nn.Module, path: str, names: Collection[str]) -> str | None:
    """The name of a layer's weight in the graph (the model may have several names for it); None if it is unused."""
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
        products: nodes that multiply with the weight, if there are no other uses and the operator supports its groups.
    """

    name: str
    module: nn.Module
    scheme: Scheme
    target: Target
    products: tuple[Any, ...]

    def arrays(self) -> Iterator[Array]:
        """Yield codes, scales and zero points."""
        from onnx import TensorProto

        bits, rows, groups = self.scheme.bits, self.target.channels, self.scheme.num_groups(self.target)
        scale_type = TensorProto.FLOAT16 if self.scheme.scale_type == torch.float16 else TensorProto.FLOAT
        per_byte = 8 // bits
        if self.products:
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
                name=f"{self.name}.zeros", onnx_type=kind, dims=self._per_group, nbytes=-(-rows * groups // per_byte),
                numbers=lambda stored: _packed(stored.zeros, bits),
            )  # fmt: skip
        scales = (rows, groups) if self.products else self._per_group
        yield Array(
            name=f"{self.name}.scales", onnx_type=scale_type, dims=scales,
            nbytes=rows * groups * self.scheme.scale_type.itemsize, numbers=lambda stored: stored.scales.numpy(),
        )  # fmt: skip
        if not self.scheme.symmetric:
            yield zero

    @property
    def _per_group(self) -> tuple[int, ...]:
        """Shape of arrays with one entry per group, as `DequantizeLinear` expects it."""
        rows = self.target.channels
        return (rows,) if self.scheme.group_size is None else (rows, self.scheme.num_groups(self.target))

    def nodes(self, accuracy_level: int) -> list[Any]:
        """Return the operators, in order, that replace the weight or the products with it."""
        return list(self._product_nodes(accuracy_level) if self.products else self._dense_nodes())

    def _product_nodes(self, accuracy_level: int) -> Iterator[Any]:
        from onnx import TensorProto, helper

        scales = f"{self.name}.scales"
        if self.scheme.scale_type == torch.float16:
            yield helper.make_node("Cast", [scales], [f"{scales}.wide"], to=TensorProto.FLOAT)
            scales = f"{scales}.wide"
        zeros = "" if self.scheme.symmetric else f"{self.name}.zeros"
        for index, node in enumerate(self.products):
            bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
            inputs = [node.input[0], f"{self.name}.codes", scales, zeros, "", bias]
            while not inputs[-1]:
                inputs.pop()
            yield helper.make_node(
                "MatMulNBits", inputs, list(node.output), domain="com.microsoft", name=f"{self.name}.{index}",
                K=self.target.per_channel, N=self.target.channels, bits=self.scheme.bits,
                block_size=self.scheme.group_size, accuracy_level=accuracy_level,
            )  # fmt: skip

    def _dense_nodes(self) -> Iterator[Any]:
        from onnx import TensorProto, helper

        how: dict[str, int] = {"axis": 0} if self.scheme.group_size is None else {
            "axis": 1, "block_size": self.scheme.group_size
        }  # fmt: skip
        if self.scheme.scale_type == torch.float16:
            how["output_dtype"] = TensorProto.FLOAT
        inputs = [f"{self.name}.codes", f"{self.name}.scales"] + (
            [] if self.scheme.symmetric else [f"{self.name}.zeros"]
        )
        steps = self._reshaping()
        names = [f"{self.name}.{index}" for index in range(len(steps))] + [self.name]
        yield helper.make_node("DequantizeLinear", inputs, [names[0]], **how)
        for index, (operator, value) in enumerate(steps):
            if operator == "Transpose":
                yield helper.make_node("Transpose", [names[index]], [names[index + 1]], perm=value)
            else:
                shape = f"{self.name}.shape{index}"
                yield helper.make_node("Constant", [], [shape], value_ints=value)
                yield helper.make_node("Reshape", [names[index], shape], [names[index + 1]])

    def _reshaping(self) -> list[tuple[str, list[int]]]:
        """The steps from rows to the weight, as in `qcompress.model.layers.from_rows`."""
        shape = list(layers.weight_of(self.module).shape)
        if len(shape) == 2:
            return []
        if not isinstance(self.module, layers.TRANSPOSED):
            return [("Reshape", shape)]
        inputs, outputs, *kernel = shape
        groups = int(self.module.groups)
        turned = [0, 2, 1, *range(3, 3 + len(kernel))]
        return [
            ("Reshape", [groups, outputs, inputs // groups, *kernel]), ("Transpose", turned), ("Reshape", shape)
        ]  # fmt: skip

    def room(self) -> int:
        """Upper bound on the bytes it takes in the file."""
        from onnx import TensorProto

        total = 0
        for array in self.arrays():
            proto = TensorProto(name=array.name, dims=array.dims, data_type=array.onnx_type)
            total += array.nbytes + int(proto.ByteSize()) + 16
        return total + sum(int(node.ByteSize()) + 4 for node in self.nodes(accuracy_level=4))


def products_with(proto: Any, name: str) -> tuple[Any, ...]:
    """The nodes that multiply with a weight ``(out, in)``, if all its uses are such products; else none."""
    nodes: list[Any] = []
    for node in _readers(proto, name):
        if node.op_type == "Gemm" and list(node.input[1:2]) == [name] and _is_linear(node):
            nodes.append(node)
        elif node.op_type == "Transpose":
            inner = list(_readers(proto, node.output[0]))
            if not all(use.op_type == "MatMul" and use.input[1] == node.output[0] for use in inner):
                return ()
            nodes += inner
        else:
            return ()
    return tuple(nodes)


def _readers(proto: Any, name: str) -> Iterator[Any]:
    return (node for node in proto.graph.node if name in node.input)


def _is_linear(node: Any) -> bool:
    values = {item.name: item.f if item.name in ("alpha", "beta") else item.i for item in node.attribute}
    return values == {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}


def takes_products(scheme: Scheme) -> bool:
    """Whether `MatMulNBits` supports the bits and group size."""
    size = scheme.group_size or 0
    return scheme.bits in MATRIX_BITS and size >= LEAST_BLOCK and size & (size - 1) == 0


def replace(proto: Any, encodings: Sequence[tuple[Encoding, IntegerCodes]], accuracy_level: int) -> None:
    """Replace weights by their encodings, in place."""
    from onnx import TensorProto, helper

    graph, gone = proto.graph, {encoding.name for encoding, _ in encodings}
    kept = [item for item in graph.initializer if item.name not in gone]
    first: list[Any] = []
    instead: dict[str, list[Any]] = {}  # output of a product → the nodes that replace it
    for encoding, numbers in encodings:
        for array in encoding.arrays():
            content = array.numbers(numbers).tobytes()
            assert len(content) == array.nbytes  # noqa: S101
            kept.append(TensorProto(name=array.name, dims=array.dims, data_type=array.onnx_type, raw_data=content))
        for node in encoding.nodes(accuracy_level):
            if node.op_type == "MatMulNBits":
                instead[node.output[0]] = [node]
            else:
                first.append(node)
    turned = {
        node.output[0] for encoding, _ in encodings if encoding.products for node in graph.node
        if node.op_type == "Transpose" and node.input[0] == encoding.name
    }  # fmt: skip
    nodes = [new for node in graph.node if node.output[0] not in turned for new in instead.get(node.output[0], [node])]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(first + nodes)
    narrow = any(encoding.scheme.bits == 2 and not encoding.products for encoding, _ in encodings)
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
