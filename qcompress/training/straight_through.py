"""A compressed model in training: its full-precision weights and their stored form.

Outside `Trained.stored`, the parameters are the full-precision weights that the optimiser trains; inside, they are the
weights as stored. At the end the model has the stored weights, with a matching record.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qcompress.compressed.factored import Factored
from qcompress.compressed.record import CompressedPart, attach, record_of
from qcompress.model.sites import Site
from qcompress.transforms.base import Keep, Target, Transform, Weight
from qcompress.transforms.low_rank.factors import LowRank


@dataclass(frozen=True, eq=False)
class _Piece:
    """A weight, or a block of its rows, that is stored in encoded form."""

    site: Site
    rows: tuple[int, int]
    transform: Transform
    target: Target
    pruned: Tensor | None

    @property
    def parameter(self) -> Tensor:
        return self.site.weight

    def latent(self) -> Tensor:
        return self.site.rows[self.rows[0] : self.rows[1]]

    def approximation(self) -> Tensor:
        """Return the rows as they are when stored."""
        return self.transform.approximate(Weight(self.latent(), self.target))

    def set_(self, rows: Tensor) -> None:
        whole = self.site.rows.clone()
        whole[self.rows[0] : self.rows[1]] = rows.to(whole)
        self.site.put_(whole)


class Trained:
    """A model in training: its compressed parts and their full-precision weights."""

    def __init__(self, model: nn.Module) -> None:
        record = record_of(model)
        parts = (
            ()
            if record is None
            else tuple(
                replace(item, transform=item.transform.nearest) if _is_trained(model, item) else item
                for item in record.parts
            )
        )
        self.model, self.record = model, record and replace(record, parts=parts)
        self.pieces = [piece for item in (self.record.parts if self.record else ()) for piece in _pieces(model, item)]

    @contextlib.contextmanager
    def stored(self) -> Iterator[None]:
        """Set every weight to its stored form inside; gradients then belong to the full-precision weights."""
        before = [(piece.parameter, piece.parameter.detach().clone()) for piece in self.pieces]
        for piece in self.pieces:
            piece.set_(piece.approximation())
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in reversed(before):
                    parameter.copy_(value)

    def prune_(self) -> None:
        """Reset pruned weights to zero."""
        for piece in self.pieces:
            if piece.pruned is not None:
                piece.set_(piece.latent().masked_fill(piece.pruned, 0.0))

    def state(self) -> dict[str, Tensor]:
        """Return the full-precision state."""
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def finish_(self, state: dict[str, Tensor], *, changed: bool) -> None:
        """Load a state; if ``changed``, encode its weights and attach the new record."""
        self.model.load_state_dict(state)
        self.model.zero_grad()
        if self.record is None or not changed:
            return
        parts = tuple(
            CompressedPart(part=item.part, transform=item.transform, stored=_encoded(self.model, item))
            if _is_trained(self.model, item)
            else item
            for item in self.record.parts
        )
        for piece in self.pieces:
            piece.set_(piece.approximation())
        attach(self.model, replace(self.record, parts=parts))


def _is_trained(model: nn.Module, item: CompressedPart) -> bool:
    """Whether a part is trained and stored in encoded form; frozen parts keep their codes bit for bit."""
    site = item.part.site(model)
    factors = [Site(layer) for layer in site.module] if isinstance(site.module, Factored) else [site]
    return bool(item.stored) and any(factor.weight.requires_grad for factor in factors)


def _pieces(model: nn.Module, item: CompressedPart) -> list[_Piece]:
    """Return the weights of a part that are trained in another form than they are stored in."""
    if not _is_trained(model, item):
        return []
    module = model.get_submodule(item.part.modules[0])
    if isinstance(module, Factored):
        assert isinstance(item.transform, LowRank)  # noqa: S101
        then = item.transform.then
        if isinstance(then, Keep):
            return []
        targets = item.transform.factor_targets(item.part.target)
        pieces = []
        for layer, (name, target) in zip(module, targets.items(), strict=True):
            sparse = f"{name}.mask" in item.stored
            pieces.append(_piece(Site(layer), (0, target.channels), then, target, sparse=sparse))
        return pieces
    target = item.part.target
    rows = item.part.rows or (0, target.channels)
    return [_piece(item.part.site(model), rows, item.transform, target, sparse="mask" in item.stored)]


def _piece(site: Site, rows: tuple[int, int], transform: Transform, target: Target, *, sparse: bool) -> _Piece:
    piece = _Piece(site, rows, transform, target, None)
    return _Piece(site, rows, transform, target, piece.latent() == 0) if sparse else piece


def _encoded(model: nn.Module, item: CompressedPart) -> dict[str, Tensor]:
    module = model.get_submodule(item.part.modules[0])
    if isinstance(module, Factored):
        assert isinstance(item.transform, LowRank)  # noqa: S101
        return item.transform.encode_factors(
            {name: rows.detach().cpu() for name, rows in module.factors.items()}, item.part.target
        )
    return item.transform.encode(Weight(item.part.weight(model).cpu(), item.part.target))
