"""Effects by direct evaluation: every option is applied to the model alone, and the true loss is computed.

Only the part of the network after the changed module is run again (`qcompress.measuring.methods.replay`). The pair
terms come from the change ``J_v`` of the output: exactly if outputs have few numbers, else by random probes.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qcompress.errors import ModelError, NotFiniteError
from qcompress.measuring.candidates import Candidates
from qcompress.measuring.effects import MAX_NUMBERS, Effects, curvature_points, exact_effects, softened_costs
from qcompress.measuring.methods.replay import RecordedCalls
from qcompress.model import forward as forwards
from qcompress.model.losses import Loss

SAME_RUN = 1e-2  # relative to the effect of the change; a valid shortcut repeats exactly the same operations


class Direct:
    """Evaluates options on batches; remembers which parts can be replayed from their own module on."""

    tried: ClassVar[dict[str, str]] = {}  # empty: all options are evaluated directly anyway

    def __init__(self, model: nn.Module, candidates: Candidates, loss: Loss, forward: forwards.Forward | None) -> None:
        self.model, self.candidates, self.loss, self.forward = model, candidates, loss, forward
        self._replay = RecordedCalls(model)
        self._shortcut: dict[int, bool] = {}
        self._point: Tensor | None = None

    def batch_effects(self, batch: Any, generator: torch.Generator, reference: Tensor | None = None) -> Effects:
        """Compute the costs and effects of all options on a batch.

        Args:
            batch: a batch of the data.
            generator: generator for random probes.
            reference: outputs of the original, if the model is not the original.

        Raises:
            ModelError: the loss of an option is not finite; the message names the option.
        """
        candidates = self.candidates
        point = self.record(batch)
        small = point[0].numel() <= MAX_NUMBERS
        probes = point[None] if small else self.loss.probes(point, batch, generator)
        width = point[0].numel() if small else len(probes)
        responses = torch.zeros(candidates.num_options, len(point), width, dtype=point.dtype)
        cost = np.zeros(candidates.num_options)
        for part in range(len(candidates.parts)):
            for flat, rises, change in self.changes(part, batch, reference):
                cost[flat] = rises.sum()
                responses[flat] = (
                    change.reshape(len(point), -1) if small else torch.einsum("kn...,n...->nk", probes, change)
                )
        if not small:
            return Effects(cost, [responses.flatten(1).numpy()], len(point))
        changes = responses.to(point.device).reshape(len(responses), *point.shape)
        points = curvature_points(self.loss, changes, point, cost, candidates) if reference is None else [point]
        softened = softened_costs(self.loss, changes, point, batch, reference)
        return Effects(cost, exact_effects(self.loss, changes, points, batch), len(point), softened)

    def record(self, batch: Any) -> Tensor:
        """Run a batch with the current weights; options are compared with this run."""
        self._shortcut = {}
        self._point = self._replay.record(lambda: forwards.run(self.model, batch, self.forward))
        return self._point

    def changes(
        self, part: int, batch: Any, reference: Tensor | None = None
    ) -> Iterator[tuple[int, NDArray[np.float64], Tensor]]:
        """Yield flat index, loss increases ``(samples,)`` and change of the outputs of each option that changes a part.

        Raises:
            ModelError: the loss of an option is not finite; the message names the option.
        """
        candidates, point = self.candidates, self._point
        assert point is not None  # noqa: S101
        goal = point if reference is None else reference
        standing = 0.0 if reference is None else self.loss.rise(point, goal, batch)
        for option in range(len(candidates.transforms[part])):
            if option == candidates.standing[part]:
                continue
            try:
                with candidates.applied(part, option):
                    output = self._output(part, batch, point)
            except NotFiniteError:
                raise candidates.not_finite(part, option) from None
            rises = (self.loss.rise(output, goal, batch) - standing).double().cpu().numpy()
            if not np.isfinite(rises).all():
                raise candidates.not_finite(part, option)
            yield int(candidates.offsets[part]) + option, rises, output - point

    def _output(self, part: int, batch: Any, point: Tensor) -> Tensor:
        """Output with a changed part; the first time in a batch it is computed both ways, to check the shortcut."""

        def full() -> Tensor:
            with torch.no_grad():
                return forwards.run(self.model, batch, self.forward)

        paths = self.candidates.parts[part].modules
        if self._shortcut.get(part) is False:
            return full()
        try:
            output = self._replay.behind(paths, full)
        except RuntimeError:  # the model computes gradients itself, which recorded outputs do not have
            self._shortcut[part] = False
            return full()
        if part in self._shortcut:
            return output
        true = full()
        if true.shape != point.shape:
            name = self.candidates.parts[part].name
            raise ModelError(
                f"the model's output has the shape {tuple(true.shape)} with {name!r} changed and {tuple(point.shape)} "
                "without; pass a forward whose outputs keep their shape"
            )
        rounding = 8 * torch.finfo(true.dtype).eps * float(true.abs().max())
        same = output.shape == true.shape and float((output - true).abs().max()) <= max(
            rounding, SAME_RUN * float((true - point).abs().max())
        )
        self._shortcut[part] = same
        return true
