"""Compensated codes of ggml's linear formats: the same bytes, read by ``gguf``, and never worse than ggml's own."""

import gguf
import numpy as np
import pytest
import torch
from torch import nn

import qcompress
from qcompress.errors import OptionsError
from qcompress.measuring.inputs.moments import second_moments
from qcompress.measuring.inputs.squares import input_squares
from qcompress.model.parts import survey
from qcompress.options import gguf_types, transform_from_json
from qcompress.transforms.base import Target, Weight
from qcompress.transforms.ggml import library
from qcompress.transforms.ggml.codes import FORMATS, put, scales_of
from qcompress.transforms.ggml.gguf_type import GgufType
from qcompress.transforms.ggml.scales import Scales
from qcompress.transforms.ggml.types import COMPENSATED, TYPES
from qcompress.transforms.quantize import compensation
from tests.models import TiedLanguageModel


def calibrated(channels=8, length=256, seed=0, inputs=2000):
    """A weight whose inputs go together in places."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(inputs, length, generator=generator) @ torch.randn(length, length, generator=generator)
    x = mixed / length**0.5 + 0.3 * torch.randn(inputs, length, generator=generator)
    rows = torch.randn(channels, length, generator=generator)
    target = Target(
        layer="Linear", channels=channels, per_channel=length, dtype=torch.float32, macs=1.0, common_input=True
    )
    return Weight(rows, target, x.T @ x / inputs, inputs, x.square().mean(0))


def any_scales(name, like, rng):
    """Scales and offsets from all that can be written."""

    def whole(span):
        return rng.integers(span[0], span[1] + 1, like.steps.shape).astype(np.float32)

    layout = FORMATS[name].scales
    units = 2.0 ** rng.integers(-8, 8, like.units.shape) if layout.powers else rng.normal(size=like.units.shape)
    offset = layout.lows is not None
    return Scales(
        units=units.astype(np.float16).astype(np.float32),
        steps=whole(layout.steps),
        low_units=rng.normal(size=units.shape).astype(np.float16).astype(np.float32) if offset else None,
        lows=whole(layout.lows) if offset else None,
    )


def test_every_type_that_is_compensated_has_its_layout():
    assert set(FORMATS) == set(COMPENSATED) <= set(TYPES)


@pytest.mark.parametrize("name", COMPENSATED)
@pytest.mark.parametrize("seed", range(3))
def test_codes_scales_and_offsets_that_are_put_are_the_ones_that_gguf_reads(name, seed):
    rng, kind = np.random.default_rng(seed), FORMATS[name]
    blocks = library.encode(name, rng.normal(size=(5, 512)).astype(np.float32))
    codes = rng.integers(0, len(kind.numbers), size=(5, 512)).astype(np.uint8)
    scales = any_scales(name, scales_of(name, blocks), rng)
    written = put(name, blocks, codes, scales)
    numbers = np.array(kind.numbers, np.float32)[codes].reshape(-1, scales.steps.shape[1], kind.group)
    expected = (scales.units[:, None] * scales.steps)[:, :, None] * numbers
    if scales.lows is not None:
        expected += (scales.low_units[:, None] * scales.lows)[:, :, None]
    found = gguf.quants.dequantize(written, gguf.GGMLQuantizationType[name])
    # products of a float16, a step and a code are exact in float32; one rounding is left in their sum
    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=0, atol=2e-7 * np.abs(expected).max())
    again = scales_of(name, written)
    for field in ("units", "steps", "low_units", "lows"):
        assert np.array_equal(getattr(again, field), getattr(scales, field))


@pytest.mark.parametrize("name", COMPENSATED)
def test_compensated_rows_lose_less_on_their_inputs_in_the_same_bytes(name):
    weight = calibrated()
    plain, better = GgufType(name), GgufType(name, compensated=True)
    assert better.size_bytes(weight.target) == plain.size_bytes(weight.target)
    stored = better.encode(weight)
    read = gguf.quants.dequantize(stored["blocks"].numpy(), gguf.GGMLQuantizationType[name])
    assert np.array_equal(read, better.decode(stored, weight.target).numpy())
    lost = {one: weight.relative_error(one.approximate(weight)) for one in (plain, better)}
    assert lost[better] < 0.8 * lost[plain]


@pytest.mark.parametrize("name", COMPENSATED)
def test_no_row_loses_more_than_ggmls(name):
    weight = calibrated(channels=32, seed=1, inputs=40)  # few inputs: what is shrunk counts
    curvature = compensation.shrunk(weight.moments, weight.num_inputs)
    lost = []
    for one in (GgufType(name), GgufType(name, compensated=True)):
        change = (one.approximate(weight) - weight.rows).double()
        lost.append(((change @ curvature) * change).sum(1))
    assert (lost[1] <= lost[0] * (1 + 1e-4)).all()  # float32 sums of 256 products


@pytest.mark.parametrize("name", ["Q4_K", "Q3_K", "Q5_1", "IQ4_XS"])
def test_scales_and_offsets_are_refitted_within_the_format(name):
    weight = calibrated()
    before = scales_of(name, GgufType(name).encode(weight)["blocks"].numpy())
    after = scales_of(name, GgufType(name, compensated=True).encode(weight)["blocks"].numpy())
    layout = FORMATS[name].scales
    assert (before.units != after.units).any()
    assert (before.steps != after.steps).any() == (layout.steps != (1, 1))
    if layout.lows is not None:
        assert (before.low_units != after.low_units).any()
        assert (before.lows != after.lows).any() == (layout.lows != (1, 1))


def test_a_refitted_factor_is_the_best_that_can_be_stored():
    weight = calibrated(length=64)
    rows, metric = weight.rows, weight.moments + 0.1 * torch.eye(64)
    along, factors = rows + 0.3 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)), torch.ones(8, 2)
    gradient = (rows - along * factors.repeat_interleave(32, 1)) @ metric
    storable = lambda numbers: (4 * numbers).round().clamp(0, 8) / 4  # noqa: E731
    compensation.refit(factors, along, 32, storable, gradient, metric)
    change = rows - along * factors.repeat_interleave(32, 1)
    torch.testing.assert_close(gradient, change @ metric, rtol=1e-4, atol=1e-4)

    def loss(last):  # the first stretch was chosen before the last, which hears of it
        tried = rows - along * torch.stack([factors[:, 0], torch.full((8,), last)], 1).repeat_interleave(32, 1)
        return ((tried @ metric) * tried).sum(1)

    losses = torch.stack([loss(step / 4) for step in range(1, 9)])
    assert torch.equal(factors[:, 1], (losses.argmin(0) + 1) / 4)


def test_compensation_is_offered_where_it_can_be():
    weight = calibrated()
    types = [found.transform for found in gguf_types(("Q4_K", "IQ3_S"), compensated=True).for_weight(weight)]
    assert set(types[1:]) == {GgufType("Q4_K", compensated=True), GgufType("IQ3_S")}
    with pytest.raises(OptionsError, match="needs the second moments"):
        GgufType("Q4_K", compensated=True).encode(Weight(weight.rows, weight.target))
    assert transform_from_json(GgufType("Q4_K", compensated=True).to_json()) == GgufType("Q4_K", compensated=True)
    assert GgufType("Q4_K", compensated=True).nearest == GgufType("Q4_K")


def test_a_model_of_compensated_codes_loses_less():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    data = [torch.randn(256, 64) @ torch.randn(64, 64) for _ in range(4)]
    losses = []
    for compensated in (False, True):
        options = gguf_types(("Q2_K", "Q4_0"), compensated=compensated)
        result = qcompress.compress(model, data, budget={"bytes": 0.16}, options=options, solver="brute-force")
        losses.append(qcompress.mean_loss(model, result.model, data))
    assert losses[1] < losses[0]


def test_a_vocabulary_that_is_a_head_too_has_the_moments_of_the_heads_input():
    torch.manual_seed(0)
    model, data = TiedLanguageModel(width=32), [torch.randint(11, (16, 5))]
    options = gguf_types(("Q4_0",), compensated=True)
    measurement = qcompress.measure(model, data, options, method="sampled")
    part = measurement.parts[0]
    assert part.target.head
    assert not part.target.common_input
    heard = []
    model.head.register_forward_pre_hook(lambda module, given: heard.append(given[0].reshape(-1, given[0].shape[-1])))
    model(data[0])
    expected = (heard[0].T @ heard[0] / len(heard[0])).detach().numpy()
    np.testing.assert_allclose(measurement.moments[part.modules[0]], expected, rtol=1e-4, atol=1e-6)
    assert GgufType("Q4_0", compensated=True) in measurement.transforms[0]


def test_squares_of_inputs_are_the_diagonals_of_moments_that_are_at_hand():
    torch.manual_seed(0)
    model, data = TiedLanguageModel(width=32), [torch.randint(11, (16, 5)) for _ in range(2)]
    parts = survey(model, data).parts
    moments, _ = second_moments(model, parts, data, None)
    found, taken = input_squares(model, parts, data, None, moments), input_squares(model, parts, data, None)
    assert found.keys() == taken.keys() == {"embed", "mix"}
    for path in found:
        torch.testing.assert_close(found[path], taken[path])
