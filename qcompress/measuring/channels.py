"""Measure how many channels of every coupled set should stay, and with which codes the layers are stored.

Removing channels is a large change, so every removal is evaluated directly: the weights that read a set are replaced by
those of the smaller network, the rest of the network is run again, and the true loss is computed. The units that an
option removes are fixed beforehand, by their scores. Codes, if they are on offer as well, are measured as without
channels (`qcompress.measuring.jointly`).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from formulations.files import AnyPath
from qcompress.compressed.channels import put_channels_
from qcompress.errors import OptionsError
from qcompress.measurement import Measurement
from qcompress.measuring.candidates import Candidates, EncodeProgress, Layer, fitted
from qcompress.measuring.codes_beside import CODES, Coded, codes_on_offer, replaces
from qcompress.measuring.jointly import Joined, join
from qcompress.measuring.kept_codes import KeptCodes
from qcompress.measuring.memory import room_on
from qcompress.measuring.options_by_layer import Offered
from qcompress.measuring.progress import MeasureProgress
from qcompress.measuring.removals import Removals, find_removals, kept_units, parts_of_sets
from qcompress.measuring.replacing import tried_out
from qcompress.measuring.stopping import NEVER, Stop
from qcompress.measuring.true_loss import mean_loss
from qcompress.model import forward as forwards
from qcompress.model.calibration import Calibration
from qcompress.model.coupled import CoupledSet
from qcompress.model.forward import device_of
from qcompress.model.parts import Part, Survey, survey
from qcompress.model.steady import Steady, steady
from qcompress.model.tensors import held_tensors, size_bytes
from qcompress.model.weights import Skipped, layer_names
from qcompress.options import Options
from qcompress.structure.uses import Uses, uses_of
from qcompress.transforms.channels import KeepChannels

Accumulate = Callable[..., Any]
"""`qcompress.measuring.measure.accumulate`."""

TRIED = "removal of channels is evaluated directly"


def offers_channels(offered: Offered) -> bool:
    """Whether channels are on offer.

    Raises:
        OptionsError: channels are offered together with other options than `CODES`.
    """
    offers = [offer for options in offered.by_pattern.values() for offer in options.offers]
    if not any(isinstance(offer, KeepChannels) for offer in offers):
        return False
    if wrong := [offer.label for offer in offers if not isinstance(offer, (KeepChannels, *CODES))]:
        raise OptionsError(
            f"channel removal can be combined with prune_quantize() and low_rank(), found {wrong[0]!r}: compress "
            "with prune_channels(), then compress the smaller model with the other options"
        )
    return True


def measure_channels(
    calibration: Calibration,
    offered: Offered,
    accumulate: Accumulate,
    method: str,
    cache: AnyPath | None = None,
    on_progress: Callable[[MeasureProgress], None] | None = None,
    on_encode: Callable[[EncodeProgress], None] | None = None,
    *,
    stop: Stop = NEVER,
) -> Measurement:
    """`qcompress.measure` for options that remove channels, and codes with them.

    Args:
        calibration: model, data, forward, loss and seed.
        offered: options by pattern: `qcompress.prune_channels`, and perhaps `qcompress.prune_quantize` and
            `qcompress.low_rank`.
        accumulate: function that sums costs and effects over the data.
        method: same as in `qcompress.measure`, for the codes; removals are always evaluated directly, and ``"sampled"``
            is refused.
        cache: same as in `qcompress.measure`.
        on_progress: same as in `qcompress.measure`.
        on_encode: same as in `qcompress.measure`.
        stop: when to stop before all batches are done.

    Raises:
        NoChannelsError: no channel of the model can be removed.
        OptionsError: the method is ``"sampled"``, or no layer's bytes follow from the number of its channels.
    """
    if method == "sampled":
        raise OptionsError("options of channels are tried one by one: method='sampled' has no gradient for them")
    model, data, loss = calibration.model, calibration.data, calibration.loss
    run = steady(calibration.forward, calibration.seed)
    offered.require_known(layer_names(model))
    fingerprint, code = Measurement.fingerprint_of(model), offered.code().digest
    run.require_same(model, calibration.first_batch())
    inventory = survey(model, data, run, loss=loss)
    kept_codes = KeptCodes(None if cache is None else Path(f"{cache}.codes"), code)
    removals, coded, encoded = _on_offer(calibration, run, offered, inventory, kept_codes, on_encode)
    uses = uses_of(model, removals.sets, inventory.counted, left_out=_in_codes(coded, encoded))
    candidates = ChannelCandidates(model, removals, uses, encoded)
    settings = [fingerprint, "channels", method, code, Measurement.fingerprint_of(calibration.goal)]
    sums = accumulate(
        model,
        data,
        candidates,
        loss,
        method if coded.layers else "direct",
        calibration.seed,
        run,
        [*settings, None if cache is None else calibration.digests()],
        original=calibration.original,
        tried=_tried(removals, coded, inventory.tried),
        cache=cache,
        stop=stop,
        on_progress=on_progress,
    )
    Measurement.require_as_before(model, fingerprint)
    tables = sums.mean_cost(), sums.factor()
    joined = join(removals, coded.layers, candidates.parts, candidates.transforms, uses, *tables)
    if cache is not None:
        Path(cache).unlink(missing_ok=True)
        kept_codes.done()
    return Measurement(
        original=MappingProxyType(inventory.original),
        skipped=_skipped(model, inventory.parts, removals, coded),
        num_samples=sums.num_samples,
        method=method if coded.layers else "direct",
        loss=loss.name,
        seed=calibration.seed,
        model_fingerprint=fingerprint,
        standing_loss=_standing_loss(calibration, run),
        notes=(*joined.notes, *coded.notes, *stop.notes(sums, candidates, inventory.num_batches)),
        tried=MappingProxyType({name: why for name, why in sums.tried.items() if why != TRIED}),
        **_tables(removals, coded, joined),
    )


def _tried(removals: Removals, coded: Coded, found: Mapping[str, str]) -> dict[str, str]:
    """Name of a measured part → why it is evaluated directly: all sets, and layers for which a reason was ``found``."""
    codes = {_code_name(name): why for name, why in found.items() if name in coded.options}
    return dict.fromkeys((item.name for item in removals.sets), TRIED) | codes


def _standing_loss(calibration: Calibration, run: forwards.Forward) -> float:
    """Return the loss of the measured network against the original, if it is another one."""
    if calibration.original is None:
        return 0.0
    return mean_loss(calibration.original, calibration.model, calibration.data, loss=calibration.loss, forward=run)


def _on_offer(
    calibration: Calibration,
    run: Steady,
    offered: Offered,
    inventory: Survey,
    kept_codes: KeptCodes,
    on_encode: Callable[[EncodeProgress], None] | None,
) -> tuple[Removals, Coded, Candidates]:
    """Return the removals on offer, the layers with codes, and their encoded options."""
    codes = codes_on_offer(inventory.parts, offered)
    of_all = {part.name: codes.get(part.name, Options(())) for part in inventory.parts}
    inventory = tried_out(calibration.model, inventory, of_all, calibration.first_batch(), run)
    parts = inventory.parts
    fitting = [part for part in parts if part.name in codes and codes[part.name].need_moments(part.target)]
    removals = find_removals(calibration, run, offered, parts, fitting)
    coded = Coded.of(calibration.model, removals, parts, codes, inventory.counted, inventory.needed)
    encoded, _ = fitted(
        calibration.model,
        tuple(layer.part for layer in coded.layers),
        coded.options,
        removals.moments,
        removals.num_inputs,
        on_encode=on_encode,
        kept=kept_codes,
    )
    return removals, coded, encoded


def _in_codes(coded: Coded, encoded: Candidates) -> dict[str, list[str]]:
    """Return for each resource the weights whose use depends on the choice of their codes."""
    names = [layer.part.state_name for layer in coded.layers]
    pairs = zip(names, coded.layers, encoded.transforms, strict=True)
    return {"bytes": names, "macs": [name for name, layer, options in pairs if replaces(layer, options)]}


def _tables(removals: Removals, coded: Coded, joined: Joined) -> dict[str, Any]:
    """Return the measurement's fields on decisions, their options, and what these use."""
    return {
        "parts": joined.parts,
        "transforms": joined.transforms,
        "cost": joined.cost,
        "factor": joined.factor,
        "error": np.full(len(joined.cost), np.nan),
        "standing": (0,) * len(joined.parts),
        "moments": MappingProxyType({path: table.numpy() for path, table in removals.moments.items()}),
        "num_inputs": MappingProxyType(removals.num_inputs),
        "sets": removals.sets,
        "coded": tuple(layer.part for layer in coded.layers),
        "fixed": MappingProxyType({name: terms[0] for name, terms in joined.uses.items()}),
        "resources": MappingProxyType({name: terms[1] for name, terms in joined.uses.items()}),
        "resource_pairs": MappingProxyType({name: terms[2] for name, terms in joined.uses.items() if terms[2].nnz}),
    }


