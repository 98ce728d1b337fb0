"""The header of a model's GGUF file: from a GGUF file of the same model, or from its configuration and tokenizer.

Invariant: a header agrees with the model. Settings that are fixed in llama.cpp and not in the header are checked
against the configuration first, then the values of a given file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from qcompress.engines.llama_cpp import rotation_factors
from qcompress.engines.llama_cpp.architectures import (
    ARCHITECTURES,
    Architecture,
    architecture_called,
    architecture_of,
)
from qcompress.engines.llama_cpp.assumptions import require_expressible
from qcompress.engines.llama_cpp.container import TensorPlan, Value, opened, why_not_whole
from qcompress.engines.llama_cpp.pooling import POOLINGS, pooling_type
from qcompress.engines.llama_cpp.rotation import rotation_kind, rotation_values, scaling_of
from qcompress.engines.llama_cpp.tokenizer import tokenizer_values
from qcompress.errors import EngineError

FREE = ("context_length", "attention.causal", "vocab_size")  # may differ between files of a model


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Header:
    """The header of a GGUF file.

    Attributes:
        values: values by name.
        architecture: the architecture in llama.cpp.
        tensors: extra tensors in the model's file besides its weights, such as factors of rotary positions.
        lacking: why the source file is not a whole model, or an empty string.
    """

    values: dict[str, Value]
    architecture: Architecture
    tensors: tuple[TensorPlan, ...] = ()
    lacking: str = ""

    def number(self, name: str, default: int | None = None) -> int:
        """Return an integer value of the architecture.

        Raises:
            EngineError: the header does not contain it, or one for every layer.
        """
        content = self.value(name, default)
        if content is None:
            raise EngineError(f"the header of the GGUF file lacks {self.architecture.name}.{name}")
        return int(content)

    def value(self, name: str, default: Any = None) -> Any:
        """Return a value of the architecture.

        Raises:
            EngineError: the header contains one for every layer.
        """
        value = self.values.get(f"{self.architecture.name}.{name}")
        if value is not None and isinstance(value.content, list):
            raise EngineError(
                f"the header of the GGUF file has {self.architecture.name}.{name} by layer, {value.content}; only "
                "models whose layers are all of one size are supported"
            )
        return default if value is None else value.content

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of matrices that follow from the values, by their names without the block."""
        width, heads = self.number("embedding_length"), self.number("attention.head_count")
        keys = self.number("attention.key_length", width // heads)
        values = self.number("attention.value_length", keys)
        shapes: dict[str, tuple[int, ...]] = {
            "attn_q.weight": (heads * keys, width),
            "attn_k.weight": (self.number("attention.head_count_kv", heads) * keys, width),
            "attn_output.weight": (width, heads * values),
            "ffn_down.weight": (width, self.number("feed_forward_length")),
        }
        words = self.values.get("tokenizer.ggml.tokens")
        return shapes | ({} if words is None else {"token_embd.weight": (len(words.content), width)})


def header_of(model: nn.Module, source: str) -> Header:
    """Make the header for a model.

    Args:
        model: a transformers model, or one with the same tensor names.
        source: a GGUF file or a folder of Hugging Face files; empty for what the model was loaded from.

    Raises:
        EngineError: the source does not exist or is of another model, the type of the model is unknown, or the model
            computes something that no header expresses.
    """
    config = getattr(model, "config", None)
    known = getattr(config, "model_type", None) in ARCHITECTURES
    if known:
        require_expressible(config)
    if (file := Path(source or _loaded_from(model))).is_file():
        header = _header_of_file(file)
        if known:
            _require_same(header, config, str(file))
        return header
    if source and not file.exists():
        raise EngineError(f"there is no folder or GGUF file {source!r}, which is the source for the header")
    if config is None or not hasattr(config, "model_type"):
        raise EngineError(
            f"llama.cpp runs language models and text encoders ({', '.join(ARCHITECTURES)} in transformers), but "
            f"{type(model).__name__} has no transformers configuration. If it is such a model nevertheless, give a "
            "GGUF file of the same model as source, such as LlamaCpp(source='model-f16.gguf')"
        )
    return _header_of_folder(_folder(model, source), config)


def _loaded_from(model: nn.Module) -> str:
    return str(getattr(model, "name_or_path", "") or getattr(getattr(model, "config", None), "_name_or_path", ""))


def _folder(model: nn.Module, source: str) -> Path:
    loaded = _loaded_from(model)
    remedy = "give the model's folder, or a GGUF file of it, as source, such as LlamaCpp(source='folder')"
    if not source and not loaded:
        raise EngineError(f"the model was not loaded from a folder, where its tokenizer would be: {remedy}")
    folder = Path(source or loaded)
    if not folder.is_dir():
        raise EngineError(f"the model was loaded from {loaded!r}, which is not a folder here: {remedy}")
    if not (folder / "tokenizer.json").is_file():
        raise EngineError(f"there is no tokenizer.json in {str(folder)!r}: {remedy}")
    return folder


def _header_of_folder(folder: Path, config: Any) -> Header:
    architecture = architecture_of(config.model_type)
    described = architecture.describe(config)
    described |= {"pooling_type": pooling_type(folder)} if architecture.encoder else rotation_values(config)
    general = {
        "general.architecture": Value.of(architecture.name),
        "general.type": Value.of("model"),
    }
    own = {f"{architecture.name}.{name}": Value.of(value) for name, value in described.items()}
    return Header(
        values=general | own | tokenizer_values(folder, config, encoder=architecture.encoder),
        architecture=architecture,
        tensors=(rotation_factors.plan_of(config),) if rotation_kind(config) == rotation_factors.KIND else (),
    )


def _header_of_file(path: Path) -> Header:
    import gguf

    reader = opened(path)
    lacking = why_not_whole(reader)
    values = {}
    for name, field in reader.fields.items():
        if name.startswith(("GGUF.", "split.")) or name == "general.alignment":
            continue
        item_kind = int(field.types[-1]) if int(field.types[0]) == gguf.GGUFValueType.ARRAY else None
        values[name] = Value(content=field.contents(), kind=int(field.types[0]), item_kind=item_kind)
    if "general.architecture" not in values:
        raise EngineError(f"the header of {path} lacks general.architecture")
    header = Header(
        values=values,
        architecture=architecture_called(str(values["general.architecture"].content)),
        tensors=tuple(
            TensorPlan(
                name=tensor.name,
                shape=tuple(int(size) for size in reversed(tensor.shape)),
                number=int(tensor.tensor_type),
                size_bytes=int(tensor.data.nbytes),
                content=lambda data=tensor.data: np.array(data),  # type: ignore[misc]
            )
            for tensor in reader.tensors
            if tensor.name.startswith("rope_")
        ),
        lacking=lacking,
    )
    if header.architecture.encoder and (number := header.number("pooling_type", 0)) not in POOLINGS:
        raise EngineError(f"{path} has the pooling type {number}; known: {POOLINGS}")
    return header


def _require_same(header: Header, config: Any, source: str) -> None:
    """Raise an error if the header is not the model's; values that it omits are derived by llama.cpp.

    Raises:
        EngineError: another architecture, or another value.
    """
    architecture = architecture_of(config.model_type)
    if header.architecture.name != architecture.name:
        raise EngineError(
            f"the source {source} is a model of architecture {header.architecture.name!r}, but the model's is "
            f"{architecture.name!r}: give a GGUF file of the same model, or its folder, as source"
        )
    values = dict(header.values)
    if not header.tensors and not architecture.encoder:
        scaling = scaling_of(header.values, architecture.name)
        values |= {f"{architecture.name}.rope.scaling.{name}": Value.of(value) for name, value in scaling.items()}
    wanted = architecture.describe(config) | ({} if architecture.encoder else _rotation(header, config))
    if not wanted.get("attention.sliding_window", 1):  # Phi 3's, which llama.cpp does not read
        wanted.pop("attention.sliding_window")
    for name, value in wanted.items():
        held = values.get(f"{architecture.name}.{name}")
        found = _DEFAULTS.get(name) if held is None else held.content
        if name not in FREE and found is not None and not _equal(found, value):
            raise EngineError(
                f"the source {source} is of another model: its {architecture.name}.{name} is {found!r}, but the model "
                f"has {value!r}; give a GGUF file of the same model, or its folder, as source"
            )


_DEFAULTS: Mapping[str, Any] = {"rope.freq_base": 10_000.0}


def _rotation(header: Header, config: Any) -> dict[str, Any]:
    """Return the values of the rotation that a file must have; only the base if a tensor holds the factors."""
    kind = rotation_kind(config)
    if not header.tensors:
        if kind == rotation_factors.KIND:
            raise EngineError(
                f"the source lacks {rotation_factors.FACTORS!r}, which the model's rotary positions of type {kind!r} "
                "need; give the model's folder as source"
            )
        return {"rope.scaling.type": "none"} | rotation_values(config)
    if kind not in (rotation_factors.KIND, "longrope"):
        raise EngineError(
            f"the source has {header.tensors[0].name!r}, but the model's rotary positions are of type {kind!r}"
        )
    if kind == rotation_factors.KIND and not any(
        rotation_factors.are_those_of(config, plan) for plan in header.tensors
    ):
        raise EngineError(
            f"the source's {rotation_factors.FACTORS!r} is not what the model's rotary positions of type {kind!r} need"
        )
    return {"rope.freq_base": float(config.rope_parameters["rope_theta"])}


def _equal(found: Any, value: Any) -> bool:
    numbers = all(isinstance(side, (int, float)) for side in (found, value))
    return math.isclose(found, value, rel_tol=1e-5) if numbers else bool(found == value)
