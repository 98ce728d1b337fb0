"""Sets that can be removed as a whole, because their outputs are added to something else that stays.

If all heads of an attention layer or all units of an MLP are removed, the branch adds nothing but a bias, and the
network computes on with what it is added to. The modules that made the values, such as the attention layer, have
nothing left to do. They are the largest modules that hold no other weights than the set's, and they return one value
for every position that they are given. Whether a network without them computes what the masked one does, and whether
its output still depends on its input, is tested.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.compressed.bypassed import LAYER_INDEX, caches_differ, caching, first_floating
from qcompress.compressed.copying import own_copy
from qcompress.compressed.removal import mask_
from qcompress.errors import ModelError
from qcompress.model import forward as forwards
from qcompress.model.coupled import Bypass, CoupledSet
from qcompress.model.tensors import held_tensors
from qcompress.structure.trial import failing, output_of

SAME = 1e-5
"""Difference of the outputs for two inputs, relative to the largest, up to which they do not depend on the input."""


def skippable(
    model: nn.Module,
    sets: Sequence[CoupledSet],
    data: Iterable[Any],
    batches: Sequence[Any],
    forward: forwards.Forward | None,
) -> tuple[CoupledSet, ...]:
    """Return the sets, those that can be removed as a whole with the modules to bypass.

    Args:
        model: the model.
        sets: its coupled sets.
        data: batches; up to two are read, because two samples are needed.
        batches: a few samples each.
        forward: how to run a batch.
    """
    calls = _calls(model, batches[0], forward)
    found = {item.name: replace(item, bypasses=_bypasses(model, item, calls)) for item in sets}
    found |= {name: replace(item, bypasses=()) for name, item in found.items() if _begins_a_cache(model, item)}
    two = [one for _, one in zip(range(2), data, strict=False)]
    tried = [item for item in found.values() if item.bypasses]
    tried = _depending(own_copy(model), tried, two, forward) if tried else []
    beside = [item for item in sets if item.name not in {other.name for other in tried}]
    failed = failing(model, tried, batches, forward, whole=True, beside=beside) if tried else {}
    left = {item.name for item in tried} - failed.keys()
    return tuple(found[item.name] if item.name in left else item for item in sets)


@dataclass(slots=True)
class _Call:
    """Calls of a module.

    Attributes:
        times: number of calls.
        per_position: whether the output has one value for every position of the input, in the last dimension.
        alike: whether the output has the shape of the input.
        outputs: length of the tuple that it returns, or None.
    """

    times: int = 0
    per_position: bool = False
    alike: bool = False
    outputs: int | None = None


def _calls(model: nn.Module, batch: Any, forward: forwards.Forward | None) -> dict[str, _Call]:
    """Run a batch and note every module's call."""
    calls: dict[str, _Call] = {}

    def note(path: str, args: Any, kwargs: Any, output: Any) -> None:
        call = calls.setdefault(path, _Call())
        call.times += 1
        several = type(output) is tuple
        first = output[0] if several and output else output
        with contextlib.suppress(ModelError):
            given = first_floating(args, kwargs)
            if isinstance(first, Tensor) and first.ndim > 1:
                call.per_position, call.alike = first.shape[:-1] == given.shape[:-1], first.shape == given.shape
                call.outputs = len(output) if several else None

    with hooked(model, note), forwards.evaluating(model), forwards.layer_by_layer(), torch.no_grad():
        forwards.run(model, batch, forward)
    return calls


@contextlib.contextmanager
def hooked(model: nn.Module, note: Any) -> Iterator[None]:
    """Call ``note(path, args, kwargs, output)`` for every call of a module below, inside the block."""
    hooks = [
        module.register_forward_hook(
            lambda _, args, kwargs, output, path=path: note(path, args, kwargs, output), with_kwargs=True
        )
        for path, module in model.named_modules()
        if path
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _bypasses(model: nn.Module, item: CoupledSet, calls: dict[str, _Call]) -> tuple[Bypass, ...]:
    """Return the modules to bypass if all units of a set are removed; () if some of its makers are in none."""
    readers = {axis.tensor.rpartition(".")[0] for axis in item.axes if axis.reads}
    made = {axis.tensor for axis in item.axes if not axis.reads}
    own = {axis.tensor for axis in item.axes} | {f"{reader}.bias" for reader in readers}
    found: list[Bypass] = []
    for path, module in model.named_modules():
        call = calls.get(path)
        names = {f"{path}.{name}" for name, _ in module.named_parameters()}
        if not path or call is None or call.times > 1 or any(b.holds(path) for b in found):
            continue
        inside = [reader for reader in readers if f"{reader}.".startswith(f"{path}.")]
        if not names & made or not names <= own or any(True for _ in module.buffers()) or len(inside) > 1:
            continue
        if _constant(model.get_submodule(inside[0]) if inside else None, call):
            found.append(Bypass(path=path, reader=inside[0] if inside else None, outputs=call.outputs))
    covered = all(any(bypass.holds(name) for bypass in found) for name in made)
    return tuple(found) if covered else ()


def _begins_a_cache(model: nn.Module, item: CoupledSet) -> bool:
    """Whether a set's attention has the first of several kinds of places in the cache, where the length is read.

    Other layers can take its place only if all are of one kind.
    """
    if not caches_differ(model):
        return False
    kinds = list(model.config.layer_types)  # type: ignore[union-attr, arg-type]
    first = {kinds.index(kind) for kind in kinds}
    places = {path: getattr(module, LAYER_INDEX) for path, module in caching(model).items()}
    return any(bypass.holds(path) and place in first for bypass in item.bypasses for path, place in places.items())


def _constant(reader: nn.Module | None, call: _Call) -> bool:
    """Whether the output of a module is known without its units: see `Bypass`."""
    bias = getattr(reader, "bias", None)
    if isinstance(reader, nn.modules.conv._ConvNd) or bias is None:
        return call.alike if reader is not None else call.per_position
    return call.per_position and isinstance(bias, nn.Parameter)


def _depending(
    model: nn.Module, sets: Sequence[CoupledSet], batches: Sequence[Any], forward: forwards.Forward | None
) -> list[CoupledSet]:
    """Return the sets without which the output still depends on the input; they are masked in ``model``, and undone.

    One sample does not show that. If the output depends on the input without several sets together, it does without
    each of them alone, unless what they add cancels out. So the sets are bisected.
    """
    tensors = {item.name: item.tensor for item in held_tensors(model)}
    before = {axis.tensor: tensors[axis.tensor].detach().clone() for item in sets for axis in item.axes if axis.reads}
    mask_(model, sets, {item.name: range(item.num_units) for item in sets})
    outputs = [sample for batch in batches for sample in output_of(model, batch, forward)]
    with torch.no_grad():
        for name, tensor in before.items():
            tensors[name].copy_(tensor)
    if len(outputs) < 2:
        return []
    if _differ(outputs):
        return list(sets)
    middle = len(sets) // 2
    halves = (sets[:middle], sets[middle:]) if middle else ()
    return [item for half in halves for item in _depending(model, half, batches, forward)]


def _differ(outputs: Sequence[Tensor]) -> bool:
    """Whether outputs of samples differ, as far as their shapes are common."""
    for other in outputs[1:]:
        common = tuple(slice(0, min(sizes)) for sizes in zip(outputs[0].shape, other.shape, strict=True))
        first, second = outputs[0][common], other[common]
        if float((first - second).abs().max()) > SAME * float(first.abs().max()):
            return True
    return False
