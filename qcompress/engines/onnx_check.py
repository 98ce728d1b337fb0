"""The weights of an ONNX file, compared with those of the model that it was written from.

Initializers that are named after a tensor of the state dict must equal it bit for bit; codes, scales and zero points
must be those that the model's record stores. Constants of the graph and biases in integers are not compared.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from qcompress.compressed.record import CompressedPart, record_of
from qcompress.engines import onnx_graph
from qcompress.engines.integer_codes import integer_codes, scheme_of
from qcompress.engines.onnx_graph import Encoding
from qcompress.engines.onnx_integer import MIDDLE, IntegerLayer, unsigned, with_room_for
from qcompress.transforms.base import Keep, Target, Transform
from qcompress.transforms.low_rank.factors import LowRank
from qcompress.transforms.quantize.integer import IntegerProduct

CODES = ".codes"


def differing(path: Path, model: nn.Module) -> str:
    """Return the name of the first initializer that is not as in the model, or an empty string."""
    import onnx
    from onnx import numpy_helper

    tensors = {item.name: item for item in onnx.load(path).graph.initializer}
    for name, weight in model.state_dict().items():
        item = tensors.get(f"model.{name}")
        if item is not None and numpy_helper.to_array(item).tobytes() != weight.cpu().contiguous().numpy().tobytes():
            return f"model.{name}"
    record = record_of(model)
    for part in () if record is None else record.parts:
        if part.stored:
            compare = _integers if isinstance(part.transform, IntegerProduct) else _codes
            if name := next(compare(model, part, tensors), ""):
                return name
    return ""


def stored_weights(item: CompressedPart) -> Iterator[tuple[tuple[str, ...], Transform, dict[str, Tensor], Target]]:
    """Layers, transform, arrays and target of a part's weight, or of its factors if they are stored as codes."""
    paths, transform, target = item.part.modules, item.transform, item.part.target
    if not isinstance(transform, LowRank):
        yield paths, transform, item.stored, target
    elif not isinstance(transform.then, Keep):
        for factor, shape in transform.factor_targets(target).items():
            arrays = {key.split(".")[1]: value for key, value in item.stored.items() if key.split(".")[0] == factor}
            yield (f"{paths[0]}.{factor}",), transform.then, arrays, shape


def _name(model: nn.Module, path: str, tensors: Collection[str]) -> str | None:
    """Return the name of a layer's weight among the tensors, in codes or not; None if the graph does not use it."""
    return onnx_graph.initializer_of(model, path, {name.removesuffix(CODES) for name in tensors})


def _codes(model: nn.Module, part: CompressedPart, tensors: dict[str, Any]) -> Iterator[str]:
    """Yield names of arrays that differ from those of a part's weight or factors."""
    for paths, transform, stored, target in stored_weights(part):
        name, scheme = _name(model, paths[0], tensors), scheme_of(transform, target)
        assert scheme is not None  # noqa: S101
        if name is None:
            continue
        codes, module = tensors.get(name + CODES), model.get_submodule(paths[0])
        blocks = (module,) if codes is not None and len(codes.dims) == 3 else ()  # rows, blocks, bytes
        encoding = Encoding(
            name=name, module=module, scheme=scheme, target=target, products=blocks, lookups=()
        )  # fmt: skip
        numbers = integer_codes(transform, stored, target)
        for array in encoding.arrays():
            item = tensors.get(array.name)
            if item is None or item.raw_data != array.numbers(numbers).tobytes():
                yield array.name


def _integers(model: nn.Module, part: CompressedPart, tensors: dict[str, Any]) -> Iterator[str]:
    """Yield names of arrays that differ from those of a layer that is multiplied in integers."""
    from onnx import numpy_helper

    path, transform = part.part.modules[0], part.transform
    assert isinstance(transform, IntegerProduct)  # noqa: S101
    if (name := _name(model, path, tensors)) is None:
        return
    layer = IntegerLayer(name=name, transform=transform, target=part.part.target, stored=part.stored)
    codes, scales = layer.numbers()
    names = name + CODES, f"{name}.scales", f"{name}.zeros"
    arrays = [numpy_helper.to_array(tensors[each]) if each in tensors else np.zeros(0) for each in names]
    if arrays[0].ndim > 2 and transform.activations.inputs is not None:  # a convolution, whose bias is in integers
        bias = getattr(model.get_submodule(path), "bias", None)
        steps = np.zeros(len(scales)) if bias is None else bias.detach().cpu().double().numpy()
        codes, scales = with_room_for(steps, codes, scales, transform.activations.inputs.step)
        arrays[0] = arrays[0].reshape(len(arrays[0]), -1)
    middle = MIDDLE if arrays[0].dtype == np.uint8 else 0
    written = unsigned(codes) if middle else codes
    if not any(np.array_equal(arrays[0], either) for either in (written, written.T)):  # a product holds them by column
        yield names[0]
    if not np.array_equal(arrays[1], scales):
        yield names[1]
    if not arrays[2].size or (arrays[2] != middle).any():
        yield names[2]
