"""The repeated blocks of a model, which pass hidden states from one to the next.

They are the entries of the `torch.nn.ModuleList` or `torch.nn.Sequential`, all of one class, that holds most of the
model's weights, or the modules that are named.
"""

import contextlib
from collections.abc import Iterator, Sequence

from torch import nn

from qcompress.errors import ModelError


class Blocks:
    """The repeated blocks of a model whose weights are in memory.

    Args:
        model: any.
        blocks: paths of its blocks, in their order.

    Attributes:
        blocks: the given paths.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        self._model = model
        self.blocks = tuple(blocks)

    @contextlib.contextmanager
    def loaded(self, block: str) -> Iterator[nn.Module]:
        """Keep the weights of the block with the given path in memory inside a ``with`` block."""
        yield self._model.get_submodule(block)

    def block_of(self, path: str) -> int | None:
        """Return the index of the block that contains a module, or None."""
        return next((number for number, block in enumerate(self.blocks) if f"{path}.".startswith(f"{block}.")), None)

    def block_bytes(self, block: str) -> int:
        """Return the bytes of a block's weights in the model's type."""
        return sum(
            parameter.numel() * parameter.element_size() for parameter in self._model.get_submodule(block).parameters()
        )

    @property
    def outside_bytes(self) -> int:
        """Bytes of the weights outside the blocks."""
        inside = {id(own) for block in self.blocks for own in self._model.get_submodule(block).parameters()}
        return sum(own.numel() * own.element_size() for own in self._model.parameters() if id(own) not in inside)


def blocks_of(model: nn.Module, named: str | Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the paths of a model's repeated blocks, in their order.

    Args:
        model: any.
        named: path of the list of blocks, or the paths of the blocks themselves; None to find them.

    Raises:
        ModelError: there is no list of blocks, a named one does not exist, or a block shares a weight with another one
            or with what is outside the blocks.

    >>> def block():
    ...     return nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    >>> model = nn.Sequential(nn.Linear(2, 4), nn.Sequential(block(), block()), nn.Linear(4, 2))
    >>> blocks_of(model), blocks_of(model, ("1.0", "1.1"))
    (('1.0', '1.1'), ('1.0', '1.1'))
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if named is None or isinstance(named, str):
        path = _largest_list(modules) if named is None else named
        if not isinstance(listed := modules.get(path), (nn.ModuleList, nn.Sequential)) or not len(listed):
            lists = [known for known, module in modules.items() if isinstance(module, (nn.ModuleList, nn.Sequential))]
            raise ModelError(
                f"blocks must be the path of a ModuleList or Sequential, or the blocks' own paths, found {path!r}; "
                f"the model has {', '.join(map(repr, lists)) or 'no such list'}"
            )
        paths = tuple(f"{path}.{key}" if path else key for key in listed._modules)
    else:
        paths = tuple(named)
        unknown = [path for path in paths if not path or path not in modules]
        if unknown or not paths:
            raise ModelError(f"blocks must be paths of modules of the model, found {unknown or list(paths)}")
    _require_own_weights(model, modules, paths)
    return paths


def _require_own_weights(model: nn.Module, modules: dict[str, nn.Module], paths: Sequence[str]) -> None:
    """Check that no other block, and nothing outside the blocks, holds a weight of a block.

    Raises:
        ModelError: names what shares a weight.
    """
    inside: dict[int, tuple[str, str]] = {}
    for path in paths:
        for name, parameter in modules[path].named_parameters(prefix=path):
            block, _ = inside.setdefault(id(parameter), (path, name))
            if block != path:
                raise ModelError(f"the blocks {block!r} and {path!r} share a weight: load the model into memory")
    within = tuple(f"{path}." for path in paths)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in inside and not name.startswith(within):
            block, shared = inside[id(parameter)]
            raise ModelError(
                f"the block {block!r} shares the weight {shared!r} with {name!r} outside the blocks, so it cannot be "
                "read on its own: load the model into memory"
            )


def _largest_list(modules: dict[str, nn.Module]) -> str:
    sizes = {
        path: sum(parameter.numel() for parameter in module.parameters())
        for path, module in modules.items()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len({type(block) for block in module}) == 1
    }
    if not sizes:
        raise ModelError(
            "the model has no list of repeated blocks that could be read one by one: name them, or load it whole"
        )
    return max(sizes, key=sizes.__getitem__)
