"""One-shot unstructured pruning by second-order scores: the arithmetic of WoodFisher (arXiv 2004.14340).

The empirical Fisher matrix ``F`` is the mean over samples of the outer product of the loss's gradient with itself. It
is kept in diagonal blocks of consecutive weights of a layer; ``H = F + damping·I`` stands for the loss's second
derivatives. Removing weight ``i`` alone, while the others of its block move to make up for it, costs
``½ w_i² / [H⁻¹]_ii``. Removing a set ``S`` of a block's weights moves the kept ones ``R`` by ``H_RR⁻¹·H_RS·w_S``, the
minimum of the quadratic model for all removals together (the paper adds up the updates of single removals). Blocks are
in float64 and inverted by Cholesky factors; blocks smaller than the number of samples are cheaper so than by Woodbury's
formula.
"""

from collections.abc import Iterator, Mapping
from math import floor

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

Layers = Mapping[str, Tensor]
"""Name of a weight → one value for each of its entries."""

CHUNK = 64  # samples whose gradients are in memory at the same time


class Fisher:
    """The block-diagonal empirical Fisher matrix of some weights of a model.

    Args:
        weights: name → weight; the blocks follow its entries in the order of memory.
        size: entries of a block; the last of a weight may be smaller.
    """

    def __init__(self, weights: Layers, size: int) -> None:
        self._size, self._count = size, 0
        self.weights = {name: weight.detach().double().flatten() for name, weight in weights.items()}
        self._sums = {
            name: [torch.zeros(len(part), len(part), dtype=torch.float64) for part in weight.split(size)]
            for name, weight in self.weights.items()
        }

    def add(self, gradients: Layers) -> None:
        """Add samples, given the gradients ``(samples, *weight's shape)`` of their losses."""
        self._count += len(next(iter(gradients.values())))
        for name, sums in self._sums.items():
            for total, part in zip(sums, gradients[name].flatten(1).split(self._size, dim=1), strict=True):
                exact = part.double()
                total.addmm_(exact.T, exact)

    def mean_diagonal(self) -> float:
        """Return the mean square of a gradient's entry."""
        diagonals = [total.diagonal() for sums in self._sums.values() for total in sums]
        return float(torch.cat(diagonals).mean()) / self._count

    def diagonal_scores(self) -> dict[str, Tensor]:
        """Return ``½ F_ii w_i²`` of every weight."""
        diagonals = {name: torch.cat([total.diagonal() for total in sums]) for name, sums in self._sums.items()}
        return {name: diagonals[name] / self._count * weight.square() / 2 for name, weight in self.weights.items()}

    def scores(self, damping: float) -> dict[str, Tensor]:
        """Return ``½ w_i² / [H⁻¹]_ii`` of every weight."""
        return {
            name: torch.cat([part.square() / 2 / inverse_diagonal(h, damping) for h, part in self.blocks(name)])
            for name in self.weights
        }

    def updated(self, kept: Layers, damping: float) -> dict[str, Tensor]:
        """Return the weights after removing those that are not kept and updating the others of each block."""
        updated = {}
        for name in self.weights:
            masks = kept[name].split(self._size)
            blocks = zip(self.blocks(name), masks, strict=True)
            updated[name] = torch.cat([without(block, part, mask, damping) for (block, part), mask in blocks])
        return updated

    def blocks(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every block of ``F`` and of the weight."""
        for total, part in zip(self._sums[name], self.weights[name].split(self._size), strict=True):
            yield total / self._count, part


def inverse_diagonal(fisher: Tensor, damping: float) -> Tensor:
    """Return the diagonal of the inverse of ``fisher + damping·I``."""
    return torch.cholesky_inverse(torch.linalg.cholesky(_damped(fisher, damping))).diagonal()


def without(fisher: Tensor, weights: Tensor, kept: Tensor, damping: float) -> Tensor:
    """Return the weights with 0 where not kept and, elsewhere, what minimises ``½ dᵀ·H·d`` of the change ``d``.

    >>> fisher = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    >>> without(fisher, torch.tensor([4.0, 1.0]), torch.tensor([True, False]), 1.0)
    tensor([4.5000, 0.0000])
    """
    new, rows = torch.zeros_like(weights), fisher[kept]
    pull = rows[:, ~kept] @ weights[~kept]
    root = torch.linalg.cholesky(_damped(rows[:, kept], damping))
    new[kept] = weights[kept] + torch.cholesky_solve(pull[:, None], root)[:, 0]
    return new


def _damped(fisher: Tensor, damping: float) -> Tensor:
    return fisher + torch.diag(fisher.new_full((len(fisher),), damping))


def per_sample_gradients(model: nn.Module, names: list[str], inputs: Tensor, labels: Tensor) -> Iterator[Layers]:
    """Yield the gradients of each sample's cross entropy with respect to the named parameters, in chunks of samples."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    chosen = {name: parameters.pop(name) for name in names}

    def loss(own: dict[str, Tensor], sample: Tensor, label: Tensor) -> Tensor:
        output = functional_call(model, {**parameters, **own}, (sample[None],))
        return nn.functional.cross_entropy(output, label[None])

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))
    for rows, classes in zip(inputs.split(CHUNK), labels.split(CHUNK), strict=True):
        yield gradients(chosen, rows, classes)


def kept_in_each(scores: Layers, sparsity: float) -> dict[str, Tensor]:
    """Return which weights are kept if the same share of every layer is removed, the lowest scores first."""
    return {name: _kept(layer, floor(sparsity * len(layer))) for name, layer in scores.items()}


def kept_in_all(scores: Layers, sparsity: float) -> dict[str, Tensor]:
    """Return which weights are kept if all layers are ranked together; as many are removed as by `kept_in_each`."""
    removed = sum(floor(sparsity * len(layer)) for layer in scores.values())
    kept = _kept(torch.cat(list(scores.values())), removed)
    return dict(zip(scores, kept.split([len(layer) for layer in scores.values()]), strict=True))


def _kept(scores: Tensor, removed: int) -> Tensor:
    kept = torch.ones(len(scores), dtype=torch.bool)
    kept[torch.argsort(scores, stable=True)[:removed]] = False
    return kept
