"""ONNX Runtime: Linear layers as MatMulNBits, embeddings as GatherBlockQuantized, others as codes that it expands.

The file is the graph of the dense model with codes in place of the weights. Each option reserves space for its numbers,
names and operators (`qcompress.engines.onnx_sizes`); what is not used of it is padding in the file's ``doc_string``, so
that the size is a sum over the layers.
"""

import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from qcompress.compressed.factored import Factored, fold_
from qcompress.compressed.record import CompressedPart, record_of
from qcompress.engines import (
    onnx_check,
    onnx_clock,
    onnx_emulation,
    onnx_graph,
    onnx_integer,
    onnx_sizes,
    onnx_timing,
    onnx_tracing,
)
from qcompress.engines.base import Engine, EngineRun, FileSizes
from qcompress.engines.integer_codes import integer_codes, scheme_of
from qcompress.engines.onnx_check import stored_weights
from qcompress.engines.onnx_graph import Encoding
from qcompress.engines.onnx_integer import IntegerLayer
from qcompress.engines.onnx_session import opened, peak_bytes
from qcompress.errors import EngineError, OptionsError
from qcompress.measurement import Measurement
from qcompress.measuring.stopwatch import TimingProgress
from qcompress.model.composed import composed
from qcompress.model.parts import Part
from qcompress.model.sites import WEIGHT
from qcompress.options import Options, integer_products, prune_quantize
from qcompress.transforms.base import Keep, Target, Transform
from qcompress.transforms.low_rank.factors import LowRank
from qcompress.transforms.quantize.integer import IntegerProduct

BITS = (2, 4, 8)
LEVELS = (1, onnx_emulation.IN_INTEGERS)
ROOM = 100  # for the versions of operators, and the lengths of the graph, the description and the padding
LARGEST = 2**31 - 1  # limit of protobuf
LOOKS = 8  # rounds to time a file


