"""Measuring opened models: the numbers of the model in memory, whatever is cut, within the memory that was given."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qcompress
from qcompress.errors import DataError, ModelError, OptionsError
from qcompress.measuring.candidates import EncodeProgress
from qcompress.measuring.methods.gradients import Gradients
from qcompress.measuring.streamed.effects import StreamedEffects
from qcompress.measuring.streamed.forecast import as_bytes
from qcompress.measuring.streamed.side_inputs import SideInputs
from qcompress.measuring.streamed.sweep import BlockSweep
from qcompress.model.opened import open_model
from tests.opened_models import in_memory, reconfigured, saved, tokens
from tests.quick import slow_but

NEAREST = qcompress.prune_quantize(bits=(3, 4), group_size=16)
COMPENSATED = qcompress.prune_quantize(bits=(3, 4), group_size=16, compensated=True)


def data() -> list[torch.Tensor]:
    return [tokens(2, 9, seed=1), tokens(1, 7, seed=2), tokens(3, 9, seed=3)]


@pytest.mark.parametrize(
    ("kind", "more", "options"),
    [
        ("Llama", {}, NEAREST),
        pytest.param("Llama", {}, COMPENSATED, marks=pytest.mark.slow),
        pytest.param("Llama", {"tie_word_embeddings": True}, NEAREST, marks=pytest.mark.slow),
        ("Gemma2", {"head_dim": 8}, NEAREST),
        ("Llama", {}, qcompress.gguf_types(names=("Q4_0",))),
    ],
)
def test_it_gives_the_numbers_of_the_model_in_memory(
    kind: str, more: dict[str, Any], options: qcompress.Options, tmp_path: Path
) -> None:
    folder = saved(kind, tmp_path, **more)
    batches = [tokens(2, 9, seed=1), tokens(1, 9, seed=2), tokens(3, 9, seed=3)]
    expected = qcompress.measure(in_memory(folder), batches, options, method="sampled", seed=5)
    found = qcompress.measure(open_model(folder), batches, options, method="sampled", seed=5)
    assert found.labels == expected.labels
    assert [part.to_json() for part in found.parts] == [part.to_json() for part in expected.parts]
    # the same operations sample by sample; only gradients of a weight that is used twice are added in another order
    np.testing.assert_allclose(found.cost, expected.cost, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(found.error, expected.error, rtol=1e-5)
    assert (found.fixed, found.original) == (expected.fixed, expected.original)
    assert (found.num_samples, found.model_fingerprint) == (expected.num_samples, expected.model_fingerprint)


def test_half_precision_gives_the_numbers_of_the_model_in_memory(tmp_path: Path) -> None:
    folder = saved("Llama", tmp_path, dtype=torch.bfloat16)
    expected = qcompress.measure(in_memory(folder), data(), NEAREST, method="sampled")
    found = qcompress.measure(open_model(folder), data(), NEAREST, method="sampled")
    assert found.ran is not None
    assert expected.ran is not None
    assert found.ran.tolist() == expected.ran.tolist()
    np.testing.assert_allclose(found.cost[~found.ran], expected.cost[~found.ran], rtol=1e-6)
    np.testing.assert_allclose(found.cost, expected.cost, rtol=1e-2)  # what is outside the blocks rounds to bfloat16


def test_padded_batches_are_measured_as_in_memory(tmp_path: Path) -> None:
    folder = saved("Llama", tmp_path)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    batches = [{"input_ids": tokens(2, 9), "attention_mask": mask}]
    expected = qcompress.measure(in_memory(folder), batches, NEAREST, method="sampled")
    found = qcompress.measure(open_model(folder), batches, NEAREST, method="sampled")
    np.testing.assert_allclose(found.cost, expected.cost, rtol=1e-5, atol=1e-12)


@pytest.mark.usefixtures("estimates_alone")
def test_the_factor_is_made_of_the_effects_and_standard_errors_tell_their_spread(tmp_path: Path) -> None:
    found = qcompress.measure(open_model(saved("Llama", tmp_path)), data(), NEAREST, method="sampled")
    np.testing.assert_allclose(0.5 * np.square(found.factor).sum(axis=1), found.cost)
    halves = 0.5 * found.num_samples * found.factor**2
    assert found.standard_error is not None
    np.testing.assert_allclose(found.standard_error, halves.std(axis=1, ddof=1) / found.num_samples**0.5)
    found.save(tmp_path / "measurement.npz")
    loaded = qcompress.Measurement.load(tmp_path / "measurement.npz")
    assert loaded.standard_error is not None
    assert (loaded.standard_error == found.standard_error).all()


def test_layers_may_be_left_out(tmp_path: Path) -> None:
    found = qcompress.measure(
        open_model(saved("Llama", tmp_path)), data(), {"*.up_proj": NEAREST}, skip="*.1.*", method="sampled"
    )
    assert [part.name for part in found.parts] == [f"model.layers.{index}.mlp.up_proj" for index in (0, 2)]


class CutError(Exception):
    """Stands for a process that was killed."""


def cut_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, count: int) -> None:
    """Let the call number ``count`` fail, and those after it not."""
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            raise CutError
        return original(*given, **named)

    monkeypatch.setattr(owner, name, counted)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A model's folder, and the file of its measurement."""
    folder = saved("Llama", tmp_path_factory.mktemp("whole"))
    return folder, measured_file(folder, folder / "whole.npz", None)


