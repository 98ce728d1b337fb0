"""Bytes that the options of a weight take in an ONNX file, from the graph of the dense model.

The sizes of arrays and of the operators that are written for codes are exact. PyTorch exports low-rank layers anew, so
for their operators, and for integer layers, whose conversions depend on their neighbours, there are upper bounds. The
difference is padding in the file.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from qcompress.engines import onnx_graph
from qcompress.engines.integer_codes import scheme_of
from qcompress.engines.onnx_graph import Encoding
from qcompress.model.parts import Part
from qcompress.transforms.base import Keep, Target, Transform
from qcompress.transforms.low_rank.factors import LowRank

NAMES = 64  # per factor, for longer names and for numbers in names of other operators that get another digit
PADS = 500  # for operators that pad the input of the second of two convolutions
ANY_OPERATORS = 4000  # for a low-rank layer whose operators are not those of its dense layer several times


def framed(nbytes: int) -> int:
    """Bytes of an entry of a list in a protobuf message: its tag, its length and itself.

    >>> framed(127), framed(128)
    (129, 131)
    """
    return 1 + max(1, -(-nbytes.bit_length() // 7)) + nbytes


def of_array(name: str, dims: Sequence[int], onnx_type: int, nbytes: int) -> int:
    """Bytes of an initializer in a graph."""
    from onnx import TensorProto

    header = TensorProto(name=name, dims=dims, data_type=onnx_type)
    return framed(int(header.ByteSize()) + framed(nbytes))


def of_nodes(nodes: Iterable[Any]) -> int:
    """Bytes of operators in a graph."""
    return sum(framed(int(node.ByteSize())) for node in nodes)


def of_encoding(proto: Any, encoding: Encoding) -> int:
    """Bytes that a weight in codes takes, less those of the operators that it replaces."""
    return of_codes(encoding) - of_nodes(_replaced(proto, encoding))


def of_codes(encoding: Encoding) -> int:
    """Bytes of codes, scales and zero points, and of the operators that read them."""
    arrays = sum(of_array(array.name, array.dims, array.onnx_type, array.nbytes) for array in encoding.arrays())
    return arrays + of_nodes(encoding.nodes(accuracy_level=4).all)


def of_factors(proto: Any, name: str, module: nn.Module, transform: LowRank, part: Part) -> int:
    """Upper bound on the bytes that a low-rank layer takes, less those of the dense layer's operators."""
    from onnx import TensorProto

    targets = transform.factor_targets(part.target)
    own = _operators(proto, name, module, transform)
    total = ANY_OPERATORS if own is None else own * (len(targets) - 1)
    for factor, target in targets.items():
        factor_name, total = f"{name.removesuffix('weight')}{factor}.weight", total + NAMES
        if isinstance(transform.then, Keep):
            dims = (target.channels, target.per_channel, 1, 1)  # of a kernel; NAMES has room for its size
            total += of_array(factor_name, dims, TensorProto.FLOAT, target.dense_bytes)
        else:
            total += _of_factor(proto, name, factor_name, module, transform.then, target, known=own is not None)
    return total


def _of_factor(
    proto: Any, name: str, factor_name: str, module: nn.Module, then: Transform, target: Target, *, known: bool
) -> int:
    """Bytes of a factor in codes, less those of the operators that it replaces."""
    scheme = scheme_of(then, target)
    assert scheme is not None  # noqa: S101
    if known and onnx_graph.is_linear(module):  # a Linear layer is multiplied with its codes, and so are its factors
        dense = onnx_graph.encoding(proto, name, [module], scheme, target)
        return of_codes(dataclasses.replace(dense, name=factor_name)) - of_nodes(_replaced(proto, dense))
    like = nn.Conv2d(1, 1, 1) if isinstance(module, nn.Conv2d) else nn.Linear(1, 1)  # a kernel to reshape to, or none
    encoding = Encoding(name=factor_name, module=like, scheme=scheme, target=target, products=(), lookups=())
    return of_codes(encoding)


def _replaced(proto: Any, encoding: Encoding) -> list[Any]:
    """The operators that an encoding replaces: products and lookups, and transpositions before the products."""
    instead = encoding.nodes(accuracy_level=4).instead
    turned = [
        node for node in proto.graph.node
        if encoding.products and node.op_type == "Transpose" and node.input[0] == encoding.name
    ]  # fmt: skip
    return turned + [node for node in (*encoding.products, *encoding.lookups) if node.output[0] in instead]


def _operators(proto: Any, name: str, module: nn.Module, transform: LowRank) -> int | None:
    """Bytes of the operators of a dense layer, which each of its factors has; None if they have others."""
    readers = [node for node in proto.graph.node if name in node.input]
    if len(readers) != 1 or onnx_graph.has_branches(proto.graph):
        return None
    if isinstance(module, nn.Linear) and transform.slices > 1:  # several reshapes of its input
        return None
    if readers[0].op_type == "Transpose":
        readers += [node for node in proto.graph.node if readers[0].output[0] in node.input]
        if [node.op_type for node in readers] != ["Transpose", "MatMul"]:
            return None
    elif readers[0].op_type not in ("Gemm", "Conv", "Gather"):
        return None
    return of_nodes(readers) + (PADS if transform.form == "spatial" and _may_pad(module) else 0)


def _may_pad(module: nn.Module) -> bool:
    """Whether an operator of its own may pad the input of a convolution."""
    return isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str))
