"""Prune filters and reduce bits of a PyTorch model with the formulation of arXiv 2505.16332.

    model + data ──read_filters──▶ FilterTables ──▶ formulations.filter_problem / filter_bqm / filter_counts
                                         a choice ──apply_filters──▶ smaller model ──▶ save_compressed

The payload of the saved model takes exactly the bytes that `FilterNetwork.evaluate` states. A pruned filter's weights
are zero and not stored. Its batch normalisation and the following filters stay (masking semantics), so with
``batch_norm_data`` its channel becomes the constant that fits the data best.
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
from qcompress.measuring.methods.direct import Direct
from qcompress.measuring.methods.fisher import Fisher
from qcompress.model import forward as forwards
from qcompress.model.batch_norm import reestimate_
from qcompress.model.losses import LossFunction, as_loss
from qcompress.model.modes import outside_modes
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
        network: input of the formulations; use ``dataclasses.replace`` for other scores or another β.
        parts: parts of the model, one for each of the network's layers.
        model_fingerprint: fingerprint of the model's state dict.
    """

    network: FilterNetwork
    parts: tuple[Part, ...]
    model_fingerprint: str


@outside_modes
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
    """Return the tables of every Conv2d of ``model``.

    Args:
        model: the original model; it is not modified.
        data: re-iterable batches; ``"l1"`` runs only the first one, to see which layers are called.
        bits: smallest and largest number of bits for a weight, from 2 to 16.
        beta: weight of the quantization term.
        tied: groups of layer names, such as layers whose outputs are added. Filter i is pruned in all layers of a group
            or in none.
        scores: ``"l1"``: mean absolute weight of a filter, as in the paper; for bits, the mean absolute change caused
            by the smallest number of bits, summed over filters. ``"fisher"``: square root of the linearised loss
            increase caused by pruning the filter, or by the smallest number of bits; it does not depend on the scaling
            of layers.
        loss: loss for ``"fisher"``, as in `qcompress.measure`.
        forward: how to run a batch, if `qcompress.model.forward.default_forward` does not fit.
        seed: seed for the random probes of large outputs in ``"fisher"``.

    Raises:
        ModelError: the model has no Conv2d that can be compressed.
        OptionsError: scores or names are unknown, or bits are outside their range.

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


@outside_modes
def apply_filters(
    model: Model,
    tables: FilterTables,
    choice: FilterChoice,
    *,
    batch_norm_data: Iterable[Any] | None = None,
    forward: forwards.Forward | None = None,
) -> Model:
    """Return a copy of ``model`` with the chosen filters set to zero and every layer at its number of bits, in
    evaluation mode.

    Args:
        model: the model that was read; it is not modified.
        tables: result of `read_filters`.
        choice: choice for ``tables.network``, as returned by ``decode`` of the formulations.
        batch_norm_data: batches on which to re-estimate batch-norm statistics, or None to leave them unchanged.
        forward: ``(model, batch) -> output tensor`` for re-estimation, if the default does not fit.

    Raises:
        ModelError: the model is not the one that was read.
        InvalidProblemError: the choice belongs to another network.
    """
    tables.network.require(choice)
    require_measured(model, tables.model_fingerprint)
    pruned_of = {
        place: pruned for tied, pruned in zip(tables.network.sets, choice.pruned, strict=True) for place in tied.layers
    }
    smaller = own_copy(model).eval()
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
    """Return every filter's mean absolute weight, and the mean absolute change by ``low`` bits, summed over filters."""
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
    """Return the square roots of the loss increases of pruning each filter alone, and of each layer at ``low`` bits."""
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
    """Return ``(parts,)`` linearised mean loss increase of applying ``transform`` to each part alone; at least 0.

    Raises:
        DataError: there is no sample, or a loss is not finite.
    """
    (candidates, _), measured = fitted(model, parts, Options((transform,))), as_loss(loss)
    total, num_samples = np.zeros(candidates.num_options), 0
    effects = Fisher(Direct(model, candidates, measured, forward))
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
        OptionsError: a name is not a layer, or is in two groups.
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
    """Return the bytes of everything except ``parts``."""
    return int(surveyed.original["bytes"]) - sum(part.target.num_weights * part.target.dtype.itemsize for part in parts)
