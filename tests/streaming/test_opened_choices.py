"""Choices in opened models: the bytes, outputs and losses of the model in memory, and whole runs that were cut."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qcompress
from qcompress.agreement import agreement
from qcompress.engines.compressed_tensors import CompressedTensors
from qcompress.engines.legal import for_engine
from qcompress.errors import DataError, EngineError, OptionsError
from qcompress.guard import KeptLoss
from qcompress.measuring.streamed.sweep import BlockSweep
from qcompress.model.losses import as_loss
from qcompress.model.opened import open_model
from qcompress.opened_guard import OpenedKeptLoss
from qcompress.proposals import Proposal
from qcompress.streaming import applying, losses
from tests.measurements import solution
from tests.measuring.streamed.test_streamed import CutError
from tests.opened_models import in_memory, reconfigured, saved, tokens

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")

NEAREST = qcompress.prune_quantize(bits=(3, 4), group_size=16)
COMPENSATED = qcompress.prune_quantize(bits=(3, 4), group_size=16, compensated=True)


def data() -> list[torch.Tensor]:
    return [tokens(2, 9, seed=1), tokens(1, 9, seed=2)]


def random_choice(measurement: qcompress.Measurement, seed: int) -> list[int]:
    rng = np.random.default_rng(seed)
    return [int(rng.integers(len(options))) for options in measurement.transforms]


@pytest.fixture(scope="module", params=["nearest", "compensated", "tied", "inputs first"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A folder, the measurement of its model in memory, and of the opened one."""
    place, tied = tmp_path_factory.mktemp("case"), request.param == "tied"
    folder = (
        saved("GPT2", place) if request.param == "inputs first" else saved("Llama", place, tie_word_embeddings=tied)
    )
    options = COMPENSATED if request.param == "compensated" else NEAREST
    return folder, *(
        qcompress.measure(model, data(), options, method="sampled") for model in (in_memory(folder), open_model(folder))
    )


def skip_without_linear_layers(measurement: qcompress.Measurement) -> None:
    """The engine stores nothing else in integers."""
    if sum(part.target.layer == "Linear" for part in measurement.parts) < 2:
        pytest.skip("a model of Conv1D layers, which compressed-tensors keeps dense")


