"""Codes that make up for each other: never worse than to nearest, in the same bytes, from measuring to the file."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qcompress import apply, compress, finetune, load_compressed, low_rank, measure, prune_quantize, save_compressed
from qcompress.compressed.record import record_of
from qcompress.errors import DataError, OptionsError
from qcompress.measuring.inputs.moments import input_rows, second_moments
from qcompress.model.layers import from_rows, to_rows
from qcompress.model.parts import survey
from qcompress.options import Options
from qcompress.transforms.base import Keep, Target, Weight
from qcompress.transforms.low_rank.factors import LowRank
from qcompress.transforms.quantize.compensation import shrunk
from qcompress.transforms.quantize.packing import unpack
from qcompress.transforms.quantize.prune_quantize import PruneQuantize
from tests.measurements import KINDS, Chain, Mixed, solution
from tests.models import Reused, TiedLanguageModel, seeded

OPTIONS = prune_quantize(bits=(2, 4), sparsity=(0, 0.5), compensated=True)


def weight(rows: Tensor, inputs: Tensor) -> Weight:
    """A Linear layer's weight that sees the rows of ``inputs``."""
    shape = {"channels": len(rows), "per_channel": rows.shape[1]}
    target = Target(layer="Linear", dtype=rows.dtype, macs=rows.numel(), common_input=True, **shape)
    return Weight(rows, target, inputs.T @ inputs / len(inputs), len(inputs))


