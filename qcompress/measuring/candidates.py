"""The options of every part of a model, and the change of the weight that each option makes.

Every weight is encoded once per option. The encoded options are kept in their stored form, a few bits per weight, and
decoded on demand (for small models only once). Changes are relative to the current weights of the model: at first the
original's, later those of a given choice (`qcompress.remeasure`).
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qcompress.errors import ModelError, ResultNotFiniteError
from qcompress.measuring.kept_codes import NOTHING_KEPT, KeptCodes
from qcompress.measuring.memory import MemoryTrimmer, return_free_memory, room_on
from qcompress.model.forward import device_of
from qcompress.model.parts import Part, weights_of
from qcompress.model.sites import WEIGHT, Site
from qcompress.options import Options
from qcompress.transforms.activations import Activations
from qcompress.transforms.base import Ranges, Transform

Codes = dict[tuple[int, int], dict[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeProgress:
    """Progress of encoding the options.

    Attributes:
        part: name of the part just finished.
        parts, total_parts: number of parts finished, and of all parts.
        elapsed_s: seconds elapsed.
        remaining_s: forecast of the remaining seconds from the weights left; None after the first part, whose time may
            include compiling kernels.
        size_bytes: bytes of the arrays held.
    """

    part: str
    parts: int
    total_parts: int
    elapsed_s: float
    remaining_s: float | None
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A weight with all its parts: one part, or its blocks of output channels in order.

    Attributes:
        modules: paths of the modules that share the weight.
        parts: indices into the candidates' parts, in ascending order of rows.
        parameter: name of the weight in these modules.
    """

    modules: tuple[str, ...]
    parts: tuple[int, ...]
    parameter: str = WEIGHT

    def site(self, model: nn.Module) -> Site:
        """Return where the weight is in ``model``."""
        return Site(model.get_submodule(self.modules[0]), self.parameter)


class Candidates:
    """Parts, their options, and the changes that these make to the current weights of a model.

    Args:
        model: the model, with the options of ``standing`` in its weights.
        parts: parts of the model.
        transforms: the options of each part.
        rows: function from (part, option) to the part's rows under the option.
        standing: current option of each part; option 0 keeps the original's rows.
        codes: (part, option) → the encoded arrays, where available.
        overwritable: whether ``rows`` gives tensors that nobody else holds.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: tuple[Part, ...],
        transforms: Sequence[tuple[Transform, ...]],
        rows: Callable[[int, int], Tensor],
        standing: Sequence[int],
        codes: Codes | None = None,
        *,
        overwritable: bool = False,
    ) -> None:
        self._model, self._rows, self.codes, self._overwritable = model, rows, codes or {}, overwritable
        self.parts, self.transforms, self.standing = parts, tuple(transforms), tuple(standing)
        sizes = [len(group) for group in self.transforms]
        self.offsets: NDArray[np.int64] = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        by_weight: dict[tuple[tuple[str, ...], str], list[int]] = {}
        for index, part in enumerate(parts):
            by_weight.setdefault((part.modules, part.parameter), []).append(index)
        self.layers = tuple(
            Layer(modules=modules, parts=tuple(parts_of_weight), parameter=parameter)
            for (modules, parameter), parts_of_weight in by_weight.items()
        )

    @property
    def size_bytes(self) -> NDArray[np.float64]:
        """``(V,)`` bytes of every option."""
        options_of_parts = zip(self.parts, self.transforms, strict=True)
        sizes = [transform.size_bytes(part.target) for part, options in options_of_parts for transform in options]
        return np.array(sizes, dtype=np.float64)

    @property
    def num_options(self) -> int:
        """Number of options of all parts, V."""
        return int(self.offsets[-1])

    def not_finite(self, part: int, option: int) -> ResultNotFiniteError:
        """Return the error that names an option whose loss is NaN or infinite."""
        name, label = self.parts[part].name, self.transforms[part][option].label
        return ResultNotFiniteError(f"the loss with {name!r} at {label!r} is not finite; leave that option out")

    def change(self, part: int, option: int) -> Tensor:
        """``approximation - weight`` of the part's rows, ``(channels, per_channel)``."""
        rows = self.parts[part].weight(self._model)
        if option == self.standing[part]:
            return torch.zeros_like(rows)
        changed = self._rows(part, option)
        return changed.sub_(rows) if self._overwritable else changed - rows

    def some(self, indices: Sequence[int]) -> "Candidates":
        """Return the candidates of some parts."""
        return Candidates(
            self._model,
            tuple(self.parts[index] for index in indices),
            [self.transforms[index] for index in indices],
            lambda part, option: self._rows(indices[part], option),
            [self.standing[index] for index in indices],
            overwritable=self._overwritable,
        )

    @property
    def decoded_bytes(self) -> int:
        """Bytes of the decoded weights of all options."""
        sizes = zip(self.parts, self.transforms, strict=True)
        return sum(part.target.dense_bytes * (len(options) - 1) for part, options in sizes)

    def changing(self, layer: Layer) -> list[int]:
        """Return the indices of options that change some part of a layer."""
        most = max(len(self.transforms[part]) for part in layer.parts)
        return [option for option in range(most) if any(option != self.standing[part] for part in layer.parts)]

    def layer_change(self, layer: Layer, option: int) -> Tensor:
        """Return the change of the whole weight when every part that has an ``option``-th option takes it."""
        rows = [
            self.change(part, option)
            if option < len(self.transforms[part])
            else torch.zeros_like(self.parts[part].weight(self._model))
            for part in layer.parts
        ]
        return layer.site(self._model).from_rows(torch.cat(rows))

    def activations(self, layer: Layer, option: int) -> Activations | None:
        """Return how the layer's activations are rounded under the option; None for layers split into blocks."""
        if len(layer.parts) > 1 or option >= len(self.transforms[layer.parts[0]]):
            return None
        return self.transforms[layer.parts[0]][option].activations

    @contextlib.contextmanager
    def applied(self, part: int, option: int) -> Iterator[None]:
        """Apply one option of one part to the model; restore the weight exactly on exit."""
        measured_part = self.parts[part]
        site = measured_part.site(self._model)
        original = site.weight.detach().clone()
        start, stop = measured_part.rows or (0, measured_part.target.channels)
        rows = site.to_rows(original).clone()
        rows[start:stop] = self._rows(part, option)
        site.put_(rows)
        rounding = contextlib.ExitStack()
        if (activations := self.transforms[part][option].activations) is not None:
            for path in measured_part.modules:
                rounding.enter_context(activations.on(self._model.get_submodule(path)))
        try:
            with rounding:
                yield
        finally:
            with torch.no_grad():
                site.weight.copy_(original)


