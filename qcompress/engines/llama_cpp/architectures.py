"""How Hugging Face transformers models are named and described in GGUF, one line per architecture.

Tensor names come from the maps of the package ``gguf``. This module holds the differences beyond names: the metadata
values, rows in another order, and norms that are stored with 1 added.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qcompress.errors import EngineError

Described = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """An architecture of llama.cpp.

    Attributes:
        name: name of the architecture in llama.cpp.
        describe: function from a config to metadata values, whose keys lack the architecture's name as prefix; those of
            rotary positions are added by ``rotation_values``.
        interleaved: whether llama.cpp expects the rows of queries and keys with the halves of a rotation interleaved.
        shifted_norms: whether norm weights are stored with 1 added.
        encoder: whether it outputs embeddings instead of tokens.
    """

    name: str
    describe: Callable[[Any], Described]
    interleaved: bool = False
    shifted_norms: bool = False
    encoder: bool = False


def _decoder(config: Any) -> Described:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head_dim,
        "vocab_size": config.vocab_size,
    }


def _gemma2(config: Any) -> Described:
    return _decoder(config) | {
        "attn_logit_softcapping": float(config.attn_logit_softcapping),
        "final_logit_softcapping": float(config.final_logit_softcapping),
        "attention.sliding_window": config.sliding_window,
    }


def _gemma3(config: Any) -> Described:
    return _decoder(config) | {"attention.sliding_window": config.sliding_window}


def _phi3(config: Any) -> Described:
    described = _decoder(config)
    part = float((getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0))
    return described | {
        "rope.dimension_count": int(part * described["rope.dimension_count"]),
        "attention.sliding_window": getattr(config, "sliding_window", None) or 0,
    }


def _bert(config: Any) -> Described:
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.layer_norm_epsilon": float(config.layer_norm_eps),
        "attention.causal": False,
        "vocab_size": config.vocab_size,
    }


ARCHITECTURES = {
    "llama": Architecture(name="llama", describe=_decoder, interleaved=True),
    "mistral": Architecture(name="llama", describe=_decoder, interleaved=True),
    "qwen2": Architecture(name="qwen2", describe=_decoder),
    "qwen3": Architecture(name="qwen3", describe=_decoder),
    "gemma": Architecture(name="gemma", describe=_decoder, shifted_norms=True),
    "gemma2": Architecture(name="gemma2", describe=_gemma2, shifted_norms=True),
    "gemma3_text": Architecture(name="gemma3", describe=_gemma3, shifted_norms=True),
    "phi3": Architecture(name="phi3", describe=_phi3),
    "bert": Architecture(name="bert", describe=_bert, encoder=True),
}
"""Architectures by ``config.model_type``."""


def architecture_of(model_type: str) -> Architecture:
    """Return the architecture for a ``config.model_type``.

    Raises:
        EngineError: the model type is unknown; the message lists the known ones.
    """
    if model_type not in ARCHITECTURES:
        raise EngineError(
            f"engine 'llama.cpp' does not support models of type {model_type!r}; known: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[model_type]


def architecture_called(name: str) -> Architecture:
    """Return the architecture by its name in llama.cpp.

    Raises:
        EngineError: the name is unknown; the message lists the known ones.
    """
    names = {architecture.name: architecture for architecture in ARCHITECTURES.values()}
    if name not in names:
        raise EngineError(f"the architecture {name!r} of a GGUF file is not known; known: {', '.join(names)}")
    return names[name]


def tensor_names(architecture: Architecture, blocks: int, names: Mapping[str, Any]) -> dict[str, str]:
    """Return GGUF's name for every tensor of a state dict; tensors that llama.cpp does not use are left out.

    Args:
        architecture: the architecture in llama.cpp.
        blocks: number of layers.
        names: names in the state dict.

    Raises:
        EngineError: a tensor has no name in GGUF.
    """
    import gguf

    arch = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    table = gguf.get_tensor_name_map(arch, blocks)
    known, unknown = {}, []
    for name in names:
        if name.endswith((".inv_freq", "position_ids", "token_type_ids")) or ".pooler." in f".{name}":
            continue
        short = next((name.removeprefix(word) for word in ("bert.",) if name.startswith(word)), name)
        candidates = (short, f"model.{short}")
        gguf_name = next((table.get_name(candidate, (".weight", ".bias")) for candidate in candidates
                      if table.get_name(candidate, (".weight", ".bias"))), None)  # fmt: skip
        if gguf_name is None:
            unknown.append(name)
        else:
            known[name] = gguf_name
    if unknown:
        raise EngineError(
            f"engine 'llama.cpp' has no place for {unknown[0]!r} in its architecture {architecture.name!r}"
            + (f" (nor for {len(unknown) - 1} others)" if len(unknown) > 1 else "")
        )
    return known
