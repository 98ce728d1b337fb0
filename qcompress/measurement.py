"""The result of measuring: every option's loss increase, factor for pair terms and resource use, saved in one file.

Measuring is the expensive step; a `Measurement` serves every budget, formulation and solver afterwards, on any
machine. It holds no weights: transforms are plain values that are applied to the model again, using the stored
second moments of the layers' inputs where they were calibrated.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from formulations.file_kinds import FileKind
from formulations.files import AnyPath
from formulations.resource_pairs import arrays_of, matrix_from
from qcompress.errors import ModelError, OptionsError
from qcompress.model.composed import composed
from qcompress.model.coupled import CoupledSet
from qcompress.model.opened import opened_of
from qcompress.model.parts import Part, unique_state, weights_of
from qcompress.model.tensors import bytes_of
from qcompress.model.weights import Skipped
from qcompress.options import transform_from_json
from qcompress.transforms.base import Keep, Transform, Weight

FILE_KIND = FileKind("qcompress measurement", version=5)
NOTHING_FITS = "no option on offer fits it"


def has_choice(options: Sequence[Transform]) -> bool:
    """Whether a part with these options can be anything but unchanged."""
    return not (len(options) == 1 and isinstance(options[0], Keep))


def without_choice(part: Part, why: str) -> Skipped:
    """Return the entry for a part that stays unchanged; an empty reason means that no option fits."""
    return Skipped(name=part.name, size_bytes=part.target.dense_bytes, reason=why or NOTHING_FITS)


def require_measurement(value: Any) -> None:
    """Check that a value is a `Measurement`.

    Raises:
        OptionsError: it is something else, such as the path of one.
    """
    if not isinstance(value, Measurement):
        raise OptionsError(
            f"measurement must be a qcompress.Measurement, found {type(value).__name__} {value!r:.60}: "
            "Measurement.load(path) reads one from its file"
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Measurement:
    """The tables of a measured model. Its V options are numbered consecutively, part after part.

    Attributes:
        parts: the G parts of the model.
        transforms: options of each part.
        cost: ``(V,)`` loss increase of each option alone over ``standing``, per sample in nats (or the loss's unit).
        error: ``(V,)`` squared error of each option's weight relative to the weight's squared norm; with moments, of
            the layer's output on the calibration data.
        factor: ``(V, r)``; options u and v of different parts chosen together add ``factor[u]·factor[v]`` to the loss.
        resources: name → ``(V,)`` use of each option.
        fixed: name → use of everything that has no choice.
        original: name → use of the whole original model.
        skipped: weights that are not a part and stay unchanged, and why (see `unchanged`).
        num_samples: number of samples that the averages are taken over.
        method: method of measuring.
        loss: name of the loss.
        seed: seed used for measuring.
        model_fingerprint: fingerprint of the measured model's state dict.
        standing: option of each part in the model that was measured; 0, the original weight, unless measured again (see
            `remeasure`).
        standing_loss: loss of that model; ``cost`` is added to it.
        moments: `Part.path` → ``(n, n)`` float32 second moments of the layer's (unfolded) input, if an option needs
            them.
        num_inputs: `Part.path` → number of inputs that the moments are averaged over.
        tried: name of a part → why its options were measured one by one although the method is ``"fisher"``.
        notes: other remarks on how the model was measured.
        codes: (part, option) → encoded arrays as they would be written, if available, so that `apply` need not encode
            again. They are not saved.
        squares: `Part.path` → ``(n,)`` float32 mean squares of the layer's input columns, if an option needs them.
        standard_error: ``(V,)`` standard errors of ``cost`` from sampling the data and outputs alone, or None if
            unknown.
        sets: the coupled sets that the parts stand for, if channels are on offer; otherwise empty.
        coded: the whole layers whose codes are chosen together with channels; otherwise empty.
        resource_pairs: name of a resource → ``(V, V)`` use by two options of different parts together.
        softened: ``(V,)`` cost at softened outputs (see `qcompress.model.losses`), or None if unknown.
        no_choice: name of a part that only its original weight is on offer for → why, where more is known about it
            than that no option fits.
        selecting: paths of the modules that select by the largest of computed numbers, as routers of experts do (see
            `qcompress.model.selections`). Where an option changes what they select, its estimated cost is too small;
            options of their own weights are run first (see ``ran``).
        ran: ``(V,)`` whether an option was run alone on some of the samples after ``"sampled"`` had estimated its cost:
            the cost is then its true loss increase there, unless that is known less well and not larger (see
            `qcompress.measuring.methods.reruns`); None if no option was run.
    """

    parts: tuple[Part, ...]
    transforms: tuple[tuple[Transform, ...], ...]
    cost: NDArray[np.float64]
    factor: NDArray[np.float64]
    error: NDArray[np.float64]
    resources: MappingProxyType[str, NDArray[np.float64]]
    fixed: MappingProxyType[str, float]
    original: MappingProxyType[str, float]
    skipped: tuple[Skipped, ...]
    num_samples: int
    method: str
    loss: str
    seed: int
    model_fingerprint: str
    standing: tuple[int, ...]
    standing_loss: float = 0.0
    moments: MappingProxyType[str, NDArray[np.float32]] = field(default_factory=lambda: MappingProxyType({}))
    num_inputs: MappingProxyType[str, int] = field(default_factory=lambda: MappingProxyType({}))
    tried: MappingProxyType[str, str] = field(default_factory=lambda: MappingProxyType({}))
    notes: tuple[str, ...] = ()
    codes: dict[tuple[int, int], dict[str, Tensor]] = field(default_factory=dict)
    squares: MappingProxyType[str, NDArray[np.float32]] = field(default_factory=lambda: MappingProxyType({}))
    standard_error: NDArray[np.float64] | None = None
    sets: tuple[CoupledSet, ...] = ()
    coded: tuple[Part, ...] = ()
    resource_pairs: MappingProxyType[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    softened: NDArray[np.float64] | None = None
    no_choice: MappingProxyType[str, str] = field(default_factory=lambda: MappingProxyType({}))
    selecting: tuple[str, ...] = ()
    ran: NDArray[np.bool_] | None = None

    def __repr__(self) -> str:
        rank = self.factor.shape[1]
        counts = f"{len(self.parts)} parts, {len(self.cost)} options, {self.num_samples} samples"
        return f"<Measurement: {counts}, {self.loss} by {self.method!r}, factor rank {rank}>"

    @property
    def unchanged(self) -> tuple[Skipped, ...]:
        """What stays unchanged whatever is chosen, and why: everything `skipped`, and parts without a choice."""
        return (*self.skipped, *self.kept)

    @property
    def kept(self) -> tuple[Skipped, ...]:
        """The parts without a choice, and why they have none."""
        return tuple(
            without_choice(part, self.no_choice.get(part.name, ""))
            for part, options in zip(self.parts, self.transforms, strict=True)
            if not has_choice(options)
        )

    @property
    def offsets(self) -> NDArray[np.int64]:
        """``(G + 1,)`` first option of each part, and V."""
        return np.cumsum([0, *map(len, self.transforms)])

    @property
    def labels(self) -> tuple[tuple[str, ...], ...]:
        """Names of the options of each part."""
        return tuple(tuple(transform.label for transform in options) for options in self.transforms)

    def restricted(self, options: Sequence[Sequence[int]]) -> "Measurement":
        """Return the measurement with some options of each part, in the given order; the standing one is among them."""
        flat = np.concatenate([start + np.array(kept) for start, kept in zip(self.offsets[:-1], options, strict=True)])
        places = {
            (part, option): (part, place) for part, kept in enumerate(options) for place, option in enumerate(kept)
        }
        return replace(
            self,
            transforms=tuple(
                tuple(own[option] for option in kept) for own, kept in zip(self.transforms, options, strict=True)
            ),
            cost=self.cost[flat],
            softened=None if self.softened is None else self.softened[flat],
            factor=self.factor[flat],
            error=self.error[flat],
            standard_error=None if self.standard_error is None else self.standard_error[flat],
            ran=None if self.ran is None else self.ran[flat],
            resources=MappingProxyType({name: use[flat] for name, use in self.resources.items()}),
            codes={places[where]: stored for where, stored in self.codes.items() if where in places},
            standing=tuple(places[where][1] for where in enumerate(self.standing)),
        )

    def weights(self, model: nn.Module) -> Iterator[Weight]:
        """Yield the weights of all parts in ``model`` (views), with the moments of their inputs if there are any."""
        distinct = {id(table): torch.tensor(table) for table in self.moments.values()}
        moments = {path: distinct[id(table)] for path, table in self.moments.items()}
        squares = {path: torch.tensor(values) for path, values in self.squares.items()}
        return weights_of(model, self.parts, moments, self.num_inputs, squares)

    def encoded(self, part: int, transform: Transform, weight: Weight) -> dict[str, Tensor]:
        """Return the arrays that a transform stores for a part's measured weight; empty when it is kept.

        Raises:
            ModelError: the weight cannot be stored in this way.
        """
        if isinstance(transform, Keep):
            return {}
        options = self.transforms[part]
        known = self.codes.get((part, options.index(transform))) if transform in options else None
        return transform.encode(weight) if known is None else known

    def weight(self, part: int, rows: Tensor) -> Weight:
        """Return a part's weight with the given rows."""
        path, target = self.parts[part].path, self.parts[part].target
        moments = torch.tensor(self.moments[path]) if path in self.moments else None
        squares = torch.tensor(self.squares[path]) if path in self.squares else None
        return Weight(rows, target, moments, self.num_inputs.get(path, math.inf), squares)

    @staticmethod
    def fingerprint_of(model: nn.Module) -> str:
        """Return a SHA-256 over names, types and values of the state dict, with parametrized weights evaluated."""
        if (opened := opened_of(model)) is not None:
            return opened.fingerprint
        digest = hashlib.sha256()
        with composed(model):
            for name, tensor in unique_state(model).items():
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(bytes_of(tensor))
        return digest.hexdigest()

    @classmethod
    def require_as_before(cls, model: nn.Module, fingerprint: str) -> None:
        """Check that a model, after all passes over the data, still has the fingerprint that it had before.

        Raises:
            ModelError: the fingerprint has changed.
        """
        if cls.fingerprint_of(model) != fingerprint:
            raise ModelError(
                "the weights of the model changed while it was measured: running it on some later batch changes them, "
                "or something else does. Load them again; let the forward pass change no parameter, also not through "
                ".data, or make what it changes a buffer"
            )

    def save(self, path: AnyPath) -> None:
        """Write everything to one ``.npz`` file, atomically."""
        distinct = list({id(table): table for table in self.moments.values()}.values())
        places = {id(table): place for place, table in enumerate(distinct)}
        header = {
            "parts": [part.to_json() for part in self.parts],
            "transforms": [[transform.to_json() for transform in options] for options in self.transforms],
            "resources": list(self.resources),
            "fixed": dict(self.fixed),
            "original": dict(self.original),
            "skipped": [asdict(item) for item in self.skipped],
            "num_samples": self.num_samples,
            "method": self.method,
            "loss": self.loss,
            "seed": self.seed,
            "model_fingerprint": self.model_fingerprint,
            "standing": list(self.standing),
            "standing_loss": self.standing_loss,
            "moments": {path: places[id(table)] for path, table in self.moments.items()},
            "num_inputs": dict(self.num_inputs),
            "tried": dict(self.tried),
            "notes": list(self.notes),
            "squares": list(self.squares),
            "no_choice": dict(self.no_choice),
            "selecting": list(self.selecting),
            "sets": [item.to_json() for item in self.sets],
            "coded": [part.to_json() for part in self.coded],
            "resource_pairs": list(self.resource_pairs),
        }
        arrays: dict[str, NDArray[Any]] = {"cost": self.cost, "factor": self.factor, "error": self.error}
        arrays |= {f"resource_{i}": use for i, use in enumerate(self.resources.values())}
        arrays |= {f"moments_{i}": table for i, table in enumerate(distinct)}
        arrays |= {f"squares_{i}": values for i, values in enumerate(self.squares.values())}
        if self.standard_error is not None:
            arrays["standard_error"] = self.standard_error
        for i, terms in enumerate(self.resource_pairs.values()):
            arrays |= arrays_of(terms, f"resource_pairs_{i}")
        if self.softened is not None:
            arrays["softened"] = self.softened
        if self.ran is not None:
            arrays["ran"] = self.ran
        FILE_KIND.write_arrays(path, header, arrays)

    @classmethod
    def load(cls, path: AnyPath) -> "Measurement":
        """Read what `save` wrote.

        Raises:
            FileFormatError: the file is truncated, of another kind or version, or holds a pickle.
        """
        header, arrays = FILE_KIND.read_arrays(path)
        with FILE_KIND.building(path):
            resources = {name: arrays[f"resource_{i}"] for i, name in enumerate(header["resources"])}
            moments = {path: arrays[f"moments_{place}"] for path, place in header["moments"].items()}
            squares = {path: arrays[f"squares_{place}"] for place, path in enumerate(header["squares"])}
            return cls(
                parts=tuple(map(Part.from_json, header["parts"])),
                transforms=tuple(tuple(map(transform_from_json, options)) for options in header["transforms"]),
                cost=arrays["cost"],
                factor=arrays["factor"],
                standard_error=arrays.get("standard_error"),
                error=arrays["error"],
                resources=MappingProxyType(resources),
                fixed=MappingProxyType(header["fixed"]),
                original=MappingProxyType(header["original"]),
                skipped=tuple(Skipped(**item) for item in header["skipped"]),
                moments=MappingProxyType(moments),
                num_inputs=MappingProxyType(header["num_inputs"]),
                tried=MappingProxyType(header["tried"]),
                notes=tuple(header["notes"]),
                squares=MappingProxyType(squares),
                no_choice=MappingProxyType(header["no_choice"]),
                selecting=tuple(header["selecting"]),
                softened=arrays.get("softened"),
                ran=arrays.get("ran"),
                standing=tuple(header["standing"]),
                standing_loss=header["standing_loss"],
                sets=tuple(map(CoupledSet.from_json, header["sets"])),
                coded=tuple(map(Part.from_json, header["coded"])),
                resource_pairs=MappingProxyType(
                    {
                        name: matrix_from(arrays, f"resource_pairs_{i}", len(arrays["cost"]))
                        for i, name in enumerate(header["resource_pairs"])
                    }
                ),
                **{key: header[key] for key in ("num_samples", "method", "loss", "seed", "model_fingerprint")},
            )
