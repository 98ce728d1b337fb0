"""Emulation: a dense copy of a model whose weights can be set to those of any choice.

To evaluate many choices in sequence, `qcompress.apply` would encode the same weights repeatedly. Here every option is
encoded once, when it is first needed, and only the parts that differ from the previous choice are written.
"""

from typing import Any

from numpy.typing import ArrayLike
from torch import Tensor, nn

from qcompress.compressed.apply import choice_of, put_, require_measured
from qcompress.compressed.copying import own_copy
from qcompress.measurement import Measurement, require_measurement
from qcompress.transforms.base import Keep, Weight


class Emulation:
    """A copy of a model that can take the weights of any choice.

    Args:
        model: the model that was measured; it is not modified.
        measurement: result of `measure`.

    Attributes:
        model: the copy, dense, in evaluation mode; a new one for every choice of channels.
        choice: current option of every part.

    Raises:
        ModelError: the model is not the one that was measured.
    """

    def __init__(self, model: nn.Module, measurement: Measurement) -> None:
        require_measurement(measurement)
        require_measured(model, measurement.model_fingerprint)
        self.model = own_copy(model).eval()
        self._measurement, self._whole = measurement, self.model
        self._original = [part.weight(self.model).clone() for part in measurement.parts]
        self._stored: dict[tuple[int, int], dict[str, Tensor]] = {}
        self._encoding: tuple[int, Weight] | None = None  # the last one, as options of a part often follow each other
        self.choice = [0] * len(measurement.parts)  # option 0 leaves a part unchanged
        self._rounding: dict[int, list[Any]] = {}  # part → handles of the hooks that round its activations

    def rows(self, part: int, option: int) -> Tensor:
        """Return a part's rows ``(channels, per_channel)`` as changed by an option."""
        transform, target = self._measurement.transforms[part][option], self._measurement.parts[part].target
        if isinstance(transform, Keep):
            return self._original[part]
        if (part, option) not in self._stored:
            if self._encoding is None or self._encoding[0] != part:
                self._encoding = part, self._measurement.weight(part, self._original[part])
            self._stored[part, option] = self._measurement.encoded(part, transform, self._encoding[1])
        return transform.decode(self._stored[part, option], target).to(self._original[part])

    def put(self, choice: ArrayLike) -> None:
        """Set the copy's weights to those of a choice ``(G,)``, with or without a group for fixed use.

        Raises:
            ModelError: the choice does not belong to the measurement.
        """
        chosen = choice_of(self._measurement, choice)
        if self._measurement.sets:
            self._cut(chosen)
            return
        for index, option in enumerate(chosen):
            if option == self.choice[index]:
                continue
            part = self._measurement.parts[index]
            site = part.site(self.model)
            whole = site.rows.clone()
            start, stop = part.rows or (0, len(whole))
            whole[start:stop] = self.rows(index, option)
            site.put_(whole)
            self._round(index, option)
            self.choice[index] = option

    def _cut(self, choice: list[int]) -> None:
        """Replace the model by one with a choice's channels; removed ones cannot be restored in it."""
        if choice != self.choice:
            transforms = [options[option] for options, option in zip(self._measurement.transforms, choice, strict=True)]
            self.model, self.choice = put_(own_copy(self._whole).eval(), self._measurement, transforms), choice

    def _round(self, index: int, option: int) -> None:
        """Make the layers of a part round their activations as its option requires."""
        for handle in self._rounding.pop(index, []):
            handle.remove()
        if (activations := self._measurement.transforms[index][option].activations) is not None:
            paths = self._measurement.parts[index].modules
            self._rounding[index] = [
                handle for path in paths for handle in activations.attach(self.model.get_submodule(path))
            ]
