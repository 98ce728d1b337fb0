"""llama.cpp as an engine: every dense layer and vocabulary in its own ggml type, in one GGUF file."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from qcompress.engines.base import Companion, Engine, EngineRun, FileSizes, timed
from qcompress.engines.llama_cpp import container, running
from qcompress.engines.llama_cpp.container import TensorPlan
from qcompress.engines.llama_cpp.content import FULL, Entry, entries, state_rows, values_of
from qcompress.engines.llama_cpp.header import Header, header_of
from qcompress.engines.llama_cpp.pooling import pooled
from qcompress.engines.llama_cpp.recipe import is_recipe, recipe_of
from qcompress.errors import EngineError
from qcompress.model import forward as forwards
from qcompress.model.opened import numbers_of
from qcompress.model.parts import Part
from qcompress.model.tensors import all_names
from qcompress.options import Options, gguf_types
from qcompress.transforms.base import Keep, Transform
from qcompress.transforms.ggml.gguf_type import GgufType
from qcompress.transforms.ggml.types import TYPES

SMALLEST_BLOCK = min(kind.block for kind in TYPES.values() if kind.block > 1)


@dataclass(frozen=True, kw_only=True)
class LlamaCpp(Engine):
    """GGUF files, run by llama.cpp on the CPU.

    Attributes:
        source: the model's folder with its tokenizer, or a GGUF file of it, whose header (tokens, template, licence) is
            copied; empty for the folder that the model was loaded from.
        recipe: a file to which the choice is also written, for ``llama-quantize --tensor-type-file``, when the GGUF
            file takes its place; empty for none. It replaces only an earlier recipe.
        threads: number of llama.cpp's threads; 0 for as many as torch uses.

    llama.cpp rounds the inputs of a quantized layer to 8 bits, so its outputs agree with the emulation's within a few
    percent; the weights are equal to the last bit.

    >>> LlamaCpp().options().offers[-1].label
    'IQ2_XXS'
    """

    name: ClassVar[str] = "llama.cpp"
    summary: ClassVar[str] = "GGUF: ggml's block formats for language models and text encoders, on any processor"
    requires: ClassVar[tuple[str, ...]] = ("gguf", "libggml", "xllamacpp")
    by_block: ClassVar[bool] = True
    extra: ClassVar[str] = "gguf"
    tolerance: ClassVar[float] = 0.1

    source: str = ""
    recipe: str = ""
    threads: int = 0

    def options(self) -> Options:
        """Return all of ggml's types down to 2 bits."""
        return gguf_types()

    def refuse(self, part: Part, transform: Transform) -> str:
        """Allow ggml's types, one per tensor."""
        if isinstance(transform, Keep):
            return ""
        if not isinstance(transform, GgufType):
            return f"llama.cpp runs ggml's types, not {transform.label!r}; offer gguf_types()"
        if part.rows is not None:
            return "a tensor of a GGUF file has one type, but this is a block of a tensor"
        if ".pooler." in f".{part.name}":
            return "llama.cpp does not use it, so it is not in the file"
        if any(word in part.name for word in ("position_embeddings", "token_type_embeddings")):
            return "llama.cpp reads it in full precision"
        if TYPES[transform.type].block > 1 and part.target.per_channel % SMALLEST_BLOCK:
            return f"quantized rows are a multiple of {SMALLEST_BLOCK} weights, these have {part.target.per_channel}"
        return transform.why_not(part.target)

    def sizes(
        self,
        model: nn.Module,
        parts: Sequence[Part],
        transforms: Sequence[Sequence[Transform]],
        example: Any = None,  # noqa: ARG002
    ) -> FileSizes:
        """Return the sizes of tensors, padded to multiples of 32 bytes; the header is equally long for every choice."""
        header = header_of(model, self.source)
        plans, state = entries(model, header), all_names(model)
        places: dict[int, list[str]] = {}
        for entry in plans:
            places.setdefault(id(state[entry.state]), []).append(entry.plan.name)
        inside = {id(state[part.state_name]) for part in parts}
        rest = [entry.plan.size_bytes for entry in plans if id(state[entry.state]) not in inside]
        rest += [tensor.size_bytes for tensor in header.tensors]
        whole = container.header_bytes(values_of(header), [*(entry.plan for entry in plans), *header.tensors])

        def size(part: Part, transform: Transform) -> int:
            full, size_bytes = 4 * part.target.num_weights, transform.size_bytes(part.target)
            return sum(
                container.padded(full if place in FULL and isinstance(transform, Keep) else size_bytes)
                for place in places.get(id(state[part.state_name]), ())
            )

        options = tuple(
            tuple(size(part, transform) for transform in on_offer)
            for part, on_offer in zip(parts, transforms, strict=True)
        )
        return FileSizes(options=options, overhead=len(whole) + sum(map(container.padded, rest)))

    def write(self, model: nn.Module, path: Path, example: Any = None) -> None:  # noqa: ARG002
        """Write the file, one tensor at a time."""
        header = header_of(model, self.source)
        container.write(path, values_of(header), _plans(model, header))

    def companions(self) -> Sequence[Companion]:
        """Return the recipe, if a file is given for it."""

        def content(model: nn.Module) -> bytes:
            return recipe_of(_plans(model, header_of(model, self.source))).encode()

        given = (Path(self.recipe),) if self.recipe else ()
        return [Companion(setting="recipe", path=path, content=content, is_one=is_recipe) for path in given]

    def run(self, path: Path, batches: Iterable[Any]) -> EngineRun:
        """Return log-probabilities of the next token of every sample or, for an encoder, every sample's embedding."""
        threads = self.threads or torch.get_num_threads()
        return running.run(path, batches, threads)

    def run_by_block(self, path: Path, batches: Iterable[Any]) -> EngineRun:
        """Run the file as a whole: llama.cpp itself needs the memory of the compressed model."""
        return self.run(path, batches)

    def emulate(self, model: nn.Module, batches: Iterable[Any]) -> EngineRun:
        """Compute the same with the model, one sample at a time, because samples may be padded in the batch."""
        header = header_of(model, self.source)

        def outputs(batch: Any) -> Tensor:
            rows = []
            for words in running.sequences(batch):
                given = forwards.to_device(torch.tensor([words]), forwards.device_of(model))
                output = model(given)
                rows.append(_embedding(output, header) if header.architecture.encoder else _next_word(output))
            return torch.cat(rows)

        return timed(outputs(batch) for batch in batches)

    def check(self, path: Path, model: nn.Module) -> str:
        """Decode every tensor with the independent code of ``gguf`` and require bitwise equality with the model's."""
        import gguf

        header = header_of(model, self.source)
        state = all_names(model)
        tensors = {tensor.name: tensor for tensor in container.opened(path).tensors}
        for entry in entries(model, header):
            tensor = tensors.get(entry.plan.name)
            if tensor is None:
                return f"the file lacks {entry.plan.name!r}"
            decoded = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            if why := _differs(entry, decoded, numbers_of(model, entry.state, state[entry.state]), header):
                return why
        return ""