@dataclass(frozen=True, kw_only=True)
class OnnxRuntime(Engine):
    """ONNX Runtime on the CPU.

    Attributes:
        accuracy_level: accuracy level of MatMulNBits: 4 multiplies in 8-bit integers, rounding the inputs by block
            (fastest; an error of about half a percent of a layer's output), 1 multiplies in float32.
        threads: number of threads; 0 for as many as there are cores.
    """

    name: ClassVar[str] = "onnxruntime"
    summary: ClassVar[str] = "ONNX file with 2-, 4- and 8-bit weights, for ONNX Runtime"
    requires: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime", "onnxscript")
    extra: ClassVar[str] = "onnx"
    tolerance: ClassVar[float] = 0.05

    accuracy_level: int = 4
    threads: int = 0

    def require_settings(self) -> None:
        """Check also the accuracy level, which is 1 or 4."""
        super().require_settings()
        if self.accuracy_level not in LEVELS:
            raise OptionsError(f"accuracy_level must be 1 (float32) or 4 (8 bits), found {self.accuracy_level!r}")

    def options(self) -> Options:
        """2, 4 and 8 bits in groups of 32 and 128 and by row; weights and activations in 8 bits."""
        weights = prune_quantize(bits=BITS, sparsity=(0,), group_size=(32, 128, None), compensated=True)
        return weights + integer_products(bits=(8, 7))

    def refuse(self, part: Part, transform: Transform) -> str:
        """Allow whole float32 layers in 2, 4 or 8 bits, or as low-rank factors that are kept or stored so."""
        if isinstance(transform, Keep):
            return ""
        if part.rows is not None:
            return "a weight has one format in an ONNX file, but this is a block of a weight"
        if part.parameter != WEIGHT:
            return f"only weights of layers are compressed, not those inside {part.target.owner}"
        if part.target.dtype != torch.float32:
            return f"only float32 models are written, not {part.target.dtype}"
        if isinstance(transform, LowRank):
            whys = (_why_not(transform.then, target) for target in transform.factor_targets(part.target).values())
            return next((f"factors: {why}" for why in whys if why), "")
        return _why_not(transform, part.target)

    def sizes(
        self, model: nn.Module, parts: Sequence[Part], transforms: Sequence[Sequence[Transform]], example: Any = None
    ) -> FileSizes:
        """Return the size of the file, from the graph of the dense model."""
        with composed(model):
            dense = _dense(model)
            return self._sizes(onnx_tracing.trace(dense, example), dense, parts, transforms)

    def _sizes(
        self, proto: Any, model: nn.Module, parts: Sequence[Part], transforms: Sequence[Sequence[Transform]]
    ) -> FileSizes:
        """Return the size of the file, given the graph of the dense ``model``."""
        tensors = {item.name: item for item in proto.graph.initializer}

        def taken(part: Part, name: str | None, transform: Transform) -> tuple[int, int]:
            """Return the bytes of an option, and those of its numbers alone."""
            numbers = transform.size_bytes(part.target)
            if name is None:
                return 0, numbers
            if isinstance(transform, Keep):
                return onnx_sizes.framed(tensors[name].ByteSize()), numbers
            modules = _modules(model, part.modules)
            if isinstance(transform, LowRank):
                return onnx_sizes.of_factors(proto, name, modules[0], transform, part)
            if isinstance(transform, IntegerProduct):
                return onnx_integer.room(proto, IntegerLayer(name=name, transform=transform, target=part.target))
            encoding = _encoding(proto, name, modules, transform, part.target)
            return onnx_sizes.of_encoding(proto, encoding), encoding.nbytes

        names = [
            onnx_graph.initializer_of(model, part.modules[0], tensors) if part.parameter == WEIGHT else None
            for part in parts
        ]
        refused = {
            (index, option): f"{part.name!r} cannot be multiplied in integers: {why}"
            for index, (part, name) in enumerate(zip(parts, names, strict=True))
            for option, transform in enumerate(transforms[index])
            if name is not None and isinstance(transform, IntegerProduct)
            if (why := onnx_integer.refused(proto, name))
        }
        options = tuple(
            tuple(
                (0, 0) if (index, option) in refused else taken(part, name, transform)
                for option, transform in enumerate(transforms[index])
            )
            for index, (part, name) in enumerate(zip(parts, names, strict=True))
        )
        rest = proto.ByteSize() - sum(onnx_sizes.framed(tensors[name].ByteSize()) for name in names if name is not None)
        room = ROOM + len(_description(proto, self.accuracy_level))
        sizes, weights = (tuple(tuple(both[place] for both in own) for own in options) for place in (0, 1))
        return FileSizes(options=sizes, overhead=rest + room, refused=refused, weights=weights)

    def write(self, model: nn.Module, path: Path, example: Any = None) -> None:
        """Write the file; computed weights (`qcompress.model.composed`) are written as what they are computed to."""
        with composed(model):
            self._write(model, path, example)

    def _write(self, model: nn.Module, path: Path, example: Any) -> None:
        record = record_of(model)
        items = [] if record is None else list(record.parts)
        whys = (f"{item.part.name!r}: {why}" for item in items if (why := self.refuse(item.part, item.transform)))
        if why := next(whys, _why_not_float32(model)):
            raise EngineError(f"engine {self.name!r} cannot write this model: {why}")
        whole = _dense(model)
        dense = onnx_tracing.trace(whole, example)
        chosen = [(item.transform if item.stored else Keep(),) for item in items]
        size = self._sizes(dense, whole, [item.part for item in items], chosen).of([0] * len(items))
        if size > LARGEST:
            raise EngineError(f"the file would take {size:,} bytes, but an ONNX file holds at most 2 GiB")
        proto = dense if whole is model else onnx_tracing.trace(model, example)
        integers = [item for item in items if isinstance(item.transform, IntegerProduct)]
        encodings = [
            encoding
            for item in items
            if item.stored and item not in integers
            for encoding in _encodings(proto, model, item)
        ]
        onnx_graph.replace(proto, encodings, self.accuracy_level)
        onnx_integer.put_(proto, list(_integer_layers(proto, model, integers)))
        path.write_bytes(_padded(proto, self.accuracy_level, size))

    def example_of(self, path: Path, batch: Any) -> Any:
        """Return the inputs of the file's example, cut or repeated to its shapes."""
        return onnx_tracing.like_the_example(self.session(path), batch)

    def run(self, path: Path, batches: Iterable[Any]) -> EngineRun:
        """Run the file on the CPU."""
        session, outputs, wall_s = self.session(path), [], 0.0
        for index, batch in enumerate(batches):
            feed = onnx_tracing.feed_of(session, batch)
            if index == 0:
                _ran(session, path, feed)  # the first run allocates
            start = time.perf_counter()
            output = _ran(session, path, feed)
            wall_s += time.perf_counter() - start
            outputs.append(torch.from_numpy(output))
        return EngineRun(outputs=tuple(outputs), wall_s=wall_s)

    def rounding(
        self, model: nn.Module, choice: Iterable[tuple[Part, Transform]] | None = None
    ) -> AbstractContextManager[None]:
        """Round the inputs of MatMulNBits to 8 bits, if ``accuracy_level`` says so."""
        return onnx_emulation.rounding_inputs(model, self.accuracy_level, choice)

    def why_not_timed(self) -> str:
        """Return an empty string: options are timed."""
        return ""

    def time_options(
        self,
        model: nn.Module,
        measurement: Measurement,
        batch: Any,
        on_progress: Callable[[TimingProgress], None] | None = None,
    ) -> Measurement:
        """See `Engine.time_options`, and `qcompress.engines.onnx_timing` for the method."""
        self.require()
        with composed(model):
            return onnx_timing.time_options(self, model, measurement, batch, on_progress)

    def seconds_of(
        self, model: nn.Module, measurement: Measurement, choices: Sequence[Sequence[int]], batch: Any
    ) -> list[float]:
        """See `Engine.seconds_of`; the choices and the dense model take turns, and only ratios to its time count."""
        with composed(model):
            return onnx_timing.seconds_of(self, model, measurement, choices, batch)

    def seconds(self, paths: Sequence[Path], batches: Sequence[Any]) -> list[float]:
        """Return the minimum seconds of several runs; the files take turns."""
        return onnx_clock.in_turn([self.session(path) for path in paths], batches, self.threads, LOOKS)

    def peak_bytes(self, path: Path, batch: Any) -> int | None:
        """Return the growth of the memory of a separate process that loads the file and runs a batch."""
        with tempfile.TemporaryDirectory() as folder:
            inputs = Path(folder) / "inputs.npz"
            np.savez(inputs, **onnx_tracing.feed_of(self.session(path), batch))
            return peak_bytes(path, inputs, self.threads)

    def check(self, path: Path, model: nn.Module) -> str:
        """Compare dense weights, codes, scales and zero points, bit for bit."""
        with composed(model):
            name = onnx_check.differing(path, model)
        return f"{name!r} in the file is not the model's" if name else ""

    def session(self, path: Path) -> Any:
        """Open the file in ONNX Runtime, with the options that every session has by default.

        Raises:
            EngineError: ONNX Runtime does not accept the file.
        """
        try:
            return opened(path, self.threads)
        except Exception as error:  # its errors have no more specific base class
            raise EngineError(f"ONNX Runtime does not accept {path}: {error}") from error


