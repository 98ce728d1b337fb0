"""Bytes that the options of a weight take in an ONNX file, from the graph of the dense model.

The sizes of arrays and of the operators that are written for codes are exact. PyTorch exports low-rank layers anew, so
for their operators, and for integer layers, whose conversions depend on their neighbours, there are upper bounds. The
difference is padding in the file.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from qcompress.engines import onnx_graph
from qcompress.engines.integer_codes import scheme_of
from qcompress.engines.onnx_graph import Encoding
from qcompress.model.parts import Part
from qcompress.transforms.base import Keep, Target, Transform
from qcompress.transforms.low_rank.factors import LowRank

# in every use of a low-rank layer
NAMES = 64  # per factor, for longer names and for numbers in names of other operators that get another digit
PADS = 500  # for operators that pad the input of the second of two convolutions
SLICES = 2500  # for operators that multiply slices of the input of the first of two Linear layers
ANY_OPERATORS = 4000  # for operators that are not those of the dense layer several times


def framed(nbytes: int) -> int:
    """Return the bytes of an entry of a list in a protobuf message: its tag, its length and itself.

    >>> framed(127), framed(128)
    (129, 131)
    """
    return 1 + max(1, -(-nbytes.bit_length() // 7)) + nbytes


def of_array(name: str, dims: Sequence[int], onnx_type: int, nbytes: int) -> int:
    """Return the bytes of an initializer in a graph."""
    from onnx import TensorProto

    header = TensorProto(name=name, dims=dims, data_type=onnx_type)
    return framed(int(header.ByteSize()) + framed(nbytes))


def of_nodes(nodes: Iterable[Any]) -> int:
    """Return the bytes of operators in a graph."""
    return sum(framed(int(node.ByteSize())) for node in nodes)


def of_encoding(proto: Any, encoding: Encoding) -> int:
    """Return the bytes that a weight in codes takes, less those of the operators that it replaces."""
    return of_codes(encoding) - of_nodes(_replaced(proto, encoding))


def of_codes(encoding: Encoding) -> int:
    """Return the bytes of codes, scales and zero points, and of the operators that read them."""
    arrays = sum(of_array(array.name, array.dims, array.onnx_type, array.nbytes) for array in encoding.arrays())
    return arrays + of_nodes(encoding.nodes(accuracy_level=4).all)


def of_factors(proto: Any, name: str, module: nn.Module, transform: LowRank, part: Part) -> tuple[int, int]:
    """Return an upper bound on the bytes that a low-rank layer takes, less those of the dense layer's operators.

    And the bytes of its numbers.
    """
    from onnx import TensorProto

    targets = transform.factor_targets(part.target)
    operators, uses = _operators(proto, name)
    sliced = isinstance(module, nn.Linear) and transform.slices > 1
    total = ANY_OPERATORS * uses if operators is None else of_nodes(operators) * (len(targets) - 1)
    pads = PADS if transform.form == "spatial" and _may_pad(module) else 0
    total += uses * (pads + SLICES * sliced + NAMES * len(targets))
    numbers = 0
    for factor, target in targets.items():
        factor_name = f"{name.removesuffix('weight')}{factor}.weight"
        if isinstance(transform.then, Keep):
            dims = (target.channels, target.per_channel, 1, 1)  # of a kernel; NAMES has room for its size
            total += of_array(factor_name, dims, TensorProto.FLOAT, target.dense_bytes)
            numbers += target.dense_bytes
        else:
            alike = operators is not None and not (sliced and factor == "reduce")
            encoding, replaced = _of_factor(proto, name, module, transform.then, target, alike=alike)
            total += of_codes(dataclasses.replace(encoding, name=factor_name)) - replaced
            numbers += encoding.nbytes
    return total, numbers


def _of_factor(
    proto: Any, name: str, module: nn.Module, then: Transform, target: Target, *, alike: bool
) -> tuple[Encoding, int]:
    """Return how a factor is stored, and the bytes of the operators replaced; ``alike`` are the dense layer's."""
    scheme = scheme_of(then, target)
    assert scheme is not None  # noqa: S101
    if alike and onnx_graph.is_linear(module):  # a Linear layer is multiplied with its codes, and so are its factors
        dense = onnx_graph.encoding(proto, name, [module], scheme, target)
        return dense, of_nodes(_replaced(proto, dense))
    like = nn.Conv2d(1, 1, 1) if isinstance(module, nn.Conv2d) else nn.Linear(1, 1)  # a kernel to reshape to, or none
    return Encoding(name=name, module=like, scheme=scheme, target=target, products=(), lookups=()), 0


def _replaced(proto: Any, encoding: Encoding) -> list[Any]:
    """Return the operators that an encoding replaces: products and lookups, and transpositions before the products."""
    instead = encoding.nodes(accuracy_level=4).instead
    turned = [
        node for node in proto.graph.node
        if encoding.products and node.op_type == "Transpose" and node.input[0] == encoding.name
    ]  # fmt: skip
    return turned + [node for node in (*encoding.products, *encoding.lookups) if node.output[0] in instead]


def _operators(proto: Any, name: str) -> tuple[list[Any] | None, int]:
    """Return the operators that read a weight (None if its factors have others), and its uses."""
    operators, uses, known = [], 0, not onnx_graph.has_branches(proto.graph)
    for node in _readers(proto.graph, name):
        turned = node.op_type == "Transpose"
        products = list(_readers(proto.graph, node.output[0])) if turned else [node]
        kinds = ("MatMul",) if turned else ("Gemm", "Conv", "Gather")
        known = known and all(
            use.op_type in kinds and not (turned and use.input[1] != node.output[0]) for use in products
        )
        operators += [node, *products] if turned else products
        uses += len(products)
    return (operators if known else None), uses


def _readers(graph: Any, name: str) -> Iterator[Any]:
    """Yield the operators that read a value, also inside of branches."""
    for node in graph.node:
        if name in node.input:
            yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _readers(attribute.g, name)


def _may_pad(module: nn.Module) -> bool:
    """Whether an operator of its own may pad the input of a convolution."""
    return isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str))
