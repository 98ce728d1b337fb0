"""A vocabulary in blocks: an Embedding split into blocks of words of similar frequency, each compressed separately.

Frequent words deserve more precision than rare ones. `split_vocabulary_` replaces an Embedding by a `BlockedEmbedding`
that computes the same function and whose blocks are Embedding layers. Every block is measured, compressed, saved and
loaded like any other layer, and the solver chooses its rank, sparsity and bits together with all other layers. With
``low_rank(…, whitened=True)``, a block's low-rank factors are weighted by the frequencies of its words.

Besides the blocks, the position of every word is stored once, as a buffer of two bytes per word (four beyond 32,767
words), which is part of the model's fixed bytes. Source: GroupReduce (Chen et al., arXiv 1806.06950): blocks by
frequency, and weighted low rank in each block.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from qcompress.compressed.factored import Foldable, replace_
from qcompress.errors import DataError, ModelError, OptionsError
from qcompress.measuring.inputs.moments import FREQUENCIES
from qcompress.model import layers
from qcompress.model.modes import outside_modes

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VocabularyBlocks:
    """Assignment of words to blocks.

    Attributes:
        block: ``(words,)`` int64, the block of each word, from 0.
        frequencies: ``(words,)`` float64, positive, with sum 1.
    """

    block: Tensor
    frequencies: Tensor

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of words in each block."""
        return tuple(torch.bincount(self.block).tolist())

    @property
    def words(self) -> tuple[Tensor, ...]:
        """The ids of each block, in ascending order."""
        return torch.split(self.block.argsort(stable=True), list(self.sizes))


def count_words(batches: Iterable[Tensor], num_words: int) -> Tensor:
    """Count how often each id occurs in the batches, ``(num_words,)`` int64.

    Raises:
        DataError: an id is outside the vocabulary.

    >>> count_words([torch.tensor([[0, 2], [2, 2]])], num_words=4)
    tensor([1, 0, 3, 0])
    """
    counts = torch.zeros(num_words, dtype=torch.int64)
    for batch in batches:
        ids = batch.flatten()
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < num_words:
            raise DataError(f"ids must be from 0 to {num_words - 1}, found {int(ids.min())} to {int(ids.max())}")
        counts += torch.bincount(ids.cpu(), minlength=num_words)
    return counts