def test_a_choice_is_written_byte_for_byte_as_from_memory(case: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder, measured, streamed = case
    skip_without_linear_layers(streamed)
    engine, opened, model = CompressedTensors(shard_bytes=20_000), open_model(folder), in_memory(folder)
    legal, legal_streamed = for_engine(engine, model, measured), for_engine(engine, opened, streamed)
    choice = random_choice(legal, 3)
    chosen = qcompress.apply(model, legal, solution(choice))
    chosen_opened = qcompress.apply(opened, legal_streamed, solution(choice), data=data())
    one = qcompress.export(chosen, tmp_path / "one", target=engine).path
    other = qcompress.export(chosen_opened, tmp_path / "other", target=engine).path
    assert [file.name for file in sorted(one.iterdir())] == [file.name for file in sorted(other.iterdir())]
    assert all(file.read_bytes() == (other / file.name).read_bytes() for file in one.iterdir())
    found = qcompress.verify(other, chosen_opened, [tokens(1, 6)], target=engine)
    assert found.ok, found.why_not
    assert found.max_difference == 0.0


def test_a_file_that_is_not_what_was_chosen_is_found_out(case: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder, _, streamed = case
    skip_without_linear_layers(streamed)
    engine, opened = CompressedTensors(), open_model(folder)
    legal = for_engine(engine, opened, streamed)
    smallest = [len(options) - 1 for options in legal.transforms]
    chosen = qcompress.apply(opened, legal, solution(smallest), data=data())
    path = qcompress.export(chosen, tmp_path / "out", target=engine).path
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    place = content.index(b"weight_packed")  # the header; numbers are in the last part of the file
    content[-5000] ^= 1
    file.write_bytes(content)
    assert place
    assert not qcompress.verify(path, chosen, [tokens(1, 6)], target=engine).ok


def test_losses_of_several_choices_are_those_in_memory(case: tuple[Path, Any, Any]) -> None:
    folder, measured, streamed = case
    kept = [tokens(2, 7, seed=5), tokens(1, 7, seed=6)]
    proposals = [Proposal(name=str(seed), choice=np.array(random_choice(measured, seed))) for seed in range(3)]
    nearest = tuple(range(len(measured.parts)))
    proposals.append(Proposal(name="nearest", choice=proposals[0].choice, nearest=nearest))
    expected = KeptLoss(in_memory(folder), measured, kept)
    found = OpenedKeptLoss(open_model(folder), streamed, kept, data(), loss=as_loss("kl"), first=proposals[:2])
    for proposal in proposals:
        np.testing.assert_allclose(found(proposal).samples, expected(proposal).samples, rtol=1e-3, atol=1e-9)
        np.testing.assert_allclose(found(proposal).mean, expected(proposal).mean, rtol=1e-4)


def test_encoding_choices_of_an_opened_model_is_reported(case: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder, measured, streamed = case
    choice, told = random_choice(measured, 1), []  # type: ignore[var-annotated]
    proposal = Proposal(name="one", choice=np.array(choice))
    OpenedKeptLoss(open_model(folder), streamed, data(), data(), loss=as_loss("kl"), on_encode=told.append)(proposal)
    guarded, codes = len(told), tmp_path / "codes"
    given = {"data": data(), "folder": codes, "on_encode": told.append}
    qcompress.apply(open_model(folder), streamed, solution(choice), **given)
    applied = len(told)
    next(codes.glob("block_*")).unlink()
    qcompress.apply(open_model(folder), streamed, solution(choice), **given)
    assert len(told) == applied + 1
    for reports in (told[:guarded], told[guarded:applied], told[applied:]):
        parts = [progress.parts for progress in reports]
        assert parts == sorted(set(parts))
        assert parts[-1] == reports[-1].total_parts == len(streamed.parts)
        assert reports[-1].remaining_s == 0


def test_proposals_go_through_the_blocks_together(case: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, measured, streamed = case
    proposals = [Proposal(name=str(seed), choice=np.array(random_choice(measured, seed))) for seed in range(3)]
    found = OpenedKeptLoss(open_model(folder), streamed, data(), data(), loss=as_loss("kl"), first=proposals)
    found(proposals[0])
    monkeypatch.setattr("qcompress.opened_guard.losses_of", lambda *_, **__: pytest.fail("another pass"))
    assert found(proposals[2]).mean != found(proposals[1]).mean


def test_the_mean_loss_of_an_opened_choice_is_that_in_memory(case: tuple[Path, Any, Any]) -> None:
    folder, measured, streamed = case
    choice, model, opened = random_choice(measured, 4), in_memory(folder), open_model(folder)
    applied = qcompress.apply(model, measured, solution(choice))
    expected = qcompress.mean_loss(model, applied, data())
    chosen = qcompress.apply(opened, streamed, solution(choice), data=data())
    with torch.no_grad():
        assert torch.equal(chosen(tokens(1, 6)).logits, applied(tokens(1, 6)).logits)
    np.testing.assert_allclose(qcompress.mean_loss(opened, chosen, data()), expected, rtol=1e-4)


def test_a_choice_whose_output_is_not_finite_loses_infinitely_much(
    case: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, measured, streamed = case
    original = losses.weights_of_choice

    def broken(*given: Any) -> Any:
        found = original(*given)
        for weight in found.values():
            weight.data.fill_(torch.nan)
        return found

    monkeypatch.setattr(losses, "weights_of_choice", broken)
    proposal = Proposal(name="x", choice=np.array([len(options) - 1 for options in measured.transforms]))
    found = OpenedKeptLoss(open_model(folder), streamed, data(), data(), loss=as_loss("kl"))
    assert found(proposal).mean == float("inf")


def test_codes_of_a_call_that_was_cut_are_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(saved("Llama", tmp_path / "model"))
    measurement = qcompress.measure(model, data(), NEAREST, method="sampled")
    choice = solution([len(options) - 1 for options in measurement.transforms])
    original, done = applying.encoded, []

    def cut(*given: Any) -> Any:
        done.append(given[2].name)
        if len(done) == 3:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(applying, "encoded", cut)
    with pytest.raises(KeyboardInterrupt):
        qcompress.apply(model, measurement, choice, folder=tmp_path / "codes")
    qcompress.apply(model, measurement, choice, folder=tmp_path / "codes")
    assert done == ["outside", "block_0000", "block_0001", "block_0001", "block_0002"]
    other = solution([0] * len(measurement.transforms))
    with pytest.raises(DataError, match="codes holds the codes of another model, choice or data"):
        qcompress.apply(model, measurement, other, folder=tmp_path / "codes")


def test_what_an_opened_model_cannot_be_applied_is_refused(tmp_path: Path) -> None:
    model, whole = open_model(saved("Llama", tmp_path)), in_memory(tmp_path)
    ranks = qcompress.measure(whole, data(), qcompress.low_rank(ratios=(0.25,), whitened=False), method="sampled")
    smallest = solution([len(options) - 1 for options in ranks.transforms])
    with pytest.raises(OptionsError, match="would become factors .*; opened models only support quantization"):
        qcompress.apply(model, ranks, smallest)
    with pytest.raises(OptionsError, match="would become factors .*; opened models only support quantization"):
        qcompress.compress(model, data(), budget={"bytes": 0.5}, measurement=ranks)
    codes = qcompress.measure(model, data(), COMPENSATED, method="sampled")
    smallest = solution([len(options) - 1 for options in codes.transforms])
    with pytest.raises(DataError, match=r"are fitted to data: give apply\(…, data=batches\)"):
        qcompress.apply(model, codes, smallest)
    with pytest.raises(EngineError, match=r"'onnxruntime' does not write a model block by block"):
        qcompress.export(model, tmp_path / "x.gguf", target="onnxruntime")


COMPRESS = {
    "budget": {"bits_per_weight": 5}, "options": NEAREST, "method": "sampled", "target": "compressed-tensors",
    "solver": "dp", "pairs": False,
}  # fmt: skip


def calibration() -> list[torch.Tensor]:
    return [tokens(4, 6, seed=1), tokens(4, 6, seed=2)]


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, qcompress.Result, Path]:
    """A folder, what `compress` gave for its opened model, and the folder of the engine."""
    folder, runs = saved("Llama", tmp_path_factory.mktemp("model")), tmp_path_factory.mktemp("runs")
    result = qcompress.compress(
        open_model(folder), calibration(), output=runs / "out", folder=runs / "run", memory="8 GB", **COMPRESS
    )
    return folder, result, runs / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_compress_gives_the_choice_and_the_bytes_of_the_model_in_memory(
    compressed: tuple[Path, qcompress.Result, Path], tmp_path: Path
) -> None:
    folder, result, out = compressed
    expected = qcompress.compress(in_memory(folder), calibration(), output=tmp_path / "out", **COMPRESS)
    assert result.solution.choice is not None
    assert expected.solution.choice is not None
    assert result.solution.choice.tolist() == expected.solution.choice.tolist()
    assert contents(out) == contents(tmp_path / "out")
    assert result.verification is not None
    assert result.verification.ok
    np.testing.assert_allclose(result.report.loss_validation, expected.report.loss_validation, rtol=1e-4)
    np.testing.assert_allclose(result.report.loss_validation_error, expected.report.loss_validation_error, rtol=1e-3)
    found, wanted = ([own.loss_validation for own in each.report.candidates] for each in (result, expected))
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


@pytest.mark.parametrize(
    ("owner", "name", "count"),
    [
        pytest.param(BlockSweep, "through", 20, marks=pytest.mark.slow),
        (BlockSweep, "through", 60),
        pytest.param(losses, "encoded", 2, marks=pytest.mark.slow),
        (applying, "encoded", 3),
        pytest.param(applying, "write_codes", 2, marks=pytest.mark.slow),
        pytest.param(BlockSweep, "output", 12, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_cut_anywhere_goes_on_to_the_same_bytes(
    owner: Any,
    name: str,
    count: int,
    compressed: tuple[Path, qcompress.Result, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, _, out = compressed
    original, calls = getattr(owner, name), 0

    def cut(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            raise CutError
        return original(*given, **named)

    words = {"output": tmp_path / "out", "folder": tmp_path / "run", **COMPRESS}
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, cut)
        with pytest.raises(CutError):
            qcompress.compress(open_model(folder), calibration(), **words)
    qcompress.compress(open_model(folder), calibration(), **words)
    assert contents(tmp_path / "out") == contents(out)


@pytest.mark.slow
def test_no_step_of_a_run_computes_the_logits_of_more_than_one_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a large vocabulary take more memory than the blocks; outputs are compared sample by sample."""
    folder, forward, seen = saved("Llama", tmp_path / "model"), nn.Linear.forward, set()

    def watched(self: nn.Linear, given: torch.Tensor) -> torch.Tensor:
        if self.out_features == 61:
            seen.add(given.shape[:-1].numel() // 6)
        return forward(self, given)

    monkeypatch.setattr(nn.Linear, "forward", watched)
    words = {"folder": tmp_path / "run", "output": tmp_path / "out", "validation": calibration(), **COMPRESS}
    qcompress.compress(open_model(folder), calibration(), **words)
    assert (tmp_path / "run" / "agreement.json").exists()
    assert seen == {1}


def test_the_agreement_of_an_opened_choice_is_that_in_memory(case: tuple[Path, Any, Any]) -> None:
    folder, measurement, streamed = case
    choice = solution(random_choice(measurement, 5))
    padded = {"input_ids": tokens(2, 9), "attention_mask": torch.tensor([[1] * 9, [1] * 4 + [0] * 5])}
    batches, model, whole = [*data(), padded], open_model(folder), in_memory(folder)
    smaller = qcompress.apply(model, streamed, choice, data=data())
    found, expected = (
        agreement(model, smaller, batches),
        agreement(whole, qcompress.apply(whole, measurement, choice), batches),
    )
    assert (found.samples, found.changed, found.by_class) == (40, expected.changed, expected.by_class)
    assert [group.changed for group in found.by_margin] == [group.changed for group in expected.by_margin]
    low = [group.low for group in expected.by_margin]
    np.testing.assert_allclose([group.low for group in found.by_margin], low, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_run_whose_model_has_another_configuration_is_done_again(tmp_path: Path) -> None:
    folder, words = saved("Llama", tmp_path / "model"), {k: v for k, v in COMPRESS.items() if k != "target"}

    def losses_of(run: str) -> tuple[float, float]:
        result = qcompress.compress(open_model(folder), calibration(), folder=tmp_path / run, **words)
        return result.report.loss_predicted, result.report.loss_measured

    first = losses_of("run")
    reconfigured(folder, hidden_act="gelu")
    assert first != losses_of("run") == losses_of("new")


def test_codes_of_a_model_with_another_configuration_are_refused(tmp_path: Path) -> None:
    folder, copy = saved("Llama", tmp_path / "model"), tmp_path / "copy"
    shutil.copytree(folder, copy)
    measurement = qcompress.measure(open_model(folder), data(), COMPENSATED, method="sampled")
    chosen = solution(random_choice(measurement, 7))
    words = {"data": data(), "folder": tmp_path / "codes"}
    for same in (folder, copy):
        qcompress.apply(open_model(same), measurement, chosen, **words)
    reconfigured(copy, rms_norm_eps=1e-4)
    with pytest.raises(DataError, match="the codes of another model, choice or data"):
        qcompress.apply(open_model(copy), measurement, chosen, **words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"finetune_steps": 5}, "finetune_steps is not supported for an opened model"),
        ({"target": None, "budget": {"latency_s": "1 s"}}, "a budget for latency_s is not supported"),
        (
            {"target": None, "budget": {"file_bytes": 0.5}},
            "a budget for file_bytes without a target is not supported",
        ),
        ({"method": "fisher"}, "measured by method='sampled', found 'fisher'"),
    ],
)
def test_what_an_opened_model_is_compressed_without_is_refused_at_once(
    words: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(OptionsError, match=message):
        qcompress.compress(open_model(saved("Llama", tmp_path)), data(), **{**COMPRESS, **words})


def test_memory_is_for_opened_models() -> None:
    with pytest.raises(OptionsError, match="memory= is for models that are read block by block"):
        qcompress.compress(torch.nn.Linear(8, 8), [torch.ones(4, 8)], budget={"bytes": 0.5}, memory="4 GB")
