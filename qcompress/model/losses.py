"""What "loss" means: its rise when outputs change, and its second-order form.

For a change ``J`` of one sample's output the loss rises by about ``g·J + ½·Jᵀ·H·J``. A loss gives ``H`` in product
form: the exact effects ``E(J)`` of given changes, with ``Jᵀ·H·J = E·E``, or a few random probes ``a_k`` of the
output's shape with ``Jᵀ·H·J = Σ_k (a_k·J)²`` in expectation (Hutchinson's estimator with signs), for outputs of many
numbers. Losses are per sample; ``kl`` is in nats.

- ``kl``: KL divergence of the original's softmax to the compressed model's (last dimension: classes; other
  dimensions between it and the samples: positions, averaged). Its gradient is zero, ``H = diag(p) - p·pᵀ``.
- ``mse``: mean squared difference of the outputs. Its gradient is zero, ``H = 2/D``.
- a callable ``(output, batch) -> (samples,)``: gradient by autograd, ``H`` by the empirical Fisher ``g·gᵀ``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qcompress.errors import ModelError, OptionsError
from qcompress.model.forward import RULED_OUT

LossFunction = Callable[[Tensor, Any], Tensor]
NUM_PROBES = 8


class Loss(ABC):
    """A loss relative to the original model's outputs."""

    name: str
    curvature_varies = False  # whether H depends on the outputs

    def require(self, output: Tensor) -> None:
        """Refuse outputs that the loss makes no sense of.

        Raises:
            ModelError: says what would.
        """
        if bool((output == RULED_OUT).any()):
            raise ModelError(
                f"the model's output holds minus infinity, which the loss {self.name!r} cannot compare; "
                "pass a forward that leaves those numbers out"
            )

    @abstractmethod
    def rise(self, output: Tensor, reference: Tensor, batch: Any) -> Tensor:
        """``(samples,)`` float64: the loss of ``output`` less that of the original's ``reference``."""

    def rise_by_position(self, output: Tensor, reference: Tensor, batch: Any) -> Tensor:
        """``(samples, positions)`` float64, whose means over positions are `rise`; one position where it has none."""
        return self.rise(output, reference, batch)[:, None]

    @abstractmethod
    def effects(self, changes: Tensor, point: Tensor, batch: Any) -> Tensor:
        """Product form of H at the outputs ``point`` ``(samples, …)``: changes ``(V, samples, …)`` → ``(V, …)``."""

    @abstractmethod
    def probes(self, reference: Tensor, batch: Any, generator: torch.Generator) -> Tensor:
        """``(K, *reference.shape)`` random probes of H at the original's outputs."""

    @abstractmethod
    def probe(self, point: Tensor, batch: Any, generator: torch.Generator) -> Tensor:
        """One random probe of the outputs' shape, whose square has the mean H: ``E[a·aᵀ] = H`` at ``point``."""

    @abstractmethod
    def gradient(self, point: Tensor, batch: Any, reference: Tensor | None = None) -> Tensor | None:
        """The gradient at the outputs ``point``, of their shape, None when it is zero; without the original's outputs
        ``reference``, ``point`` are those.
        """


