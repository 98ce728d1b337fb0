"""Pruning filters and removing bits of a PyTorch model by the formulation of arXiv 2505.16332.

    model + data ──read_filters──▶ FilterTables ──▶ formulations.filter_problem / filter_bqm / filter_counts
                                         a choice ──apply_filters──▶ smaller model ──▶ save_compressed

What always holds: the payload of the saved model takes exactly the bytes that `FilterNetwork.evaluate` says. A
pruned filter's weights are zero and not stored; its batch normalisation and the filters behind it stay (masking
semantics), so with ``batch_norm_data`` its channel becomes the constant that suits the data best.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from formulations.generators.filters.tables import FilterChoice, FilterLayer, FilterNetwork
from qcompress.compressed.apply import require_measured
from qcompress.compressed.copying import own_copy
from qcompress.compressed.record import CompressedPart, Compression, attach, install_
from qcompress.errors import DataError, ModelError, OptionsError
from qcompress.measurement import Measurement
from qcompress.measuring.candidates import fitted
from qcompress.measuring.fisher import Fisher
from qcompress.model import forward as forwards
from qcompress.model.batch_norm import reestimate_
from qcompress.model.losses import LossFunction, as_loss
from qcompress.model.parts import Part, Survey, survey
from qcompress.options import Options
from qcompress.transforms.base import Weight
from qcompress.transforms.quantize.whole_filters import PruneFilters

SCORES = ("l1", "fisher")

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FilterTables:
    """The tables of a model's convolutions.

    Attributes:
        network: what the formulations take; ``dataclasses.replace`` gives it other scores or another β.
        parts: of the model, one for each of the network's layers.
        model_fingerprint: of the model's state dict.
    """

    network: FilterNetwork
    parts: tuple[Part, ...]
    model_fingerprint: str


def read_filters(
    model: nn.Module,
    data: Iterable[Any],
    *,
    bits: tuple[int, int] = (2, 8),
    beta: float = 1.0,
    tied: Sequence[Sequence[str]] = (),
    scores: str = "l1",
    loss: str | LossFunction = "kl",
    forward: forwards.Forward | None = None,
    seed: int = 0,
) -> FilterTables:
    """The tables of every Conv2d of ``model``.

    Args:
        model: the original; left as it is.
        data: re-iterable of batches; ``"l1"`` only runs the first one, to see which layers are called.
        bits: fewest and most bits a weight, from 2 to 16.
        beta: weight of the quantization term.
        tied: names of layers whose filter i is pruned in all of them or in none, a group each: those whose outputs
            are added.
        scores: ``"l1"``: mean absolute weight of a filter, as in the paper; for bits the mean absolute change that
            the fewest bits make, of all filters together. ``"fisher"``: the root of the loss increase, by
            linearisation, of pruning the filter and of the fewest bits; it does not depend on how layers are scaled.
        loss: of ``"fisher"``, as in `qcompress.measure`.
        forward: how to run a batch, where `qcompress.model.forward.default_forward` does not fit.
        seed: of the probes that ``"fisher"`` takes of large outputs.

    Raises:
        ModelError: no Conv2d in the model can be compressed.
        OptionsError: unknown scores or names, bits outside their range.

    >>> from formulations.generators.filters.counts import fit_size
    >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.LazyLinear(3))
    >>> batch = torch.randn(16, 1, 8, 8)
    >>> _ = model(batch)
    >>> tables = read_filters(model, [batch])
    >>> gamma, choice = fit_size(tables.network, 1200)
    >>> smaller = apply_filters(model, tables, choice)
    >>> bool((smaller[2].weight[torch.from_numpy(choice.pruned[1])] == 0).all())
    True
    """
    if scores not in SCORES:
        raise OptionsError(f"scores must be one of {', '.join(SCORES)}, found {scores!r}")
    low, high = (PruneFilters(bits=number).bits for number in bits)
    batches = forwards.checked_data(data)
    with forwards.evaluating(model):
        surveyed = survey(model, batches, forward)
        parts = tuple(part for part in surveyed.parts if part.target.layer == "Conv2d")
        if not parts:
            raise ModelError("the model has no Conv2d that can be compressed, so there is no filter to prune")
        if scores == "l1":
            measured = [_changes(model, part, low) for part in parts]
        else:
            measured = _losses(model, batches, parts, low, loss, forward, seed)
        fingerprint = Measurement.fingerprint_of(model)
    group_of = _groups([part.name for part in parts], tied)
    layers = tuple(
        FilterLayer(
            name=part.name,
            scores=filter_scores,
            weights_per_filter=part.target.per_channel,
            bit_score=lowest / max(high - low, 1),
            tied=group_of.get(part.name, ""),
        )
        for part, (filter_scores, lowest) in zip(parts, measured, strict=True)
    )
    network = FilterNetwork(
        layers=layers, low_bits=low, high_bits=high, beta=beta, fixed_bytes=_fixed_bytes(surveyed, parts)
    )
    return FilterTables(network=network, parts=parts, model_fingerprint=fingerprint)


def apply_filters(
    model: Model,
    tables: FilterTables,
    choice: FilterChoice,
    *,
    batch_norm_data: Iterable[Any] | None = None,
    forward: forwards.Forward | None = None,
) -> Model:
    """A copy of ``model`` with the chosen filters zero and every layer at its bits; the original is left as it is.

    Args:
        model: the model that was read.
        tables: what `read_filters` gave.
        choice: of ``tables.network``, as the forms' ``decode`` give it.
        batch_norm_data: batches to re-estimate batch-norm statistics on, or None to leave them.
        forward: ``(model, batch) -> output tensor`` for that, where the default does not fit.

    Raises:
        ModelError: another model than was read.
        InvalidProblemError: a choice of another network.
    """
    tables.network.require(choice)
    require_measured(model, tables.model_fingerprint)
    pruned_of = {
        place: pruned for tied, pruned in zip(tables.network.sets, choice.pruned, strict=True) for place in tied.layers
    }
    smaller = own_copy(model)
    stored = []
    for place, part in enumerate(tables.parts):
        rows = part.weight(smaller).clone()
        rows[torch.from_numpy(pruned_of[place]).to(rows.device)] = 0.0
        transform = PruneFilters(bits=int(choice.bits[place]), num_pruned=int(pruned_of[place].sum()))
        stored.append(
            CompressedPart(part=part, transform=transform, stored=transform.encode(Weight(rows, part.target)))
        )
    install_(smaller, stored)
    attach(smaller, Compression(parts=tuple(stored)))
    if batch_norm_data is not None:
        reestimate_(smaller, batch_norm_data, forward)
    return smaller


def _changes(model: nn.Module, part: Part, low: int) -> tuple[NDArray[np.float64], float]:
    """Mean absolute weight of every filter, and the sum over filters of the mean absolute change by ``low`` bits."""
    rows = part.weight(model).cpu()
    change = PruneFilters(bits=low).approximate(Weight(rows, part.target)).double() - rows.double()
    return rows.double().abs().mean(dim=1).numpy(), float(change.abs().mean(dim=1).sum())


def _losses(
    model: nn.Module,
    batches: Iterable[Any],
    parts: Sequence[Part],
    low: int,
    loss: str | LossFunction,
    forward: forwards.Forward | None,
    seed: int,
) -> list[tuple[NDArray[np.float64], float]]:
    """Roots of the loss increases of pruning each filter alone, and of every layer at ``low`` bits."""
    single = survey(model, batches, forward, granularity=1).parts
    names = {part.name for part in parts}
    filters = tuple(part for part in single if part.modules[0] in names)
    pruned = _option_losses(model, batches, filters, PruneFilters(bits=low, num_pruned=1), loss, forward, seed)
    lowest = _option_losses(model, batches, tuple(parts), PruneFilters(bits=low), loss, forward, seed)
    ends = np.cumsum([part.target.channels for part in parts])
    return list(zip(np.split(np.sqrt(pruned), ends[:-1]), np.sqrt(lowest).tolist(), strict=True))


def _option_losses(
    model: nn.Module,
    batches: Iterable[Any],
    parts: tuple[Part, ...],
    transform: PruneFilters,
    loss: str | LossFunction,
    forward: forwards.Forward | None,
    seed: int,
) -> NDArray[np.float64]:
    """``(parts,)`` mean loss increase of each part alone as ``transform`` makes it, by linearisation; not below 0.

    Raises:
        DataError: there is no sample, or a loss is not finite.
    """
    (candidates, _), measured = fitted(model, parts, Options((transform,))), as_loss(loss)
    total, num_samples = np.zeros(candidates.num_options), 0
    effects = Fisher(model, candidates, measured, forward)
    for index, batch in enumerate(batches):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        effects_of_batch = effects.batch_effects(batch, generator)
        total, num_samples = total + effects_of_batch.cost, num_samples + effects_of_batch.num_samples
    if not num_samples or not np.isfinite(total).all():
        raise DataError("the calibration data holds no sample, or the losses measured on it are not finite")
    return np.asarray(np.maximum(total[candidates.offsets[:-1] + 1] / num_samples, 0.0))


def _groups(names: Sequence[str], tied: Sequence[Sequence[str]]) -> dict[str, str]:
    """Layer name → name of its group.

    Raises:
        OptionsError: a name that is no layer, or in two groups.
    """
    group_of: dict[str, str] = {}
    for group in tied:
        if isinstance(group, str):
            raise OptionsError(
                f"tied must be a list of groups of layer names, such as [['conv1', 'conv2']], found {group!r}"
            )
        for name in group:
            if name not in names:
                raise OptionsError(
                    f"tied names {name!r}, which is not one of the layers; there are: {', '.join(names)}"
                )
            if name in group_of:
                raise OptionsError(f"tied names {name!r} twice: join the two groups")
            group_of[name] = " + ".join(group)
    return group_of


def _fixed_bytes(surveyed: Survey, parts: Sequence[Part]) -> int:
    """Bytes of everything but ``parts``, as it is."""
    return int(surveyed.original["bytes"]) - sum(part.target.num_weights * part.target.dtype.itemsize for part in parts)
