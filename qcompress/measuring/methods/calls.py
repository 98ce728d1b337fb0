"""The calls of layers in one forward pass, and the output a layer would give with another weight."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.model import layers
from qcompress.transforms.activations import Activations


@dataclass(slots=True)
class Call:
    """One call of a layer.

    Attributes:
        module: the layer.
        args, kwargs: arguments of the call.
        output: output of the call, without gradient.
        handle: zeros that were added to the output, so that their gradient is the output's; None where autograd is
            disabled altogether (inference mode).
        autocast: device type and dtype of the autocast that the call ran under, or None.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    handle: Tensor | None
    autocast: tuple[str, torch.dtype] | None


@dataclass(slots=True)
class Recorder:
    """Records the calls of layers and makes their outputs differentiable.

    Attributes:
        calls: path of a module → its calls, in order.
        odd: path of a module → why its calls could not be recorded.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    odd: dict[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def recording(self, model: nn.Module, paths: list[str]) -> Iterator[None]:
        """Record the calls of these modules inside the block, with hooks that run before all other hooks.

        The calls use weights without gradient, so a gradient that reaches a weight comes from a use elsewhere.
        """
        modules = {path: model.get_submodule(path) for path in paths}
        hooks = [
            module.register_forward_hook(self._hook(path), with_kwargs=True, prepend=True)
            for path, module in modules.items()
        ]
        for module in modules.values():
            put_aside, put_back = _detaching()
            hooks.append(module.register_forward_pre_hook(put_aside))
            hooks.append(module.register_forward_hook(put_back, prepend=True, always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def of(self, paths: tuple[str, ...]) -> list[Call]:
        """Return the calls of these modules."""
        return [call for path in paths for call in self.calls.get(path, [])]

    def _hook(self, path: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not isinstance(output, Tensor):
                self.odd[path] = f"it returns a {type(output).__name__}"
                return output
            noted = self.calls.setdefault(path, [])
            if torch.is_inference_mode_enabled():
                noted.append(Call(module, args, kwargs, output.clone(), None, autocast_of(output)))
                return output
            with torch.enable_grad():
                # adding a broadcast zero does not change the output, whatever is done to it in place later
                handle = (
                    torch.zeros((), dtype=output.dtype, device=output.device).requires_grad_(True).expand_as(output)
                )
                noted.append(Call(module, args, kwargs, output.detach(), handle, autocast_of(output)))
                return output + handle

        return note


def _detaching() -> tuple[Any, Any]:
    """Hooks right before and right after a module's forward, between which its weight has no gradient."""
    before: list[dict[str, Any]] = []

    def put_aside(module: nn.Module, args: Any) -> None:  # noqa: ARG001
        before.append(module._parameters)
        module.__dict__["_parameters"] = {**before[-1], "weight": layers.weight_of(module).detach()}

    def put_back(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
        if before:  # a hook before ours may have failed
            module.__dict__["_parameters"] = before.pop()

    return put_aside, put_back


def response(call: Call, change: Tensor, activations: Activations | None = None) -> Tensor:
    """Change of a call's output when ``change`` is added to the layer's weight and its activations are rounded.

    One of PyTorch's own layers is linear in its weight and is run once, on the change alone; any other layer is run
    with both weights.
    """
    if activations is not None:
        weight = layers.weight_of(call.module).detach()
        return rerun(call, weight + change, activations=activations) - call.output
    if layers.is_plain(call.module):
        return rerun(call, change, bias=False)
    weight = layers.weight_of(call.module).detach()
    return rerun(call, weight + change) - rerun(call, weight)


def rerun(call: Call, weight: Tensor, *, bias: bool = True, activations: Activations | None = None) -> Tensor:
    """Run the layer on its recorded input with another weight, under the same autocast and without hooks."""
    module, parameters = call.module, call.module._parameters
    changed = {**parameters, "weight": weight}
    if not bias and (bias_now := parameters.get("bias")) is not None:
        changed["bias"] = None if isinstance(module, layers.CONVOLUTIONS) else torch.zeros_like(bias_now)
    device, dtype = call.autocast or (weight.device.type, None)
    module.__dict__["_parameters"] = changed
    try:
        with torch.autocast(device, dtype=dtype, enabled=call.autocast is not None):
            if activations is None:
                output: Tensor = module.forward(*call.args, **call.kwargs)
                return output
            args, kwargs = activations.before(call.args, call.kwargs)
            return activations.after(module.forward(*args, **kwargs))
    finally:
        module.__dict__["_parameters"] = parameters


def autocast_of(output: Tensor) -> tuple[str, torch.dtype] | None:
    """Return the device type and dtype of the autocast that an output was computed under, or None."""
    device = output.device.type
    return (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
