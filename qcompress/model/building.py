"""Build a model whose parameters have shapes but no values."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

LARGE_BYTES = 1 << 16
"""Bytes from which on a weight is not allocated while a model is built."""


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Let parameters that are registered inside the block hold no values; buffers do."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:  # one that is has been registered before: it is shared
            place = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
            place.__dict__.update(parameter.__dict__)
            module._parameters[name] = place

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        with _LargeOnMeta():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class _LargeOnMeta(TorchFunctionMode):
    """Move large tensors without values to the meta device.

    Weights that were allocated, and released when they are registered, would leave holes in the address space: as many
    bytes as the model has, which counts where a limit is set on it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is torch.empty and given.get("device") is None and "out" not in given:
            without = torch.empty(*args, **{**given, "device": "meta"})
            if without.nbytes >= LARGE_BYTES:
                return without
        return func(*args, **given)
