"""Fine-tune a compressed model that stays compressed.

Quantized and pruned weights are trained with the straight-through estimator (arXiv 1308.3432): the optimiser updates a
full-precision copy, while the network runs on the copy's stored (rounded and pruned) form. Factors of low-rank layers
are trained directly. Pruned weights stay pruned. Everything else that requires a gradient (biases, batch-norm scales,
kept layers) is trained too; batch norms and dropout are in evaluation mode.

The result has the same options and the same size as the given model, and its record matches its weights (so that
`save_compressed` accepts it). Its loss on the validation batches (with the penalty, if any) is not above the initial
one.
"""

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from formulations.files import AnyPath
from qcompress.compressed.copying import own_copy
from qcompress.compressed.packed import is_packed
from qcompress.compressed.record import record_of
from qcompress.errors import ModelError, NotFiniteError, OptionsError
from qcompress.identity import identify, identify_batches, once
from qcompress.measuring.accumulation import SAVE_EVERY_S
from qcompress.model import forward as forwards
from qcompress.model.calibration import Calibration
from qcompress.model.losses import CallableLoss, Loss, LossFunction, as_loss
from qcompress.model.modes import outside_modes, seeded
from qcompress.model.opened import require_in_memory
from qcompress.model.passes import number_of
from qcompress.model.steady import kept_state
from qcompress.scalars import as_cache_file, plain
from qcompress.training.checkpoint import Checkpoint, TrainingState
from qcompress.training.optimiser import WideAdam
from qcompress.training.straight_through import Trained
from qcompress.transforms.own_code import code_of

LEARNING_RATE = 3e-4
"""Default peak learning rate."""

WARM_UP = 0.2
"""Share of the steps in which the learning rate rises."""

LOOKS = 20
"""Number of evaluations of the validation loss."""

VALIDATED = 4
"""Number of batches of the data used for validation if no validation batches are given."""

Model = TypeVar("Model", bound=nn.Module)
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneProgress:
    """Progress of fine-tuning; losses per sample on the validation batches, with the penalty if any.

    The losses are those before the first step, now, and the best so far.
    """

    step: int
    steps: int
    before: float
    loss: float
    best: float


@outside_modes
@seeded
def finetune(
    model: Model,
    data: Iterable[Any],
    steps: int,
    *,
    teacher: nn.Module | None = None,
    loss: str | LossFunction | Loss = "kl",
    learning_rate: float = LEARNING_RATE,
    validation: Iterable[Any] | None = None,
    patience: int = 10,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    forward: forwards.Forward | None = None,
    seed: int = 0,
    cache: AnyPath | None = None,
    on_progress: Callable[[FinetuneProgress], None] | None = None,
) -> Model:
    """Return a fine-tuned copy of a compressed (or any other) model, in evaluation mode.

    Args:
        model: model returned by `apply`, `compress` or `load_compressed`; it is not modified.
        data: re-iterable batches, iterated repeatedly.
        steps: number of optimiser steps, one batch each. The optimiser is Adam, on float32 copies of half-precision
            parameters; the learning rate rises over the first fifth, then falls to zero along a cosine.
        teacher: the original model, whose outputs are the target ("distillation"); no labels are needed.
        loss: ``"kl"`` or ``"mse"`` to the teacher's outputs, or a callable ``(output, batch) -> (samples,)``, which
            needs no teacher.
        learning_rate: peak learning rate.
        validation: batches on which the best weights are selected, kept in memory with the teacher's outputs; by
            default the first ones of ``data``.
        patience: number of successive evaluations of the validation loss (of 20 in all) without improvement after which
            the training ends.
        penalty: penalty added to the loss, in training and validation, for example `stable_rank`.
        forward: ``(model, batch) -> output tensor``, for models that the default does not fit.
        seed: seed for data that torch's global generator shuffles, as in a DataLoader.
        cache: checkpoint file, from which an interrupted training resumes; it is deleted when the training is finished.
        on_progress: called at every evaluation, the first of which is before any step.

    Ctrl-C ends the training with the best weights so far; with a cache, the same call resumes it. A training whose
    outputs become NaN or infinite ends there, also with the best weights so far.

    Raises:
        OptionsError: there are no steps, the loss needs a teacher but there is none, or a number is outside its range.
        DataError: there is no batch, or the cache cannot be written or belongs to another training.
        ModelError: the weights of the model are packed.

    >>> from qcompress import compress, mean_loss, prune_quantize
    >>> _ = torch.manual_seed(0)
    >>> original = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> data = [torch.randn(64, 8)]
    >>> small = compress(original, data, budget={"bytes": 0.3}, options=prune_quantize(bits=(3,), sparsity=(0,))).model
    >>> tuned = finetune(small, data, 40, teacher=original)
    >>> mean_loss(original, tuned, data) < mean_loss(original, small, data)
    True
    """
    require_training(steps, learning_rate, patience)
    learning_rate, patience, place = plain(learning_rate), plain(patience), as_cache_file(cache)
    require_in_memory(model, "finetune", "load its folder with transformers' from_pretrained")
    if is_packed(model):
        raise ModelError(
            "the weights of this model are packed, so that they cannot be trained: fine-tune it before pack_(), or "
            "load its file without packed=True"
        )
    if teacher is not None:
        forwards.require_module(teacher, "teacher")
    calibration = Calibration(model=model, data=data, forward=forward, loss=as_loss(loss), seed=seed)
    if teacher is None and not isinstance(calibration.loss, CallableLoss):
        raise OptionsError(
            f"the loss {calibration.loss.name!r} compares with a teacher: pass teacher=the original model, or a "
            "loss (output, batch) -> (samples,)"
        )
    data = calibration.data
    looked_at = list(islice(data, VALIDATED) if validation is None else forwards.checked_data(validation, "validation"))
    for batches in (data, looked_at):
        forwards.first_batch(batches)
    student = own_copy(model).eval()
    objective = _Objective(calibration, student, teacher, penalty, looked_at)
    schedule = _Schedule(steps=steps, learning_rate=learning_rate, patience=patience)
    file = None
    if place is not None:
        settings = [steps, learning_rate, patience, penalty]
        file = Checkpoint(place, _key(settings, calibration, teacher, looked_at), student)
    with forwards.recurrent_gradients(student):
        _train(objective, schedule, file, on_progress)
    return student


