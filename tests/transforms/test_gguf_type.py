"""ggml's types as transforms: what ggml encodes, the package ``gguf`` decodes bit for bit, in the bytes told."""

import gguf
import numpy as np
import pytest
import torch
from torch import nn

import qcompress
from qcompress.errors import ModelError, OptionsError
from qcompress.options import Options, gguf_types, transform_from_json
from qcompress.transforms.base import Target, Weight
from qcompress.transforms.ggml import library
from qcompress.transforms.ggml.gguf_type import GgufType
from qcompress.transforms.ggml.types import TYPES
from tests.models import TiedLanguageModel, seeded

QUANTIZED = [name for name in TYPES if name != "F32"]


def weight(channels=6, per_channel=512, *, squares=True, seed=0, layer="Linear", dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(channels, per_channel, generator=generator).to(dtype)
    means = torch.rand(per_channel, generator=generator) + 0.01
    target = Target(layer=layer, channels=channels, per_channel=per_channel, dtype=dtype, macs=1.0)
    return Weight(rows, target, squares=means if squares else None)


@pytest.mark.parametrize("name", TYPES)
def test_the_table_is_what_gguf_says(name):
    kind = gguf.GGMLQuantizationType[name]
    assert (TYPES[name].number, TYPES[name].block, TYPES[name].block_bytes) == (int(kind), *gguf.GGML_QUANT_SIZES[kind])


SLOW_TO_SET_UP = ("IQ1_M", "IQ1_S", "IQ2_S", "IQ2_XS")  # ggml makes its tables in 3 to 10 s


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW_TO_SET_UP else name for name in QUANTIZED]
)
@pytest.mark.parametrize("squares", [True, False])
def test_gguf_decodes_what_ggml_encoded_to_the_same_bits(name, squares):
    given = weight(squares=squares)
    transform = GgufType(name).resolve(given)
    if transform is None:
        assert not squares
        assert not TYPES[name].blind
        return
    stored = transform.encode(given)
    expected = gguf.quants.dequantize(stored["blocks"].numpy(), gguf.GGMLQuantizationType[name])
    found = transform.decode(stored, given.target)
    assert np.array_equal(found.numpy(), expected)
    assert torch.equal(found, transform.approximate(given))
    assert stored["blocks"].nbytes == transform.size_bytes(given.target)


@pytest.mark.parametrize(("name", "most"), [("Q8_0", 1e-4), ("Q6_K", 1e-3), ("Q4_K", 1e-2), ("Q2_K", 0.15)])
def test_errors_are_of_the_size_that_the_bits_allow(name, most):
    given = weight()
    found = GgufType(name).approximate(given)
    assert 0 < given.relative_error(found) < most


def test_columns_that_count_more_lose_less():
    given = weight(channels=64)
    squares = torch.ones(512)
    squares[:256] = 100.0  # of a block's columns the even ones
    squares = squares.view(2, 256).T.reshape(-1)
    heavy = Weight(given.rows, given.target, squares=squares)
    even = (GgufType("Q2_K").approximate(given) - given.rows)[:, ::2].square().mean()
    weighed = (GgufType("Q2_K").approximate(heavy) - given.rows)[:, ::2].square().mean()
    assert weighed < even


@pytest.mark.parametrize(("name", "instead"), [("Q4_K", "Q5_0"), ("Q6_K", "Q8_0"), ("IQ2_XXS", "IQ4_NL")])
def test_rows_that_do_not_fit_get_what_llama_cpp_falls_back_to(name, instead):
    assert GgufType(name).resolve(weight(per_channel=96)) == GgufType(instead)
    assert GgufType(name).resolve(weight(per_channel=512)) == GgufType(name)


@pytest.mark.parametrize(("shape", "layer"), [((4, 30), "Linear"), ((4, 256), "Conv2d")])
def test_what_fits_nowhere_is_not_on_offer(shape, layer):
    given = weight(*shape, layer=layer)
    labels = [option.transform.label for option in gguf_types(("Q4_0", "Q4_K", "Q8_0")).for_weight(given)]
    assert labels == ["keep"]


def test_larger_types_of_more_error_are_not_on_offer():
    fitted = gguf_types().for_weight(weight(channels=16))
    sizes = [option.transform.size_bytes(weight(channels=16).target) for option in fitted[1:]]
    errors = [option.error for option in fitted[1:]]
    ranked = [error for _, error in sorted(zip(sizes, errors, strict=True))]
    assert ranked == sorted(errors, reverse=True)
    assert len(set(sizes)) == len(sizes)


