"""The content of a model's GGUF file: every tensor with its type.

The tensors are those of the state dict: parts of the model's record are written as their stored blocks, others
unchanged, and one-dimensional tensors in float32, as llama.cpp expects. Rows that llama.cpp expects in another order
can be permuted with their blocks, because ggml encodes every row independently.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qcompress.compressed.record import CompressedPart, record_of
from qcompress.engines.llama_cpp.architectures import tensor_names
from qcompress.engines.llama_cpp.container import TensorPlan, Value
from qcompress.engines.llama_cpp.header import Header
from qcompress.errors import EngineError
from qcompress.model.opened import numbers_of
from qcompress.model.tensors import all_names, byte_tensor
from qcompress.transforms.base import Keep
from qcompress.transforms.ggml.gguf_type import GgufType
from qcompress.transforms.ggml.types import TYPES

GUESSED = 1024  # file type of files with mixed types
PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FULL = ("position_embd.weight", "token_types.weight", "ffn_gate_inp.weight")  # llama.cpp reads them as float32
WORDS = ("embed_tokens.weight", "word_embeddings.weight")  # the vocabulary in a state dict


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Entry:
    """A tensor of the state dict and its counterpart in the file.

    Attributes:
        state: name in the state dict.
        plan: how it is written.
        part: the compressed part of the model's record that it belongs to, or None.
    """

    state: str
    plan: TensorPlan
    part: CompressedPart | None


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the state dict that belong in a file, shared ones under each of their names.

    An output layer that is the vocabulary is left out: llama.cpp takes the vocabulary where a file has no output layer.
    """
    state = all_names(model)
    words = {id(tensor) for name, tensor in state.items() if name.endswith(WORDS)}
    return {name: tensor for name, tensor in state.items() if name.endswith(WORDS) or id(tensor) not in words}


def entries(model: nn.Module, header: Header) -> list[Entry]:
    """Return every tensor of the file that comes from the model, in the order of its state dict.

    Raises:
        EngineError: a tensor has no place in the file, a size other than the header's, or a dtype or storage that
            llama.cpp does not read.
    """
    state = all_names(model)
    names = tensor_names(header.architecture, header.number("block_count"), state_of(model))
    record = record_of(model)
    stored: dict[int, CompressedPart] = {}
    for item in () if record is None else record.parts:
        if item.part.rows is not None:
            raise EngineError(f"a tensor of a GGUF file has one type, but {item.part.name!r} is a block of a tensor")
        stored[id(state[item.part.state_name])] = item
    whole = [_entry(model, name, state[name], names[name], stored.get(id(state[name])), header) for name in names]
    _require_fit(whole, header)
    return whole


def _require_fit(whole: list[Entry], header: Header) -> None:
    """Raise an error if the model's sizes differ from the header's."""
    remedy = "the header must come from the same model: give its folder, or a GGUF file of it, as source"
    blocks = {int(entry.plan.name.split(".")[1]) for entry in whole if entry.plan.name.startswith("blk.")}
    if len(blocks) != (count := header.number("block_count")):
        raise EngineError(f"the header of the GGUF file says {count} blocks, but the model has {len(blocks)}; {remedy}")
    sizes = header.sizes()
    for entry in whole:
        wanted = sizes.get(entry.plan.name.removeprefix("blk.").lstrip("0123456789."))
        if wanted is not None and entry.plan.shape != wanted:
            raise EngineError(
                f"the header of the GGUF file says {wanted} for {entry.plan.name!r}, but {entry.state!r} of the model "
                f"has the shape {entry.plan.shape}; {remedy}"
            )


def _entry(
    model: nn.Module, name: str, tensor: Tensor, called: str, item: CompressedPart | None, header: Header
) -> Entry:
    order = _order(called, header, tensor.shape[0]) if tensor.ndim else None
    if item is not None and isinstance(item.transform, GgufType):
        plan = _plan(called, tuple(tensor.shape), item.transform.type, _rows(lambda: item.stored["blocks"], order))
        return Entry(state=name, plan=plan, part=item)
    if item is not None and not isinstance(item.transform, Keep):
        raise EngineError(
            f"engine 'llama.cpp' runs ggml's types, but {name!r} is stored as {item.transform.label!r}; offer "
            "gguf_types()"
        )
    if tensor.dtype not in PLAIN:
        raise EngineError(f"{name!r} has dtype {tensor.dtype}, which cannot be written to GGUF")
    full = called in FULL or (item is None and tensor.ndim < 2)
    kind = "F32" if full else PLAIN[tensor.dtype]
    shift = float(header.architecture.shifted_norms and called.endswith("norm.weight"))

    def values() -> Tensor:
        numbers = numbers_of(model, name, tensor)
        wide = numbers.to(torch.float32) + shift if full else numbers
        return byte_tensor(wide).view(len(wide), -1)

    return Entry(state=name, plan=_plan(called, tuple(tensor.shape), kind, _rows(values, order)), part=item)


def _plan(called: str, shape: tuple[int, ...], kind: str, content: Callable[[], NDArray[Any]]) -> TensorPlan:
    rows = int(np.prod(shape[:-1]))
    return TensorPlan(
        name=called,
        shape=shape,
        number=TYPES[kind].number,
        size_bytes=rows * TYPES[kind].row_bytes(shape[-1]),
        content=content,
    )


def _rows(give: Callable[[], Tensor], order: NDArray[np.int64] | None) -> Callable[[], NDArray[Any]]:
    def content() -> NDArray[Any]:
        rows: NDArray[Any] = give().numpy()
        return rows if order is None else rows[order]

    return content


def _order(called: str, header: Header, rows: int) -> NDArray[np.int64] | None:
    """Return the order in which llama.cpp expects the rows, or None for the state dict's order."""
    kind = called.split(".")[-2] if "." in called else called
    if not header.architecture.interleaved or kind not in ("attn_q", "attn_k"):
        return None
    heads = header.number("attention.head_count")
    if kind == "attn_k":
        heads = header.number("attention.head_count_kv", heads)
    halves: NDArray[np.int64] = np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
    return halves


def state_rows(entry: Entry, rows: NDArray[Any], header: Header) -> NDArray[Any]:
    """Return rows of a tensor of the file in the order of the state dict."""
    order = _order(entry.plan.name, header, len(rows))
    return rows if order is None else rows[np.argsort(order)]


def values_of(header: Header) -> Mapping[str, Value]:
    """Return the header's values for a file of mixed types."""
    return header.values | {
        "general.file_type": Value.of(GUESSED),
        "general.quantization_version": Value.of(2),
    }
