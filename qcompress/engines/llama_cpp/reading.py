"""Read a GGUF file as a transformers model: the reverse of what the engine writes, for any of ggml's types.

The configuration comes from the file's header, the tensors are decoded by the package ``gguf``, and the order of rows
and the shift of norms are undone. Invariant: a file written by the engine gives back the weights it was written from,
bit for bit where they are stored unchanged (norms stored with 1 added: up to the rounding of that sum). Anything that
the header does not contain (activation functions, dropout) is transformers' default for the type of model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from formulations.files import AnyPath
from qcompress.engines.llama_cpp import rotation_factors
from qcompress.engines.llama_cpp.architectures import tensor_names
from qcompress.engines.llama_cpp.assumptions import query_scale
from qcompress.engines.llama_cpp.container import opened
from qcompress.engines.llama_cpp.content import entries, state_of, state_rows
from qcompress.engines.llama_cpp.header import Header, header_of
from qcompress.engines.llama_cpp.rotation import LOCAL_BASE, scaling_of
from qcompress.errors import EngineError

MODEL_TYPES = {"gemma3": "gemma3_text"}  # names in transformers, where they differ from llama.cpp's
FIELDS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "layer_norm_eps": "attention.layer_norm_epsilon",
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}


def read_gguf(path: AnyPath) -> nn.Module:
    """Load a GGUF file as a transformers model in float32, in evaluation mode.

    Args:
        path: path of a file with an architecture that the engine supports; blocks of any type are decoded. Its header
            is also that of files which the engine writes of this model, if it gets no other ``source``.

    Raises:
        EngineError: it is not a GGUF file, has an unsupported architecture or rotation, or tensors that do not fit.
        FileNotFoundError: there is no such file.
    """
    import gguf
    import transformers

    file = Path(path)
    header = require_readable(file)
    tensors = {tensor.name: tensor for tensor in opened(file).tensors}
    shapes = {name: _shape(tensor) for name, tensor in tensors.items()}
    config = transformers.AutoConfig.for_model(**_config(header, shapes))
    if any(not rotation_factors.are_those_of(config, plan) for plan in header.tensors):
        raise EngineError(
            f"{file} has {header.tensors[0].name!r}, factors of rotary positions, which have no configuration here; "
            f"load the model from its Hugging Face folder, and give this file as LlamaCpp(source={str(file)!r})"
        )
    if hasattr(config, "query_pre_attn_scalar"):
        config.query_pre_attn_scalar = query_scale(config)
    factory = transformers.AutoModel if header.architecture.encoder else transformers.AutoModelForCausalLM
    model: nn.Module = factory.from_config(config, dtype=torch.float32).eval()
    state = dict(model.state_dict())
    for entry in entries(model, header):
        name = entry.plan.name
        if name not in tensors:
            raise EngineError(f"{file} lacks {name!r}, which a model of type {config.model_type!r} has")
        if shapes[name] != entry.plan.shape:
            raise EngineError(f"{name!r} in {file} has the shape {shapes[name]}, expected {entry.plan.shape}")
        rows = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type).astype(np.float32)
        rows = state_rows(entry, rows.reshape(entry.plan.shape), header)
        shift = float(header.architecture.shifted_norms and name.endswith("norm.weight"))
        state[entry.state].copy_(torch.from_numpy(np.ascontiguousarray(rows)) - shift)
    _require_all_read(file, header, state_of(model), shapes)
    model.name_or_path = str(file)  # type: ignore[assignment]
    return model


def config_of(file: Path) -> Any:
    """Return the configuration of a GGUF file in transformers' terms, from its header alone.

    Raises:
        EngineError: same as in `read_gguf`.
    """
    import transformers

    header = require_readable(file)
    return transformers.AutoConfig.for_model(
        **_config(header, {tensor.name: _shape(tensor) for tensor in opened(file).tensors})
    )


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


def require_readable(file: Path) -> Header:
    """Return the header of a GGUF file.

    Raises:
        EngineError: it is a folder or no GGUF file, is cut off or no whole model, or has an unsupported architecture.
        FileNotFoundError: there is no such file.
    """
    if file.is_dir():
        raise EngineError(f"{file} is a folder; name a GGUF file, such as one in it")
    if not file.is_file():
        raise FileNotFoundError(2, "there is no such GGUF file", str(file))
    header = header_of(nn.Identity(), str(file))
    if header.lacking:
        raise EngineError(f"{file} {header.lacking}")
    return header


def _require_all_read(file: Path, header: Header, state: Mapping[str, Tensor], shapes: Mapping[str, Any]) -> None:
    """Raise an error for tensors of the file that the model has no place for."""
    read = set(tensor_names(header.architecture, header.number("block_count"), state).values())
    read |= {plan.name for plan in header.tensors}
    unread = [name for name in shapes if name not in read]
    if unread:
        raise EngineError(
            f"{file} has {unread[0]!r}, for which a model of architecture {header.architecture.name!r} has no place"
            + (f" (nor for {len(unread) - 1} others)" if len(unread) > 1 else "")
        )


def _rope(header: Header) -> dict[str, Any]:
    """Return the rotation in the terms of transformers."""
    scaling = scaling_of(header.values, header.architecture.name)
    kind = scaling.pop("type")
    stated = header.values.get(f"{header.architecture.name}.rope.freq_base")
    base = 10_000.0 if stated is None else stated.content
    if header.tensors:
        return rotation_factors.usual_parameters(header.tensors[0], base)
    rope = {"rope_type": "default" if kind == "none" else kind, "rope_theta": base}
    names = {"original_context_length": "original_max_position_embeddings"}
    return rope | {names.get(name, name): value for name, value in scaling.items()}


def _config(header: Header, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the configuration in the terms of transformers."""
    name, value_of = header.architecture.name, header.value
    for key in ("block_count", "embedding_length", "feed_forward_length", "attention.head_count"):
        header.number(key)  # the sizes depend on it
    config = {
        field: value for field, key in FIELDS.items() if (value := value_of(key)) not in (None, 0)
    }  # 0: no window
    config |= {
        "model_type": MODEL_TYPES.get(name, name),
        "vocab_size": shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
    }
    for field, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        value = header.values.get(f"tokenizer.ggml.{key}_token_id")
        config[field] = None if value is None else int(value.content)
    if header.architecture.encoder:
        config["type_vocab_size"] = shapes.get("token_types.weight", (2,))[0]
        return config
    rope = _rope(header)
    width = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    if (part := value_of("rope.dimension_count", width)) != width:
        if name != "phi3":
            raise EngineError(f"the header rotates {part} of {width} dimensions, which only models of type 'phi3' do")
        rope["partial_rotary_factor"] = part / width
    if name == "phi3":  # whose window llama.cpp does not apply
        config.pop("sliding_window", None)
    local = {"rope_type": "default", "rope_theta": LOCAL_BASE}
    config["rope_parameters"] = {"full_attention": rope, "sliding_attention": local} if name == "gemma3" else rope
    return config
