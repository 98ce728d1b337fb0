"""Losses: the increase caused by a change of the outputs, and its second-order approximation.

For a change ``J`` of one sample's output, the loss increases by about ``g·J + ½·Jᵀ·H·J``. A loss provides ``H`` in
product form: either the exact effects ``E(J)`` of given changes, with ``Jᵀ·H·J = E·E``, or, for large outputs, a few
random probes ``a_k`` of the output's shape with ``Jᵀ·H·J = Σ_k (a_k·J)²`` in expectation (Hutchinson's estimator with
random signs). Losses are per sample; ``kl`` is in nats.

- ``kl``: KL divergence of the original's softmax to the compressed model's. Classes are in the last dimension (the
  second one for ``kl:1``); other dimensions except the samples are positions and averaged. Its gradient is zero,
  ``H = diag(p) - p·pᵀ``.
- ``kl-tail``: the same with weights for the samples that the original is unsure of (`qcompress.model.tail_loss`).
- ``mse``: mean squared difference of the outputs. Its gradient is zero, ``H = 2/D``.
  The named losses leave padded positions out (`qcompress.model.padding`).
- a callable ``(output, batch) -> (samples,)``: gradient by autograd, ``H`` by the empirical Fisher ``g·gᵀ``.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qcompress.errors import ModelError, OptionsError
from qcompress.model.forward import RULED_OUT, described, failing_as
from qcompress.model.scores import drawn_scores, random_signs

LossFunction = Callable[[Tensor, Any], Tensor]
NUM_PROBES = 8

MAX_PLAIN_DIMS = 3
"""Outputs with more dimensions are refused until the dimension of the classes is named."""

SOFTENED = 4.0
"""Temperature of softened outputs."""

NORMALISED = 1e-4
"""How far sums of probabilities may be from 1: more than rounding in float32 makes of them."""

KL_DIM = re.compile(r"kl:(-?[0-9]+)")

INSTEAD = (
    "For regression use loss='mse'; for one binary logit per sample, make it two: loss='kl:-1', "
    "forward=lambda model, batch: torch.{}([0 * (x := model(batch)), x], dim=-1)"
)


class Loss(ABC):
    """A loss relative to the original model's outputs."""

    name: str
    curvature_varies = False  # whether H depends on the outputs

    def guesses_dim(self, output: Tensor) -> bool:  # noqa: ARG002
        """Whether the network must show which dimension of such outputs holds the classes."""
        return False

    def ignores_shifts(self, output: Tensor) -> bool:  # noqa: ARG002
        """Whether adding the same number to all outputs of a sample changes nothing, for such outputs."""
        return False

    def takes_probabilities(self, output: Tensor) -> bool:  # noqa: ARG002
        """Whether such outputs are probabilities, and the loss turns outputs into probabilities itself."""
        return False

    def doubt(self, output: Tensor, batch: Any) -> float | None:  # noqa: ARG002
        """Return the number of wrong answers to expect of outputs that are probabilities; None for other outputs."""
        return None

    @property
    def softened(self) -> "Loss | None":
        """The same loss at softened outputs, for which fewer samples are enough; None if there is no such loss."""
        return None

    def require(self, output: Tensor, batch: Any) -> None:  # noqa: ARG002
        """Check that the loss can compare such outputs of the original for a batch.

        Raises:
            ModelError: it cannot; the message says what to do.
        """
        if bool((output == RULED_OUT).any()):
            raise ModelError(
                f"the model's output holds minus infinity, which the loss {self.name!r} cannot compare; "
                "pass a forward that omits these values"
            )

    @abstractmethod
    def rise(self, output: Tensor, reference: Tensor, batch: Any) -> Tensor:
        """Return ``(samples,)`` float64: loss of ``output`` minus loss of the original's output ``reference``."""

    def rise_by_position(self, output: Tensor, reference: Tensor, batch: Any) -> Tensor:
        """Return ``(samples, positions)`` float64 whose mean over positions is `rise`; one position if it has none."""
        return self.rise(output, reference, batch)[:, None]

    def values(self, output: Tensor, batch: Any) -> Tensor | None:  # noqa: ARG002
        """Return ``(samples,)`` values of a function of outputs and batch; None for losses of the outputs alone."""
        return None

    @abstractmethod
    def effects(self, changes: Tensor, point: Tensor, batch: Any) -> Tensor:
        """Product form of H at the outputs ``point`` ``(samples, …)``: changes ``(V, samples, …)`` → ``(V, …)``."""

    @abstractmethod
    def probes(self, reference: Tensor, batch: Any, generator: torch.Generator) -> Tensor:
        """Return ``(K, *reference.shape)`` random probes of H at the original's outputs."""

    @abstractmethod
    def probe(self, point: Tensor, batch: Any, generator: torch.Generator) -> Tensor:
        """One random probe of the outputs' shape with ``E[a·aᵀ] = H`` at ``point``."""

    @abstractmethod
    def gradient(self, point: Tensor, batch: Any, reference: Tensor | None = None) -> Tensor | None:
        """Return the gradient at the outputs ``point``, of the same shape, or None if it is zero.

        ``reference`` are the original's outputs; None means that ``point`` are the original's outputs.
        """


