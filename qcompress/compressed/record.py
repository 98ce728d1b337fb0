"""The record that a compressed model carries: how each of its parts is stored.

It holds the arrays that go to disk, which are small by their nature, so that saving never has to guess how a weight
came about. A weight that is kept as it is has no arrays here. The record is a plain attribute of the model: it
survives `copy.deepcopy`, and state dicts do not know of it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from qcompress.compressed.cutting import Cuts
from qcompress.compressed.factored import Factored, factored, replace_
from qcompress.errors import ArtefactError
from qcompress.model.parts import Part
from qcompress.model.tensors import same_bits
from qcompress.transforms import activations
from qcompress.transforms.base import Transform

_ATTRIBUTE = "_qcompress_compression"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CompressedPart:
    """A part of a model, the transform chosen for it and the arrays that it is stored in.

    Attributes:
        stored: arrays by name, on the CPU; empty when the weight is kept as it is.
    """

    part: Part
    transform: Transform
    stored: dict[str, Tensor]

    @property
    def factors(self) -> dict[str, Tensor]:
        """Weights (as rows) of the layers in the part's place, or {} when the layer itself is there."""
        return self.transform.factors(self.stored, self.part.target) if self.stored else {}

    def rows(self) -> Tensor:
        """The rows that the stored arrays give."""
        return self.transform.decode(self.stored, self.part.target)

    def weights_in(self, model: nn.Module) -> list[Tensor] | None:
        """The parameters of ``model`` that hold the part, or None when they do not hold what is stored.

        A kept weight has nothing stored: it only has to be there, in its shape and type.
        """
        try:
            site = self.part.site(model)
        except AttributeError:
            return None
        module = site.module
        factors = self.factors
        if list(factors) != (list(module.factors) if isinstance(module, Factored) else []):
            return None
        expected: list[Tensor]
        if isinstance(module, Factored):
            weights: list[Tensor] = [layer.weight for layer in module]  # type: ignore[misc]
            expected = list(factors.values())
            actual = list(module.factors.values())
        else:
            if site.why_not():
                return None
            weights = [site.weight]
            actual = [self.part.weight(model)]
            target = self.part.target
            if actual[0].shape != (target.channels, target.per_channel) or actual[0].dtype != target.dtype:
                return None
            expected = [self.rows() if self.stored else actual[0]]
        return weights if all(map(same_bits, actual, expected)) else None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Compression:
    """How every part of a model is stored.

    Attributes:
        payload_bytes: what the whole model takes as it was predicted, without buffers that no state dict takes (their
            size may depend on what a model was run on); None where nothing was.
        cuts: what was taken out of the original's tensors.
    """

    parts: tuple[CompressedPart, ...]
    payload_bytes: int | None = None
    cuts: Cuts = field(default_factory=dict)


def record_of(model: nn.Module) -> Compression | None:
    """The record that ``model`` carries, or None."""
    record: Compression | None = getattr(model, _ATTRIBUTE, None)
    return record


def attach(model: nn.Module, record: Compression) -> None:
    """Let ``model`` carry ``record``; what was cut before stays noted."""
    before = record_of(model)
    if before is not None and before.cuts and not record.cuts:
        record = replace(record, cuts=before.cuts)
    setattr(model, _ATTRIBUTE, record)


def detach(model: nn.Module) -> None:
    """Let ``model`` carry no record."""
    if record_of(model) is not None:
        delattr(model, _ATTRIBUTE)


def require_unchanged(record: Compression, model: nn.Module) -> list[Tensor]:
    """The parameters of ``model`` that hold the parts of its record.

    Raises:
        ArtefactError: one does not hold what is stored of it.
    """
    holding: list[Tensor] = []
    for item in record.parts:
        weights = item.weights_in(model)
        if weights is None:
            raise ArtefactError(
                f"the weight of {item.part.name!r} is no longer what apply() put there ({item.transform.label}): it "
                "was fine-tuned, converted or replaced. Load the compressed weights again, or measure and apply anew"
            )
        holding += weights
    return holding


def install_(model: nn.Module, parts: Sequence[CompressedPart]) -> None:
    """Give ``model`` what ``parts`` store; where nothing is stored its weight stays."""
    for _, group in itertools.groupby(parts, key=lambda item: item.part.path):
        items = list(group)
        site, modules = items[0].part.site(model), items[0].part.modules
        if site.is_layer:
            for path in modules:
                activations.detach(model.get_submodule(path))
        items = [item for item in items if item.stored]
        if not items:
            continue
        if (rounding := items[0].transform.activations) is not None:
            for path in modules:
                rounding.attach(model.get_submodule(path))
        if factors := items[0].factors:
            replace_(model, site.module, factored(site.module, factors))
            continue
        rows = site.rows.clone()
        for item in items:
            start, stop = item.part.rows or (0, len(rows))
            rows[start:stop] = item.rows()
        site.put_(rows)