@dataclass(frozen=True, slots=True, kw_only=True)
class _Schedule:
    """Length, learning rate and patience of the training, see `finetune`."""

    steps: int
    learning_rate: float
    patience: int


class _DivergedError(ModelError):
    """The student's output or loss is not finite; before the first step, the model itself is at fault."""


class _Objective:
    """The function to minimize: the student's loss, relative to the teacher's outputs if any, and a penalty."""

    def __init__(
        self,
        calibration: Calibration,
        student: nn.Module,
        teacher: nn.Module | None,
        penalty: Callable[[nn.Module], Tensor] | None,
        looked_at: list[Any],
    ) -> None:
        self.calibration, self.student = calibration, student
        self._teacher, self._penalty = teacher, penalty
        self._looked_at = [(batch, self._taught(batch)) for batch in looked_at]

    def of_batch(self, batch: Any) -> Tensor:
        """Return the mean over a batch, with gradients."""
        mean = self._losses(batch, self._taught(batch)).mean()
        mean = mean if self._penalty is None else mean + self._penalty(self.student)
        if not bool(mean.isfinite()):
            raise _DivergedError("the loss of the model in training is NaN or infinite")
        return mean

    def validated(self) -> float:
        """Return the mean over the validation batches."""
        with torch.no_grad():
            losses = [self._losses(batch, reference) for batch, reference in self._looked_at]
            added = 0.0 if self._penalty is None else float(self._penalty(self.student))
        mean = float(torch.cat(losses).double().mean()) + added
        if not math.isfinite(mean):
            raise _DivergedError("the loss of the model in training is NaN or infinite on the validation batches")
        return mean

    def _taught(self, batch: Any) -> Tensor | None:
        if (teacher := self._teacher) is None:
            return None
        with kept_state(teacher), forwards.evaluating(teacher), torch.no_grad(), forwards.first_pass(batch, "a batch"):
            return forwards.run(teacher, batch, self.calibration.forward)

    def _losses(self, batch: Any, reference: Tensor | None) -> Tensor:
        loss = self.calibration.loss
        try:
            with forwards.first_pass(batch, "a batch"):
                output = forwards.run(self.student, batch, self.calibration.forward)
        except NotFiniteError as error:
            raise _DivergedError(str(error)) from error
        if reference is None:
            assert isinstance(loss, CallableLoss)  # noqa: S101
            return loss.values(output, batch)
        return loss.rise(output, reference.to(output.device), batch)