def _ran(session: Any, path: Path, feed: dict[str, Any]) -> Any:
    """Return the first output.

    Raises:
        EngineError: ONNX Runtime does not run the file on these inputs.
    """
    try:
        return session.run(None, feed)[0]
    except Exception as error:  # its errors have no more specific base class
        shapes = ", ".join(f"{name!r} {array.dtype} {list(array.shape)}" for name, array in feed.items())
        wanted = ", ".join(f"{entry.name!r} {entry.type} {entry.shape}" for entry in session.get_inputs())
        why = " ".join(str(error).split())
        raise EngineError(
            f"ONNX Runtime cannot run {path} on inputs {shapes}; the file takes {wanted}, where only dimensions with "
            f"names may vary: {why}"
        ) from error


def _why_not_float32(model: nn.Module) -> str:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            return f"{name!r} is {tensor.dtype}, but only float32 models are written; convert it with model.float()"
    return ""


def _why_not(transform: Transform, target: Target) -> str:
    if isinstance(transform, Keep):
        return ""
    if isinstance(transform, IntegerProduct):
        return "" if target.dtype == torch.float32 else "integer products need a float32 model"
    scheme = scheme_of(transform, target)
    if scheme is None or scheme.bits not in BITS:
        return f"there is no kernel for {transform.label!r}, only for {', '.join(map(str, BITS))} bits without pruning"
    if scheme.scale_type == torch.bfloat16:
        return f"{transform.label!r} has bfloat16 scales, but only float16 and float32 are read"
    return ""


