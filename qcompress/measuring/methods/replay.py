"""Re-run only the modules after a changed one.

In a recorded run, every module call is stored with its output and its position in time. In a replay for a changed
module, each call that had ended before the first call of that module returns its recorded output; everything after
that is computed. No graph of the model is needed, only that the calls come in the same order again; the caller checks
this against a full run.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map


@dataclass(slots=True)
class _Call:
    start: int
    end: int
    output: Any  # a copy of what the call returned
    returned: list[tuple[Tensor, int]]  # the returned tensors with their versions; empty once `changed` is known
    untold: bool  # whether a returned tensor has no version (inference mode)
    counts_after: dict[nn.Module, int]  # calls of the inner modules when this call had ended
    changed: bool = False  # whether later operations change the output in place


class RecordedCalls:
    """The recorded calls of one batch."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = {name: module for name, module in model.named_modules() if name}
        self._calls: dict[nn.Module | None, list[_Call]] = {}
        self._counts: dict[nn.Module, int] = {}
        self._clock = 0

    def record(self, run: Callable[[], Tensor]) -> Tensor:
        """Run once, recording all calls."""
        self._calls, self._counts, self._clock = {}, {}, 0
        with self._wrapped(self._note), torch.no_grad():
            output = run()
        for call in (call for calls in self._calls.values() for call in calls):
            call.changed = call.untold or any(leaf._version != version for leaf, version in call.returned)
            call.returned = []
        return output

    def behind(self, paths: tuple[str, ...], run: Callable[[], Tensor]) -> Tensor:
        """Run again with recorded outputs for every call that ended before the first call of the named modules."""
        changed = [self._modules.get(path) for path in paths]  # None for the model itself: nothing comes before it
        first = min((call.start for module in changed for call in self._calls.get(module, [])), default=0)
        self._counts = {}

        def reuse(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            count = self._counts.get(module, 0)
            self._counts[module] = count + 1
            calls = self._calls.get(module, [])
            if count < len(calls) and calls[count].end < first:
                call = calls[count]
                self._counts |= call.counts_after
                return _copied(call.output) if call.changed else call.output
            return forward(*args, **kwargs)

        with self._wrapped(reuse), torch.no_grad():
            return run()

    def _note(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        start = self._clock = self._clock + 1
        before = dict(self._counts)
        output = forward(*args, **kwargs)
        self._clock += 1
        counts_after = {inner: count for inner, count in self._counts.items() if before.get(inner, 0) != count}
        self._counts[module] = self._counts.get(module, 0) + 1
        leaves = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]
        returned = [(leaf, leaf._version) for leaf in leaves if not leaf.is_inference()]
        untold = len(returned) < len(leaves)
        call = _Call(start, self._clock, _copied(output), returned, untold, counts_after)
        self._calls.setdefault(module, []).append(call)
        return output

    @contextlib.contextmanager
    def _wrapped(self, around: Callable[..., Any]) -> Iterator[None]:
        changed = []
        try:
            for module in self._modules.values():
                forward = module.forward

                def wrapper(*args: Any, _module: nn.Module = module, _forward: Any = forward, **kwargs: Any) -> Any:
                    return around(_module, _forward, args, kwargs)

                own_forward = module.__dict__.get("forward")
                module.__dict__["forward"] = wrapper
                changed.append((module, own_forward))
            yield
        finally:
            for module, own_forward in changed:
                if own_forward is None:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = own_forward


def _copied(output: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)
