"""A model that stands for any choice at once: weights are what the options make of them, the layers stay dense.

Where many choices are tried one after the other, putting the options into a copy of the model (`qcompress.apply`) would
encode the same weights over and over. Here every option is encoded the first time it is asked for
and only the parts that differ from the last choice are written.
"""

import copy

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from qcompress import layers
from qcompress.apply import choice_of, require_measured
from qcompress.measurement import Measurement


class Emulation:
    """A copy of a model whose weights can be those of any choice.

    Args:
        model: the model that was measured; left as it is.
        measurement: what `measure` gave.

    Attributes:
        model: the copy, dense, in evaluation mode.

    Raises:
        ModelError: another model than measured.
    """

    def __init__(self, model: nn.Module, measurement: Measurement) -> None:
        require_measured(model, measurement.model_fingerprint)
        self.model = copy.deepcopy(model).eval()
        self._measurement = measurement
        self._weights = list(measurement.weights(copy.deepcopy(model)))
        self._stored: dict[tuple[int, int], dict[str, Tensor]] = {}  # many times smaller than the rows
        self.choice = [0] * len(measurement.parts)  # option 0 keeps a part as it is

    def rows(self, part: int, option: int) -> Tensor:
        """What an option makes of a part's rows, ``(channels, per_channel)``."""
        weight, transform = self._weights[part], self._measurement.transforms[part][option]
        if (part, option) not in self._stored:
            self._stored[part, option] = transform.encode(weight)
        return transform.decode(self._stored[part, option], weight.target).to(weight.rows)

    def put(self, choice: ArrayLike) -> None:
        """Give the copy the weights of a choice ``(G,)``, with or without the group of what is fixed.

        Raises:
            ModelError: it is no choice of what was measured.
        """
        for index, option in enumerate(choice_of(self._measurement, choice)):
            if option == self.choice[index]:
                continue
            part = self._measurement.parts[index]
            module = self.model.get_submodule(part.modules[0])
            weight = layers.weight_of(module)
            whole = layers.to_rows(module, weight.detach()).clone()
            start, stop = part.rows or (0, len(whole))
            whole[start:stop] = self.rows(index, option)
            with torch.no_grad():
                weight.copy_(layers.from_rows(module, whole, weight.shape))
            self.choice[index] = option