def _plans(model: nn.Module, header: Header) -> list[TensorPlan]:
    """Return all tensors of the file."""
    return [*(entry.plan for entry in entries(model, header)), *header.tensors]


def _differs(entry: Entry, decoded: Any, weight: Tensor, header: Header) -> str:
    wanted = weight.float()
    shift = float(header.architecture.shifted_norms and entry.plan.name.endswith("norm.weight"))
    rows = state_rows(entry, np.asarray(decoded, dtype=np.float32).reshape(wanted.shape), header)
    if torch.equal(torch.tensor(rows).to(weight.dtype), (wanted + shift).to(weight.dtype)):
        return ""
    return f"{entry.plan.name!r} in the file is not the model's {entry.state!r}"


def _next_word(output: Any) -> Tensor:
    """Return ``(1, tokens)`` log-probabilities from ``(1, positions, tokens)`` logits."""
    logits = output if isinstance(output, Tensor) else output.logits
    return logits[:, -1].float().log_softmax(-1)


def _embedding(output: Any, header: Header) -> Tensor:
    """Return ``(1, width)``: pooled as the header says, normalised to length 1.

    Raises:
        EngineError: the model's output has no token states.
    """
    states = output if isinstance(output, Tensor) else getattr(output, "last_hidden_state", None)
    if not isinstance(states, Tensor) or states.ndim != 3:
        raise EngineError(f"the output of an encoder must have token states, found {type(output).__name__}")
    return torch.nn.functional.normalize(pooled(states.float(), header.number("pooling_type")), dim=-1)
