"""How far a model's outputs move if every layer is only rounded differently.

An engine adds numbers in another order, so each of its layers differs by rounding errors. Usually the outputs then
differ as little. But a model that rounds its activations to few bits can be chaotic: an error of 1e-7 changes one
rounded number by a whole step, the next layer sees a larger error, and after some dozens of layers the outputs differ
by as much as the rounding of activations itself does. No two implementations agree on such a model, and a comparison
of outputs can ask for no more than for what the model does to itself.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 4.0
"""Standard deviation of the errors, in units of the last place."""


@contextlib.contextmanager
def rounded_differently(model: nn.Module, seed: int) -> Iterator[None]:
    """Add random errors in the last places to the outputs of all innermost layers inside the block.

    >>> model = nn.Linear(4, 4).requires_grad_(False)
    >>> before = model(torch.ones(4))
    >>> with rounded_differently(model, seed=0):
    ...     change = (model(torch.ones(4)) - before).abs().max()
    >>> 0 < float(change) < 1e-5
    True
    """
    generator = torch.Generator().manual_seed(seed)

    def moved(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        noise = torch.randn(output.shape, generator=generator).to(output)
        return output * (1 + STEPS * torch.finfo(output.dtype).eps * noise)

    innermost = [module for module in model.modules() if not any(module.children())]
    hooks = [module.register_forward_hook(moved) for module in innermost]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