def correlated(count: int, width: int, seed: int) -> Tensor:
    """Inputs that go together and are positive, as behind a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.relu(torch.randn(count, 3, generator=generator) @ torch.randn(3, width, generator=generator) + 0.5)


def losses(own: Weight, approximation: Tensor) -> Tensor:
    """``(channels,)`` of the output, by shrunk moments, in float64."""
    assert own.moments is not None
    change = (own.rows - approximation).double()
    return ((change @ shrunk(own.moments, own.num_inputs)) * change).sum(1)


@settings(max_examples=150, deadline=None)  # the first one compiles
@given(
    st.integers(0, 10_000), st.sampled_from([1, 2, 7, 20, 150]), st.sampled_from([2, 3, 8]), st.sampled_from([0.0, 0.6])
)
def test_no_row_loses_more_than_rounded_to_nearest_and_what_is_pruned_stays_so(
    seed: int, width: int, bits: int, sparsity: float
) -> None:
    rows = torch.randn(6, width, generator=torch.Generator().manual_seed(seed))
    own = weight(rows, correlated(40, width, seed))  # 150 wide: more inputs than were seen
    transform = PruneQuantize(bits, sparsity, compensated=True)
    found, nearest = transform.approximate(own), transform.nearest.approximate(own)
    assert (losses(own, found) <= losses(own, nearest) * (1 + 1e-4) + 1e-10).all()  # sums in float32
    stored, to_nearest = transform.encode(own), transform.nearest.encode(own)
    if sparsity:
        assert torch.equal(stored["mask"], to_nearest["mask"])
        assert not found.flatten()[unpack(stored["mask"], 1, rows.numel()) == 0].any()
    assert torch.equal(transform.decode(stored, own.target), found)
    assert sum(array.nbytes for array in stored.values()) == transform.size_bytes(own.target)
    assert {name: len(array) for name, array in stored.items()} == {
        name: len(array) for name, array in to_nearest.items()
    }


def test_pruned_weights_are_those_of_least_magnitude() -> None:
    own = weight(torch.randn(8, 20, generator=torch.Generator().manual_seed(0)), correlated(99, 20, 0))
    transform = PruneQuantize(4, 0.5, compensated=True)
    assert torch.equal(transform.encode(own)["mask"], transform.nearest.encode(own)["mask"])


def test_it_comes_near_the_best_of_all_codes() -> None:
    gains, left = [], []
    for seed in range(30):
        rows = torch.randn(1, 5, generator=torch.Generator().manual_seed(seed))
        own = weight(rows, correlated(50, 5, seed))
        transform = PruneQuantize(2, compensated=True)
        found, nearest = (float(losses(own, one.approximate(own))) for one in (transform, transform.nearest))
        assert own.moments is not None
        metric, best = shrunk(own.moments, own.num_inputs), np.inf
        for codes in product(range(-2, 2), repeat=5):  # each with its own best scale
            code = torch.tensor(codes, dtype=torch.float64)
            square = float(code @ metric @ code)
            scale = float(rows[0].double() @ metric @ code) / square if square else 0.0
            best = min(best, float(losses(own, (code * scale)[None])))
        assert found >= best * (1 - 1e-6)
        gains.append(found / nearest)
        left.append((found - best) / (nearest - best))
    assert np.median(gains) < 0.8
    assert np.median(left) < 0.15  # of what there is to gain


def test_inputs_that_go_together_are_worth_much() -> None:
    rows = torch.randn(32, 144, generator=torch.Generator().manual_seed(0))
    own = weight(rows, correlated(1000, 144, 1) + 0.1 * torch.rand(1000, 144))
    for bits in (2, 3, 4):
        transform = PruneQuantize(bits, compensated=True)
        error = own.relative_error(transform.approximate(own))
        assert error < 0.2 * own.relative_error(transform.nearest.approximate(own))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_and_strides(dtype: torch.dtype) -> None:
    rows = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).to(dtype).T
    own = weight(rows.float(), correlated(99, 20, 0))
    own = Weight(rows, replace(own.target, dtype=dtype), own.moments)
    transform = PruneQuantize(4, 0.25, compensated=True)
    found = transform.approximate(own)
    assert found.dtype == dtype
    assert own.relative_error(found) < own.relative_error(transform.nearest.approximate(own))


@pytest.mark.parametrize("rows", [torch.zeros(3, 8), torch.ones(3, 8), torch.eye(3, 8)])
@pytest.mark.parametrize("inputs", [torch.zeros(5, 8), torch.eye(5, 8), torch.full((5, 8), 1e-20)])
def test_nothing_comes_in_or_nothing_is_there(rows: Tensor, inputs: Tensor) -> None:
    own = weight(rows, inputs)
    torch.testing.assert_close(PruneQuantize(4, compensated=True).approximate(own), rows, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-41, 1e-30, 1e6, 1e36])
@pytest.mark.parametrize("seen", [1e-18, 1e17])
@pytest.mark.parametrize("bits", [3, 16])
def test_neither_the_size_of_weights_nor_that_of_inputs_matters(size: float, seen: float, bits: int) -> None:
    rows = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    inputs, transform = correlated(80, 20, 0), PruneQuantize(bits, 0.25, compensated=True)
    own = weight(rows * size, inputs * seen)
    found = transform.encode(own)
    assert torch.equal(found["mask"], transform.encode(weight(rows, inputs))["mask"])
    exact = weight(rows, inputs)  # what can be judged by
    errors = [
        exact.relative_error((transform.decode(stored, own.target).double() / size).float())
        for stored in (found, transform.nearest.encode(own))
    ]
    digits = 1e-3 if size == 1e-41 else 1e-9  # floats that small have few
    assert errors[0] <= errors[1] * (1 + 1e-3) + digits


@pytest.mark.parametrize("count", [4, 30, 300])
def test_what_a_few_inputs_have_by_chance_is_not_fitted(count: int) -> None:
    rows = torch.randn(64, 40, generator=torch.Generator().manual_seed(0))
    seen, new = torch.randn(count, 40, generator=torch.Generator().manual_seed(1)), torch.randn(5000, 40)
    transform, own, judged = PruneQuantize(3, compensated=True), weight(rows, seen), weight(rows, new)
    found, nearest = transform.approximate(own), transform.nearest.approximate(own)
    assert judged.relative_error(found) < 1.1 * judged.relative_error(nearest)  # there is nothing to gain
    # where the inputs do go together a few are enough
    seen, new = correlated(5000, 40, 2).split((count, 5000 - count))
    own, judged = weight(rows, seen), weight(rows, new)
    gain = judged.relative_error(transform.approximate(own)) / judged.relative_error(nearest)
    assert gain < {4: 0.9, 30: 0.4, 300: 0.4}[count]


def test_without_moments_it_says_what_is_missing() -> None:
    own = weight(torch.ones(4, 40), torch.ones(2, 40))
    for transform in (PruneQuantize(4, compensated=True), LowRank(ranks=2, then=PruneQuantize(4, compensated=True))):
        with pytest.raises(OptionsError, match=r"compensated' needs the second moments .* measure\(\)"):
            transform.approximate(Weight(own.rows, replace(own.target, layer="Linear")))


# ---- in a model ----


def test_all_convolutions_are_compensated_those_in_groups_by_the_moments_of_each() -> None:
    measurement = measure(Mixed().eval(), [torch.randn(4, 3, 6, 6)], OPTIONS)
    compensated = {
        part.name: {own.label.endswith("compensated") for own in options[1:]}
        for part, options in zip(measurement.parts, measurement.transforms, strict=True)
    }
    assert compensated == {
        "stem": {True},
        "depthwise": {True},
        "grouped": {True},
        "wide": {True},
        "up": {True},
        "fc": {True},
    }
    assert list(measurement.moments) == ["stem", "depthwise", "grouped", "wide", "up", "fc"]
    assert measurement.moments["depthwise"].shape == (8, 9, 9)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_moments_of_samples_of_several_lengths_are_of_what_is_not_padding() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    lengths = torch.tensor([5, 2, 3])
    padding = torch.arange(5) >= lengths[:, None]
    data = [{"src": torch.randn(3, 5, 8), "src_key_padding_mask": padding}]
    offered = prune_quantize(bits=(4,), sparsity=(0,), compensated=True)
    measurement = measure(encoder, data, offered, loss="mse", method="direct")
    assert measurement.num_inputs["layers.0.linear1"] == lengths.sum()
    layer = encoder.layers[0]
    alone = torch.cat([data[0]["src"][i, :length] for i, length in enumerate(lengths)])
    with torch.no_grad():
        attended = [layer.self_attn(one, one, one)[0] for one in alone.split(lengths.tolist())]
        seen = layer.norm1(alone + torch.cat(attended))
    # float32 activations, added up in another order
    np.testing.assert_allclose(measurement.moments["layers.0.linear1"], seen.T @ seen / len(seen), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2), (5, 4, 11)),
        (lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 1), padding_mode="circular"), (5, 4, 7, 8)),
        (lambda: nn.Conv3d(2, 6, (1, 3, 5), padding="same"), (3, 2, 4, 5, 6)),
        (lambda: nn.Conv1d(4, 6, 3), (4, 9)),  # one sample without its dimension
        (lambda: nn.ConvTranspose1d(4, 6, 3, stride=3, padding=1, output_padding=2, dilation=2), (5, 4, 7)),
        (lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=(1, 2), padding=(3, 0)), (5, 4, 7, 8)),
        (lambda: nn.ConvTranspose3d(2, 6, (1, 3, 2), stride=2), (3, 2, 4, 3, 2)),
    ],
)
def test_input_rows_are_what_a_convolution_multiplies(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    conv, given = seeded(make), torch.randn(*shape)
    weight, bias = conv.get_parameter("weight"), conv.get_parameter("bias")
    (rows,) = input_rows(conv, given)
    expected = conv(given)
    batched_output = expected if given.ndim == weight.ndim else expected[None]
    channels = to_rows(conv, weight)
    outputs = (rows @ channels.T + bias).reshape(len(batched_output), -1, len(channels))
    torch.testing.assert_close(outputs.transpose(1, 2).reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv2d(6, 12, 3, padding=1, groups=3), (4, 6, 5, 5)),
        (lambda: nn.Conv1d(6, 6, 2, groups=6), (4, 6, 9)),
        (lambda: nn.ConvTranspose2d(6, 9, (2, 3), stride=2, padding=1, groups=3), (4, 6, 4, 5)),
    ],
)
def test_input_rows_of_a_grouped_convolution_are_those_of_each_group(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    conv, given = seeded(make), torch.randn(*shape)
    (rows,) = input_rows(conv, given)
    channels = to_rows(conv, conv.get_parameter("weight"))
    blocks = channels.view(len(rows), -1, channels.shape[1])
    expected = conv(given)
    outputs = torch.cat([seen @ block.T for seen, block in zip(rows, blocks, strict=True)], 1) + conv.bias
    found = outputs.reshape(len(given), -1, len(channels)).transpose(1, 2).reshape(expected.shape)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
        lambda: nn.Conv2d(8, 16, 3, groups=2),
        lambda: nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2),
        lambda: nn.ConvTranspose2d(8, 6, 3),
    ],
    ids=["depthwise", "grouped", "transposed in groups", "transposed"],
)
def test_grouped_and_transposed_convolutions_lose_less_of_their_output(make: Callable[[], nn.Module]) -> None:
    conv, generator = seeded(make), torch.Generator().manual_seed(0)
    mixed = torch.einsum("nchw,dc->ndhw", torch.randn(16, 3, 6, 6, generator=generator), torch.randn(8, 3))
    given = torch.relu(nn.functional.avg_pool2d(mixed, 3, 1, 1) + 0.5)
    measurement = measure(conv, [given], prune_quantize(bits=(3,), sparsity=(0,), compensated=True), loss="mse")
    (weight,) = measurement.weights(conv)
    transform = measurement.transforms[0][1]
    assert transform.label.endswith("compensated")
    found, nearest = (weight.relative_error(one.approximate(weight)) for one in (transform, transform.nearest))
    assert found < 0.7 * nearest
    rows, exact = transform.approximate(weight), conv(given)
    with torch.no_grad():
        conv.weight.copy_(from_rows(conv, rows, conv.weight.shape))
        lost = (conv(given) - exact).square().mean() / (exact - conv.bias.view(-1, 1, 1)).square().mean()
    assert float(lost) == pytest.approx(found, rel=1e-3)  # the moments tell the loss of the output itself


def test_a_weight_shared_with_an_embedding_is_rounded_to_nearest() -> None:
    class Turned(TiedLanguageModel):
        def __init__(self) -> None:
            super().__init__()
            self._modules = {"head": self._modules.pop("head"), **self._modules}  # the Linear comes first

    found = survey(Turned(), [torch.randint(11, (3, 5))])
    assert [(part.modules, part.target.common_input) for part in found.parts] == [
        (("head", "embed"), False),
        (("mix",), True),
    ]


def test_a_layer_that_no_input_comes_to_stays_as_it_is() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.used, self.idle = nn.Conv2d(1, 3, 2), nn.Linear(27, 9), nn.Linear(27, 9)

        def forward(self, x: Tensor) -> Tensor:
            empty = self.conv(x[:0])
            out = self.conv(x).flatten(1)
            return self.used(out) + self.idle(out[:0]).sum() + empty.sum()

    measurement = measure(Experts().eval(), [torch.rand(40, 1, 4, 4)], OPTIONS, method="direct")
    assert measurement.num_inputs == {"conv": 360, "used": 40}
    assert [part.name for part in measurement.parts] == ["conv", "used"]
    (idle,) = measurement.skipped
    assert (idle.name, idle.size_bytes) == ("idle", 4 * 27 * 9)
    assert "no calibration input" in idle.reason


def test_data_that_changes_from_pass_to_pass_is_refused() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.sometimes = nn.Linear(20, 20), nn.Linear(20, 20)

        def forward(self, x: Tensor) -> Tensor:
            out = self.always(x)
            return self.sometimes(out) if x[0, 0] > 0 else out

    class Data:
        passes = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.passes += 1
            yield torch.ones(4, 20) * (1 if self.passes <= 2 else -1)  # run twice, then counted, then the moments

    with pytest.raises(
        DataError, match="'sometimes' was called in the first pass over the data but not in a later one"
    ):
        measure(Gate().eval(), Data(), OPTIONS)


def test_moments_of_a_layer_that_is_reused_or_shared_are_over_all_its_calls() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.tanh(self.one(x)))

    model, x = Shared(), torch.randn(50, 4)
    (part,) = survey(model, [x]).parts
    assert part.modules == ("one", "two")
    found, counts = second_moments(model, [part], [x], None)
    assert counts == {"one": 100}
    seen = torch.cat([x, torch.tanh(model.one(x))]).detach()
    torch.testing.assert_close(found["one"], seen.T @ seen / len(seen))
    measure(Reused(), [torch.randn(8, 5)], OPTIONS)


def test_blocks_of_a_layer_take_the_moments_of_the_layer() -> None:
    torch.manual_seed(0)
    model, data = Chain(nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 3)).eval(), [torch.rand(64, 30)]
    options = prune_quantize(bits=(3,), sparsity=(0,), compensated=True)
    whole, blocks = measure(model, data, options), measure(model, data, options, granularity=8)
    assert blocks.labels[:2] == (("keep", "3 bits, compensated"),) * 2
    one = apply(model, whole, solution([1, 0]))
    other = apply(model, blocks, solution([1, 1, 0]))
    assert torch.equal(one.layers[0].weight, other.layers[0].weight)  # rows do not depend on each other


@pytest.mark.parametrize("name", KINDS)
def test_what_is_measured_is_what_is_applied_saved_and_loaded(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, batch = KINDS[name]
    model = make().eval()
    ranks = low_rank(ratios=(0.5,), kinds=("channels", "spatial", "tucker", "sliced"), slices=(3,), whitened=False)
    coded = ranks.then(prune_quantize(bits=(4,), sparsity=(0,), compensated=True))
    measurement = measure(model, [batch() for _ in range(2)], OPTIONS + coded, loss="kl:-1")
    starts = np.cumsum([0, *map(len, measurement.transforms)])
    for turn in range(max(map(len, measurement.transforms))):
        choice = [turn % len(own) for own in measurement.transforms]
        smaller = apply(model, measurement, solution(choice))
        saved = save_compressed(smaller, tmp_path / "model")
        used = measurement.resources["bytes"][starts[:-1] + choice].sum()
        assert saved.payload_bytes == measurement.fixed["bytes"] + used
        again = load_compressed(saved.path, make)
        for key, value in smaller.state_dict().items():
            assert torch.equal(again.state_dict()[key], value)
        weights = measurement.weights(model)
        for part, own, options, option in zip(measurement.parts, weights, measurement.transforms, choice, strict=True):
            expected = options[option].approximate(own)
            assert own.relative_error(expected) == measurement.error[starts[measurement.parts.index(part)] + option]


@pytest.mark.parametrize("form", ["channels", "spatial", "tucker", "sliced"])
@pytest.mark.parametrize("whitened", [False, True])
def test_factors_are_compensated_too(form: str, *, whitened: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 12, 3), nn.ReLU(), nn.Conv2d(12, 16, 3)).eval()
    data = [torch.relu(torch.randn(64, 6, 8, 8).cumsum(2))]
    ranks = low_rank(ratios=(0.4,), kinds=(form,), slices=(2,), whitened=whitened)
    coded = [prune_quantize((3,), (0,), compensated=compensated) for compensated in (True, False)]
    measurement = measure(model, data, ranks.then(coded[0]) + ranks.then(coded[1]), loss="kl:-1")
    errors = []
    for own, options in zip(measurement.weights(model), measurement.transforms, strict=True):
        (compensated,) = [one for one in options if one.label.endswith("compensated")]
        assert isinstance(compensated, LowRank)
        assert compensated.size_bytes(own.target) == compensated.nearest.size_bytes(own.target)
        exact = replace(compensated, then=Keep())
        errors.append([own.relative_error(one.approximate(own)) for one in (exact, compensated, compensated.nearest)])
    of_rank, found, nearest = np.sum(errors, axis=0)
    # What bits add to what the rank leaves: over 25 draws at most .7 of rounding to nearest (one layer alone: .9).
    assert found - of_rank < 0.85 * (nearest - of_rank)


@pytest.mark.parametrize("whitened", [False, True])
def test_the_factors_of_an_embedding_are_compensated_too(*, whitened: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(300, 24), nn.Linear(24, 4)).eval()
    model[0].weight.data = torch.randn(300, 6) @ torch.randn(6, 24) + 0.1 * torch.randn(300, 24)
    ranks = low_rank(ranks=(6,), kinds=("channels",), whitened=whitened)
    measurement = measure(
        model, [torch.randint(300, (8, 40))], ranks.then(prune_quantize((3,), (0,), compensated=True))
    )
    own, (_, compensated) = next(measurement.weights(model)), measurement.transforms[0]
    assert isinstance(compensated, LowRank)
    assert compensated.label.endswith("3 bits, compensated")
    found, nearest = (own.relative_error(one.approximate(own)) for one in (compensated, compensated.nearest))
    assert found < 0.96 * nearest  # over 60 draws at most .93, in the middle .86


def test_what_is_fine_tuned_is_rounded_to_nearest_from_then_on(tmp_path: Path) -> None:
    torch.manual_seed(0)

    def make() -> nn.Module:
        return Chain(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3)).eval()

    model, data = make(), [torch.randn(32, 12) for _ in range(4)]
    options = prune_quantize((3,), (0,), compensated=True)
    options += low_rank(ranks=(4,), kinds=("channels",), whitened=False).then(options)
    measurement = measure(model, data, options)
    assert measurement.labels[0][1:] == ("3 bits, compensated", "rank 4, 3 bits, compensated")
    smaller = apply(model, measurement, solution([2, 1]))
    tuned = finetune(smaller, data, 30, teacher=model, learning_rate=1e-2)
    record = record_of(tuned)
    assert record is not None
    assert [own.transform.label for own in record.parts] == ["rank 4, 3 bits", "3 bits"]
    assert not torch.equal(tuned.layers[2].weight, smaller.layers[2].weight)  # type: ignore[union-attr, operator]
    loaded = load_compressed(save_compressed(tuned, tmp_path / "tuned").path, make)
    assert torch.equal(loaded(data[0]), tuned(data[0]))


def test_compress_offers_it_unless_told_otherwise() -> None:
    torch.manual_seed(0)
    model = Chain(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 6)).eval()
    data = [torch.rand(64, 24) for _ in range(3)]
    result = compress(model, data, budget={"bytes": 0.13}, solver="brute-force")
    assert {
        transform.label.endswith("compensated") for own in result.measurement.transforms for transform in own[1:]
    } == {True}
    plain = compress(model, data, budget={"bytes": 0.13}, solver="brute-force", options=prune_quantize())
    assert result.report.usage["bytes"] <= result.report.budgets["bytes"]
    assert result.solution.objective < plain.solution.objective


def test_options_round_trip_as_json() -> None:
    offered = OPTIONS + low_rank(ranks=(2,), whitened=False).then(OPTIONS)
    assert Options.from_json(offered.to_json()) == offered
    older = [{"kind": "prune_quantize", "bits": 4, "sparsity": 0.5}]
    assert Options.from_json(older) == prune_quantize((4,), (0.5,))
    assert prune_quantize((4,), (0.5,)).to_json() == older  # folders and caches of older runs are still theirs
    with pytest.raises(OptionsError, match="True or False, found 'no'"):
        prune_quantize(compensated="no")  # type: ignore[arg-type]
