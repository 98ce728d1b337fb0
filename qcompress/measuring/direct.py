"""Effects by trying: every option is put into the model alone, and the true loss is taken.

Only the part of the network behind the changed module is run again (`qcompress.measuring.replay`). The pair terms
come from the change ``J_v`` of the output: exactly where outputs have few numbers, else by random probes.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qcompress.errors import ModelError
from qcompress.measuring.candidates import Candidates
from qcompress.measuring.effects import MAX_NUMBERS, curvature_points, exact_effects
from qcompress.measuring.replay import Replay
from qcompress.model import forward as forwards
from qcompress.model.losses import Loss

SAME_RUN = 1e-4  # relative to the largest output; a shortcut that is right repeats the very same operations


class Direct:
    """Tries options on batches; remembers which parts can be replayed from their own module on."""

    def __init__(self, model: nn.Module, candidates: Candidates, loss: Loss, forward: forwards.Forward | None) -> None:
        self._model, self._candidates, self._loss, self._forward = model, candidates, loss, forward
        self._replay = Replay(model)
        self._shortcut: dict[int, bool] = {}

    def batch_effects(
        self, batch: Any, generator: torch.Generator, reference: Tensor | None = None
    ) -> tuple[NDArray[np.float64], Iterable[NDArray[np.floating]], int]:
        """Costs ``(V,)`` summed over the batch, blocks of effects ``(V, columns)``, and the number of samples.

        Args:
            batch: of the data.
            generator: of random probes.
            reference: the original's outputs, where the model is not the original.

        Raises:
            ModelError: an option's loss is not finite; names it.
        """
        candidates = self._candidates
        point = self._replay.record(lambda: forwards.run(self._model, batch, self._forward))
        goal = point if reference is None else reference
        standing = 0.0 if reference is None else float(self._loss.rise(point, goal, batch).sum())
        small = point[0].numel() <= MAX_NUMBERS
        probes = point[None] if small else self._loss.probes(point, batch, generator)
        width = point[0].numel() if small else len(probes)
        found = torch.zeros(candidates.num_options, len(point), width, dtype=point.dtype)
        cost = np.zeros(candidates.num_options)
        for part, options in enumerate(candidates.transforms):
            for option in range(len(options)):
                if option == candidates.standing[part]:
                    continue
                with candidates.applied(part, option):
                    output = self._output(part, batch)
                rise = float(self._loss.rise(output, goal, batch).sum()) - standing
                if not np.isfinite(rise):
                    name, label = candidates.parts[part].name, options[option].label
                    raise ModelError(f"the loss with {name!r} at {label!r} is not finite; leave that option out")
                flat = candidates.offsets[part] + option
                cost[flat] = rise
                change = output - point
                found[flat] = change.flatten(1) if small else torch.einsum("kn...,n...->nk", probes, change)
        if not small:
            return cost, [found.flatten(1).numpy()], len(point)
        changes = found.to(point.device).reshape(len(found), *point.shape)
        points = curvature_points(self._loss, changes, point, cost, candidates) if reference is None else [point]
        return cost, exact_effects(self._loss, changes, points, batch), len(point)

    def _output(self, part: int, batch: Any) -> Tensor:
        """The output with a changed part; the first time by both ways, to see whether the shortcut holds."""

        def full() -> Tensor:
            return forwards.run(self._model, batch, self._forward)

        paths = self._candidates.parts[part].modules
        if self._shortcut.get(part) is not False:
            output = self._replay.behind(paths, full)
            if part in self._shortcut:
                return output
        with torch.no_grad():
            true = full()
        if part not in self._shortcut:
            scale = float(true.abs().max())
            self._shortcut[part] = output.shape == true.shape and float((output - true).abs().max()) <= SAME_RUN * scale
        return true
