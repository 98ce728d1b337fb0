"""``config.json`` of a compressed-tensors folder: how each layer is stored, within a size that is known before."""

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from qcompress.engines.integer_codes import Scheme
from qcompress.errors import EngineError

CONFIG_ROOM = 400  # bytes for what does not depend on the layers


def _arguments(scheme: Scheme) -> dict[str, Any]:
    """Return the scheme in the terms of compressed-tensors."""
    grouped = {"strategy": "channel"} if scheme.group_size is None else {
        "strategy": "group", "group_size": scheme.group_size
    }  # fmt: skip
    return {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, "dynamic": False, **grouped}


def _group(modules: list[str], scheme: Scheme) -> dict[str, Any]:
    return {
        "format": "pack-quantized", "input_activations": None, "targets": modules, "weights": _arguments(scheme)
    }  # fmt: skip


def config_room(name: str, scheme: Scheme) -> int:
    """Return the bytes of ``config.json`` that suffice for a layer, even if it is the only one of its scheme."""
    text = json.dumps({"group_000": _group([name.removesuffix(".weight")], scheme)}, indent=2)
    return len(text.encode()) + 4 * (text.count("\n") + 1)


def config_bytes(model: nn.Module, schemes: Mapping[str, Scheme]) -> bytes:
    """Return the file for the schemes of the weights, by name; padded to its predicted size."""
    plain, groups = _config_values(model), dict[Scheme, list[str]]()
    for name, scheme in schemes.items():
        groups.setdefault(scheme, []).append(name.removesuffix(".weight"))
    if groups:
        plain["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": [],
            "config_groups": {
                f"group_{index}": _group(names, scheme) for index, (scheme, names) in enumerate(groups.items())
            },
        }
    text = json.dumps(plain, indent=2, sort_keys=True).encode()
    room = (
        len(plain_config(model))
        + CONFIG_ROOM
        + sum(config_room(*scheme_and_names) for scheme_and_names in schemes.items())
    )
    assert len(text) <= room  # noqa: S101
    return text.ljust(room)


def plain_config(model: nn.Module) -> bytes:
    """Return the model's own configuration."""
    return json.dumps(_config_values(model), indent=2, sort_keys=True).encode()


def _config_values(model: nn.Module) -> dict[str, Any]:
    require_of_transformers(model)
    values: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=True))  # type: ignore[operator, union-attr]
    values.pop("quantization_config", None)
    dtype = str(model.dtype).removeprefix("torch.")  # else the dtype of the first tensor in the files, a scale
    return values | {"architectures": [type(model).__name__], "dtype": dtype}


def require_of_transformers(model: nn.Module) -> None:
    """Raise an error for a model that is not of transformers.

    Raises:
        EngineError: it is not.
    """
    import transformers

    if not isinstance(model, transformers.PreTrainedModel):
        raise EngineError(
            f"engine 'compressed-tensors' writes models of transformers (AutoModelForCausalLM.from_pretrained(…)), "
            f"found {type(model).__name__}"
        )


def generation_config(model: nn.Module) -> bytes | None:
    """Return the model's settings for generating text, if it has any."""
    config = getattr(model, "generation_config", None)
    return None if config is None else config.to_json_string().encode()
