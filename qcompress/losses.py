"""What "loss" means: its rise when outputs change, and its second-order form around the original outputs.

For a change ``J`` of one sample's output the loss rises by about ``g·J + ½·Jᵀ·H·J``. A loss gives ``H`` by roots
``a_k`` of the output's shape with ``Jᵀ·H·J = Σ_k (a_k·J)²``: all of them when they are few, else random mixtures of
them whose expectation is the same (Hutchinson's estimator with signs). Loss is in nats per sample for ``kl``.

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

LossFunction = Callable[[Tensor, Any], Tensor]
NUM_PROBES = 8


class Loss(ABC):
    """A loss relative to the original model's outputs."""

    name: str

    @abstractmethod
    def rise(self, output: Tensor, reference: Tensor, batch: Any) -> Tensor:
        """``(samples,)`` float64: the loss of ``output`` less that of the original's ``reference``."""

    @abstractmethod
    def roots(self, reference: Tensor, batch: Any, limit: int, generator: torch.Generator) -> Tensor:
        """``(K, *reference.shape)``: the roots of H, all when there are at most ``limit``, else random mixtures."""

    def gradient(self, reference: Tensor, batch: Any) -> Tensor | None:  # noqa: ARG002
        """The gradient at the original's outputs, of their shape; None when it is zero."""
        return None


class KullbackLeibler(Loss):
    """KL divergence of the original's softmax to the compressed model's."""

    name = "kl"

    def rise(self, output: Tensor, reference: Tensor, batch: Any) -> Tensor:  # noqa: ARG002
        """``Σ p·(log p - log q)``, averaged over positions."""
        log_p, log_q = reference.double().log_softmax(-1), output.double().log_softmax(-1)
        return _per_sample_mean((log_p.exp() * (log_p - log_q)).sum(-1))

    def roots(self, reference: Tensor, batch: Any, limit: int, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """``a_k = √p_k·(e_k - p)``."""
        if reference.ndim < 2:
            raise ModelError(
                f"loss 'kl' needs outputs (samples, …, classes), found shape {tuple(reference.shape)}; use 'mse'"
            )
        p = reference.double().softmax(-1).to(reference.dtype)
        root_p = p.sqrt()
        classes = p.shape[-1]
        positions = p[0, ..., 0].numel()
        if positions == 1 and classes <= limit:
            units = torch.eye(classes, dtype=p.dtype, device=p.device).reshape(classes, *[1] * (p.ndim - 1), classes)
            return torch.mul(root_p.movedim(-1, 0).unsqueeze(-1), units - p)
        signs = _signs((NUM_PROBES, *p.shape), p, generator)
        mixed = root_p * signs - p * (root_p * signs).sum(-1, keepdim=True)
        return torch.div(mixed, (positions * NUM_PROBES) ** 0.5)


class MeanSquaredError(Loss):
    """Mean squared difference of the outputs."""

    name = "mse"

    def rise(self, output: Tensor, reference: Tensor, batch: Any) -> Tensor:  # noqa: ARG002
        """Mean over everything but the samples."""
        return _per_sample_mean((output.double() - reference.double()).square())

    def roots(self, reference: Tensor, batch: Any, limit: int, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """``a_k = √(2/D)·e_k``."""
        numbers = reference[0].numel()
        if numbers <= limit:
            units = torch.eye(numbers, dtype=reference.dtype, device=reference.device)
            spread = units.reshape(numbers, 1, *reference.shape[1:]).expand(numbers, *reference.shape)
            return torch.mul(spread, (2 / numbers) ** 0.5)
        signs = _signs((NUM_PROBES, *reference.shape), reference, generator)
        return torch.mul(signs, (2 / (numbers * NUM_PROBES)) ** 0.5)


class CallableLoss(Loss):
    """A function ``(output, batch) -> (samples,)``."""

    def __init__(self, function: LossFunction) -> None:
        self._function = function
        self.name = getattr(function, "__qualname__", type(function).__qualname__)

    def _values(self, output: Tensor, batch: Any) -> Tensor:
        values = self._function(output, batch)
        if not isinstance(values, Tensor) or values.shape != output.shape[:1]:
            found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ModelError(
                f"loss(output, batch) must return one number per sample: expected ({len(output)},), found {found}"
            )
        return values

    def rise(self, output: Tensor, reference: Tensor, batch: Any) -> Tensor:
        """The function's difference."""
        return self._values(output, batch).double() - self._values(reference, batch).double()

    def gradient(self, reference: Tensor, batch: Any) -> Tensor:
        """By autograd."""
        with torch.enable_grad():
            output = reference.detach().requires_grad_(True)
            return torch.autograd.grad(self._values(output, batch).sum(), output)[0]

    def roots(self, reference: Tensor, batch: Any, limit: int, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """The gradient itself."""
        return self.gradient(reference, batch).unsqueeze(0)


def as_loss(loss: str | LossFunction) -> Loss:
    """The loss behind a name or a function.

    Raises:
        OptionsError: neither ``"kl"``, ``"mse"`` nor a callable.
    """
    if loss == "kl":
        return KullbackLeibler()
    if loss == "mse":
        return MeanSquaredError()
    if callable(loss):
        return CallableLoss(loss)
    raise OptionsError(f"loss must be 'kl', 'mse' or a callable (output, batch) -> (samples,), found {loss!r}")


def _per_sample_mean(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).mean(dim=1)


def _signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs, drawn on the CPU so that every device gets the same."""
    drawn = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8)
    return drawn.to(like.device, like.dtype) * 2 - 1