def measured_file(folder: Path, file: Path, cache: Path | None) -> bytes:
    """The bytes of a measurement on three samples."""
    only = ("*.mlp.up_proj", "*.o_proj", "lm_head", "*.embed_tokens")
    model, batches = open_model(folder), [tokens(2, 5), tokens(1, 4)]
    qcompress.measure(model, batches, NEAREST, only=only, method="sampled", cache=cache).save(file)
    return file.read_bytes()


# 3 samples: 9 runs of blocks forward and as many backward, then those of options alone; 15 products; 5 units
POINTS = [
    *((BlockSweep, "through", count) for count in (1, 2, 4, 7, 9, 10, 14, 18, 19, 30)),
    *((Gradients, "add", count) for count in (1, 3, 4, 6, 8, 12, 13, 15)),
    *((StreamedEffects, "_unit", count) for count in (1, 2, 3, 4, 5)),
]


QUICK = [(BlockSweep, "through", 4), (BlockSweep, "through", 30), (Gradients, "add", 8), (StreamedEffects, "_unit", 3)]
CASES = [pytest.param(*own, marks=[] if own in QUICK else pytest.mark.slow) for own in POINTS]


@pytest.mark.parametrize(("owner", "name", "count"), CASES)
def test_a_measurement_that_was_cut_anywhere_goes_on_to_the_same_bytes(
    owner: Any, name: str, count: int, whole: tuple[Path, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = whole
    with monkeypatch.context() as patch:
        cut_after(patch, owner, name, count)
        with pytest.raises(CutError):
            measured_file(folder, tmp_path / "cut.npz", tmp_path / "cache")
    assert measured_file(folder, tmp_path / "resumed.npz", tmp_path / "cache") == expected
    assert not (tmp_path / "cache").exists()


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flipped(file: Path) -> None:
    numbers = bytearray(file.read_bytes())
    numbers[len(numbers) // 2] ^= 16
    file.write_bytes(numbers)


@pytest.mark.parametrize("damage", slow_but([flipped, Path.unlink], [truncated, flipped, Path.unlink]))
def test_a_damaged_file_of_a_measurement_that_was_cut_is_named_or_made_again(
    damage: Callable[[Path], None], whole: tuple[Path, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = whole
    with monkeypatch.context() as patch:
        cut_after(patch, Gradients, "add", 8)
        with pytest.raises(CutError):
            measured_file(folder, tmp_path / "cut.npz", tmp_path / "cut")
    files = sorted(file.name for file in (tmp_path / "cut").iterdir())
    assert {"key.json", "states_0001.bin", "gradients_0002.bin", "effects_after.npz"} <= set(files)
    named = []
    for number, name in enumerate(files):
        cache = tmp_path / f"cache{number}"
        shutil.copytree(tmp_path / "cut", cache)
        damage(cache / name)
        try:
            assert measured_file(folder, tmp_path / "resumed.npz", cache) == expected, name
        except DataError as error:
            assert re.search(rf"{cache}.*delete", str(error)), name  # noqa: PT017
            assert cache.exists()
            named.append(name)
    assert {"key.json", "states_0001.bin", "gradients_0002.bin"} <= set(named)


def test_a_cache_that_is_a_file_or_holds_other_files_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    model = open_model(saved("Llama", tmp_path / "model"))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match="must be a folder for the files of an opened model, and is a file"):
        qcompress.measure(model, data(), NEAREST, method="sampled", cache=tmp_path / "file")
    with pytest.raises(DataError, match=r"holds 'file' but no key\.json .*choose a new folder"):
        qcompress.measure(model, data(), NEAREST, method="sampled", cache=tmp_path)
    assert (tmp_path / "file").read_text() == "mine"


def test_blocks_that_are_done_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(saved("Llama", tmp_path / "model"))
    with monkeypatch.context() as patch:
        cut_after(patch, Gradients, "add", 13)  # in the second block from the end
        with pytest.raises(CutError):
            qcompress.measure(model, data(), NEAREST, method="sampled", cache=tmp_path / "cache")
    done: list[int] = []
    original = SideInputs.through
    monkeypatch.setattr(
        SideInputs, "through", lambda self, block, *more: done.append(block) or original(self, block, *more)
    )
    qcompress.measure(model, data(), NEAREST, method="sampled", cache=tmp_path / "cache")
    assert done == [1] * 6 + [0] * 6


def test_encoding_is_reported_over_all_blocks(tmp_path: Path) -> None:
    model, cache = open_model(saved("Llama", tmp_path)), tmp_path / "cache"
    told: list[EncodeProgress] = []

    def cut(progress: EncodeProgress) -> None:
        told.append(progress)
        if progress.parts > progress.total_parts // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qcompress.measure(model, data(), NEAREST, method="sampled", cache=cache, on_encode=cut)
    first = len(told)
    found = qcompress.measure(model, data(), NEAREST, method="sampled", cache=cache, on_encode=told.append)
    for reports in (told[:first], told[first:]):
        parts = [progress.parts for progress in reports]
        assert parts == list(range(parts[0], parts[0] + len(parts)))
        assert {progress.total_parts for progress in reports} == {len(found.parts)}
        assert all(progress.remaining_s is not None for progress in reports)
    assert told[0].parts == 1
    assert 1 < told[first].parts <= told[first - 1].parts  # what was done is not done again
    assert (told[-1].parts, told[-1].remaining_s) == (len(found.parts), 0)


def test_files_of_another_measurement_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(saved("Llama", tmp_path / "model"))
    with monkeypatch.context() as patch:
        cut_after(patch, BlockSweep, "through", 5)
        with pytest.raises(CutError):
            qcompress.measure(model, data(), NEAREST, method="sampled", cache=tmp_path / "cache")
    with pytest.raises(DataError, match="the files of another measurement"):
        qcompress.measure(model, data()[:2], NEAREST, method="sampled", cache=tmp_path / "cache")


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": 1e-4},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
    ],
)
def test_files_of_a_model_with_another_configuration_are_refused(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved("Llama", tmp_path / "model")
    with monkeypatch.context() as patch:
        cut_after(patch, Gradients, "add", 3)
        with pytest.raises(CutError):
            measured_file(folder, tmp_path / "cut.npz", tmp_path / "cache")
    reconfigured(folder, **change)
    with pytest.raises(DataError, match="the files of another measurement"):
        measured_file(folder, tmp_path / "resumed.npz", tmp_path / "cache")


def test_too_little_memory_is_refused_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(saved("Llama", tmp_path))
    monkeypatch.setattr(BlockSweep, "forward", lambda _: pytest.fail("it ran"))
    with pytest.raises(
        OptionsError, match=r"memory=10 MB was given, but about .* [GM]B are needed: .* 'model\.layers\.0'"
    ):
        qcompress.measure(model, data(), NEAREST, method="sampled", memory="10 MB")


def test_memory_is_an_amount() -> None:
    assert as_bytes("1 GiB") == 2**30
    assert as_bytes(None) is None
    assert (as_bytes(4_000_000_000), as_bytes("4e9 B"), as_bytes("100 bytes")) == (4_000_000_000, 4_000_000_000, 100)


@pytest.mark.parametrize("memory", ["50%", "lots", "4", "4e9", "4 XB", 0, 0.5, -1, True])
def test_memory_that_is_no_amount_is_refused_in_its_own_words(memory: Any, tmp_path: Path) -> None:
    found = rf"^memory must be an amount with its unit, such as '4 GB', or a number of bytes, found {memory!r}$"
    with pytest.raises(OptionsError, match=found):
        as_bytes(memory)
    if memory == "lots":
        model = open_model(saved("Llama", tmp_path))
        with pytest.raises(OptionsError, match=found):
            qcompress.compress(model, data(), options=NEAREST, method="sampled", budget={"bytes": 0.5}, memory=memory)


def test_blocks_that_pass_on_more_than_hidden_states_are_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.T5Config(
        vocab_size=61, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    model, words = open_model(tmp_path), [{"input_ids": tokens(2, 5), "decoder_input_ids": tokens(2, 4)}]
    alone = r"returns 3 values, and the model cannot go on with its hidden states alone .*load the model whole"
    with pytest.raises(ModelError, match=alone):
        qcompress.measure(model, words, NEAREST, method="sampled")
    with pytest.raises(ModelError, match=alone):
        qcompress.mean_loss(model, model, words)


class Telling(nn.Module):
    """A block that also returns what nobody needs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x + torch.relu(self.layer(x)), x


class Listening(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Telling(), Telling()])
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)[0]
        out: torch.Tensor = self.head(x)
        return out


def test_further_values_that_the_model_does_not_use_are_no_obstacle(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    model = Listening()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    batches = [torch.randn(4, 6, generator=generator)]
    options = qcompress.prune_quantize(bits=(3,), sparsity=(0,))
    expected = qcompress.measure(model, batches, options, method="sampled")
    found = qcompress.measure(open_model(tmp_path, model=Listening), batches, options, method="sampled")
    np.testing.assert_allclose(found.cost, expected.cost, rtol=1e-5)


def test_a_small_number_of_bytes_is_shown_in_bytes(tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match=r"memory=4,096 bytes was given, but about .* [GM]B are needed"):
        qcompress.measure(open_model(saved("Llama", tmp_path)), data(), NEAREST, method="sampled", memory=4096)


def test_what_an_opened_model_is_not_measured_by_is_refused(tmp_path: Path) -> None:
    model = open_model(saved("Llama", tmp_path))
    with pytest.raises(OptionsError, match="with method='sampled', layer by layer.*found method='fisher'"):
        qcompress.measure(model, data(), NEAREST)
    with pytest.raises(OptionsError, match="loss 'kl' or 'mse', found"):
        qcompress.measure(model, data(), NEAREST, method="sampled", loss=lambda output, _: output.sum((1, 2)))
    with pytest.raises(OptionsError, match="memory= is for models that are read block by block"):
        qcompress.measure(torch.nn.Linear(2, 2), [torch.ones(1, 2)], NEAREST, memory="4 GB")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (qcompress.integer_products(), r"would round its inputs .*leave integer_products\(\) out"),
        (qcompress.low_rank(ratios=(0.25,)), r"would become factors \(rank for 25 %.*leave low_rank\(\) out"),
        (qcompress.low_rank(ranks=(2,)) + NEAREST, r"would become factors \(rank 2"),
        (
            {"*mlp*": qcompress.low_rank(ranks=(2,)).then(qcompress.prune_quantize(bits=(4,))), "*": NEAREST},
            r"mlp.*would become factors",
        ),
    ],
)
def test_options_that_it_cannot_be_given_are_refused_before_any_sample_passes_a_block(
    options: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(saved("Llama", tmp_path))
    monkeypatch.setattr(BlockSweep, "forward", lambda _: pytest.fail("a long pass has started"))
    with pytest.raises(OptionsError, match=message):
        qcompress.measure(model, data(), options, method="sampled")
    with pytest.raises(OptionsError, match=message):
        qcompress.compress(model, data(), options=options, method="sampled", budget={"bytes": 0.9})
