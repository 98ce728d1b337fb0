"""The stable-rank penalty: weights that are trained to be cut to low rank."""

import torch
from torch import Tensor, nn

from qcompress.errors import OptionsError
from qcompress.model import layers


def stable_rank(model: nn.Module, ranks: dict[str, int]) -> Tensor:
    """A penalty that makes weights easy to cut to given ranks: what lies beyond them, relative to what lies within.

    The sum over the layers of ``Σ_{i>r} σ_i / Σ_{i≤r} σ_i``, after the modified stable rank of BSR (arXiv 2111.15179):
    train with ``penalty=lambda model: strength * stable_rank(model, ranks)``, then factor at these ranks.

    Args:
        model: with the layers still dense.
        ranks: path of a layer → its rank.

    Raises:
        OptionsError: a rank that the layer's weight (as rows) does not have.

    >>> layer = nn.Linear(2, 2, bias=False)
    >>> _ = layer.weight.data.copy_(torch.diag(torch.tensor([3.0, 1.0])))
    >>> round(stable_rank(nn.Sequential(layer), {"0": 1}).item(), 4)
    0.3333
    """
    total = torch.zeros(())
    for name, rank in ranks.items():
        module = model.get_submodule(name)
        values = torch.linalg.svdvals(layers.to_rows(module, layers.weight_of(module)))
        if not 1 <= rank <= len(values):
            raise OptionsError(f"{name!r} has ranks 1 to {len(values)}, asked for {rank}")
        total = total + values[rank:].sum() / values[:rank].sum()
    return total
