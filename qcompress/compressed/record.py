"""The record of a compressed model: how each of its parts is stored.

It holds the encoded arrays, which are small, so that saving never has to infer how a weight was made. A weight that is
kept unchanged has no arrays here. The record is a plain attribute of the model: it survives `copy.deepcopy` and is not
part of state dicts.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from qcompress.compressed.cutting import Cuts
from qcompress.compressed.factored import Factored, factored, replace_
from qcompress.errors import ArtefactError
from qcompress.model.coupled import Bypass
from qcompress.model.parts import Part
from qcompress.model.tensors import same_bits
from qcompress.transforms import activations
from qcompress.transforms.base import Transform

_ATTRIBUTE = "_qcompress_compression"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CompressedPart:
    """A part of a model with the transform chosen for it and its stored arrays.

    Attributes:
        part: the part.
        transform: the chosen transform.
        stored: arrays by name, on the CPU; empty when the weight is kept.
    """

    part: Part
    transform: Transform
    stored: dict[str, Tensor]

    @property
    def factors(self) -> dict[str, Tensor]:
        """Weights (as rows) of the layers that replace the part's layer, or {} if it is not replaced."""
        return self.transform.factors(self.stored, self.part.target) if self.stored else {}

    def rows(self) -> Tensor:
        """Return the rows decoded from the stored arrays."""
        return self.transform.decode(self.stored, self.part.target)

    def weights_in(self, model: nn.Module) -> list[Tensor] | None:
        """Return the parameters of ``model`` that hold the part, or None if they differ from what is stored.

        A kept weight has nothing stored; only its shape and type must match.
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
        parts: the stored parts.
        payload_bytes: predicted bytes of the whole model, without non-persistent buffers (whose size may depend on the
            last batch); None without a prediction.
        cuts: indices removed from the original's tensors.
        bypasses: modules of the original that are replaced by their constant output.
    """

    parts: tuple[CompressedPart, ...]
    payload_bytes: int | None = None
    cuts: Cuts = field(default_factory=dict)
    bypasses: tuple[Bypass, ...] = ()

    @property
    def smaller(self) -> bool:
        """Whether something was removed from the network."""
        return bool(self.cuts or self.bypasses)


def record_of(model: nn.Module) -> Compression | None:
    """Return the record of ``model``, or None."""
    record: Compression | None = getattr(model, _ATTRIBUTE, None)
    return record


def bypasses_in(model: nn.Module) -> tuple[Bypass, ...]:
    """Return the modules of the original that ``model`` does without."""
    record = record_of(model)
    return () if record is None else record.bypasses


def attach(model: nn.Module, record: Compression) -> None:
    """Attach ``record`` to ``model``; earlier cuts and bypasses are preserved."""
    before = record_of(model)
    if before is not None and not record.smaller:
        record = replace(record, cuts=before.cuts, bypasses=before.bypasses)
    setattr(model, _ATTRIBUTE, record)


def detach(model: nn.Module) -> None:
    """Remove the record of ``model``, if any."""
    if record_of(model) is not None:
        delattr(model, _ATTRIBUTE)


def require_unchanged(record: Compression, model: nn.Module) -> list[Tensor]:
    """Return the parameters of ``model`` that hold the parts of its record.

    Raises:
        ArtefactError: a parameter differs from what is stored.
    """
    holding: list[Tensor] = []
    for item in record.parts:
        weights = item.weights_in(model)
        if weights is None:
            raise ArtefactError(
                f"the weight of {item.part.name!r} is no longer what apply() set ({item.transform.label}): it was "
                "fine-tuned, converted or replaced. Load the compressed weights again, or measure and apply again"
            )
        holding += weights
    return holding


def install_(model: nn.Module, parts: Sequence[CompressedPart]) -> None:
    """Set the weights of ``model`` to those stored in ``parts``; weights without stored arrays are unchanged."""
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
            replace_(site.module, factored(site.module, factors))
            continue
        rows = site.rows.clone()
        for item in items:
            start, stop = item.part.rows or (0, len(rows))
            rows[start:stop] = item.rows()
        site.put_(rows)