class KullbackLeibler(Loss):
    """KL divergence of the original's softmax to the compressed model's."""

    name = "kl"
    curvature_varies = True

    def require(self, output: Tensor) -> None:
        """Two classes at least, along a last dimension of their own.

        Raises:
            ModelError: there are not.
        """
        if output.ndim < 2 or output.shape[-1] < 2:
            raise ModelError(
                f"loss 'kl' compares distributions over the last dimension, (samples, …, classes), found outputs of "
                f"shape {tuple(output.shape)}. For regression take loss='mse'; for one logit of yes or no per sample "
                "make it two: forward=lambda model, batch: torch.stack([0 * (x := model(batch)), x], dim=-1)"
            )

    def rise(self, output: Tensor, reference: Tensor, batch: Any) -> Tensor:  # noqa: ARG002
        """``Σ p·(log p - log q)``, averaged over positions."""
        return _per_sample_mean(_divergence(output, reference))

    def rise_by_position(self, output: Tensor, reference: Tensor, batch: Any) -> Tensor:  # noqa: ARG002
        """The divergence at every position."""
        return _divergence(output, reference).reshape(len(output), -1)

    def effects(self, changes: Tensor, point: Tensor, batch: Any) -> Tensor:  # noqa: ARG002
        """``√p·(J - p·J)`` at every position."""
        p = point.softmax(-1)
        return (p / _positions(p)).sqrt() * (changes - (p * changes).sum(-1, keepdim=True))

    def probes(self, reference: Tensor, batch: Any, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """``√p·z - p·(√p·z)`` for random signs z."""
        p = reference.softmax(-1)
        mixed = p.sqrt() * _signs((NUM_PROBES, *p.shape), p, generator)
        return torch.div(mixed - p * mixed.sum(-1, keepdim=True), (_positions(p) * NUM_PROBES) ** 0.5)

    def probe(self, point: Tensor, batch: Any, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """``e_y - p`` for a label y drawn from the softmax at every position: the score of the Fisher information."""
        p = point.softmax(-1)
        drawn = torch.multinomial(p.reshape(-1, p.shape[-1]).cpu(), 1, generator=generator).to(p.device)
        label = torch.zeros_like(p).scatter_(-1, drawn.view(*p.shape[:-1], 1), 1.0)
        return torch.div(label - p, _positions(p) ** 0.5)

    def gradient(self, point: Tensor, batch: Any, reference: Tensor | None = None) -> Tensor | None:  # noqa: ARG002
        """``q - p`` at every position."""
        return None if reference is None else (point.softmax(-1) - reference.softmax(-1)) / _positions(point)


class MeanSquaredError(Loss):
    """Mean squared difference of the outputs."""

    name = "mse"

    def rise(self, output: Tensor, reference: Tensor, batch: Any) -> Tensor:  # noqa: ARG002
        """Mean over everything but the samples."""
        return _per_sample_mean((output.double() - reference.double()).square())

    def effects(self, changes: Tensor, point: Tensor, batch: Any) -> Tensor:  # noqa: ARG002
        """``√(2/D)·J``."""
        return torch.mul(changes, (2 / point[0].numel()) ** 0.5)

    def probes(self, reference: Tensor, batch: Any, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """``√(2/D)·z`` for random signs z."""
        signs = _signs((NUM_PROBES, *reference.shape), reference, generator)
        return torch.mul(signs, (2 / (reference[0].numel() * NUM_PROBES)) ** 0.5)

    def probe(self, point: Tensor, batch: Any, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """``√(2/D)·z`` for random signs z."""
        return torch.mul(_signs(tuple(point.shape), point, generator), (2 / point[0].numel()) ** 0.5)

    def gradient(self, point: Tensor, batch: Any, reference: Tensor | None = None) -> Tensor | None:  # noqa: ARG002
        """``2/D`` times the difference."""
        return None if reference is None else (point - reference) * (2 / point[0].numel())


class CallableLoss(Loss):
    """A function ``(output, batch) -> (samples,)``."""

    def __init__(self, function: LossFunction) -> None:
        self._function = function
        self.name = getattr(function, "__qualname__", type(function).__qualname__)

    def values(self, output: Tensor, batch: Any) -> Tensor:
        """``(samples,)`` what the function gives.

        Raises:
            ModelError: it gives something else than one number per sample.
        """
        values = self._function(output, batch)
        if not isinstance(values, Tensor) or values.shape != output.shape[:1]:
            found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ModelError(
                f"loss(output, batch) must return one number per sample: expected ({len(output)},), found {found}"
            )
        return values

    def rise(self, output: Tensor, reference: Tensor, batch: Any) -> Tensor:
        """The function's difference."""
        return self.values(output, batch).double() - self.values(reference, batch).double()

    def gradient(self, point: Tensor, batch: Any, reference: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The gradient, by autograd."""
        with torch.enable_grad():
            output = point.detach().requires_grad_(True)
            return torch.autograd.grad(self.values(output, batch).sum(), output)[0]

    def effects(self, changes: Tensor, point: Tensor, batch: Any) -> Tensor:
        """``g·J``."""
        return torch.einsum("vn...,n...->vn", changes, self.gradient(point, batch))

    def probes(self, reference: Tensor, batch: Any, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """The gradient itself."""
        return self.gradient(reference, batch).unsqueeze(0)

    def probe(self, point: Tensor, batch: Any, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """The gradient itself."""
        return self.gradient(point, batch)


def as_loss(loss: str | LossFunction | Loss) -> Loss:
    """The loss behind a name or a function (or itself).

    Raises:
        OptionsError: neither ``"kl"``, ``"mse"`` nor a callable.
    """
    if isinstance(loss, Loss):
        return loss
    if loss == "kl":
        return KullbackLeibler()
    if loss == "mse":
        return MeanSquaredError()
    if callable(loss):
        return CallableLoss(loss)
    raise OptionsError(f"loss must be 'kl', 'mse' or a callable (output, batch) -> (samples,), found {loss!r}")


def _per_sample_mean(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).mean(dim=1)


def _positions(p: Tensor) -> int:
    """Positions per sample of probabilities ``(samples, …, classes)``.

    Raises:
        ModelError: there is no dimension for the classes.
    """
    if p.ndim < 2:
        raise ModelError(f"loss 'kl' needs outputs (samples, …, classes), found shape {tuple(p.shape)}; use 'mse'")
    return p[0, ..., 0].numel()


def _signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs, drawn on the CPU so that every device gets the same."""
    drawn = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8)
    return drawn.to(like.device, like.dtype) * 2 - 1


def _divergence(output: Tensor, reference: Tensor) -> Tensor:
    """KL of the last dimension."""
    log_p, log_q = reference.double().log_softmax(-1), output.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