def _dense(model: nn.Module) -> nn.Module:
    """Return the model with low-rank layers multiplied out."""
    if not any(isinstance(module, Factored) for module in model.modules()):
        return model
    return fold_(copy.deepcopy(model))


def _encoding(proto: Any, name: str, modules: Sequence[nn.Module], transform: Transform, target: Target) -> Encoding:
    scheme = scheme_of(transform, target)
    assert scheme is not None  # noqa: S101
    return onnx_graph.encoding(proto, name, modules, scheme, target)


def _encodings(proto: Any, model: nn.Module, item: CompressedPart) -> list[tuple[Encoding, Any]]:
    """Return the encodings of a part's weight, or of its factors, with their numbers; unused weights are left out."""
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    encodings = []
    for paths, transform, stored, target in stored_weights(item):
        if (name := onnx_graph.initializer_of(model, paths[0], tensors)) is not None:
            encoding = _encoding(proto, name, _modules(model, paths), transform, target)
            encodings.append((encoding, integer_codes(transform, stored, target)))
    return encodings


def _integer_layers(proto: Any, model: nn.Module, items: Iterable[CompressedPart]) -> Iterator[IntegerLayer]:
    """Yield the parts that are multiplied in integers, without those that no output depends on."""
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    for item in items:
        assert isinstance(item.transform, IntegerProduct)  # noqa: S101
        if (name := onnx_graph.initializer_of(model, item.part.modules[0], tensors)) is not None:
            yield IntegerLayer(name=name, transform=item.transform, target=item.part.target, stored=item.stored)


def _modules(model: nn.Module, paths: Sequence[str]) -> list[nn.Module]:
    return [model.get_submodule(path) for path in paths]


def _description(proto: Any, accuracy_level: int) -> str:
    """Return what the file says about itself."""
    import onnxruntime

    return json.dumps(
        {"engine": f"onnxruntime {onnxruntime.__version__}", "opset": proto.opset_import[0].version,
         "accuracy_level": accuracy_level}
    )  # fmt: skip


def _padded(proto: Any, accuracy_level: int, size: int) -> bytes:
    """Serialise the file, padded to exactly ``size`` bytes."""
    proto.metadata_props.add(key="qcompress", value=_description(proto, accuracy_level))
    missing = size - proto.ByteSize()
    for room in (missing, missing - 2):  # a text of 128 characters takes 2 bytes more than one of 127
        for length in range(max(room - 8, 0), room):
            proto.doc_string = " " * length
            if proto.ByteSize() == size:
                content: bytes = proto.SerializeToString()
                return content
        proto.domain = ""  # present but empty: 2 bytes
    raise AssertionError(f"the graph takes {size - missing} bytes instead of the predicted {size}")