class KullbackLeibler(Loss):
    """KL divergence of the original's softmax to the compressed model's.

    Args:
        dim: dimension of the outputs that holds the classes; None is the last one, for at most three dimensions.
        temperature: both outputs are divided by it and the result is multiplied by its square, so that small changes
            count the same.
    """

    curvature_varies = True

    def __init__(self, dim: int | None = None, *, temperature: float = 1.0) -> None:
        if dim == 0:
            raise OptionsError("loss 'kl:0' is not possible: dimension 0 holds the samples, not classes")
        self.name = "kl" if dim is None else f"kl:{dim}"
        self._dim = -1 if dim is None else dim
        self._given, self._temperature = dim, temperature

    def ignores_shifts(self, output: Tensor) -> bool:
        """Whether the outputs of a sample are classes and nothing else."""
        return output.ndim == 2

    @property
    def softened(self) -> "KullbackLeibler":
        """The same loss at the temperature `SOFTENED`."""
        return KullbackLeibler(self._given, temperature=SOFTENED)

    def takes_probabilities(self, output: Tensor) -> bool:
        """Whether no output is negative, and those of the classes sum to 1."""
        sums = self._classes_last(output).sum(-1)
        return bool((output >= 0).all() and ((sums - 1).abs() < NORMALISED).all())

    def doubt(self, output: Tensor, batch: Any) -> float:  # noqa: ARG002
        """Return the sum of one minus the largest probability, over all positions."""
        largest = self._classes_last(output).double().log_softmax(-1).amax(-1)
        return float(-torch.expm1(largest).sum())

    def _probabilities(self, output: Tensor) -> Tensor:
        """Return the softmax of the outputs, ``(samples, …, classes)``."""
        return self._classes_last(output / self._temperature).softmax(-1)

    def require(self, output: Tensor, batch: Any) -> None:  # noqa: ARG002
        """Check that there are at least two classes along an unambiguous dimension.

        Raises:
            ModelError: there are not.
        """
        shape = tuple(output.shape)
        if output.ndim > MAX_PLAIN_DIMS and self._given is None:
            raise ModelError(
                f"loss 'kl' compares distributions over classes, and for outputs of shape {shape} it is unclear which "
                "dimension holds these: use loss='kl:1' for the second, as in segmentation (samples, classes, height, "
                "width), or loss='kl:-1' for the last"
            )
        if not 1 <= (self._dim if self._dim > 0 else output.ndim + self._dim) < output.ndim:
            raise ModelError(
                f"loss {self.name!r} compares distributions over {self._words}, found outputs of shape {shape}. "
                f"{INSTEAD.format('stack')}"
            )
        if output.shape[self._dim] < 2:
            raise ModelError(
                f"loss {self.name!r} compares distributions over {self._words}, found outputs of shape {shape}, which "
                f"has one class there. {INSTEAD.format('cat')}"
            )

    def guesses_dim(self, output: Tensor) -> bool:
        """Whether the outputs have three dimensions and the loss names none of them."""
        return self._given is None and output.ndim == MAX_PLAIN_DIMS

    @property
    def _words(self) -> str:
        return f"dimension {self._dim}" if self._given is not None else "the last dimension, (samples, …, classes)"

    def _classes_last(self, values: Tensor, before: int = 0) -> Tensor:
        """Move the classes to the last dimension, in tensors of the outputs' shape after ``before`` more dimensions."""
        return values.movedim(self._dim + before if self._dim > 0 else self._dim, -1)

    def _classes_back(self, values: Tensor, before: int = 0) -> Tensor:
        return values.movedim(-1, self._dim + before if self._dim > 0 else self._dim)

    def _divergence(self, output: Tensor, reference: Tensor) -> Tensor:
        """Return the KL divergence at every position."""
        log_p, log_q = (
            (self._classes_last(logits).double() / self._temperature).log_softmax(-1) for logits in (reference, output)
        )
        return (log_p.exp() * (log_p - log_q)).sum(-1) * self._temperature**2

    def rise(self, output: Tensor, reference: Tensor, batch: Any) -> Tensor:  # noqa: ARG002
        """``Σ p·(log p - log q)``, averaged over positions."""
        return _per_sample_mean(self._divergence(output, reference))

    def rise_by_position(self, output: Tensor, reference: Tensor, batch: Any) -> Tensor:  # noqa: ARG002
        """Return the divergence at every position."""
        return self._divergence(output, reference).reshape(len(output), -1)

    def effects(self, changes: Tensor, point: Tensor, batch: Any) -> Tensor:  # noqa: ARG002
        """``√p·(J - p·J)`` at every position."""
        p, moved = self._probabilities(point), self._classes_last(changes, before=1)
        effects = (p / _positions(p)).sqrt() * (moved - (p * moved).sum(-1, keepdim=True))
        return self._classes_back(effects, before=1)

    def probes(self, reference: Tensor, batch: Any, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """``√p·z - p·(√p·z)`` for random signs z."""
        p = self._probabilities(reference)
        mixed = p.sqrt() * random_signs((NUM_PROBES, *p.shape), p, generator)
        probes = torch.div(mixed - p * mixed.sum(-1, keepdim=True), (_positions(p) * NUM_PROBES) ** 0.5)
        return self._classes_back(probes, before=1)

    def probe(self, point: Tensor, batch: Any, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """Return the score of a drawn label at every position: see `qcompress.model.scores`."""
        p = self._probabilities(point.to(torch.promote_types(point.dtype, torch.float32)))
        score = drawn_scores(p.reshape(-1, p.shape[-1]), generator).div_(_positions(p) ** 0.5)
        return self._classes_back(score.view(p.shape)).to(point.dtype)

    def gradient(self, point: Tensor, batch: Any, reference: Tensor | None = None) -> Tensor | None:  # noqa: ARG002
        """``q - p`` at every position."""
        if reference is None:
            return None
        precise = torch.promote_types(point.dtype, torch.float32)
        q, p = self._probabilities(point.to(precise)), self._probabilities(reference.to(precise))
        return self._classes_back(self._temperature * (q - p) / _positions(p)).to(point.dtype)


class MeanSquaredError(Loss):
    """Mean squared difference of the outputs."""

    name = "mse"

    def rise(self, output: Tensor, reference: Tensor, batch: Any) -> Tensor:  # noqa: ARG002
        """Return the mean over all dimensions except the samples."""
        return _per_sample_mean((output.double() - reference.double()).square())

    def effects(self, changes: Tensor, point: Tensor, batch: Any) -> Tensor:  # noqa: ARG002
        """``√(2/D)·J``."""
        return torch.mul(changes, (2 / point[0].numel()) ** 0.5)

    def probes(self, reference: Tensor, batch: Any, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """``√(2/D)·z`` for random signs z."""
        signs = random_signs((NUM_PROBES, *reference.shape), reference, generator)
        return torch.mul(signs, (2 / (reference[0].numel() * NUM_PROBES)) ** 0.5)

    def probe(self, point: Tensor, batch: Any, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """``√(2/D)·z`` for random signs z."""
        return torch.mul(random_signs(tuple(point.shape), point, generator), (2 / point[0].numel()) ** 0.5)

    def gradient(self, point: Tensor, batch: Any, reference: Tensor | None = None) -> Tensor | None:  # noqa: ARG002
        """``2/D`` times the difference."""
        return None if reference is None else (point - reference) * (2 / point[0].numel())


class CallableLoss(Loss):
    """A function ``(output, batch) -> (samples,)``."""

    def __init__(self, function: LossFunction) -> None:
        self._function = function
        self.name = getattr(function, "__qualname__", type(function).__qualname__)

    def require(self, output: Tensor, batch: Any) -> None:
        """Check that the function and its gradient exist and are finite.

        Raises:
            ModelError: they are not.
        """
        with failing_as(ModelError, f"loss(output, batch) has no gradient for {described(batch)}"):
            found = self.values(output, batch), self.gradient(output, batch)
        if wrong := [
            name for name, values in zip(("", "the gradient of "), found, strict=True) if not values.isfinite().all()
        ]:
            raise ModelError(
                f"{wrong[0]}loss(output, batch) is NaN or infinite for the original's outputs and {described(batch)}"
            )

    def values(self, output: Tensor, batch: Any) -> Tensor:
        """Return ``(samples,)`` values of the function.

        Raises:
            ModelError: it fails, or does not return one number per sample.
        """
        with failing_as(ModelError, f"loss(output, batch) failed for {described(batch)}"):
            values = self._function(output, batch)
        if not isinstance(values, Tensor) or values.shape != output.shape[:1]:
            actual = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ModelError(
                f"loss(output, batch) must return one number per sample: expected ({len(output)},), found {actual}"
            )
        return values

    def rise(self, output: Tensor, reference: Tensor, batch: Any) -> Tensor:
        """Return the difference of the function's values."""
        return self.values(output, batch).double() - self.values(reference, batch).double()

    def gradient(self, point: Tensor, batch: Any, reference: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Return the gradient, by autograd."""
        with torch.enable_grad():
            output = point.detach().requires_grad_(True)
            return torch.autograd.grad(self.values(output, batch).sum(), output)[0]

    def effects(self, changes: Tensor, point: Tensor, batch: Any) -> Tensor:
        """``g·J``."""
        return torch.einsum("vn...,n...->vn", changes, self.gradient(point, batch))

    def probes(self, reference: Tensor, batch: Any, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """Return the gradient."""
        return self.gradient(reference, batch).unsqueeze(0)

    def probe(self, point: Tensor, batch: Any, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """Return the gradient."""
        return self.gradient(point, batch)


def is_named(loss: object) -> bool:
    """Whether a loss is given by its name."""
    return isinstance(loss, str) and (
        loss in ("kl", "mse") or loss.startswith("kl-tail") or KL_DIM.fullmatch(loss) is not None
    )


def as_loss(loss: str | LossFunction | Loss) -> Loss:
    """Return the loss for a name or a function; a `Loss` is returned unchanged.

    Raises:
        OptionsError: it is neither ``"kl"``, ``"kl:1"`` (classes in dimension 1), ``"mse"`` nor a callable.
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str) and (named := _named(loss)) is not None:
        from qcompress.model.padding import OverRealPositions  # which is made of a loss from here

        classes_last = named.name not in ("kl:1", "kl:-2")  # with classes there, positions are elsewhere
        return OverRealPositions(named) if classes_last else named
    if callable(loss):
        return CallableLoss(loss)
    raise OptionsError(
        f"loss must be 'kl', 'kl-tail', 'mse' or a callable (output, batch) -> (samples,), found {loss!r}; 'kl:1' is "
        "'kl' with the classes in dimension 1, 'kl-tail:3' weighs unsure samples more than 'kl-tail' does"
    )


def _named(name: str) -> Loss | None:
    """Return the loss of a name, None for another name."""
    from qcompress.model.tail_loss import tail_weighted  # which is made of a loss from here

    if name in ("kl", "mse"):
        return KullbackLeibler() if name == "kl" else MeanSquaredError()
    if dim := KL_DIM.fullmatch(name):
        return KullbackLeibler(int(dim[1]))
    return tail_weighted(name)


def _per_sample_mean(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).mean(dim=1)


def _positions(p: Tensor) -> int:
    """Return the number of positions per sample of probabilities ``(samples, …, classes)``."""
    return p[0, ..., 0].numel()
