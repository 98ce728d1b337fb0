"""Models of transformers, built from a folder's ``config.json`` without their weights."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qcompress.errors import MissingError, ModelError
from qcompress.model.weight_files import FLOATS, INDEX, MAIN, WeightFiles

CONFIG = "config.json"


def require_config(folder: Path) -> dict[str, Any]:
    """Return the values in a folder's ``config.json``.

    Raises:
        ModelError: it has none, or it cannot be read.
    """
    if not (folder / CONFIG).is_file():
        raise ModelError(
            f"{str(folder)!r} is not the folder of a Hugging Face model: it has no config.json. For another model give "
            "open_model(folder, model=function that returns it)"
        )
    return read_json(folder / CONFIG)


def require_original(folder: Path) -> None:
    """Check that a folder's weights are not quantized.

    Raises:
        ModelError: they are, or it has no ``config.json`` that can be read.
    """
    if require_config(folder).get("quantization_config"):
        raise ModelError(f"{folder} holds quantized weights; open the folder of the original model")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ModelError: it holds something else, or is damaged.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON ({error}): download or save the model again") from error
    if not isinstance(values, dict):
        raise ModelError(f"{file} must hold a JSON object, found {type(values).__name__}")
    return values


def config_of(folder: Path) -> Any:
    """Return the configuration of a folder as transformers reads it.

    Raises:
        ModelError: transformers cannot read it.
        MissingError: transformers is missing.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingError("open_model needs transformers: pip install 'qcompress[compressed-tensors]'") from error
    _require_dtype(folder)
    try:
        return transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"transformers cannot read the configuration in {folder}: {error}") from error


def _require_dtype(folder: Path) -> None:
    """Check that ``config.json`` names a type to compute in, or none.

    Raises:
        ModelError: it names something else.
    """
    values, known = require_config(folder), [str(dtype).removeprefix("torch.") for dtype in FLOATS]
    key = "dtype" if values.get("dtype") is not None else "torch_dtype"
    if values.get(key) is not None and getattr(torch, str(values[key]), None) not in FLOATS:
        raise ModelError(
            f"{folder / CONFIG} has {key} {values[key]!r}, and it must be one of {', '.join(known)}; without it, the "
            "type of the weights in the files is used"
        )


def stored_weights(folder: Path) -> WeightFiles:
    """Return the weights in the files that transformers reads for a folder's ``config.json``.

    Raises:
        ModelError: transformers cannot read the configuration, or the files are missing or damaged.
        MissingError: transformers is missing.
    """
    config = config_of(folder)
    named: str | None = getattr(config, "transformers_weights", None)
    if named is not None and not (folder / named).is_file():
        raise ModelError(
            f"{folder / CONFIG} names {named!r} under transformers_weights, and {folder} has no such file: download or "
            "copy the folder again"
        )
    return WeightFiles(folder, (MAIN, INDEX) if named is None else (named,), getattr(type(config), "extra_files", ()))


def built(folder: Path, dtype: torch.dtype | None, stored: torch.dtype | None = None) -> nn.Module:
    """Build the model of a folder's ``config.json``.

    Args:
        folder: folder of the model.
        dtype: type of its weights; None for the type that ``config.json`` names. As in transformers, some kinds of
            models keep their norms in float32.
        stored: type of its weights if ``config.json`` names none; None for float32.

    Raises:
        ModelError: transformers cannot read the configuration, or has no such model.
        MissingError: transformers is missing.
    """
    config, generation = config_of(folder), _generation_of(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    kind: Any = class_of(config)
    computed = dtype or config.dtype or stored or torch.float32
    model: nn.Module = kind._from_config(config, dtype=computed)
    plan: Any = getattr(model, "_get_dtype_plan", lambda _: {})  # norms kept in float32; transformers may rename it
    for pattern, kept in plan(computed).items():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if re.search(pattern.replace("*", ".*"), name) and tensor.is_floating_point():
                tensor.data = tensor.to(kept)
    if generation is not None:
        model.generation_config = generation
    return model


def _generation_of(folder: Path) -> Any:
    """Return the settings for generating text in a folder, or None without any."""
    import transformers

    if not (folder / "generation_config.json").is_file():
        return None
    try:
        return transformers.GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"transformers cannot read generation_config.json in {folder}: {error}") from error


def class_of(config: Any) -> type[nn.Module]:
    """Return the class of a configuration's model.

    It is the first of ``architectures``. A configuration that names none is assumed to be a causal language model if
    transformers has one of its kind, otherwise for the model without a head.

    Raises:
        ModelError: transformers has no such class.

    >>> from transformers import LlamaConfig, ViTConfig
    >>> class_of(LlamaConfig()).__name__, class_of(ViTConfig()).__name__
    ('LlamaForCausalLM', 'ViTModel')
    >>> class_of(LlamaConfig(architectures=["LlamaModel"])).__name__
    'LlamaModel'
    """
    import transformers

    if names := getattr(config, "architectures", None):
        kind: type[nn.Module] | None = getattr(transformers, names[0], None)
        if kind is None:
            raise ModelError(f"transformers has no {names[0]!r}, which {CONFIG} names under architectures")
        return kind
    for kinds in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING):
        if type(config) in kinds:
            listed = kinds[type(config)]
            first: type[nn.Module] = listed[0] if isinstance(listed, tuple) else listed
            return first
    raise ModelError(f"transformers has no model for {type(config).__name__}; name its class under architectures")
