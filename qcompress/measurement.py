"""What measuring gives: per option its loss increase, its effect for pair terms and its costs. Saved in one file.

Measuring is the expensive step; a `Measurement` serves every budget, formulation and solver afterwards, on any
machine. It holds no weights: the transforms are plain values that are applied to the model anew, with the moments of
its layers' inputs where they were calibrated.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from formulations.file_kinds import FileKind
from formulations.files import AnyPath
from formulations.resource_pairs import arrays_of, matrix_from
from qcompress.model.composed import composed
from qcompress.model.coupled import CoupledSet
from qcompress.model.opened import opened_of
from qcompress.model.parts import Part, unique_state, weights_of
from qcompress.model.weights import Skipped
from qcompress.options import transform_from_json
from qcompress.transforms.base import Keep, Transform, Weight

FILE_KIND = FileKind("qcompress measurement", version=4)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measurement:
    """The tables of a measured model. Options are numbered flat, part after part: V of them.

    Attributes:
        parts: G parts of the model, each with its options in ``transforms``.
        cost: ``(V,)`` loss increase of each option alone, nats (or the loss's unit) per sample, from ``standing``.
        error: ``(V,)`` squared error of each option's weight, relative to the weight's own square; of the layer's
            output on the calibration data where there are moments.
        factor: ``(V, r)``; options u, v of different parts together add ``factor[u]·factor[v]``.
        resources: name → ``(V,)`` use of each option.
        fixed: name → use of everything that is not chosen about.
        original: name → use of the whole original model.
        skipped: what stays as it is, and why.
        num_samples: samples the averages are over.
        method, loss, seed: how it was measured.
        model_fingerprint: of the measured model's state dict.
        standing: option of each part in the model that was measured; 0, its own weight, at first (see `remeasure`).
        standing_loss: loss of that model; ``cost`` comes on top of it.
        moments: `Part.path` → ``(n, n)`` float32 second moments of its (unfolded) input, where an
            option needs them.
        num_inputs: path → of how many inputs the moments are the mean.
        tried: name of a part → why its options were tried one by one although the method is ``"fisher"``.
        notes: what else is to be known of how it was measured.
        codes: (part, option) → its arrays as they would be written, as far as they are at hand: `apply` need not
            work them out again. They are not saved.
        squares: path → ``(n,)`` float32 mean squares of the layer's input columns, where an option needs them.
        standard_error: ``(V,)`` of the costs as estimates from samples of the outputs; None where that is not known.
        sets: the coupled sets that the parts stand for, where channels are on offer; else none.
        resource_pairs: name of a resource → ``(V, V)`` what two options of different parts use of it together.
        softened: ``(V,)`` as ``cost``, at outputs that are less sure (see `qcompress.model.losses`), where known.
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
    codes: dict[tuple[int, int], dict[str, Tensor]] = field(default_factory=dict, repr=False)
    squares: MappingProxyType[str, NDArray[np.float32]] = field(default_factory=lambda: MappingProxyType({}))
    standard_error: NDArray[np.float64] | None = None
    sets: tuple[CoupledSet, ...] = ()
    resource_pairs: MappingProxyType[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    softened: NDArray[np.float64] | None = None

    @property
    def labels(self) -> tuple[tuple[str, ...], ...]:
        """Per part the names of its options."""
        return tuple(tuple(transform.label for transform in options) for options in self.transforms)

    def weights(self, model: nn.Module) -> Iterator[Weight]:
        """The weights of all parts in ``model`` (views), with the moments of their inputs where there are any."""
        distinct = {id(table): torch.tensor(table) for table in self.moments.values()}
        moments = {path: distinct[id(table)] for path, table in self.moments.items()}
        squares = {path: torch.tensor(values) for path, values in self.squares.items()}
        return weights_of(model, self.parts, moments, self.num_inputs, squares)

    def encoded(self, part: int, transform: Transform, weight: Weight) -> dict[str, Tensor]:
        """The arrays that a transform writes for a part, whose weight is the measured one; nothing when it is kept.

        Raises:
            ModelError: the weight cannot be stored so.
        """
        if isinstance(transform, Keep):
            return {}
        options = self.transforms[part]
        known = self.codes.get((part, options.index(transform))) if transform in options else None
        return transform.encode(weight) if known is None else known

    def weight(self, part: int, rows: Tensor) -> Weight:
        """A part's weight that has those rows."""
        path, target = self.parts[part].path, self.parts[part].target
        moments = torch.tensor(self.moments[path]) if path in self.moments else None
        squares = torch.tensor(self.squares[path]) if path in self.squares else None
        return Weight(rows, target, moments, self.num_inputs.get(path, math.inf), squares)

    @staticmethod
    def fingerprint_of(model: nn.Module) -> str:
        """SHA-256 over the names, types and values of the model's state dict, with its weights as it uses them."""
        if (opened := opened_of(model)) is not None:
            return opened.fingerprint
        digest = hashlib.sha256()
        with composed(model):
            for name, tensor in unique_state(model).items():
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def save(self, path: AnyPath) -> None:
        """Write everything to one ``.npz`` file, whole or not at all."""
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
            **({"sets": [item.to_json() for item in self.sets]} if self.sets else {}),
            **({"resource_pairs": list(self.resource_pairs)} if self.resource_pairs else {}),
        }
        arrays: dict[str, NDArray[np.floating]] = {"cost": self.cost, "factor": self.factor, "error": self.error}
        arrays |= {f"resource_{i}": use for i, use in enumerate(self.resources.values())}
        arrays |= {f"moments_{i}": table for i, table in enumerate(distinct)}
        arrays |= {f"squares_{i}": values for i, values in enumerate(self.squares.values())}
        if self.standard_error is not None:
            arrays["standard_error"] = self.standard_error
        for i, terms in enumerate(self.resource_pairs.values()):
            arrays |= arrays_of(terms, f"resource_pairs_{i}")
        if self.softened is not None:
            arrays["softened"] = self.softened
        FILE_KIND.write_arrays(path, header, arrays)

    @classmethod
    def load(cls, path: AnyPath) -> "Measurement":
        """Read what `save` wrote.

        Raises:
            FileFormatError: the file is cut short, of another kind, newer, or holds a pickle.
        """
        header, arrays = FILE_KIND.read_arrays(path)
        with FILE_KIND.building(path):
            resources = {name: arrays[f"resource_{i}"] for i, name in enumerate(header["resources"])}
            places = header.get("moments", {})
            if isinstance(places, list):  # up to version 3 every layer had its own
                places = {path: place for place, path in enumerate(places)}
            moments = {path: arrays[f"moments_{place}"] for path, place in places.items()}
            squares = {path: arrays[f"squares_{place}"] for place, path in enumerate(header.get("squares", ()))}
            return cls(
                parts=tuple(map(Part.from_json, header["parts"])),
                transforms=tuple(tuple(map(transform_from_json, options)) for options in header["transforms"]),
                cost=arrays["cost"],
                factor=arrays["factor"],
                standard_error=arrays.get("standard_error"),
                error=arrays.get("error", np.full(len(arrays["cost"]), np.nan)),  # version 1 had none
                resources=MappingProxyType(resources),
                fixed=MappingProxyType(header["fixed"]),
                original=MappingProxyType(header["original"]),
                skipped=tuple(Skipped(**item) for item in header["skipped"]),
                moments=MappingProxyType(moments),
                num_inputs=MappingProxyType(header.get("num_inputs", {})),
                tried=MappingProxyType(header.get("tried", {})),
                notes=tuple(header.get("notes", ())),
                squares=MappingProxyType(squares),
                softened=arrays.get("softened"),
                standing=tuple(header.get("standing", [0] * len(header["parts"]))),  # since version 3
                standing_loss=header.get("standing_loss", 0.0),
                sets=tuple(map(CoupledSet.from_json, header.get("sets", ()))),
                resource_pairs=MappingProxyType(
                    {
                        name: matrix_from(arrays, f"resource_pairs_{i}", len(arrays["cost"]))
                        for i, name in enumerate(header.get("resource_pairs", ()))
                    }
                ),
                **{key: header[key] for key in ("num_samples", "method", "loss", "seed", "model_fingerprint")},
            )
