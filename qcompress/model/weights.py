"""Find a model's weights, including those shared by modules and those used without a call of their layer.

Every parameter is listed once, under its first location, even if several modules hold it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.errors import NotFiniteError
from qcompress.model import forward as forwards
from qcompress.model import layers
from qcompress.model.sites import WEIGHT, Site, path_of, sites_of
from qcompress.model.steady import steady
from qcompress.model.tensors import held_tensors, overlapping, size_bytes, unregistered_modules

BUFFER = "a buffer: make it a parameter to compress it"
UNREGISTERED = "in a plain list or dict, where PyTorch does not see it: use nn.ModuleList or nn.ModuleDict"


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """Something with parameters that stays unchanged, and why."""

    name: str
    size_bytes: int
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class ModelWeight:
    """A weight that can be compressed, with all modules that hold it under this name."""

    modules: tuple[str, ...]
    site: Site

    @property
    def path(self) -> str:
        """Its name, see `path_of`."""
        return path_of(self.modules[0], self.site.parameter)

    @property
    def kind(self) -> str:
        """The layer's kind, or class and parameter of a module that is not a supported layer."""
        module = self.site.module
        return layers.kind_name(module) if self.site.is_layer else f"{type(module).__name__}.{self.site.parameter}"

    def skipped(self, reason: str) -> Skipped:
        """Return an entry for leaving the weight unchanged."""
        return Skipped(name=self.path or self.site.parameter, size_bytes=size_bytes(self.site.weight), reason=reason)


def layer_names(model: nn.Module) -> list[str]:
    """Return the paths of all weights and of their (first) modules, which are the names that parts can have."""
    weights, skipped = find_weights(model)
    names = [name for weight in weights for name in (weight.modules[0], weight.path)]
    return list(dict.fromkeys([*names, *(item.name for item in skipped)]))


def find_weights(model: nn.Module) -> tuple[list[ModelWeight], tuple[Skipped, ...]]:
    """Return the weights that can be compressed, in the model's order, and everything else that has parameters."""
    owners, shared = _owners(model), overlapping(held_tensors(model))
    weights, skipped = [], []
    named: set[int] = set()  # buffers that several modules hold
    for path, module in model.named_modules():
        for site in sites_of(module):
            holders = owners[id(site.weight)]
            name = WEIGHT if any(parameter == WEIGHT for _, parameter in holders) else holders[0][1]
            modules = tuple(holder for holder, parameter in holders if parameter == name)
            if (path, site.parameter) != (modules[0], name):
                continue  # listed under its first location
            reasons = [Site(model.get_submodule(holder), name).why_not() for holder in modules]
            reason = next(filter(None, reasons), "")
            if not reason and id(site.weight) in shared:
                reason = f"its weight shares memory with {shared[id(site.weight)]!r}, which would change with it"
            if reason and "bias" not in site.parameter:
                skipped.append(ModelWeight((path,), site).skipped(reason))
            elif not reason:
                weights.append(ModelWeight(modules, site))
        skipped += [
            Skipped(name=f"{path}.{name}".lstrip("."), size_bytes=size_bytes(buffer), reason=BUFFER)
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_floating_point() and sum(size > 1 for size in buffer.shape) > 1 and id(buffer) not in named
        ]
        named.update(map(id, module.buffers(recurse=False)))
    for path, module in unregistered_modules(model).items():
        if parameters := list(module.parameters(recurse=False)):
            skipped.append(Skipped(name=path, size_bytes=sum(map(size_bytes, parameters)), reason=UNREGISTERED))
    return weights, tuple(skipped)


def effective_paths(
    weights: list[ModelWeight], model: nn.Module, data: Iterable[Any], forward: forwards.Forward | None
) -> set[str]:
    """Return the paths of those weights, among ones whose layer is never called, that still affect outputs.

    In an opened model, those in blocks, such as experts, are assumed to; their gradients are checked.
    """
    effective = {weight.path for weight in weights if weight.site.weight.is_meta}
    weights = [weight for weight in weights if not weight.site.weight.is_meta]
    if not weights:
        return effective
    run = steady(forward)
    generator = torch.Generator().manual_seed(0)
    sites = {weight.path: weight.site for weight in weights}
    moved = {path: _moved(site.weight, generator) for path, site in sites.items()}

    def changes(chosen: list[str], batch: Any, output: Tensor) -> bool:
        before = {path: sites[path].weight.detach().clone() for path in chosen}
        try:
            for path in chosen:
                sites[path].weight.copy_(moved[path])
            changed = forwards.run(model, batch, run)
        except NotFiniteError:
            return True
        finally:
            for path in chosen:
                sites[path].weight.copy_(before[path])
        return changed.shape != output.shape or not torch.equal(changed, output)

    with forwards.evaluating(model), torch.no_grad():
        for batch in data:
            left = [path for path in sites if path not in effective]
            output = forwards.run(model, batch, run)
            if left and changes(left, batch, output):
                effective |= {path for path in left if changes([path], batch, output)}
    return effective


def _moved(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Return a weight with noise of its own magnitude added."""
    noise = torch.randn(weight.shape, generator=generator).to(weight)
    return weight.detach() + noise * weight.detach().abs().mean()


def _owners(model: nn.Module) -> dict[int, list[tuple[str, str]]]:
    """Id of a parameter → all its locations: path of the module, and name in the module."""
    owners: dict[int, list[tuple[str, str]]] = {}
    for path, module in model.named_modules():
        for site in sites_of(module):
            owners.setdefault(id(site.weight), []).append((path, site.parameter))
    return owners