def test_a_weight_beyond_float16_has_no_block_formats():
    given = weight()
    given.rows[0, 0] = 1e6
    assert GgufType("Q4_0").resolve(given) is None
    with pytest.raises(ModelError, match="up to 65504"):
        library.encode("Q4_0", given.rows.numpy())


def test_half_precision_weights_keep_their_dtype():
    given = weight(dtype=torch.bfloat16)
    assert GgufType("Q4_0").approximate(given).dtype == torch.bfloat16
    assert GgufType("BF16").resolve(given) is None  # takes what the weight itself takes


def test_calls_that_would_end_the_process_are_refused():
    rows = np.ones((2, 256), np.float32)
    with pytest.raises(ModelError, match="multiple of 32"):
        library.encode("Q4_0", rows[:, :40].copy())
    with pytest.raises(ModelError, match="needs the mean squares"):
        library.encode("IQ2_XXS", rows)
    with pytest.raises(ModelError, match="256 finite numbers"):
        library.encode("Q4_0", rows, np.full(256, np.nan, np.float32))
    with pytest.raises(ModelError, match="take 288 bytes"):
        library.decode("Q4_0", np.zeros((1, 17), np.uint8), 512)
    rows[0, 0] = np.nan
    with pytest.raises(ModelError, match="finite"):
        library.encode("Q8_0", rows)


def test_inputs_that_are_never_seen_count_for_all_alike():
    given = weight()
    unseen = Weight(given.rows, given.target, squares=torch.zeros(512))
    blind = weight(squares=False)
    assert torch.equal(GgufType("Q4_K").approximate(unseen), GgufType("Q4_K").approximate(blind))


def test_the_same_blocks_on_any_number_of_threads():
    given, threads = weight(channels=37), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = GgufType("Q4_K").encode(given)["blocks"]
        torch.set_num_threads(3)
        assert torch.equal(GgufType("Q4_K").encode(given)["blocks"], alone)
    finally:
        torch.set_num_threads(threads)


def test_names_are_checked_and_survive_json():
    with pytest.raises(OptionsError, match="ggml has no type called 'Q9_K'"):
        gguf_types(("Q9_K",))
    with pytest.raises(OptionsError, match="names is empty"):
        gguf_types(())
    options = gguf_types(("Q4_K", "IQ3_S"))
    assert Options.from_json(options.to_json()) == options
    assert transform_from_json(GgufType("Q4_K").to_json()) == GgufType("Q4_K")


def test_measured_squares_are_those_of_the_inputs_and_are_saved(tmp_path):
    model = seeded(lambda: TiedLanguageModel(words=40, width=32))
    data = [torch.arange(20).view(2, 10), torch.arange(5, 25).view(2, 10)]
    measurement = qcompress.measure(model, data, gguf_types(("Q4_0", "Q8_0")))
    states = torch.cat([model.embed(batch).reshape(-1, 32) for batch in data])
    mixed = torch.tanh(model.mix(states))
    torch.testing.assert_close(torch.tensor(measurement.squares["mix"]), states.square().mean(0))
    torch.testing.assert_close(torch.tensor(measurement.squares["embed"]), mixed.square().mean(0))
    assert not measurement.moments  # the diagonal is all that is asked for
    measurement.save(tmp_path / "m.npz")
    loaded = qcompress.Measurement.load(tmp_path / "m.npz")
    assert {name: values.tolist() for name, values in loaded.squares.items()} == {
        name: values.tolist() for name, values in measurement.squares.items()
    }
    first, second = (list(one.weights(model)) for one in (measurement, loaded))
    assert all(
        torch.equal(GgufType("Q4_0").approximate(one), GgufType("Q4_0").approximate(other))
        for one, other in zip(first, second, strict=True)
    )


def test_a_compressed_model_in_these_types_is_saved_and_loaded_bit_for_bit(tmp_path):
    make = lambda: seeded(lambda: nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8)))  # noqa: E731
    torch.manual_seed(0)
    data = [torch.randn(16, 64)]
    result = qcompress.compress(make(), data, budget={"bytes": 0.2}, options=gguf_types(), solver="brute-force")
    saved = qcompress.save_compressed(result.model, tmp_path / "small.safetensors")
    assert saved.payload_bytes == result.report.usage["bytes"]
    loaded = qcompress.load_compressed(saved.path, make)
    assert torch.equal(loaded[0].weight, result.model[0].weight)
    assert torch.equal(loaded[2].weight, result.model[2].weight)
