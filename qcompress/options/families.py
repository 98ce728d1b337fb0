"""Families of options: pruning and quantization, low rank, and removed channels."""

from collections.abc import Iterable
from typing import Any

from qcompress.errors import OptionsError
from qcompress.options.base import Options
from qcompress.scalars import as_flag, plain
from qcompress.transforms.base import Offer
from qcompress.transforms.channels import KeepChannels
from qcompress.transforms.low_rank.factors import RankRule
from qcompress.transforms.quantize.group_wise import GroupWise
from qcompress.transforms.quantize.prune_quantize import PruneQuantize

SPARSITY, SPARSITY_IN_GROUPS = (0.0, 0.5, 0.75), (0.0,)
"""Default shares of the weights to prune; engines for grouped codes do not store which weights are pruned."""


def prune_quantize(
    bits: Iterable[int] = (2, 3, 4, 6, 8),
    sparsity: Iterable[float] | None = None,
    *,
    group_size: int | Iterable[int | None] | None = None,
    symmetric: bool = True,
    scale_dtype: str | None = None,
    compensated: bool = False,
) -> Options:
    """Prune to each sparsity, then quantize to each number of bits in groups of each size: all combinations.

    Args:
        bits: numbers of bits, each from 2 to 16; at most 8 in groups, with zero points or with short scales.
        sparsity: shares of the weights to prune, each from 0 to below 1. The default is 0, 0.5 and 0.75 for whole rows,
            and 0 for groups, because engines for grouped codes do not store which weights are pruned.
        group_size: number of weights of a row that share a scale, for example 32 or (32, 128); None for whole rows.
        symmetric: False to use zero points, so that a group's codes span exactly the range of its weights.
        scale_dtype: ``"float16"``, ``"bfloat16"`` or ``"float32"``. The default is float32 for whole rows without zero
            points; otherwise bfloat16 for bfloat16 weights and float16 for all others.
        compensated: whether the remaining weights are adjusted to compensate the error on the calibration inputs (in
            Linear layers and all kinds of convolutions): lower loss at the same size. `measure` then
            stores ``(in, in)`` second moments of each such layer (for a convolution, of the unfolded input; for a
            grouped convolution, of each group's unfolded input).

    Raises:
        OptionsError: a list is empty or a value is outside its range.

    >>> prune_quantize(bits=(2, 4), sparsity=(0, 0.5))
    Options(2 bits; 4 bits; 2 bits, 50 % sparse; 4 bits, 50 % sparse)
    >>> prune_quantize(bits=(4,), group_size=(32, 128), symmetric=False)
    Options(4 bits in groups of 32, asymmetric; 4 bits in groups of 128, asymmetric)
    """
    all_bits = listed(bits, "bits", "(2, 4, 8)")
    sizes = listed(group_size, "group_size", "(32, 128)") if isinstance(group_size, Iterable) else [group_size]
    given = None if sparsity is None else listed(sparsity, "sparsity", "(0, 0.5)")
    offers: list[Offer] = []
    for size in sizes:
        shares = given or (SPARSITY if size is None else SPARSITY_IN_GROUPS)
        each = [(count, share, compensated) for share in shares for count in all_bits]
        if size is None and symmetric is True and scale_dtype in (None, "float32"):
            offers += [PruneQuantize(*values) for values in each]
        else:
            offers += [
                GroupWise(*values, group_size=size, symmetric=symmetric, scale_dtype=scale_dtype) for values in each
            ]
    return Options(tuple(offers))


def low_rank(
    ratios: Iterable[float] | None = None,
    *,
    ranks: Iterable[int] | None = None,
    energies: Iterable[float] | None = None,
    kinds: Iterable[str] = ("channels", "spatial"),
    slices: Iterable[int] = (2, 4),
    whitened: bool = True,
) -> Options:
    """Low-rank factors in place of Linear and ungrouped Conv2d layers: every kind at every rank.

    Args:
        ratios: shares of the number of weights, above 0 and below 1; each gives the largest rank whose factors fit into
            it. The default, if neither ranks nor energies are given, is one eighth to six eighths.
        ranks: ranks, from 1.
        energies: shares of the weight's squared norm, above 0 and below 1; each gives the smallest rank that retains
            it. The rank depends on the weight; the option that is measured, solved for and saved states it.
        kinds: ``"channels"``: the weight as ``(out, in)`` matrix; ``"spatial"``: a column, then a row of a kernel;
            ``"tucker"``: 1×1, kernel, 1×1; ``"sliced"``: a rank for each slice of the input channels. Linear layers
            support "channels" and "sliced" only.
        slices: numbers of slices, for ``"sliced"``.
        whitened: whether the factors are closest on the calibration inputs; False weighs all inputs alike. If True,
            `measure` stores ``(in, in)`` second moments of each such layer (for a convolution, of the unfolded input).

    Ranks that save neither bytes nor macs in a layer are not offered there. ``low_rank(…).then(prune_quantize(…))``
    prunes and quantizes the factors.

    Raises:
        OptionsError: a list is empty or a value is outside its range.

    >>> low_rank(ratios=(0.25, 0.5), kinds=("channels",))
    Options(rank for 25 % of the weights, whitened; rank for 50 % of the weights, whitened)
    >>> low_rank(energies=(0.9,), kinds=("spatial", "sliced"), slices=(2,), whitened=False)
    Options(spatial rank for 90 % of the energy; 2 slices rank for 90 % of the energy)
    """
    if ratios is None and ranks is None and energies is None:
        ratios = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
    given = {"ratio": ("ratios", ratios, "(0.25, 0.5)"), "rank": ("ranks", ranks, "(8, 16)")}
    given["energy"] = ("energies", energies, "(0.9, 0.99)")
    rules = [(by, value) for by, (name, values, example) in given.items() if values is not None
             for value in listed(values, name, example)]  # fmt: skip
    counts = listed(slices, "slices", "(2, 4)")
    forms = [(kind, count) for kind in listed(kinds, "kinds", "('channels', 'spatial')")
             for count in (counts if kind == "sliced" else [1])]  # fmt: skip
    return Options(
        tuple(
            RankRule(by=by, value=value, form=form, slices=count, whitened=as_flag(whitened, "whitened"))
            for form, count in forms
            for by, value in rules
        )
    )


def prune_channels(
    keep: Iterable[float] = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125),
    *,
    granularity: int = 1,
    scores: str = "obs",
    reconstructed: bool = True,
) -> Options:
    """Remove channels, heads and gated units with everything that belongs to them, leaving a smaller dense network.

    Args:
        keep: shares of the channels of a coupled set to keep, each below 1. 0 leaves out what the set belongs to, such
            as an attention layer or an MLP with a connection around it.
        granularity: number of channels that are removed together; the number that stays is a multiple of it.
        scores: order in which channels are removed. ``"obs"``: by the loss that remains after the other channels
            compensate, one channel after another; ``"fisher"``: by the linearised change of the outputs; ``"l1"``: by
            the mean absolute weight.
        reconstructed: whether the layers that read a set are refitted to the remaining channels, by least squares on
            the calibration data. `measure` then stores ``(in, in)`` second moments of each of them.

    Raises:
        OptionsError: a list is empty or a value is outside its range.

    >>> prune_channels(keep=(0.75, 0.5))
    Options(75 % of the channels; 50 % of the channels)
    """
    shares = listed(keep, "keep", "(0.75, 0.5)")
    return Options(tuple(KeepChannels(plain(share), plain(granularity), scores, reconstructed) for share in shares))


def listed(values: Any, name: str, example: str) -> list[Any]:
    """Return an argument that must be a list and not empty.

    Raises:
        OptionsError: it is not; the message gives its name and an example.
    """
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise OptionsError(f"{name} must be a list, such as {example}, found {values!r}")
    items = list(values)
    if not items:
        raise OptionsError(f"{name} is empty: give at least one, for example {example}")
    return items
