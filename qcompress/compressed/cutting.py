"""Cut indices out of a model's tensors, in place: modules, names, hooks and parameters remain the same objects."""

from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor, nn

from qcompress.model.tensors import held_tensors

Cuts = Mapping[tuple[str, int], Sequence[int]]
"""(Name of a tensor, dimension) → indices to remove, in ascending order."""

SIZES = (
    *("num_heads", "num_attention_heads", "n_heads", "num_key_value_heads", "num_kv_heads"),
    *("split_size", "all_head_size", "inner_dim"),
)
"""Names under which transformers' attention stores numbers of heads, or of outputs of the layers of `HEADS`."""

HEADS = (
    *("q_proj", "k_proj", "v_proj", "q", "k", "v", "query", "key", "value", "q_lin", "k_lin", "v_lin"),
    *("query_proj", "key_proj", "value_proj", "c_attn", "q_attn", "query_key_value", "qkv", "Wqkv", "qkv_proj"),
)
"""Names of the layers in such a module whose outputs are the heads; its other layers say nothing about them."""


def cut_(model: nn.Module, cuts: Cuts) -> None:
    """Remove indices from tensors, and update the sizes of the layers that hold them.

    >>> layer = nn.Linear(3, 4)
    >>> cut_(layer, {("weight", 0): [1], ("bias", 0): [1]})
    >>> layer
    Linear(in_features=3, out_features=3, bias=True)
    """
    tensors = {item.name: item.tensor for item in held_tensors(model)}
    widths = _widths(model)
    with torch.no_grad():
        for (name, dim), indices in cuts.items():
            tensor = tensors[name]
            stay = np.setdiff1d(np.arange(tensor.shape[dim]), indices)
            tensor.data = tensor.data.index_select(dim, torch.from_numpy(stay).to(tensor.device)).contiguous()
            tensor.grad = None
    changed = {id(tensors[name]): cuts.get((name, 0), ()) for name, _ in cuts}
    for module in model.modules():
        held = [*module._parameters.values(), *module._buffers.values()]
        if any(id(tensor) in changed for tensor in held):
            _follow(module, changed.get(id(getattr(module, "weight", None)), ()))
    _follow_heads(model, widths)


def together(first: Cuts, second: Cuts, model: nn.Module) -> dict[tuple[str, int], list[int]]:
    """Combine two successive cuts into one cut of the original's tensors.

    Tensors that ``model`` no longer has, as smaller layers replaced theirs, keep their first cuts.

    Args:
        first: cut of the original.
        second: cut of the result of the first one.
        model: model after both cuts.

    >>> layer = nn.Linear(3, 5)
    >>> first, second = {("weight", 0): [1]}, {("weight", 0): [0, 2]}
    >>> cut_(layer, first), cut_(layer, second)
    (None, None)
    >>> together(first, second, layer)
    {('weight', 0): [0, 1, 3]}
    """
    shapes = {item.name: item.tensor.shape for item in held_tensors(model)}
    joined = {}
    for place in dict.fromkeys([*first, *second]):
        gone, more = list(first.get(place, ())), list(second.get(place, ()))
        if place[0] not in shapes:
            joined[place] = gone
            continue
        left = np.setdiff1d(np.arange(shapes[place[0]][place[1]] + len(gone) + len(more)), gone)
        joined[place] = sorted([*gone, *left[more].tolist()])
    return joined


def beyond(cuts: Cuts, earlier: Cuts, model: nn.Module) -> dict[tuple[str, int], list[int]]:
    """Return what ``cuts`` of the original remove from a model that ``earlier`` cuts were already made in.

    Tensors that the model no longer has have lost nothing more if they were cut before, as smaller layers replaced
    theirs; of others all is returned, for the caller to refuse.

    >>> layer = nn.Linear(3, 5)
    >>> cut_(layer, {("weight", 0): [1]})
    >>> beyond({("weight", 0): [0, 1, 3]}, {("weight", 0): [1]}, layer)
    {('weight', 0): [0, 2]}
    """
    shapes = {item.name: item.tensor.shape for item in held_tensors(model)}
    left = {}
    for (name, dim), gone in cuts.items():
        before = earlier.get((name, dim), ())
        if name not in shapes:
            if not before:
                left[name, dim] = list(gone)
            continue
        present = np.setdiff1d(np.arange(shapes[name][dim] + len(before)), before)
        left[name, dim] = np.flatnonzero(np.isin(present, gone)).tolist()
    return left


def _widths(model: nn.Module) -> dict[str, dict[str, int]]:
    """Map each module (by path) to the numbers of outputs of the layers in it that make heads (by name)."""
    widths: dict[str, dict[str, int]] = {}
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        width = getattr(module, "out_features", getattr(module, "nf", None))
        if name in HEADS and isinstance(width, int):
            widths.setdefault(parent, {})[name] = width
    return widths


def _follow_heads(model: nn.Module, before: Mapping[str, Mapping[str, int]]) -> None:
    """Update the sizes that attention stores (`SIZES`) where all its layers have lost the same share of the heads."""
    after = _widths(model)
    for path, widths in before.items():
        ratios = {Fraction(after.get(path, {}).get(name, width), width) for name, width in widths.items()}
        if path not in after or len(ratios) > 1 or ratios == {1}:
            continue
        module = model.get_submodule(path)
        for attribute in SIZES:
            size = vars(module).get(attribute)  # a property follows automatically
            if type(size) is int and (smaller := size * min(ratios)).denominator == 1:
                setattr(module, attribute, int(smaller))


def _follow(module: nn.Module, gone: Sequence[int]) -> None:
    """Set the sizes stored in a layer to those of its tensors.

    Args:
        module: the layer.
        gone: indices that its weight lost along dimension 0.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return
    if isinstance(module, nn.modules.conv._ConvNd):
        _follow_convolution(module, weight, gone)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = module.num_groups * len(weight) // module.num_channels
        module.num_channels = len(weight)
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = len(weight)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)
    elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # of transformers: a transposed linear layer
        setattr(module, "nf", weight.shape[1])  # noqa: B010 - torch's type has no such attribute


def _follow_convolution(module: nn.modules.conv._ConvNd, weight: Tensor, gone: Sequence[int]) -> None:
    """Groups with something left stay, whatever the others lose: inputs, outputs, or everything."""
    before = len(weight) + len(gone)
    stay = np.setdiff1d(np.arange(before), gone)
    module.groups = max(len(np.unique(stay // (before // module.groups))), 1)
    first, second = len(weight), weight.shape[1] * module.groups
    module.in_channels, module.out_channels = (first, second) if module.transposed else (second, first)
