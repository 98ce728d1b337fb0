"""Rotary position embeddings in the header of a GGUF file."""

import math
from collections.abc import Mapping
from typing import Any, Final

from qcompress.engines.llama_cpp.container import Value
from qcompress.errors import EngineError

SCALINGS: Final = {"none": (), "linear": ("factor",), "yarn": ("factor", "original_context_length")}
"""Types of scaling, and the values that they have."""

WITH_FACTORS: Final = ("llama", "mistral")
"""Types of models for which llama.cpp reads factors of frequencies from a tensor."""

LOCAL_BASE: Final = 10_000.0
"""Base of the rotation in Gemma 3's layers with a window, which is fixed in llama.cpp."""


def rotation_kind(config: Any) -> str:
    """Return the type of rotation of a transformers configuration; of two, the one for layers without a window.

    >>> rotation_kind(None)
    'default'
    """
    rope = getattr(config, "rope_parameters", None) or {}
    return str(rope.get("full_attention", rope).get("rope_type", "default"))


def rotation_values(config: Any) -> dict[str, Any]:
    """Return the header's values for a transformers configuration, without the architecture's name as prefix.

    Raises:
        EngineError: the header has no values for this rotation.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in rope:
        _require_plain(rope.get("sliding_attention", {}))
        rope = rope["full_attention"]
    kind = rotation_kind(config)
    values: dict[str, Any] = {"rope.freq_base": float(rope.get("rope_theta", 10_000.0))}
    if config.model_type != "phi3" and (share := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise _refused("partial_rotary_factor", share, f"1.0 in a model of type {config.model_type!r}")
    if kind == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    elif kind == "yarn":
        _require_default_yarn(rope)
        values |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
        }
    elif kind != "default" and not (kind == "llama3" and config.model_type in WITH_FACTORS):
        raise EngineError(
            f"rotary positions of type {kind!r} cannot be written to GGUF; give a GGUF file of the model as source"
        )
    return values


def scaling_of(values: Mapping[str, Value], architecture: str) -> dict[str, Any]:
    """Return the scaling in a header: its ``type`` (``none``, ``linear`` or ``yarn``) and the values that it has.

    Raises:
        EngineError: another type, or a value that is not known here and may change what llama.cpp computes.
    """
    prefix = f"{architecture}.rope.scaling."
    scaling = {name.removeprefix(prefix): value.content for name, value in values.items() if name.startswith(prefix)}
    scaling.pop("finetuned", None)
    kind = scaling.setdefault("type", "linear" if "factor" in scaling else "none")  # as in llama.cpp
    unknown = set(scaling) - {"type", "factor", "original_context_length"}
    if kind not in SCALINGS or unknown:
        raise EngineError(
            f"the header of the GGUF file scales rotary positions with {scaling}, of which "
            f"{', '.join(sorted(unknown)) or kind} is not known; known: {SCALINGS}"
        )
    return {"type": kind} | {name: scaling[name] for name in SCALINGS[kind] if name in scaling}


def _require_plain(local: Mapping[str, Any]) -> None:
    if (kind := local.get("rope_type", "default")) != "default":
        raise EngineError(f"local rotary positions of type {kind!r} cannot be written to GGUF")
    if (base := float(local.get("rope_theta", LOCAL_BASE))) != LOCAL_BASE:
        raise _refused("rope_theta of the layers with a window", base, repr(LOCAL_BASE))


def _require_default_yarn(rope: Mapping[str, Any]) -> None:
    """Raise an error for parameters of YaRN (arXiv:2309.00071) other than its paper's, which llama.cpp assumes."""
    if rope.get("factor") is None:
        raise _refused("factor of YaRN", None, "a number")
    factor = float(rope["factor"])
    for field, assumed in (("beta_fast", 32), ("beta_slow", 1), ("truncate", True)):
        value = rope.get(field)
        if value is not None and value != assumed:
            raise _refused(f"{field} of YaRN", value, repr(assumed))
    usual = _attention_factor(factor, 1.0)
    attention = rope.get("attention_factor")
    if attention is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        attention = _attention_factor(factor, rope["mscale"]) / _attention_factor(factor, rope["mscale_all_dim"])
    if attention is not None and not math.isclose(attention, usual, rel_tol=1e-4):
        raise _refused("attention_factor of YaRN (given, or by mscale and mscale_all_dim)", attention, f"{usual:.6g}")


def _attention_factor(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _refused(field: str, value: Any, assumed: str) -> EngineError:
    return EngineError(
        f"the {field} is {value!r}, but llama.cpp computes with {assumed}, and a GGUF file cannot change that; "
        "export the model for another engine, such as 'onnxruntime'"
    )