def _skipped(model: nn.Module, parts: tuple[Part, ...], removals: Removals, coded: Coded) -> tuple[Skipped, ...]:
    """Return the layers that keep their channels and their codes, with the reasons."""
    sizes = {item.name.removesuffix(".weight"): size_bytes(item.tensor) for item in held_tensors(model)}
    sizes |= {part.name: part.target.dense_bytes for part in parts}
    reasons = {name: why for name, why in removals.kept.items() if name not in coded.options} | coded.reasons
    return tuple(Skipped(name=name, size_bytes=sizes.get(name, 0), reason=why) for name, why in reasons.items())


class ChannelCandidates(Candidates):
    """Sets and their removals, then layers and their codes.

    Args:
        model: the model.
        removals: the removals.
        uses: uses of everything but the weights of the layers.
        encoded: candidates of the layers.
    """

    def __init__(self, model: nn.Module, removals: Removals, uses: Uses, encoded: Candidates) -> None:
        parts = (*parts_of_sets(model, removals.sets), *map(_renamed, encoded.parts))
        self._encoded, self._removals, self._uses = encoded, removals, uses
        super().__init__(model, parts, (*removals.transforms, *encoded.transforms), self._rows_of, [0] * len(parts))
        self.layers = tuple(
            Layer(modules=part.modules, parts=(index,), parameter=part.parameter) for index, part in enumerate(parts)
        )
        self._moments = {path: table.numpy() for path, table in removals.moments.items()}
        self._tensors = {item.name: item.tensor for item in held_tensors(model)}
        self._put: dict[tuple[int, int], dict[str, Tensor]] = {}
        reading = [sum(tensor.nbytes for tensor in self._reading(item).values()) for item in removals.sets]
        sizes = zip(reading, removals.transforms, strict=True)
        self._all_fit = sum(size * (len(options) - 1) for size, options in sizes) <= room_on(device_of(model))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what each process works out for itself."""
        return {**self.__dict__, "_put": {}}

    def _reading(self, item: CoupledSet) -> dict[str, Tensor]:
        """The tensors that read a set, by name."""
        return {axis.tensor: self._tensors[axis.tensor] for axis in item.axes if axis.reads}

    @property
    def size_bytes(self) -> NDArray[np.float64]:
        """``(V,)`` bytes with each option alone: of the network without the layers, or of a layer."""
        sets, transforms = self._removals.sets, self._removals.transforms
        whole = [item.num_units for item in sets]
        alone = [
            self._uses.of([*whole[:place], kept, *whole[place + 1 :]])["bytes"]
            for place, (item, options) in enumerate(zip(sets, transforms, strict=True))
            for kept in kept_units(item, options)
        ]
        return np.concatenate([alone, self._encoded.size_bytes])

    def _rows_of(self, part: int, option: int) -> Tensor:
        return self._encoded._rows(part - len(self._removals.sets), option)

    @contextlib.contextmanager
    def applied(self, part: int, option: int) -> Iterator[None]:
        """Mask units of a set or apply codes, according to the option; restore the model exactly on exit."""
        if part >= len(self._removals.sets):
            with super().applied(part, option):
                yield
            return
        item, transform = self._removals.sets[part], self.transforms[part][option]
        tensors = self._reading(item)
        before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        try:
            if (part, option) in self._put:
                _copy_(tensors, self._put[part, option])
            else:
                put_channels_(self._model, [item], [transform], self._moments)
                if self._all_fit:  # making up for units takes far longer than a batch through a small network
                    self._put[part, option] = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            yield
        finally:
            _copy_(tensors, before)


def _copy_(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(values[name])


def _renamed(part: Part) -> Part:
    """Return a layer under a name that no set has."""
    return replace(part, name=_code_name(part.name))


def _code_name(name: str) -> str:
    return f"codes of {name}"
