"""Calibration: which model is looked at, on which data, run how, and by which loss."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from qcompress.errors import ModelError, OptionsError
from qcompress.identity import Identity, identify, identify_batches
from qcompress.model import forward as forwards
from qcompress.model.losses import Loss
from qcompress.model.opened import opened_of
from qcompress.scalars import as_whole


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calibration:
    """What every measured number depends on.

    Attributes:
        model: the original.
        data: re-iterable batches.
        forward: ``(model, batch) -> output tensor``, or None for `qcompress.model.forward.default_forward`.
        loss: relative to the original's outputs.
        seed: of shuffled data and of whatever is drawn.

    Raises:
        DataError: the data can be read only once.
        ModelError: a model whose layers or weights cannot be looked at (see `require_usable`).
        OptionsError: a seed that is not a whole number from 0, or a ``forward`` that cannot be called.
    """

    model: nn.Module
    data: Iterable[Any]
    forward: forwards.Forward | None
    loss: Loss
    seed: int

    def __post_init__(self) -> None:
        require_usable(self.model)
        forwards.checked_data(self.data)
        object.__setattr__(self, "seed", as_whole(self.seed, "seed", least=0))
        if self.forward is not None and not callable(self.forward):
            raise OptionsError(f"forward must be a callable (model, batch) -> tensor, found {self.forward!r}")

    def first_batch(self) -> Any:
        """The first batch.

        Raises:
            DataError: there is none.
        """
        return forwards.first_batch(self.data)

    def identities(self) -> dict[str, Identity]:
        """Name → identity of everything in it; reads all the data once, shuffled as the seed says."""
        opened = opened_of(self.model)
        return {
            "model": identify(self.model, "model") if opened is None else identify(opened.fingerprint),
            "data": identify_batches(self.data, seed=self.seed),
            "forward": identify(self.forward, "forward"),
            "loss": identify(self.loss, "loss"),
            "seed": identify(self.seed),
        }

    def digests(self) -> dict[str, str]:
        """Name → digest, as `identities`, in plain JSON."""
        return {name: identity.digest for name, identity in self.identities().items()}


def require_usable(model: nn.Module) -> None:
    """Refuse a model whose layers or weights cannot be looked at.

    Raises:
        ModelError: no module, a scripted one, a packed one, a lazy one that has not run yet, or one on the meta device
            that was not opened by `qcompress.open_model`.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a torch.nn.Module, found {type(model).__name__}")
    for path, module in model.named_modules():
        name = repr(path) if path else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(f"{name} is scripted, so its layers cannot be changed: give the module it was made from")
        if getattr(module, "weight_is_packed", False):
            raise ModelError(
                f"the weights of {name} are packed, they can only be run: give the original, or what compress() or "
                "load_compressed() gave before pack_()"
            )
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if is_lazy(tensor):
                raise ModelError(f"{name} is lazy and has no {key} yet: run one batch through the model first")
            if tensor.device.type == "meta" and opened_of(model) is None:
                raise ModelError(f"the {key} of {name} is on the meta device, without numbers: load the weights first")
