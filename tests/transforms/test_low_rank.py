"""Low rank: the closest product of factors, as real smaller layers that behave as the dense layer would."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from qcompress.compressed.factored import (
    FactoredConv2d,
    FactoredLinear,
    GroupedLinear,
    SpatialConv2d,
    TuckerConv2d,
    factored,
    fold_,
    replace_,
)
from qcompress.errors import ModelError, OptionsError
from qcompress.model import layers
from qcompress.model.parts import Part, survey
from qcompress.options import Options, low_rank, prune_quantize, transform_from_json
from qcompress.transforms.base import Keep, Target, Transform, Weight, Window
from qcompress.transforms.low_rank.decomposition import Decomposition, columns_for, split
from qcompress.transforms.low_rank.factors import KINDS, LowRank, RankRule
from qcompress.transforms.quantize.prune_quantize import PruneQuantize

FORMS = [("channels", 1), ("spatial", 1), ("tucker", 1), ("sliced", 2), ("sliced", 4)]


def random_rows(channels: int, per_channel: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(channels, per_channel, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_moments(size: int, rank: int | None = None) -> Tensor:
    inputs = random_rows(size, rank or 3 * size, seed=1) * torch.logspace(0, -2, size)[:, None]
    return inputs @ inputs.T / inputs.shape[1]


def linear(rows: Tensor, moments: Tensor | None = None) -> Weight:
    shape = {"channels": rows.shape[0], "per_channel": rows.shape[1]}
    return Weight(rows, Target(layer="Linear", dtype=rows.dtype, macs=rows.numel(), **shape), moments)


def conv(rows: Tensor, kernel: tuple[int, int], moments: Tensor | None = None) -> Weight:
    window = Window(kernel=kernel, inputs=1, halfway=1)
    return replace_target(linear(rows, moments), layer="Conv2d", window=window)


def replace_target(weight: Weight, **changes: object) -> Weight:
    return Weight(weight.rows, replace(weight.target, **changes), weight.moments)  # type: ignore[arg-type]


def lost(weight: Weight, transform: Transform) -> float:
    return float((transform.approximate(weight).double() - weight.rows.double()).square().sum())


# ---- closeness ----


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (20, 20), (2, 50), (50, 2)])
def test_no_matrix_of_that_rank_is_closer(shape: tuple[int, int]) -> None:
    weight = linear(random_rows(*shape))
    values = torch.linalg.svdvals(weight.rows.double()).square()
    for rank in range(1, min(shape) + 1):
        # the product is rounded to float32: relative 1e-7 of the weight itself
        allowed = 1e-5 * float(values[rank:].sum()) + 1e-10 * float(values.sum())
        assert abs(lost(weight, LowRank(ranks=rank)) - float(values[rank:].sum())) <= allowed


@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (1, 3)])
def test_spatial_is_the_closest_matrix_of_columns_against_rows(kernel: tuple[int, int]) -> None:
    rows = random_rows(6, 5 * kernel[0] * kernel[1])
    matrix = torch.stack([grid.permute(2, 0, 1) for grid in rows.reshape(6, 5, *kernel)]).reshape(6 * kernel[1], -1)
    tail = torch.linalg.svdvals(matrix.double()).square()
    for rank in (1, 3, 5):
        found = lost(conv(rows, kernel), LowRank(ranks=rank, form="spatial"))
        assert found == pytest.approx(float(tail[rank:].sum()), rel=1e-5, abs=1e-8)


def test_each_slice_is_closest_by_itself() -> None:
    rows = random_rows(10, 24)
    tails = [torch.linalg.svdvals(part.double()).square()[3:].sum() for part in rows.chunk(4, dim=1)]
    found = lost(linear(rows), LowRank(ranks=3, form="sliced", slices=4))
    assert found == pytest.approx(float(sum(tails)), rel=1e-5)


@pytest.mark.parametrize("ranks", [(1, 1), (2, 5), (6, 3)])
def test_tucker_is_within_the_bound_of_the_higher_order_svd(ranks: tuple[int, int]) -> None:
    rows = random_rows(8, 6 * 9)
    grid = rows.double().reshape(8, 6, 9)
    inputs = torch.linalg.svdvals(grid.transpose(0, 1).reshape(6, -1)).square()[ranks[0] :].sum()
    outputs = torch.linalg.svdvals(grid.reshape(8, -1)).square()[ranks[1] :].sum()
    found = lost(conv(rows, (3, 3)), LowRank(ranks=ranks, form="tucker"))
    assert max(float(inputs), float(outputs)) * (1 - 1e-5) <= found <= float(inputs + outputs) * (1 + 1e-5)


@pytest.mark.parametrize(("form", "slices"), FORMS)
@pytest.mark.parametrize("moments", [None, random_moments(8 * 9)])
def test_full_rank_gives_the_weight_back(form: str, slices: int, moments: Tensor | None) -> None:
    weight = conv(random_rows(10, 8 * 9), (3, 3), moments)
    ranks = KINDS[form](slices).largest(weight.target)
    found = LowRank(ranks=ranks, form=form, slices=slices, whitened=moments is not None).approximate(weight)
    torch.testing.assert_close(found, weight.rows, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("form", "slices"), FORMS)
@pytest.mark.parametrize("value", [0.0, 0.7])
def test_constant_weights_are_exact_at_rank_one(form: str, slices: int, value: float) -> None:
    weight = conv(torch.full((10, 8 * 9), value), (3, 3), torch.eye(72))
    for whitened in (False, True):
        transform = LowRank(ranks=(1, 1) if form == "tucker" else 1, form=form, slices=slices, whitened=whitened)
        torch.testing.assert_close(transform.approximate(weight), weight.rows, rtol=1e-5, atol=0)


def test_a_random_decomposition_is_nearly_as_close_and_the_same_every_time() -> None:
    left, right = (torch.linalg.qr(random_rows(300, 200).double()).Q for _ in range(2))
    for decay in (0.0, 0.5, 1.0):
        values = torch.arange(1, 201, dtype=torch.float64) ** -decay
        matrix, rank = left * values @ right.T, 50
        found = split(matrix, columns=64)
        tail = values[rank:].square().sum()
        error = (matrix - found.left[:, :rank] @ found.right[:rank]).square().sum()
        assert tail * (1 - 1e-9) <= error <= tail * 1.01
        assert found.total == pytest.approx(float(values.square().sum()))
        assert torch.equal(split(matrix, columns=64).left, found.left)


def test_a_random_whitened_decomposition_is_nearly_as_close() -> None:
    matrix, moments = random_rows(120, 90).double(), random_moments(90)

    def error(found: Decomposition, rank: int) -> float:
        change = matrix - found.left[:, :rank] @ found.right[:rank]
        return float((change @ moments.double() * change).sum())

    assert error(split(matrix, moments, columns=48), 30) <= 1.01 * error(split(matrix, moments), 30)


def test_large_weights_are_decomposed_at_random_and_ranks_share_it() -> None:
    assert columns_for(20, 4096) == columns_for(40, 4096) == 64
    assert columns_for(512, 4096) == 1024
    assert columns_for(513, 4096) is None
    assert columns_for(8, 1000) is None


# ---- whitened ----


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (20, 20)])
@pytest.mark.parametrize("inputs", [None, 5])
def test_whitened_no_matrix_of_that_rank_is_closer_for_the_inputs(shape: tuple[int, int], inputs: int | None) -> None:
    rows, moments = random_rows(*shape), random_moments(shape[1], inputs)
    values, vectors = torch.linalg.eigh(moments.double())
    root, weight = vectors * values.clamp(min=0).sqrt(), linear(rows, moments)
    values = torch.linalg.svdvals(rows.double() @ root).square()
    for rank in (1, 4, 9):
        least = float(values[rank:].sum() / values.sum())
        whitened = weight.relative_error(LowRank(ranks=rank, whitened=True).approximate(weight))
        plain = weight.relative_error(LowRank(ranks=rank).approximate(weight))
        assert whitened == pytest.approx(least, rel=1e-3, abs=1e-6)
        assert whitened <= plain + 1e-9


@pytest.mark.parametrize(("form", "slices"), FORMS)
def test_whitened_forms_are_closer_for_inputs_of_uneven_size(form: str, slices: int) -> None:
    scales = torch.logspace(0, -3, 8).repeat_interleave(9)  # some input channels hardly speak
    weight = conv(random_rows(10, 72), (3, 3), torch.diag(scales.square()))
    transform = LowRank(ranks=(3, 3) if form == "tucker" else 3, form=form, slices=slices)
    plain, whitened = (
        weight.relative_error(own.approximate(weight)) for own in (transform, replace(transform, whitened=True))
    )
    assert whitened < 0.9 * plain


@pytest.mark.parametrize(("form", "slices"), FORMS)
def test_inputs_that_never_come_leave_the_plain_approximation(form: str, slices: int) -> None:
    rows, ranks = random_rows(10, 72), (3, 3) if form == "tucker" else 3
    transform = LowRank(ranks=ranks, form=form, slices=slices)
    silent = replace(transform, whitened=True).approximate(conv(rows, (3, 3), torch.zeros(72, 72)))
    torch.testing.assert_close(silent, transform.approximate(conv(rows, (3, 3))), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("form", "slices"), FORMS)
@pytest.mark.parametrize("whitened", [True, False])
def test_no_other_last_layer_leaves_less_behind_the_same_first_ones(form: str, slices: int, whitened: bool) -> None:
    weight = conv(random_rows(10, 72), (3, 3), random_moments(72) if whitened else None)
    transform = LowRank(ranks=(3, 3) if form == "tucker" else 3, form=form, slices=slices, whitened=whitened)
    factors = transform.factors(transform.encode(weight), weight.target)
    least = weight.relative_error(transform.approximate(weight))
    last = list(factors)[-1]
    for seed in range(5):
        other = factors[last] + 1e-2 * random_rows(*factors[last].shape, seed=seed)
        assert weight.relative_error(transform.layout(weight.target).product(factors | {last: other}, (3, 3))) > least


def test_the_relative_error_is_that_of_the_output() -> None:
    x, weight = random_rows(50, 12, seed=3), random_rows(7, 12)
    moments, approximation = x.T @ x / 50, LowRank(ranks=3).approximate(linear(weight))
    expected = ((weight - approximation) @ x.T).square().sum() / (weight @ x.T).square().sum()
    assert linear(weight, moments).relative_error(approximation) == pytest.approx(float(expected), rel=1e-4)
    assert linear(weight).relative_error(weight) == 0
    assert linear(torch.zeros(2, 2)).relative_error(torch.zeros(2, 2)) == 0


def test_whitened_without_moments_is_refused() -> None:
    for act in (
        lambda weight: LowRank(ranks=2, whitened=True).encode(weight),
        low_rank(ratios=(0.5,), whitened=True).for_weight,
    ):
        with pytest.raises(OptionsError, match=r"'rank .*, whitened' needs the second moments .* measure\(\)"):
            act(linear(random_rows(20, 20)))


# ---- ranks from rules ----


@pytest.mark.parametrize(("form", "slices"), FORMS)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_ratio_gives_the_most_that_fits(form: str, slices: int, share: float) -> None:
    weight = conv(random_rows(16, 12 * 9), (3, 3))
    found = RankRule(by="ratio", value=share, form=form, slices=slices).resolve(weight)
    assert found is not None
    assert found.size_bytes(weight.target) <= share * weight.target.dense_bytes
    more = [tuple(own + (i == place) for i, own in enumerate(found.ranks)) for place in range(len(found.ranks))]
    assert all(replace(found, ranks=own).size_bytes(weight.target) > share * weight.target.dense_bytes for own in more)


def kept_share(weight: Weight, transform: LowRank) -> float:
    return 1 - weight.relative_error(transform.approximate(weight))


@pytest.mark.parametrize(("form", "slices"), FORMS)
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_an_energy_gives_the_least_that_keeps_it(form: str, slices: int, share: float) -> None:
    weight = conv(random_rows(24, 24 * 9), (3, 3))
    found = RankRule(by="energy", value=share, form=form, slices=slices).resolve(weight)
    assert found is not None
    assert kept_share(weight, found) >= share - 1e-6
    for place in range(len(found.ranks)):
        less = tuple(own - (i == place) for i, own in enumerate(found.ranks))
        assert min(less) == 0 or kept_share(weight, replace(found, ranks=less)) < share


def test_an_energy_of_whitened_factors_is_that_of_the_output() -> None:
    weight = linear(random_rows(30, 40), random_moments(40))
    found = RankRule(by="energy", value=0.9, whitened=True).resolve(weight)
    assert found is not None
    assert kept_share(weight, found) >= 0.9 - 1e-4 > kept_share(weight, replace(found, ranks=found.ranks[0] - 1))


def test_large_weights_reach_an_energy_without_a_whole_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompress.transforms.low_rank.decomposition.LARGE", 300)
    rows = random_rows(400, 20) @ random_rows(20, 320) + 0.01 * random_rows(400, 320)
    weight = linear(rows)
    found = RankRule(by="energy", value=0.99).resolve(weight)
    values = torch.linalg.svdvals(rows.double()).square()
    assert found is not None
    assert found.ranks == (int((values.cumsum(0) < 0.99 * values.sum()).sum()) + 1,)
    assert [key[2] for key in weight._found] == [64]
    noise = linear(random_rows(400, 320))
    rule = RankRule(by="energy", value=0.3)
    monkeypatch.setattr("qcompress.transforms.low_rank.decomposition.LARGE", 10_000)
    assert rule.resolve(noise) == rule.resolve(linear(noise.rows))


@pytest.mark.parametrize("whitened", [True, False])
def test_what_a_large_weight_becomes_does_not_depend_on_what_else_was_asked(
    whitened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcompress.transforms.low_rank.decomposition.LARGE", 300)
    rows, moments = random_rows(320, 400), random_moments(400) if whitened else None
    offered = low_rank(ranks=(4, 9, 30, 150), energies=(0.1, 0.5), kinds=("channels", "sliced"), whitened=whitened)
    found = offered.for_weight(linear(rows, moments))[1:]
    assert len(found) >= 5
    for own in found:
        weight = linear(rows, moments)
        assert torch.equal(own.transform.approximate(weight), own.transform.decode(own.stored, weight.target))


def test_an_energy_keeps_a_rank_of_one_at_least() -> None:
    assert RankRule(by="energy", value=0.5).resolve(linear(torch.zeros(9, 9))) == LowRank(ranks=1)


def test_a_rule_names_its_rank_in_json() -> None:
    weight = conv(random_rows(16, 12 * 9), (3, 3), random_moments(108))
    offered = low_rank(energies=(0.5,), ratios=(0.4,), ranks=(3,), kinds=tuple(KINDS), whitened=True)
    for own in offered.then(low_codes()).for_weight(weight)[1:]:
        value = json.loads(json.dumps(own.transform.to_json()))
        assert value["ranks"] == list(own.transform.ranks)  # type: ignore[attr-defined]
        assert transform_from_json(value) == own.transform
        assert torch.equal(
            transform_from_json(value).approximate(weight), own.transform.decode(own.stored, weight.target)
        )


def low_codes() -> Options:
    return prune_quantize(bits=(4, 8), sparsity=(0, 0.5))


@pytest.mark.parametrize(
    ("transform", "changes", "reason"),
    [
        (LowRank(ranks=3), {"layer": "Conv1d"}, "only Linear, Conv2d and Embedding"),
        (LowRank(ranks=3, form="sliced", slices=2), {"layer": "Embedding"}, "no input channels"),
        (LowRank(ranks=3), {"whole": False}, "cannot be replaced"),
        (LowRank(ranks=3), {"replaceable": False}, "cannot be replaced"),
        (LowRank(ranks=31), {}, "the largest ranks of the weight are 30"),
        (LowRank(ranks=15), {}, "takes 3600 bytes, the weight itself 3600, and no fewer macs"),
        (LowRank(ranks=1, then=PruneQuantize(16)), {"dtype": torch.float16}, "its factors take 120 bytes uncompressed"),
        (LowRank(ranks=3, form="sliced", slices=4), {}, "30 input channels are not divided by 4 slices"),
        (LowRank(ranks=3, form="spatial"), {}, "only a Conv2d has a kernel to split"),
        (LowRank(ranks=(3, 3), form="tucker"), {}, "only a Conv2d has a kernel"),
        (LowRank(ranks=3, form="spatial"), {"window": Window(kernel=(3, 1), inputs=1, halfway=1)}, "no rows to split"),
        (LowRank(ranks=(3, 3), form="tucker"), {"window": Window(kernel=(1, 1), inputs=1, halfway=1)}, "1×1"),
        (LowRank(ranks=14), {}, ""),
    ],
)
def test_where_it_does_not_fit_it_says_why(transform: LowRank, changes: dict[str, object], reason: str) -> None:
    target = replace_target(linear(random_rows(30, 30)), **changes).target
    assert reason in transform.why_not(target)
    assert bool(reason) == bool(transform.why_not(target))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRank(ranks=0), "a rank must be a whole number from 1, found 0: rank 0 would leave only .* bias"),
        (lambda: LowRank(ranks=-2), "a rank must be a whole number from 1, found -2"),
        (lambda: LowRank(ranks=2.5), "a rank must be a whole number from 1, found 2.5"),  # type: ignore[arg-type]
        (lambda: LowRank(ranks=True), "a rank must be a whole number from 1, found True"),
        (lambda: LowRank(ranks=(2, 3)), "'tucker' takes two ranks"),
        (lambda: LowRank(ranks=2, form="tucker"), "'tucker' takes two ranks"),
        (lambda: LowRank(ranks=2, form="cp"), "must be one of channels, spatial, tucker, sliced; found 'cp'"),
        (lambda: LowRank(ranks=2, form="sliced"), "'sliced' takes 2 slices or more"),
        (lambda: LowRank(ranks=2, slices=2), "'sliced' takes 2 slices or more"),
        (lambda: LowRank(ranks=2, then=LowRank(ranks=2)), "factors can be kept, or pruned and quantized"),
        (lambda: RankRule(by="luck", value=2), "chosen by one of ratio, rank, energy; found 'luck'"),
        (lambda: low_rank(ranks=(0,)), "rank 0 would leave only"),
        (lambda: low_rank(ranks=()), "ranks is empty"),
        (lambda: low_rank(kinds="spatial"), "kinds must be a list"),
        (lambda: low_rank(kinds=("svd",)), "found 'svd'"),
        (lambda: low_rank(kinds=("sliced",), slices=(1,)), "'sliced' takes 2 slices or more"),
        (
            lambda: low_rank().then(low_rank()),
            "only low_rank.* can be composed, found 'rank for 12.5 % of the weights, whitened'",
        ),
        (lambda: low_codes().then(low_codes()), "can be composed, found '4 bits'"),
        (lambda: low_rank().then(low_codes()).then(low_codes()), "can be composed, found 'rank .*, 4 bits'"),
    ],
)
def test_what_does_not_exist_is_refused(make: object, message: str) -> None:
    with pytest.raises(OptionsError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("value", [0, 1, -0.5, 2, float("nan"), "half", None])
@pytest.mark.parametrize("name", ["ratios", "energies"])
def test_shares_outside_0_to_1_are_refused(name: str, value: object) -> None:
    with pytest.raises(OptionsError, match="above 0 and below 1"):
        low_rank(**{name: (value,)})  # type: ignore[arg-type]


def test_a_rank_above_the_weights_own_is_not_offered_and_refused_when_asked_for() -> None:
    weight = linear(random_rows(6, 40))
    assert low_rank(ranks=(3, 7, 100), whitened=False).for_weight(weight)[1:][0].transform == LowRank(ranks=3)
    assert len(low_rank(ranks=(3, 7, 100), whitened=False).for_weight(weight)) == 2
    with pytest.raises(OptionsError, match="'rank 7' does not fit a weight whose largest rank is 6"):
        LowRank(ranks=7).encode(weight)


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ModelError, match="NaN"):
        LowRank(ranks=2).encode(linear(torch.full((4, 4), torch.nan)))


# ---- what is written ----


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    then=st.sampled_from([Keep(), PruneQuantize(4), PruneQuantize(3, 0.5), PruneQuantize(8, 0.75)]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    shape=st.tuples(st.integers(2, 9), st.integers(1, 3)),
    kernel=st.sampled_from([(3, 3), (2, 3), (1, 5)]),
    whitened=st.booleans(),
    seed=st.integers(0, 100),
)
def test_factors_take_the_predicted_bytes_and_give_the_approximation(
    form: tuple[str, int],
    then: Transform,
    dtype: torch.dtype,
    shape: tuple[int, int],
    kernel: tuple[int, int],
    whitened: bool,
    seed: int,
) -> None:
    size = 4 * shape[1] * kernel[0] * kernel[1]
    rows = random_rows(size, shape[0], dtype, seed).T  # not contiguous
    weight = conv(rows, kernel, random_moments(size) if whitened else None)
    ranks = (2, 2) if form[0] == "tucker" else 2
    transform = LowRank(ranks=ranks, form=form[0], slices=form[1], whitened=whitened, then=then)
    stored = transform.encode(weight)
    assert all(tensor.is_contiguous() for tensor in stored.values())
    assert sum(tensor.numel() * tensor.element_size() for tensor in stored.values()) == transform.size_bytes(
        weight.target
    )
    decoded = transform.decode(stored, weight.target)
    assert decoded.dtype == dtype
    assert decoded.shape == rows.shape
    assert torch.equal(decoded, transform.approximate(weight))
    factors = transform.factors(stored, weight.target)
    assert {name: tuple(own.shape) for name, own in factors.items()} == transform.layout(weight.target).shapes(
        weight.target, transform.ranks
    )
    assert {own.dtype for own in factors.values()} == {dtype}


def test_quantized_factors_get_closer_with_bits_and_pruned_ones_further_with_sparsity() -> None:
    weight = conv(random_rows(24, 24 * 9), (3, 3))
    for form, slices in FORMS:
        ranks = (6, 6) if form == "tucker" else 6
        base = LowRank(ranks=ranks, form=form, slices=slices)
        errors = [lost(weight, replace(base, then=PruneQuantize(bits))) for bits in (2, 3, 4, 8)]
        assert errors == sorted(errors, reverse=True)
        # from 8 bits on the rank is all of it, and which of two is closer by a hundred-thousandth is chance
        assert lost(weight, replace(base, then=PruneQuantize(16))) == pytest.approx(lost(weight, base), rel=1e-5)
        pruned = [lost(weight, replace(base, then=PruneQuantize(8, share))) for share in (0, 0.3, 0.6, 0.9)]
        assert pruned == sorted(pruned)


def test_one_decomposition_serves_all_ranks_and_what_is_done_to_the_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("qcompress.transforms.low_rank.forms.split", lambda *args: calls.append(1) or split(*args))
    offered = low_rank(ratios=(0.2, 0.5), energies=(0.5,), kinds=("channels", "spatial"), whitened=False)
    found = (offered + offered.then(low_codes())).for_weight(conv(random_rows(16, 108), (3, 3)))
    assert len(found) > 12
    assert len(calls) == 2


# ---- layers ----

CONVS = {
    "plain": {"kernel_size": 3},
    "padded": {"kernel_size": 3, "padding": 1},
    "stride, dilation": {"kernel_size": (3, 2), "stride": (2, 1), "dilation": 2, "padding": 3},
    "uneven": {"kernel_size": (2, 3), "stride": (1, 3), "dilation": (2, 1), "padding": (0, 2), "bias": False},
    "same": {"kernel_size": (3, 4), "padding": "same", "dilation": (1, 2)},
    "valid": {"kernel_size": 2, "padding": "valid", "padding_mode": "circular"},
    "same reflect": {"kernel_size": 3, "padding": "same", "padding_mode": "reflect"},
    "replicate": {"kernel_size": (5, 3), "padding": (3, 1), "stride": 2, "padding_mode": "replicate"},
    "circular": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular"},
    "1x1": {"kernel_size": 1, "stride": 2},
    "row": {"kernel_size": (1, 3), "padding": (0, 1)},
}


class Net(nn.Module):
    """One layer under a name."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def part_of(layer: nn.Module, x: Tensor) -> Part:
    (part,) = survey(Net(layer), [x]).parts
    return part


