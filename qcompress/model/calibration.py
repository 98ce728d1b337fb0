"""Calibration: a model with the data, the forward function and the loss that it is measured with."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from formulations.files import AnyPath
from qcompress.errors import ModelError, OptionsError
from qcompress.identity import Identity, identify, identify_batches, once
from qcompress.model import forward as forwards
from qcompress.model.decoder_inputs import require_decoder_mask
from qcompress.model.losses import Loss
from qcompress.model.opened import opened_of
from qcompress.scalars import as_seed


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calibration:
    """Everything that measured numbers depend on.

    Attributes:
        model: the model that is measured.
        data: re-iterable batches.
        forward: ``(model, batch) -> output tensor``, or None for `qcompress.model.forward.default_forward`.
        loss: loss relative to the original's outputs.
        seed: seed for shuffling and all random draws.
        original: the original, if ``model`` is a smaller network made from it; None if it is ``model`` itself.

    Raises:
        DataError: the data can be read only once, or a batch in a list does not say what is padding.
        ModelError: the layers or weights of the model cannot be accessed (see `require_usable`).
        OptionsError: the seed is not a non-negative integer, or ``forward`` is not callable.
    """

    model: nn.Module
    data: Iterable[Any]
    forward: forwards.Forward | None
    loss: Loss
    seed: int
    original: nn.Module | None = None

    def __post_init__(self) -> None:
        require_usable(self.model)
        object.__setattr__(self, "data", forwards.checked_data(self.data))
        for batch in self.data if isinstance(self.data, (list, tuple)) else ():  # before a long run ends at a later one
            require_decoder_mask(self.model, batch)
        object.__setattr__(self, "seed", as_seed(self.seed))
        if self.forward is not None and not callable(self.forward):
            raise OptionsError(f"forward must be a callable (model, batch) -> tensor, found {self.forward!r}")

    @property
    def goal(self) -> nn.Module:
        """The network whose outputs losses are relative to."""
        return self.model if self.original is None else self.original

    def first_batch(self) -> Any:
        """Return the first batch.

        Raises:
            DataError: there is none.
        """
        return forwards.first_batch(self.data)

    def identities(self) -> dict[str, Identity]:
        """Name → identity of every field; reads all the data once, shuffled according to the seed."""
        opened = opened_of(self.model)
        of_opened = {} if opened is None else {"model": once(self.model, find=lambda: opened.identity)}
        data = once(self.data, self.seed, find=partial(identify_batches, self.data, seed=self.seed))
        return {**self._identities_of_code(), **of_opened, "data": data, "seed": identify(self.seed)}

    def note_identities(self, folder: AnyPath | None) -> None:
        """Work out, before any pass, the identities of what passes may change, if there is a folder to resume from."""
        if folder is not None:
            self._identities_of_code()

    def _identities_of_code(self) -> dict[str, Identity]:
        """Name → identity of models in memory, ``forward`` and the loss."""
        fields = {"forward": self.forward, "loss": self.loss}
        fields |= {} if opened_of(self.model) is not None else {"model": self.model}
        fields |= {} if self.original is None else {"original": self.original}
        return {name: once(value, find=partial(identify, value, name)) for name, value in fields.items()}

    def digests(self) -> dict[str, str]:
        """Name → digest of every field, as plain JSON (see `identities`)."""
        return {name: identity.digest for name, identity in self.identities().items()}


def require_usable(model: nn.Module) -> None:
    """Check that the layers and weights of a model can be accessed.

    Raises:
        ModelError: it is not a module; it is scripted, exported, packed, made in inference mode, or lazy and has not
            run yet; or it is on the meta device and was not opened by `qcompress.open_model`.
    """
    require_changeable(model)
    for path, module in model.named_modules():
        name = repr(path) if path else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(f"{name} is scripted, so its layers cannot be changed: give the module it was made from")
        if isinstance(module, torch.fx.GraphModule) and "eval" in vars(module):
            raise ModelError(f"{name} is exported, so its layers cannot be changed: give the module it was made from")
        if getattr(module, "weight_is_packed", False):
            raise ModelError(
                f"the weights of {name} are packed and can only be run: give the original, or the result of "
                "compress() or load_compressed() before pack_()"
            )
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if is_lazy(tensor):
                raise ModelError(f"{name} is lazy and has no {key} yet: run one batch through the model first")
            if tensor.device.type == "meta" and opened_of(model) is None:
                raise ModelError(f"the {key} of {name} is on the meta device, without numbers: load the weights first")


def require_changeable(model: nn.Module) -> None:
    """Check that the weights of a model can be changed and take part in a backward pass.

    Raises:
        ModelError: one was made in inference mode; the message names it. Or it is no module.
    """
    forwards.require_module(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not is_lazy(tensor) and tensor.is_inference():
            raise ModelError(
                f"{name!r} was made in inference mode, so that it can neither be changed nor take part in a backward "
                "pass: give copy.deepcopy(model) made outside of torch.inference_mode()"
            )
