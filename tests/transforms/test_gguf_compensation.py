"""Compensated codes of ggml's linear formats: the same bytes, read by ``gguf``, and never worse than ggml's own."""

import gguf
import numpy as np
import pytest
import torch
from torch import nn

import qcompress
from qcompress.errors import OptionsError
from qcompress.options import gguf_types, transform_from_json
from qcompress.transforms.base import Target, Weight
from qcompress.transforms.ggml import library
from qcompress.transforms.ggml.codes import FORMATS, lines, put, with_scales
from qcompress.transforms.ggml.gguf_type import GgufType
from qcompress.transforms.ggml.types import LINEAR, TYPES


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


def test_every_linear_type_has_its_layout():
    assert set(FORMATS) == set(LINEAR) <= set(TYPES)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("seed", range(3))
def test_codes_that_are_put_are_the_ones_that_gguf_reads(name, seed):
    rng, kind = np.random.default_rng(seed), FORMATS[name]
    rows = rng.normal(size=(5, 512)).astype(np.float32)
    blocks = library.encode(name, rows)
    codes = rng.integers(0, kind.levels, size=rows.shape).astype(np.uint8)
    offset, scales = lines(name, blocks, 512)
    expected = offset + np.repeat(scales, kind.group, axis=1) * codes
    found = gguf.quants.dequantize(put(name, blocks, codes), gguf.GGMLQuantizationType[name])
    # offset and scale are differences of decoded float32 numbers: of their size times the largest code's rounding
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize("name", [name for name in LINEAR if FORMATS[name].free])
def test_scales_that_are_put_are_the_ones_that_gguf_reads(name):
    blocks = library.encode(name, np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32))
    wanted = np.array([[0.5, 0.25], [1.0, -2.0], [4.0, 0.125]], np.float32)
    found = lines(name, with_scales(name, blocks, wanted), 64)[1]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("name", LINEAR)
def test_compensated_rows_lose_less_on_their_inputs_in_the_same_bytes(name):
    weight = calibrated()
    plain, better = GgufType(name), GgufType(name, compensated=True)
    assert better.size_bytes(weight.target) == plain.size_bytes(weight.target)
    stored = better.encode(weight)
    read = gguf.quants.dequantize(stored["blocks"].numpy(), gguf.GGMLQuantizationType[name])
    assert np.array_equal(read, better.decode(stored, weight.target).numpy())
    lost = {one: weight.relative_error(one.approximate(weight)) for one in (plain, better)}
    assert lost[better] < 0.8 * lost[plain]


@pytest.mark.parametrize("name", LINEAR)
def test_no_row_loses_more_than_ggmls(name):
    weight = calibrated(channels=32, seed=1, inputs=40)  # few inputs: what is shrunk counts
    from qcompress.transforms.quantize.compensation import shrunk

    curvature = shrunk(weight.moments, weight.num_inputs)
    lost = []
    for one in (GgufType(name), GgufType(name, compensated=True)):
        change = (one.approximate(weight) - weight.rows).double()
        lost.append(((change @ curvature) * change).sum(1))
    assert (lost[1] <= lost[0] * (1 + 1e-4)).all()  # float32 sums of 256 products


def test_compensation_is_offered_where_it_can_be():
    weight = calibrated()
    types = [found.transform for found in gguf_types(("Q4_K", "IQ4_XS"), compensated=True).for_weight(weight)]
    assert types[1:] == [GgufType("Q4_K", compensated=True), GgufType("IQ4_XS")] or types[1:] == [
        GgufType("IQ4_XS"), GgufType("Q4_K", compensated=True)
    ]  # fmt: skip
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
