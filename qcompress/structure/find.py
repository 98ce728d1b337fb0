"""Find the removable channels of a model: trace a few samples, then test the result."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from qcompress.model import forward as forwards
from qcompress.model.batches import taken
from qcompress.model.composed import composed
from qcompress.model.coupled import CoupledSet
from qcompress.model.modes import outside_modes
from qcompress.model.steady import kept_state
from qcompress.structure.sets import Structure, trace
from qcompress.structure.skipping import hooked, skippable
from qcompress.structure.trial import failing, output_of

SAMPLES = 2
"""Number of samples that are run to trace the channels, and of each of some batches to test the result."""

BATCHES = 4
"""Number of batches with samples to test: the first ones may be silent, constant, or a single word."""

MAX_OUTPUTS = 1 << 25
"""Number of output values after which no further batch is tested (language models have many per sample)."""


@outside_modes
def find_sets(model: nn.Module, data: Iterable[Any], forward: forwards.Forward | None = None) -> Structure:
    """Find the coupled sets of ``model`` by tracing a few samples of the first batch.

    Every set is tested: the model must run without some of its units and give the same output as with the units masked,
    on samples of several batches; also on a batch that calls layers which the first batch does not.
    Sets that can also be removed as a whole have `CoupledSet.bypasses`. Computed weights (parametrizations) count as
    plain parameters, which they are in a smaller network.

    Raises:
        DataError: the model does not accept the first batch.

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    >>> structure = find_sets(model, [torch.randn(2, 3, 6, 6)])
    >>> [(item.name, item.num_units, [axis.tensor for axis in item.axes if axis.reads]) for item in structure.sets]
    [('0', 8, ['4.weight'])]
    >>> structure.kept
    {'4': 'it reaches the output'}
    """
    with composed(model), kept_state(model), forwards.evaluating(model), torch.no_grad():
        forwards.require_samples_in(data, "data")
        first = forwards.first_batch(data)
        batch = _few(model, first, forward)
        with forwards.first_pass(first):
            called = _called(model, batch, forward)
        structure = trace(model, batch, forward)
        tested = [batch, *_tested(model, data, called, forward)] if structure.sets else [batch]
        failed = failing(model, structure.sets, tested, forward) if structure.sets else {}
        left = tuple(item for item in structure.sets if item.name not in failed)
        failed |= _failing_elsewhere(model, left, data, called, forward)
        left = tuple(item for item in left if item.name not in failed)
        left = skippable(model, left, data, tested, forward)
    return replace(structure, sets=left, kept={**structure.kept, **failed})


def trace_few(model: nn.Module, batch: Any, forward: forwards.Forward | None) -> Structure:
    """Trace a few samples of a batch, without any test of the result."""
    with kept_state(model), forwards.evaluating(model), torch.no_grad():
        return trace(model, _few(model, batch, forward), forward)


def _failing_elsewhere(
    model: nn.Module,
    sets: Sequence[CoupledSet],
    data: Iterable[Any],
    traced: set[str],
    forward: forwards.Forward | None,
) -> dict[str, str]:
    """Return why sets (by name) fail on a batch with layers that the traced batch does not call."""
    failed: dict[str, str] = {}
    waiting = _others(model, traced)
    for other in data if waiting and sets else ():
        called = waiting & _called(model, other, forward)
        left = [item for item in sets if item.name not in failed]
        if called and left:
            why = f"with a batch that calls {min(called)!r}, which the first one does not, "
            failed |= {name: why + reason for name, reason in failing(model, left, [other], forward).items()}
        waiting -= called
    return failed


def _called(model: nn.Module, batch: Any, forward: forwards.Forward | None) -> set[str]:
    """Run a batch and return the paths of the modules that it calls."""
    called: set[str] = set()
    with hooked(model, lambda path, *_: called.add(path)):
        forwards.run(model, batch, forward)
    return called


def _tested(model: nn.Module, data: Iterable[Any], traced: set[str], forward: forwards.Forward | None) -> list[Any]:
    """Return samples from all over each of the first batches; only of those that call no untraced layers."""
    batches, outputs, others = list[Any](), 0, _others(model, traced)
    for index, batch in enumerate(itertools.islice(data, BATCHES)):
        if outputs >= MAX_OUTPUTS:
            break
        with forwards.first_pass(batch, f"data[{index}]"):
            few = _few(model, batch, forward, spaced=True)
            size = output_of(model, few, forward).numel() if others.isdisjoint(_called(model, few, forward)) else 0
        if size:
            batches.append(few)
            outputs += size
    return batches


def _others(model: nn.Module, traced: set[str]) -> set[str]:
    """Return the paths of the layers that were not called."""
    return {path for path, module in model.named_modules() if path and module._parameters} - traced


def _few(model: nn.Module, batch: Any, forward: forwards.Forward | None, *, spaced: bool = False) -> Any:
    """Return the first samples of the batch, or some at equal distances; all if the model does not run on fewer."""
    tensors = [value for value in tree_leaves(batch) if isinstance(value, Tensor) and value.ndim]
    if tensors and len(tensors[0]) > SAMPLES:
        count = len(tensors[0])
        some = slice(None, None, -(-count // SAMPLES)) if spaced else slice(SAMPLES)
        few = tree_map(
            lambda value: taken(value, some) if isinstance(value, Tensor) and value.shape[:1] == (count,) else value,
            batch,
        )
        try:
            forwards.run(model, few, forward)
        except Exception:
            return batch
        return few
    return batch
