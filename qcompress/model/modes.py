"""PyTorch's modes around a call: autocast, inference mode, precision, gradients, compiled code, and the seed.

The first two change arithmetic that is not the model's. Under autocast, matrix products that fit codes and sum up costs
would be rounded to half precision, and decompositions fail; tensors made in inference mode can never take part in a
backward pass or be changed in place later. So functions that measure or make weights run outside of them.
"""

import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from qcompress.errors import AutocastWarning
from qcompress.scalars import as_seed, require_kinds

Given = ParamSpec("Given")
Found = TypeVar("Found")


def outside_modes(function: Callable[Given, Found]) -> Callable[Given, Found]:
    """Run ``function`` without autocast and inference mode, whatever modes its caller is in.

    Before that, the kinds of its keyword arguments are checked (see `qcompress.scalars.require_kinds`).

    Warns:
        AutocastWarning: the caller uses autocast, which does not reach the model either.

    >>> product = outside_modes(lambda: (torch.ones(2, 2) @ torch.ones(2, 2)).is_inference())
    >>> with torch.inference_mode():
    ...     product()
    False
    """

    @functools.wraps(function)
    def run(*given: Given.args, **named: Given.kwargs) -> Found:
        require_kinds(named)
        devices = [device for device in _devices() if torch.is_autocast_enabled(device)]
        if devices:
            warnings.warn(
                f"{function.__name__}() was called under autocast, which is switched off in it: the model runs in the "
                "types of its weights. To run it under autocast, call it under autocast in "
                "forward=(model, batch) -> tensor",
                AutocastWarning,
                stacklevel=2,
            )
        with ExitStack() as modes:
            if torch.is_inference_mode_enabled():
                modes.enter_context(torch.inference_mode(mode=False))
            for device in devices:
                modes.enter_context(torch.autocast(device, enabled=False))
            return function(*given, **named)

    return run


def seeded(function: Callable[Given, Found]) -> Callable[Given, Found]:
    """Run ``function`` with torch's generator seeded by its keyword ``seed`` (default 0), and restore it afterwards.

    The seed is checked first. A DataLoader that shuffles then gives the same batches again when an interrupted call
    is repeated.

    >>> draw = seeded(lambda seed=0: torch.rand(()).item())
    >>> draw() == draw(seed=0) != draw(seed=1)
    True
    """

    @functools.wraps(function)
    def run(*given: Given.args, **named: Given.kwargs) -> Found:
        with seeding(as_seed(named.get("seed", 0))):
            return function(*given, **named)

    return run


@contextmanager
def seeding(seed: int) -> Iterator[None]:
    """Seed torch's generator inside the block, and restore it on exit."""
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        yield


def _devices() -> set[str]:
    accelerator = torch.accelerator.current_accelerator()
    return {"cpu"} if accelerator is None else {"cpu", accelerator.type}


@contextmanager
def full_precision() -> Iterator[None]:
    """Disable TensorFloat-32 in products and convolutions."""
    if hasattr(torch.backends.cudnn, "conv"):  # since PyTorch 2.9
        places = [(torch.backends.cuda.matmul, "fp32_precision"), (torch.backends.cudnn.conv, "fp32_precision")]
        exact: str | bool = "ieee"
    else:
        places, exact = [(torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32")], False
    before = [getattr(place, name) for place, name in places]
    for place, name in places:
        setattr(place, name, exact)
    try:
        yield
    finally:
        for (place, name), value in zip(places, before, strict=True):
            setattr(place, name, value)


@contextmanager
def differentiable(weights: Iterable[Tensor]) -> Iterator[None]:
    """Let weights take part in backward passes."""
    before = [(weight, weight.requires_grad) for weight in weights]
    try:
        for weight, _ in before:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, flag in before:
            weight.requires_grad_(flag)


def not_compiled() -> AbstractContextManager[Any]:
    """Run compiled functions and modules uncompiled."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled; avoid importing the compiler
        return nullcontext()
    eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager
