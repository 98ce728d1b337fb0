"""Options: what is on offer, what of it is of use for a weight, and what is refused."""

import json

import pytest
import torch

from qcompress.errors import OptionsError
from qcompress.options import Options, low_rank, prune_quantize, transform_from_json
from qcompress.transforms.base import Keep, Target, Transform, Weight
from qcompress.transforms.low_rank.factors import LowRank
from qcompress.transforms.quantize.prune_quantize import PruneQuantize


def weight(channels: int, per_channel: int, dtype: torch.dtype = torch.float32) -> tuple[Target, torch.Tensor]:
    rows = torch.randn(channels, per_channel, generator=torch.Generator().manual_seed(0)).to(dtype)
    target = Target(layer="Linear", channels=channels, per_channel=per_channel, dtype=dtype, macs=rows.numel())
    return target, rows


def offered_for(options: Options, target: Target, rows: torch.Tensor) -> tuple[Transform, ...]:
    return tuple(fitted.transform for fitted in options.for_weight(Weight(rows, target)))


def test_all_combinations_are_offered_once() -> None:
    options = prune_quantize(bits=(2, 4, 4), sparsity=(0, 0.5, 0.0))
    assert options.offers == (
        PruneQuantize(2), PruneQuantize(4), PruneQuantize(2, 0.5), PruneQuantize(4, 0.5),
    )  # fmt: skip


def test_sums_keep_the_order_and_drop_what_is_double() -> None:
    options = prune_quantize(bits=(4,), sparsity=(0,)) + low_rank(ratios=(0.5,), kinds=("channels",), whitened=False)
    assert (options + options) == options
    assert [transform.label for transform in options.offers] == ["4 bits", "rank for 50 % of the weights"]
    with pytest.raises(TypeError):
        options + 3  # type: ignore[operator]


def test_labels_are_distinct() -> None:
    options = prune_quantize(sparsity=(0, 0.001, 0.5)) + low_rank(ratios=(1 / 3, 0.333, 0.34), whitened=False)
    labels = [transform.label for transform in options.offers]
    assert len(set(labels)) == len(labels) == 15 + 2 * 3


def test_options_come_back_from_json() -> None:
    options = prune_quantize() + low_rank(whitened=False)
    assert Options.from_json(json.loads(json.dumps(options.to_json()))) == options
    assert transform_from_json(Keep().to_json()) == Keep()


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (
            {"kind": "zip"},
            "'zip'; known: keep, prune_quantize, group_wise, integer_product, prune_filters, low_rank, rank_rule",
        ),
        ("low_rank", "'low_rank'; known"),
        ({"kind": "low_rank", "ratio": 0.5}, "invalid fields for a low_rank"),
        ({"kind": "prune_quantize", "bits": 99}, "from 2 to 16, found 99"),
    ],
)
def test_json_that_is_no_transform_is_refused(value: object, found: str) -> None:
    with pytest.raises(OptionsError, match=found):
        transform_from_json(value)


def test_json_that_is_no_list_is_refused() -> None:
    with pytest.raises(OptionsError, match="a list of transforms, found dict"):
        Options.from_json({})


def test_factors_are_whitened_unless_told_otherwise() -> None:
    assert low_rank() == low_rank(whitened=True) != low_rank(whitened=False)


@pytest.mark.parametrize("make", [lambda: prune_quantize(bits=()), lambda: low_rank(ratios=[])])
def test_empty_lists_are_refused(make: object) -> None:
    with pytest.raises(OptionsError, match=r"is empty: give at least one"):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("make", [lambda: prune_quantize(bits=4), lambda: low_rank(ratios="0.5")])
def test_a_single_value_is_refused_with_an_example(make: object) -> None:
    with pytest.raises(OptionsError, match=r"must be a list, such as \("):
        make()  # type: ignore[operator]


def test_what_is_no_transform_is_refused() -> None:
    with pytest.raises(OptionsError, match="options must be transforms"):
        Options(("4 bits",))  # type: ignore[arg-type]


def test_keep_comes_first_and_what_does_not_fit_is_left_out() -> None:
    target, rows = weight(3, 2)
    assert offered_for(prune_quantize(), target, rows)[0] == Keep()
    useless = prune_quantize(bits=(16,), sparsity=(0,)) + low_rank(ratios=(0.1,), whitened=False)
    assert offered_for(useless, target, rows) == (Keep(),)


def test_only_options_that_no_other_one_beats_are_left() -> None:
    target, rows = weight(24, 60)
    offered = prune_quantize()
    left = offered_for(offered, target, rows)[1:]

    def figures(transform: PruneQuantize) -> tuple[int, float]:
        error = (transform.approximate(Weight(rows, target)).double() - rows.double()).square().sum()
        return transform.size_bytes(target), float(error)

    for transform in offered.offers:
        size_bytes, error = figures(transform)
        beaten = any(
            other != transform and figures(other)[0] <= size_bytes and figures(other)[1] <= error
            for other in offered.offers
        )
        assert (transform in left) != beaten
    assert PruneQuantize(8) in left
    assert len(left) < len(offered.offers)


def test_of_equal_options_one_is_left() -> None:
    target, rows = weight(8, 8)
    assert len(offered_for(prune_quantize(sparsity=(0,)), target, torch.zeros_like(rows))) == 2
    ratios = (0.5, 0.501, 0.502)  # all of rank 2
    assert offered_for(low_rank(ratios, whitened=False), target, rows) == (Keep(), LowRank(ranks=2))


def test_a_half_precision_weight_is_offered_less() -> None:
    target, rows = weight(16, 64, torch.float16)
    assert PruneQuantize(16) not in offered_for(prune_quantize(bits=(8, 16)), target, rows)
    target, rows = weight(16, 64)
    assert PruneQuantize(16) in offered_for(prune_quantize(bits=(8, 16)), target, rows)