def vocabulary_blocks(
    counts: Tensor | Sequence[float], num_blocks: int = 4, *, sizes: Sequence[int] | None = None
) -> VocabularyBlocks:
    """Divide words into blocks of descending frequency; of equally frequent words the lower id comes first.

    Args:
        counts: number of occurrences of each word. One is added to each, because an unseen word may still occur.
        num_blocks: number of blocks; each has about twice as many words as the previous one.
        sizes: number of words in each block, used instead of ``num_blocks``.

    Raises:
        OptionsError: the counts are invalid, or the sizes do not add up to the vocabulary.

    >>> blocks = vocabulary_blocks([5, 0, 9, 1, 0, 2, 0], num_blocks=3)
    >>> [words.tolist() for words in blocks.words]
    [[2], [0, 5], [1, 3, 4, 6]]
    """
    often = torch.as_tensor(counts, dtype=torch.float64)
    if often.ndim != 1 or not len(often) or not bool(torch.isfinite(often).all()) or float(often.min()) < 0:
        raise OptionsError("counts must be one finite number, not negative, for every word of the vocabulary")
    if sizes is None:
        if num_blocks < 1 or 2**num_blocks - 1 > len(often):
            most = int(math.log2(len(often) + 1))
            raise OptionsError(f"num_blocks must be 1 to {most} for {len(often)} words, got {num_blocks}")
        stops = [len(often) * (2 ** (i + 1) - 1) // (2**num_blocks - 1) for i in range(num_blocks)]
        sizes = [stop - start for start, stop in zip([0, *stops], stops, strict=False)]
    if not sizes or min(sizes) < 1 or sum(sizes) != len(often):
        raise OptionsError(f"sizes must be positive and add up to {len(often)} words, found {list(sizes)}")
    block = torch.empty(len(often), dtype=torch.int64)
    block[often.argsort(descending=True, stable=True)] = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return VocabularyBlocks(block=block, frequencies=(often + 1) / (often + 1).sum())


class BlockedEmbedding(Foldable):
    """An Embedding whose words are divided into blocks, which are Embeddings or their compressed replacements.

    Every block is looked up for all positions, and positions of other blocks are masked. Shapes therefore do not depend
    on the words, so that the module can be exported and its cost is known. No matrix of the whole vocabulary is built.

    >>> blocks = vocabulary_blocks([1, 5, 3], sizes=[1, 2])
    >>> blocked = BlockedEmbedding(nn.Embedding(3, 2, _weight=torch.tensor([[0.0, 1], [2, 3], [4, 5]])), blocks)
    >>> blocked(torch.tensor([2, 1])).tolist(), blocked.position.tolist()
    ([[4.0, 5.0], [2.0, 3.0]], [1, 0, 2])
    """

    own_buffers = ("position",)
    position: Tensor

    def __init__(self, embedding: nn.Embedding, blocks: VocabularyBlocks) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx
        self.sizes = blocks.sizes
        weight = embedding.weight
        order = torch.cat(blocks.words)
        narrow = torch.int16 if len(order) <= torch.iinfo(torch.int16).max else torch.int32
        self.register_buffer("position", order.argsort().to(weight.device, narrow))
        self.blocks = nn.ModuleList()
        for words in blocks.words:
            padding = (
                [] if embedding.padding_idx is None else (words == embedding.padding_idx).nonzero().view(-1).tolist()
            )
            rows = weight.detach()[words.to(weight.device)].clone()
            member = _embedding(rows, padding[0] if padding else None, sparse=embedding.sparse)
            member.weight.requires_grad_(weight.requires_grad)
            setattr(member, FREQUENCIES, (blocks.frequencies[words] / blocks.frequencies[words].sum()).float())
            self.blocks.append(member)
        self.train(embedding.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (name of the argument of nn.Embedding)
        """``(…)`` ids → ``(…, features)``."""
        place = self.position.index_select(0, input.reshape(-1)).reshape(input.shape).long()
        features: Tensor | None = None
        start = 0
        for block, size in zip(self.blocks, self.sizes, strict=True):
            local = place - start
            inside = (local >= 0) & (local < size)
            block_features: Tensor = block(torch.where(inside, local, 0))
            features = block_features if features is None else torch.where(inside[..., None], block_features, features)
            start += size
        assert features is not None  # noqa: S101
        return features

    def to_dense(self) -> nn.Embedding:
        """Return one Embedding with its words in the original order."""
        members = [block.to_dense() if isinstance(block, Foldable) else block for block in self.blocks]
        weight = torch.cat([layers.weight_of(member).detach() for member in members])
        sparse = any(bool(member.sparse) for member in members)
        dense = _embedding(weight[self.position.long()], self.padding_idx, sparse=sparse)
        dense.weight.requires_grad_(any(parameter.requires_grad for parameter in self.parameters()))
        return dense.train(self.training)

    def extra_repr(self) -> str:
        """Same as for an Embedding, with the sizes of the blocks."""
        return f"{self.num_embeddings}, {self.embedding_dim}, sizes={list(self.sizes)}"


@outside_modes
def split_vocabulary_(model: Model, name: str, blocks: VocabularyBlocks) -> Model:
    """Turn the Embedding called ``name`` into a `BlockedEmbedding`, in place; do this before measuring.

    For `load_compressed`, use a ``model_factory`` that does the same with blocks of the same sizes; the assignment of
    words is read from the file. `qcompress.fold_` restores one dense Embedding.

    Raises:
        ModelError: there is no such Embedding, or it shares its weight or changes it when it runs.
        OptionsError: the blocks belong to another vocabulary.

    >>> model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 2))
    >>> split_vocabulary_(model, "0", vocabulary_blocks([9, 1, 1, 7, 1, 1], sizes=[2, 4]))
    Sequential(
      (0): BlockedEmbedding(
        6, 4, sizes=[2, 4]
        (blocks): ModuleList(
          (0): Embedding(2, 4)
          (1): Embedding(4, 4)
        )
      )
      (1): Linear(in_features=4, out_features=2, bias=True)
    )
    """
    try:
        embedding = model.get_submodule(name)
    except AttributeError:
        embedding = None
    if not name or not _is_embedding(embedding):
        known = [path for path, module in model.named_modules() if path and _is_embedding(module)]
        actual = "nothing" if embedding is None else type(embedding).__name__
        raise ModelError(f"{name!r} is {actual}, not an Embedding inside the model; there are: {', '.join(known)}")
    assert isinstance(embedding, nn.Embedding)  # noqa: S101
    if reason := layers.why_unsupported(embedding):
        raise ModelError(f"{name!r} cannot be split: {reason}")
    if embedding.scale_grad_by_freq:
        raise ModelError(f"{name!r} cannot be split: it scales gradients by the words of a batch")
    owners = [
        path
        for path, module in model.named_modules()
        if module is not embedding and any(parameter is embedding.weight for parameter in module._parameters.values())
    ]
    if owners:
        raise ModelError(f"{name!r} cannot be split: its weight is shared with {', '.join(owners)}")
    if len(blocks.block) != embedding.num_embeddings:
        raise OptionsError(f"the blocks have {len(blocks.block)} words, {name!r} has {embedding.num_embeddings}")
    replace_(embedding, BlockedEmbedding(embedding, blocks))
    return model


def _is_embedding(module: nn.Module | None) -> bool:
    """Whether a module looks words up as PyTorch's Embedding does, whatever its class is called."""
    return isinstance(module, nn.Embedding) and layers.is_plain(module)


def _embedding(weight: Tensor, padding_idx: int | None, *, sparse: bool) -> nn.Embedding:
    words, features = weight.shape
    return nn.Embedding(words, features, padding_idx=padding_idx, sparse=sparse, _weight=weight)
