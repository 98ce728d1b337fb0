"""Codes with a scale a group: exact bytes, bit for bit back, near the best scales and codes, one error for the rest."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompress.errors import OptionsError
from qcompress.options import Options, low_rank, prune_quantize, transform_from_json
from qcompress.transforms.base import Target, Weight
from qcompress.transforms.quantize.compensation import shrunk
from qcompress.transforms.quantize.group_wise import SCALE_TYPES, GroupWise
from qcompress.transforms.quantize.packing import unpack
from qcompress.transforms.quantize.prune_quantize import PruneQuantize
from tests.quick import slow_but

BITS = (2, 3, 4, 5, 6, 8)


def target_of(rows: Tensor) -> Target:
    shape = {"channels": rows.shape[0], "per_channel": rows.shape[1]}
    return Target(layer="Linear", dtype=rows.dtype, macs=rows.numel(), common_input=True, **shape)


def weight_of(rows: Tensor, inputs: Tensor | None = None) -> Weight:
    if inputs is None:
        return Weight(rows, target_of(rows))
    return Weight(rows, target_of(rows), inputs.T @ inputs / len(inputs), len(inputs))


@st.composite
def transforms(draw: st.DrawFn, compensated: bool = False) -> GroupWise:
    return GroupWise(
        draw(st.sampled_from(BITS)),
        draw(st.sampled_from([0.0, 0.0, 0.3])),
        compensated,
        group_size=draw(st.sampled_from([None, 2, 5, 16, 32])),
        symmetric=draw(st.booleans()),
        scale_dtype=draw(st.sampled_from([None, *SCALE_TYPES])),
    )


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    channels, per_channel = draw(st.integers(1, 6)), draw(st.integers(1, 40))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    rows = torch.randn(channels, per_channel, generator=generator) * 10.0 ** draw(st.integers(-4, 3))
    rows[torch.rand(channels, generator=generator) < 0.2] = 0
    return (rows + draw(st.sampled_from([0.0, 2.0])) * rows.abs()).to(dtype)


@settings(max_examples=120, deadline=None)  # the first one compiles
@given(transforms(), weights())
def test_what_is_stored_gives_back_the_approximation_in_exactly_the_predicted_bytes(
    transform: GroupWise, rows: Tensor
) -> None:
    target, weight = target_of(rows), weight_of(rows)
    stored = transform.encode(weight)
    decoded = transform.decode(stored, target)
    approximated = transform.approximate(weight)
    assert torch.equal(decoded, approximated)
    assert torch.equal(decoded.signbit(), approximated.signbit())  # also of zeros
    assert (decoded.dtype, decoded.shape) == (rows.dtype, rows.shape)
    assert bool(torch.isfinite(decoded).all())
    assert sum(array.nbytes for array in stored.values()) == transform.size_bytes(target)
    short = torch.bfloat16 if rows.dtype == torch.bfloat16 else torch.float16
    assert stored["scales"].dtype == SCALE_TYPES.get(transform.scale_dtype or "", short)
    assert set(stored) == {"codes", "scales"} | ({"mask"} if transform.sparsity else set()) | (
        set() if transform.symmetric else {"zeros"}
    )
    if transform.sparsity:
        same = PruneQuantize(transform.bits, transform.sparsity).encode(weight)
        assert torch.equal(stored["mask"], same["mask"])
        assert not decoded.flatten()[unpack(stored["mask"], 1, rows.numel()) == 0].any()


@settings(max_examples=40, deadline=None)
@given(transforms(), weights())
def test_decoding_is_scale_times_code_less_zero_point(transform: GroupWise, rows: Tensor) -> None:
    if transform.sparsity:
        return
    stored, target = transform.encode(weight_of(rows)), target_of(rows)
    codes = unpack(stored["codes"], transform.bits, rows.numel()).view(rows.shape)
    size = transform.group_size or rows.shape[1]
    groups = -(-rows.shape[1] // size)
    zeros = transform.zero_points(stored, target)
    scales = stored["scales"].float().view(len(rows), groups)
    expected = torch.empty(rows.shape)
    for channel in range(len(rows)):
        for place in range(rows.shape[1]):
            group = place // size
            expected[channel, place] = (codes[channel, place] - zeros[channel, group]) * scales[channel, group]
    limit = torch.finfo(rows.dtype).max
    assert torch.equal(transform.decode(stored, target), expected.double().clamp(-limit, limit).to(rows.dtype))


@pytest.mark.parametrize("bits", slow_but([2, 4, 8], BITS))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", ["even", "one side"])
def test_scales_and_zero_points_are_as_good_as_those_of_a_fine_search(bits: int, symmetric: bool, shape: str) -> None:
    generator = torch.Generator().manual_seed(bits)
    rows = torch.randn(40, 32, generator=generator)
    rows = rows if shape == "even" else rows + 1.5
    transform = GroupWise(bits, group_size=16, symmetric=symmetric, scale_dtype="float32")
    found = (transform.approximate(weight_of(rows)).double() - rows.double()).square().view(80, 16).sum(1)
    groups, top = rows.double().view(80, 16), 2**bits - 1
    width = (groups.amax(1) - groups.amin(1)) if not symmetric else 2 * groups.abs().amax(1)
    least = torch.full((80,), torch.inf, dtype=torch.float64)
    middle = -(groups.amin(1).clamp(max=0) / (groups.amax(1).clamp(min=0) - groups.amin(1).clamp(max=0)) * top)
    zeros = [torch.full((80,), (top + 1) // 2)] if symmetric else [
        (middle.round() + shift).clamp(0, top) for shift in range(-4, 5)
    ]  # fmt: skip
    for zero in zeros:
        for ratio in torch.linspace(0.3, 1.6, 400, dtype=torch.float64):
            for sign in (1, -1) if symmetric else (1,):
                scale = (sign * ratio * width / top)[:, None]
                low = -zero.double()[:, None]
                codes = (groups / scale).round().clamp(low, low + top)
                scale = (codes * groups).sum(1, keepdim=True) / codes.square().sum(1, keepdim=True).clamp(min=1)
                least = torch.minimum(least, (codes * scale - groups).square().sum(1))
    # Short groups at many bits have hundreds of minima of an error that hardly matters there.
    assert float((found / least).mean()) < (1.05 if bits < 5 else 1.3)


def test_small_groups_lose_less_and_zero_points_pay_on_one_sided_weights() -> None:
    rows = torch.randn(32, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 128)
    lost = [
        weight_of(rows).relative_error(GroupWise(3, group_size=size).approximate(weight_of(rows)))
        for size in (16, 32, 64, None)
    ]
    assert lost == sorted(lost)
    one_sided = weight_of(rows.abs())
    with_zeros, without = (GroupWise(3, group_size=32, symmetric=own).approximate(one_sided) for own in (False, True))
    assert one_sided.relative_error(with_zeros) < 0.5 * one_sided.relative_error(without)


@settings(max_examples=60, deadline=None)
@given(transforms(compensated=True), st.integers(0, 10_000), st.sampled_from([1, 7, 40, 150]))
def test_compensated_no_row_loses_more_in_the_same_bytes(transform: GroupWise, seed: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(5, width, generator=generator)
    seen = torch.randn(60, 3, generator=generator) @ torch.randn(3, width, generator=generator)
    weight = weight_of(rows, torch.relu(seen + 0.5) + 0.1 * torch.rand(60, width, generator=generator))
    found, nearest = transform.approximate(weight), transform.nearest.approximate(weight)
    assert weight.moments is not None
    metric = shrunk(weight.moments, weight.num_inputs)
    loss, at_most = ((((rows - one).double() @ metric) * (rows - one).double()).sum(1) for one in (found, nearest))
    assert (loss <= at_most * (1 + 1e-4) + 1e-9).all()  # sums in float32
    stored = transform.encode(weight)
    assert torch.equal(transform.decode(stored, weight.target), found)
    sizes = {name: array.nbytes for name, array in stored.items()}
    assert sizes == {name: array.nbytes for name, array in transform.nearest.encode(weight).items()}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_compensating_is_worth_much_where_inputs_go_together(bits: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    rows = torch.randn(32, 144, generator=generator)
    seen = torch.randn(1000, 3, generator=generator) @ torch.randn(3, 144, generator=generator)
    weight = weight_of(rows, torch.relu(seen + 0.5) + 0.1 * torch.rand(1000, 144, generator=generator))
    transform = GroupWise(bits, compensated=True, group_size=32, symmetric=symmetric)
    error = weight.relative_error(transform.approximate(weight))
    assert error < 0.2 * weight.relative_error(transform.nearest.approximate(weight))


def test_scales_beyond_their_type_are_the_nearest_that_are_not() -> None:
    huge, tiny = torch.tensor([[1e9, -1e9]]), torch.tensor([[1e-9, -1e-9]])
    transform = GroupWise(8, group_size=2)
    assert float(transform.approximate(weight_of(huge)).max()) == 65504 * 127
    assert transform.approximate(weight_of(tiny)).tolist() == [[0.0, 0.0]]
    for rows in (huge, tiny):
        wide = GroupWise(8, group_size=2, scale_dtype="bfloat16").approximate(weight_of(rows))
        torch.testing.assert_close(wide, rows, rtol=0.01, atol=0)


def test_all_combinations_are_on_offer_and_come_back_from_json() -> None:
    options = prune_quantize(
        bits=(2, 4), sparsity=(0, 0.5), group_size=(16, None), symmetric=False, scale_dtype="bfloat16", compensated=True
    )
    assert len(options.offers) == 8
    assert len({offer.label for offer in options.offers}) == 8
    assert Options.from_json(options.to_json()) == options
    for offer in options.offers:
        assert transform_from_json(offer.to_json()) == offer


def test_whole_rows_stay_what_they_were_and_groups_are_not_pruned_unless_asked() -> None:
    assert prune_quantize(bits=(4,)).offers == tuple(PruneQuantize(4, share) for share in (0.0, 0.5, 0.75))
    assert prune_quantize(bits=(4,), group_size=None, sparsity=(0,)).offers == (PruneQuantize(4),)
    assert prune_quantize(bits=(4,), group_size=32).offers == (GroupWise(4, group_size=32),)
    assert prune_quantize(bits=(4,), group_size=32, sparsity=(0.5,)).offers == (GroupWise(4, 0.5, group_size=32),)


def test_factors_are_stored_in_groups_as_well() -> None:
    options = low_rank(ranks=(4,), kinds=("channels",), whitened=False).then(prune_quantize(bits=(4,), group_size=16))
    rows = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    target = target_of(rows)
    transform = options.offers[0].resolve(weight_of(rows))
    assert transform is not None
    stored = transform.encode(weight_of(rows))
    assert transform.size_bytes(target) == (128 * 2) // 2 + 2 * (4 * 2 + 32)  # codes; scales of 8 and of 32 groups
    assert sum(array.nbytes for array in stored.values()) == transform.size_bytes(target)
    assert torch.equal(transform.decode(stored, target), transform.approximate(weight_of(rows)))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"bits": 9}, "bits in groups must be a whole number from 2 to 8, found 9"),
        ({"bits": 1}, "bits must be a whole number from 2"),
        ({"group_size": 1}, "group_size must be a whole number from 2, or None for whole rows; found 1"),
        ({"group_size": True}, "group_size must be"),
        ({"group_size": "32"}, "group_size must be"),
        ({"group_size": 1.5}, "group_size must be"),
        ({"symmetric": "no"}, "symmetric must be True or False, found 'no'"),
        ({"scale_dtype": "float8"}, "scale_dtype must be one of float16, bfloat16, float32, found 'float8'"),
    ],
)
def test_values_outside_their_range_are_refused(values: dict[str, object], expected: str) -> None:
    with pytest.raises(OptionsError, match=expected):
        GroupWise(**{"bits": 4, **values})  # type: ignore[arg-type]


def test_an_empty_list_of_group_sizes_is_refused() -> None:
    with pytest.raises(OptionsError, match="group_size is empty"):
        prune_quantize(bits=(4,), group_size=())
    with pytest.raises(OptionsError, match="group_size must be a list"):
        prune_quantize(bits=(4,), group_size="32")  # type: ignore[arg-type]


def test_an_option_that_takes_more_than_the_weight_says_so() -> None:
    small = Target(layer="Linear", channels=4, per_channel=2, dtype=torch.float16, macs=4)
    assert "takes 20 bytes, the weight itself 16" in GroupWise(8, group_size=2, symmetric=False).why_not(small)