def _train(
    objective: _Objective,
    schedule: _Schedule,
    file: Checkpoint | None,
    on_progress: Callable[[FinetuneProgress], None] | None,
) -> None:
    """Train the objective's student, and set it to the best weights seen."""
    student, steps = objective.student, schedule.steps
    trained = Trained(student)
    before = trained.state()
    optimiser = WideAdam(
        (parameter for parameter in student.parameters() if parameter.requires_grad), lr=schedule.learning_rate
    )
    rates = torch.optim.lr_scheduler.LambdaLR(optimiser, partial(_rate, steps=steps))
    if file is not None and file.path.exists():
        state = file.load(optimiser, rates)
    else:
        state = TrainingState(before=(loss_before := objective.validated()), best=loss_before)
        if file is not None:
            file.save(state, optimiser, rates)
    last_save = time.perf_counter()

    def tell(loss_now: float) -> None:
        if on_progress is not None:
            on_progress(
                FinetuneProgress(step=state.step, steps=steps, before=state.before, loss=loss_now, best=state.best)
            )

    every, cut = max(1, steps // LOOKS), False
    try:
        tell(state.best)
        for batch in _from(objective.calibration.data, state.step, steps, objective.calibration.seed):
            _step(objective, trained, optimiser, batch)
            rates.step()
            state.step += 1
            if state.step % every and state.step < steps:
                continue
            with trained.stored():
                loss_now = objective.validated()
            state.idle = state.idle + 1 if loss_now >= state.best else 0
            if loss_now < state.best:
                state.best, state.kept = loss_now, trained.state()
            tell(loss_now)
            if state.idle == schedule.patience:
                break
            if file is not None and time.perf_counter() - last_save > SAVE_EVERY_S:
                file.save(state, optimiser, rates)
                last_save = time.perf_counter()
    except KeyboardInterrupt:
        cut = True
    except _DivergedError as error:
        if not state.step:
            raise
        _logger.warning("fine-tuning ends at step %d of %d, a lower learning rate helps: %s", state.step, steps, error)
    trained.finish_(before if state.kept is None else state.kept, changed=state.kept is not None)
    if file is not None and not cut:
        file.path.unlink(missing_ok=True)


def _step(objective: _Objective, trained: Trained, optimiser: WideAdam, batch: Any) -> None:
    """Move the weights once; pruned ones stay zero."""
    optimiser.zero_grad()
    with trained.stored():
        objective.of_batch(batch).backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    trained.prune_()


def require_training(steps: int, learning_rate: float, patience: int = 1) -> None:
    """Check the numbers of a training.

    Raises:
        OptionsError: steps or patience are below 1, or the learning rate is not above 0.
    """
    looks = 1 if patience == math.inf else plain(patience)
    numbers = ((plain(steps), int), (looks, int), (plain(learning_rate), Real))
    known = all(isinstance(value, kind) and not isinstance(value, bool) for value, kind in numbers)
    if not (known and steps >= 1 and patience >= 1 and 0 < learning_rate < math.inf):
        raise OptionsError(
            f"fine-tuning takes steps and patience from 1 and a learning rate above 0, found steps={steps!r}, "
            f"patience={patience!r}, learning_rate={learning_rate!r}"
        )


def _rate(step: int, *, steps: int) -> float:
    """Share of the peak rate: a linear rise, because Adam's first steps are as long as its rate, then a cosine."""
    rise = max(1.0, WARM_UP * steps)
    return min(1.0, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _from(batches: Iterable[Any], done: int, steps: int, seed: int) -> Iterator[Any]:
    """Return the batches of the remaining steps."""
    number = number_of(batches)
    passes, skipped = divmod(done, number) if number else (0, done)

    def endless() -> Iterator[Any]:
        for number in itertools.count(passes):
            torch.default_generator.manual_seed(seed + number)
            yield from batches

    return islice(endless(), skipped, skipped + steps - done)


def _key(settings: list[Any], calibration: Calibration, teacher: nn.Module | None, looked_at: list[Any]) -> str:
    """Return the identity of a training: its settings, models with their stored form, and all batches."""
    record = record_of(calibration.model)
    transforms = [part.transform for part in record.parts] if record else []
    trained = [parameter.requires_grad for parameter in calibration.model.parameters()]
    stored = [[transform.to_json() for transform in transforms], code_of(transforms).digest, trained]
    taught = None if teacher is None else once(teacher, find=partial(identify, teacher, "teacher")).digest
    return identify([settings, calibration.digests(), taught, stored, identify_batches(looked_at).digest]).digest
