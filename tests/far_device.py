"""A second device that is none: tensors that say they are on ``far`` hold their numbers in a CPU tensor.

As on an accelerator, an operation on tensors of both devices is refused, but for those that PyTorch takes there:
copies, numbers without dimensions, and indices from the CPU for tensors there (not the other way round). So a run on it
finds what was left on the wrong device. It is registered for the whole process, so tests run it in one of their own.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "far"
ACROSS = {"copy_", "_copy_from", "index", "index_put", "index_put_", "_index_put_impl_"}


class Far(Tensor):
    """A tensor on the device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> "Far":
        kind = {"dtype": inner.dtype, "device": torch.device(NAME, 0), "requires_grad": requires_grad}
        far = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), **kind
        )
        far.inner = inner
        return far

    def __init__(self, inner: Tensor, requires_grad: bool = False) -> None:
        pass

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, other: "Far") -> None:
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.inner = other.inner

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Far":
        if id(self) not in memo:
            copied = Far(self.inner.detach().clone(), requires_grad=self.requires_grad)
            if getattr(self, "_is_param", False):
                copied._is_param = True
            memo[id(self)] = copied
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return operate(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """While open, the device can be asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return operate(func, args, kwargs or {})


def operate(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the numbers; its results are on the device where its tensors are, or where it says."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    wrappers = {id(own.inner): own for own in tensors if isinstance(own, Far)}
    name = func._schema.name.removeprefix("aten::")
    device = kwargs.get("device")
    if wrappers and (name not in ACROSS or ("index" in name and not isinstance(args[0], Far))):
        near = [own for own in tensors if not isinstance(own, Far) and own.ndim]
        if near:
            raise RuntimeError(f"{name}: expected all tensors on one device, found {NAME} and {near[0].device}")
    far = bool(wrappers) if device is None else torch.device(device).type == NAME
    if name in ("copy_", "index_put_", "_index_put_impl_"):
        far = isinstance(args[0], Far)
    plain = {
        key: torch.device("cpu") if key == "device" and value is not None else value for key, value in kwargs.items()
    }
    output = func(*tree_map(_inner, args), **tree_map(_inner, plain))
    if not far:
        return output

    def outside(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return wrappers[id(value)] if id(value) in wrappers else Far(value)

    return tree_map(outside, output)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Far) else value


class Backend(_DummyBackendModule):
    """What PyTorch asks of a device: it draws no random numbers of its own."""

    def get_rng_state(self, device: Any = 0) -> Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = 0) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def register() -> None:
    """Make ``torch.device("far")`` known to this process."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
