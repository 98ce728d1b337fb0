"""Tensors that a model computes with but that are not parameters or buffers, so that no file contains them.

They are in plain attributes, in lists, dicts and objects there, or in modules that only such an object holds. What a
forward pass itself stores there, such as its activations, is not state of the model.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qcompress.model import forward as forwards
from qcompress.model.dispatch import Reading
from qcompress.model.plain_state import PlainContents, PlainState, name_of, plain_tensors
from qcompress.model.steady import steady
from qcompress.model.tensors import Held, Memory, held_tensors


def loose_state(model: nn.Module) -> list[str]:
    """Return the names of parameters, and of other tensors that are trained, outside of the model's state.

    >>> model = nn.Linear(2, 2)
    >>> model.scales = [nn.Parameter(torch.ones(2)), torch.ones(2)]
    >>> loose_state(model)
    ['scales[0]']
    """
    inside = {
        f"{name_of(place)}.{key}": tensor
        for place, holder, _ in PlainContents(model).holders
        if isinstance(holder, nn.Module)
        for key, tensor in {**holder._parameters, **holder._buffers}.items()
        if tensor is not None
    }
    plain = {
        name: tensor
        for name, tensor in plain_tensors(model).items()
        if isinstance(tensor, nn.Parameter) or (tensor.requires_grad and tensor.is_leaf)
    }
    return list(_loose(model, {**plain, **inside}))


def constants_read(model: nn.Module, batch: Any, forward: forwards.Forward | None) -> list[str]:
    """Return the names of other plain tensors that a pass of ``batch`` reads, and neither stores nor changes.

    >>> model = nn.Linear(2, 2)
    >>> model.mean, model.unused = torch.ones(2), torch.ones(2)
    >>> constants_read(model, torch.ones(1, 2), lambda model, batch: model(batch - model.mean))
    ['mean']
    """
    state = set(loose_state(model))
    loose = {name: tensor for name, tensor in _loose(model, plain_tensors(model)).items() if name not in state}
    if not loose:
        return []
    reading = Reading(Memory(Held(name=name, tensor=tensor, module=model, key="") for name, tensor in loose.items()))
    before = PlainState(model)
    try:
        with forwards.evaluating(model), torch.no_grad(), reading:
            forwards.run_on(model, batch, steady(forward))
    finally:
        stored = before.put_back()
    return [
        name
        for name in reading.names
        if not any(name == changed or name.startswith((f"{changed}.", f"{changed}[")) for changed in stored)
    ]


def _loose(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return those tensors that do not lie in the memory of parameters and buffers."""
    if not tensors:
        return {}
    held = held_tensors(model)
    known, memory = {id(item.tensor) for item in held}, Memory(held)
    return {
        name: tensor
        for name, tensor in tensors.items()
        if id(tensor) not in known and memory.owner_of(tensor) is None and tensor.numel()
    }
