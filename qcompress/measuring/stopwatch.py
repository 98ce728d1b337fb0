"""A stopwatch for the layers of a model: what they are called with, and when they begin and end."""

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qcompress.errors import ModelError
from qcompress.model import forward as forwards
from solvers.provenance import machine

MICROSECOND = 1e-6
OUTSIDE = -1  # in place of a layer's index: not in any layer


@dataclass(frozen=True, slots=True, kw_only=True)
class TimingProgress:
    """Number of layers whose options have been timed."""

    layers: int
    total_layers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedCall:
    """The arguments of a layer's call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def first(self) -> Any:
        """The first argument, by place or by name."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()))


def shapes_in(calls: list[TimedCall]) -> tuple[Hashable, ...]:
    """Return the shapes, strides and types of the tensors that a layer is called with."""
    return tuple(
        (tensor.shape, tensor.stride(), tensor.dtype)
        for call in calls
        for tensor in tree_leaves((call.args, call.kwargs))
        if isinstance(tensor, Tensor)
    )


class Stopwatch:
    """Hooks into a model's layers that record, in a run, their arguments and when they begin and end.

    Args:
        model: the model, in evaluation mode.
        paths: for each layer the paths of the modules that share its weight.
    """

    def __init__(self, model: nn.Module, paths: Sequence[tuple[str, ...]]) -> None:
        self._now, self._num_layers = clock_of(model), len(paths)
        self._layer_of = {model.get_submodule(path): i for i, layer_paths in enumerate(paths) for path in layer_paths}

    def calls(self, run: Callable[[], object]) -> list[list[TimedCall]]:
        """Return for each layer the arguments of its calls in one run."""
        calls: list[list[TimedCall]] = [[] for _ in range(self._num_layers)]

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[self._layer_of[module]].append(TimedCall(args=args, kwargs=kwargs))

        hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in self._layer_of]
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        return calls

    def times(self, run: Callable[[], None], repeats: int) -> tuple[NDArray[np.float64], float]:
        """Return the seconds in every layer, over all its calls, and the seconds outside all layers.

        A run is a sequence of pieces, from one mark to the next; for each piece the median of all runs is taken.

        Raises:
            ModelError: the layers are called in a different order from run to run.
        """
        marks: list[tuple[float, int]] = []  # time, and the layer that runs from then on
        within = [OUTSIDE]

        def begin(module: nn.Module, args: Any) -> None:  # noqa: ARG001
            within.append(self._layer_of[module])
            marks.append((self._now(), within[-1]))

        def end(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
            within.pop()
            marks.append((self._now(), within[-1]))

        hooks = [module.register_forward_pre_hook(begin) for module in self._layer_of]
        hooks += [module.register_forward_hook(end) for module in self._layer_of]
        runs = []
        try:
            for _ in range(repeats + 1):
                marks[:] = [(self._now(), OUTSIDE)]
                run()
                runs.append([*marks, (self._now(), OUTSIDE)])
        finally:
            for hook in hooks:
                hook.remove()
        orders = {tuple(layer for _, layer in marked) for marked in runs}
        if len(orders) > 1:
            raise ModelError("the model calls its layers in a different order each time, so they cannot be timed")
        moments = [[moment for moment, _ in marked] for marked in runs[1:]]  # the first run is a warm-up
        pieces = np.median(np.diff(moments), axis=0)
        seconds = np.zeros(self._num_layers + 1)  # the last one is OUTSIDE
        np.add.at(seconds, list(orders.pop()[:-1]), pieces)
        return seconds[:-1], float(seconds[-1])


def conditions(model: nn.Module) -> dict[str, Any]:
    """Return what measured times depend on besides the model: machine, threads and device."""
    device = forwards.device_of(model)
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {"machine": machine(), "threads": torch.get_num_threads(), "device": [str(device), named]}


def clock_of(model: nn.Module) -> Callable[[], float]:
    """Return a clock: processor time on one CPU thread, else wall time after synchronising with the device."""
    device = forwards.device_of(model)
    if device.type == "cpu":
        fine = time.get_clock_info("process_time").resolution <= MICROSECOND
        return time.process_time if torch.get_num_threads() == 1 and fine else time.perf_counter

    def synchronised() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return synchronised
