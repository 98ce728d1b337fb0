"""``kl-tail``: KL divergence with more weight on samples where the original is unsure.

Compression changes answers mostly where two classes are about equally likely, which a mean over all samples hardly
shows. Each sample (each position, for outputs with positions) has the weight ``(1 + margin)**-strength``, where the
margin is the difference of the original's two largest log-probabilities. The weight of a tie is 1; it falls as the
original gets surer. Predicted losses are in weighted nats and comparable with each other, not with those of ``kl``.
"""

import re
from typing import Any

import torch
from torch import Tensor

from qcompress.errors import OptionsError
from qcompress.model.losses import SOFTENED, KullbackLeibler

NAME = re.compile(r"kl-tail(?::([0-9]*\.?[0-9]+))?")

STRENGTH = 2.0
"""Strength of ``kl-tail`` without a number."""


class TailWeighted(KullbackLeibler):
    """KL divergence with weights that fall with the original's margin; classes are in the last dimension.

    Args:
        strength: exponent of the weights; 0 gives the plain divergence.
        temperature: same as in `KullbackLeibler`; the weights are computed at temperature 1.
    """

    def __init__(self, strength: float = STRENGTH, *, temperature: float = 1.0) -> None:
        super().__init__(temperature=temperature)
        self.name, self._strength = f"kl-tail:{strength:g}", strength

    @property
    def softened(self) -> "TailWeighted":
        """The same loss at the temperature `SOFTENED`."""
        return TailWeighted(self._strength, temperature=SOFTENED)

    def _weights(self, output: Tensor) -> Tensor:
        """Return the weight of every position, ``(samples, …)``."""
        top = output.double().log_softmax(-1).topk(2, dim=-1).values
        return (1.0 + top[..., 0] - top[..., 1]).pow(-self._strength)

    def _divergence(self, output: Tensor, reference: Tensor) -> Tensor:
        return super()._divergence(output, reference) * self._weights(reference)

    def effects(self, changes: Tensor, point: Tensor, batch: Any) -> Tensor:
        """Return ``√w·√p·(J - p·J)`` at every position."""
        return super().effects(changes, point, batch) * self._roots(point)

    def probes(self, reference: Tensor, batch: Any, generator: torch.Generator) -> Tensor:
        """Return the plain divergence's probes times ``√w``."""
        return super().probes(reference, batch, generator) * self._roots(reference)

    def probe(self, point: Tensor, batch: Any, generator: torch.Generator) -> Tensor:
        """Return the plain divergence's probe times ``√w``."""
        return super().probe(point, batch, generator) * self._roots(point)

    def gradient(self, point: Tensor, batch: Any, reference: Tensor | None = None) -> Tensor | None:
        """Return ``w·(q - p)`` at every position."""
        gradient = super().gradient(point, batch, reference)
        return None if gradient is None or reference is None else gradient * self._roots(reference) ** 2

    def _roots(self, output: Tensor) -> Tensor:
        return self._weights(output).sqrt().to(output.dtype).unsqueeze(-1)


def tail_weighted(name: str) -> TailWeighted | None:
    """Return the loss with a name such as ``kl-tail`` or ``kl-tail:3``; None for other names.

    Raises:
        OptionsError: the strength is 0, which would be ``kl``.
    """
    match = NAME.fullmatch(name)
    if match is None:
        return None
    strength = STRENGTH if match[1] is None else float(match[1])
    if strength == 0:
        raise OptionsError("loss 'kl-tail:0' weighs all samples alike: use 'kl'")
    return TailWeighted(strength)