def fitted(
    model: nn.Module,
    parts: tuple[Part, ...],
    options: Options | Mapping[str, Options],
    moments: Mapping[str, Tensor] = MappingProxyType({}),
    num_inputs: Mapping[str, float] = MappingProxyType({}),
    squares: Mapping[str, Tensor] = MappingProxyType({}),
    on_encode: Callable[[EncodeProgress], None] | None = None,
    decoded_bytes: int | None = None,
    ranges: Mapping[str, Ranges] = MappingProxyType({}),
    kept: KeptCodes = NOTHING_KEPT,
) -> tuple[Candidates, NDArray[np.float64]]:
    """Collect the useful options of each part of the original model, and the ``(V,)`` squared errors of all options.

    Args:
        model: the original model.
        parts: parts of the model.
        options: options on offer, for all parts or by part name.
        moments: second moments of the inputs of layers with an option that needs them, by `Part.path`.
        num_inputs: number of inputs that the moments are averaged over.
        squares: mean squares of the input columns of layers, by `Part.path`.
        on_encode: called after every part.
        decoded_bytes: bytes up to which the decoded options are kept, if all of them fit; by default `room_on` the
            model's device.
        ranges: ranges of the layers' activations, by `Part.path`.
        kept: options that an earlier run encoded, and where this run keeps its own.

    Raises:
        ModelError: a weight is not finite.
    """
    codes: Codes = {}
    work = np.cumsum([_work(part, moments) for part in parts])
    start, first_s, trimmer = time.perf_counter(), 0.0, MemoryTrimmer()
    transforms: list[tuple[Transform, ...]] = []
    errors: list[float] = []
    for part, weight in zip(parts, weights_of(model, parts, moments, num_inputs, squares, ranges), strict=True):
        if not bool(torch.isfinite(weight.rows).all()):
            raise ModelError(f"the weight of {part.name!r} holds NaN or infinity")
        offered = options if isinstance(options, Options) else options[part.name]
        index = len(transforms)
        fits = kept.once(index, offered, weight, partial(offered.for_weight, weight))
        codes |= {(index, option): fit.stored for option, fit in enumerate(fits)}
        transforms.append(tuple(fit.transform for fit in fits))
        errors += [fit.error for fit in fits]
        trimmer.after(weight.rows.nbytes)  # pieces between the codes that are kept
        if on_encode is not None:
            elapsed_s = time.perf_counter() - start
            first_s = elapsed_s if index == 0 else first_s
            later = float((work[-1] - work[index]) / (work[index] - work[0])) if index else None
            on_encode(
                EncodeProgress(
                    part=part.name,
                    parts=index + 1,
                    total_parts=len(parts),
                    elapsed_s=elapsed_s,
                    remaining_s=None if later is None else (elapsed_s - first_s) * later,
                    size_bytes=sum(array.nbytes for arrays in codes.values() for array in arrays.values()),
                )
            )
    return_free_memory()
    decoded: dict[tuple[int, int], Tensor] = {}

    def rows(part: int, option: int) -> Tensor:
        if (part, option) in decoded:
            return decoded[part, option]
        transform, target, weight = transforms[part][option], parts[part].target, parts[part].weight(model)
        stored = codes[part, option]
        if transform.decodes_anywhere:  # codes are a fraction of the rows, which an accelerator also restores faster
            stored = {name: array.to(weight.device) for name, array in stored.items()}
        changed = transform.decode(stored, target).to(weight.device, target.dtype)  # also while the model is widened
        if all_fit:
            decoded[part, option] = changed
        return changed

    candidates = Candidates(model, parts, transforms, rows, [0] * len(parts), codes)
    room = room_on(device_of(model)) if decoded_bytes is None else decoded_bytes
    all_fit = candidates.decoded_bytes <= room
    return candidates, np.array(errors)


def _work(part: Part, moments: Mapping[str, Tensor]) -> float:
    """Return the relative time to encode the options of a part: compensation visits all inputs for every weight."""
    input_moments = moments.get(part.path)
    return part.target.num_weights * (
        1.0 + (len(input_moments) / 32 if input_moments is not None and input_moments.ndim == 2 else 0.0)
    )