def cases() -> list[tuple[str, str, int]]:
    linears = [("linear", "channels", 1), ("linear", "sliced", 2), ("tokens", "channels", 1), ("tokens", "sliced", 4)]
    convs = [(name, *form) for name in CONVS for form in FORMS]
    pointless = {("1x1", "spatial", 1), ("1x1", "tucker", 1), ("1x1", "sliced", 4)}
    return linears + [case for case in convs if case not in pointless]


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name == "linear":
        return nn.Linear(12, 20), torch.randn(5, 12)
    if name == "tokens":
        return nn.Linear(20, 12, bias=False), torch.randn(2, 3, 20)
    return nn.Conv2d(8, 12, **CONVS[name]), torch.randn(2, 8, 9, 11)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "form", "slices"), cases())
def test_the_layers_compute_what_the_dense_layer_with_their_product_does_at_the_predicted_macs(
    name: str, form: str, slices: int
) -> None:
    layer, x = made(name)
    part = part_of(layer, x)
    weight = Weight(layers.to_rows(layer, layers.weight_of(layer).detach()), part.target)
    transform = LowRank(ranks=(3, 4) if form == "tucker" else 3, form=form, slices=slices)
    assert not transform.layout(part.target).why_not(part.target)
    small = factored(layer, transform.factors(transform.encode(weight), part.target))
    dense = copy.deepcopy(layer)
    with torch.no_grad():
        layers.weight_of(dense).copy_(transform.approximate(weight).view_as(layers.weight_of(dense)))
    with FlopCounterMode(display=False) as counter:
        found = small(x)
    assert counter.get_total_flops() == 2 * len(x) * transform.macs(part.target)
    # float32 sums in another order: a few units in the last place of numbers of size 1
    torch.testing.assert_close(found, dense(x), rtol=1e-4, atol=1e-5)
    folded = small.to_dense()
    assert torch.equal(layers.weight_of(folded), layers.weight_of(dense))
    assert folded.bias is layer.bias
    assert str(folded) == str(layer)
    exported = torch.export.export(Net(small).eval(), (x,)).module()
    torch.testing.assert_close(exported(x), found, rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    channels=st.tuples(st.sampled_from([4, 8]), st.integers(3, 9)),
    kernel=st.tuples(st.integers(1, 4), st.integers(2, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    bias=st.booleans(),
)
def test_any_convolution_keeps_its_way_over_the_input(
    form: tuple[str, int],
    channels: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    mode: str,
    bias: bool,
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(*channels, kernel, stride, padding, dilation, bias=bias, padding_mode=mode).double()
    x = torch.randn(2, channels[0], 8, 9, dtype=torch.float64)
    part = part_of(layer, x)
    ranks = (2, 3) if form[0] == "tucker" else min(2, *KINDS[form[0]](form[1]).largest(part.target))
    transform = LowRank(ranks=ranks, form=form[0], slices=form[1])
    weight = Weight(layer.weight.detach().flatten(1), part.target)
    small = factored(layer, transform.factors(transform.encode(weight), part.target))
    with FlopCounterMode(display=False) as counter:
        found = small(x)
    assert counter.get_total_flops() == pytest.approx(2 * len(x) * transform.macs(part.target))
    torch.testing.assert_close(found, small.to_dense()(x), rtol=1e-9, atol=1e-9)
    assert str(small.to_dense()) == str(layer)


class Twice(nn.Module):
    """One convolution on maps of two sizes, the second time without a batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 4, (3, 2), stride=(1, 2), padding=(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.layer(input=one) for one in self.layer(x)]).flatten(1)


@pytest.mark.parametrize("form", KINDS)
def test_macs_are_counted_over_calls_on_maps_of_several_sizes(form: str) -> None:
    model, x = Twice(), torch.randn(3, 4, 6, 9)
    (part,) = survey(model, [x]).parts
    transform = LowRank(ranks=(2, 3) if form == "tucker" else 2, form=form, slices=2 if form == "sliced" else 1)
    weight = Weight(part.weight(model), part.target)
    replace_(model.layer, factored(model.layer, transform.factors(transform.encode(weight), part.target)))
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() == pytest.approx(2 * len(x) * transform.macs(part.target))


NAMES = {
    "channels": (FactoredConv2d, ["reduce.weight", "expand.weight", "expand.bias"]),
    "sliced": (FactoredConv2d, ["reduce.weight", "expand.weight", "expand.bias"]),
    "spatial": (SpatialConv2d, ["vertical.weight", "horizontal.weight", "horizontal.bias"]),
    "tucker": (TuckerConv2d, ["reduce.weight", "core.weight", "expand.weight", "expand.bias"]),
}


def small_conv(form: str, layer: nn.Conv2d) -> nn.Sequential:
    rows = layers.to_rows(layer, layer.weight.detach())
    transform = LowRank(ranks=(2, 3) if form == "tucker" else 2, form=form, slices=2 if form == "sliced" else 1)
    weight = conv(rows, layer.kernel_size)  # type: ignore[arg-type]
    return factored(layer, transform.factors(transform.encode(weight), weight.target))


@pytest.mark.parametrize("form", KINDS)
def test_members_are_named_and_keep_bias_mode_type_and_gradients_and_draw_no_random_numbers(form: str) -> None:
    layer = nn.Conv2d(8, 8, 3).eval().to(torch.bfloat16)
    layer.weight.requires_grad_(False)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    small = small_conv(form, layer)
    assert torch.equal(torch.rand(1), expected)
    assert type(small) is NAMES[form][0]
    assert list(small.state_dict()) == NAMES[form][1]
    assert small[-1].bias is layer.bias
    assert not any(module.training for module in small.modules())
    assert [parameter.requires_grad for parameter in small.parameters()] == [False] * (len(small)) + [True]
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    assert small(torch.randn(2, 8, 5, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("form", KINDS)
def test_a_weight_that_lies_otherwise_in_memory_gives_the_same(form: str) -> None:
    layer = nn.Conv2d(8, 8, 3)
    expected = small_conv(form, layer).state_dict()
    found = small_conv(form, layer.to(memory_format=torch.channels_last)).state_dict()  # type: ignore[call-overload]
    assert all(torch.equal(own, expected[name]) for name, own in found.items())


def test_a_sliced_linear_layer_reads_well_and_has_a_plain_state() -> None:
    layer = nn.Linear(8, 6)
    transform = LowRank(ranks=2, form="sliced", slices=2)
    weight = linear(layer.weight.detach())
    small = factored(layer, transform.factors(transform.encode(weight), weight.target))
    assert isinstance(small, FactoredLinear)
    assert isinstance(small.reduce, GroupedLinear)
    assert "(reduce): GroupedLinear(in_features=8, out_features=4, groups=2)" in str(small)
    assert {name: tuple(own.shape) for name, own in small.state_dict().items()} == {
        "reduce.weight": (4, 4),
        "expand.weight": (6, 4),
        "expand.bias": (6,),
    }


@pytest.mark.parametrize(
    "make", [lambda: nn.Conv2d(8, 8, 3, groups=2), lambda: nn.Conv1d(8, 8, 3), lambda: nn.Embedding(8, 8)]
)
def test_only_linear_and_plain_conv2d_are_factored(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(TypeError, match="can be factored"):
        factored(make(), {"reduce": torch.ones(2, 8), "expand": torch.ones(8, 2)})


class Reused(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.inner = nn.Sequential(self.first, nn.Conv2d(8, 8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[0](torch.relu(self.first(x)))


@pytest.mark.parametrize("form", KINDS)
def test_a_layer_under_several_names_is_replaced_under_all_and_folded_back(form: str) -> None:
    model = Reused()
    original = copy.deepcopy(model.state_dict())
    replace_(model.first, factored(model.first, {"reduce": torch.ones(2, 8), "expand": torch.ones(8, 2)}))
    replace_(model.inner[1], small_conv(form, model.inner[1]))
    assert isinstance(model.first, FactoredLinear)
    assert model.inner[0] is model.first
    copied = copy.deepcopy(model)
    assert copied.inner[0] is copied.first
    assert copied.first is not model.first
    x = torch.randn(3, 8)
    assert torch.equal(copied(x), model(x))
    fold_(model)
    assert isinstance(model.first, nn.Linear)
    assert model.inner[0] is model.first
    model.load_state_dict(original)
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())
