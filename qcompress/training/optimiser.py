"""Adam for parameters of any dtype, in which steps too small for a half-precision number still accumulate."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_WIDE = "parameter"  # stored with Adam's moments, so that checkpoints include it


class WideAdam(torch.optim.Adam):
    """Adam that updates a float32 copy of every half-precision parameter.

    The parameter is the rounded copy (arXiv 1710.03740, section 3.1). Other parameters are trained directly, and sparse
    gradients are converted to dense ones.

    >>> weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    >>> adam = WideAdam([weight], lr=1e-3)  # half of the least step down from 1 that bfloat16 has is 2e-3
    >>> for _ in range(8):
    ...     weight.grad = torch.ones_like(weight)
    ...     adam.step()
    >>> weight.item()
    0.9921875
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        self._narrow: list[Tensor] = list(parameters)
        wide = [torch.promote_types(parameter.dtype, torch.float32) for parameter in self._narrow]
        self._wide = [
            parameter if parameter.dtype == dtype else nn.Parameter(parameter.detach().to(dtype))
            for parameter, dtype in zip(self._narrow, wide, strict=True)
        ]
        super().__init__(self._wide, lr=lr)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the model's parameters and of the copies."""
        super().zero_grad(set_to_none)
        for narrow, _ in self._copied():
            narrow.grad = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step; closures are not supported."""
        assert closure is None  # noqa: S101
        for narrow in self._narrow:
            if narrow.grad is not None and narrow.grad.is_sparse:  # of an Embedding(sparse=True)
                narrow.grad = narrow.grad.to_dense()
        for narrow, wide in self._copied():
            wide.grad = None if narrow.grad is None else narrow.grad.to(wide)
        super().step()
        for narrow, wide in self._copied():
            narrow.copy_(wide)
            if wide.grad is not None:
                self.state[wide][_WIDE] = wide.detach()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state, including the copies."""
        super().load_state_dict(state_dict)
        with torch.no_grad():
            for narrow, wide in self._copied():
                wide.copy_(self.state[wide].get(_WIDE, narrow))

    def _copied(self) -> list[tuple[Tensor, Tensor]]:
        return [pair for pair in zip(self._narrow, self._wide, strict=True) if pair[0] is not pair[1]]
