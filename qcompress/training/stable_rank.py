"""The stable-rank penalty, for training weights that will be cut to low rank."""

import torch
from torch import Tensor, nn

from qcompress.errors import OptionsError
from qcompress.model import layers


def stable_rank(model: nn.Module, ranks: dict[str, int]) -> Tensor:
    """Return a penalty that makes weights easy to cut to given ranks.

    It is the sum over the layers of ``Σ_{i>r} σ_i / Σ_{i≤r} σ_i``, the singular values beyond the rank relative to
    those within it, after the modified stable rank of BSR (arXiv 2111.15179). Train with
    ``penalty=lambda model: strength * stable_rank(model, ranks)``, then factor at these ranks.

    Args:
        model: model whose layers are still dense.
        ranks: path of a layer → its rank.

    Raises:
        OptionsError: a rank is larger than the layer's weight (as rows) allows.

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
