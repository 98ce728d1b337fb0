"""From measurement to the smaller model: budgets as asked, files as predicted, a cut run goes on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from formulations import FileFormatError, InfeasibleBudgetError
from qcompress import (
    PAIR_STRENGTH,
    Measurement,
    MeasureProgress,
    Problem,
    Solution,
    compress,
    formulate,
    load_compressed,
    low_rank,
    mean_loss,
    measure,
    prune_quantize,
)
from qcompress.compression import NoChoiceError
from qcompress.errors import OptionsError
from qcompress.formulation import consistent_rows
from solvers import Search, Solver
from tests.models import Residual, TiedLanguageModel, seeded

OPTIONS = prune_quantize(bits=(2, 4, 8), sparsity=(0, 0.5)) + low_rank(ratios=(0.5,))


def batches(count: int = 2) -> list[Tensor]:
    return [torch.randn(16, 2, 5, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


@pytest.fixture(scope="module")
def measurement() -> Measurement:
    return measure(seeded(Residual), batches(), OPTIONS)


def test_a_budget_up_to_one_is_a_fraction_and_above_one_an_amount(measurement: Measurement) -> None:
    original = measurement.original["bytes"]
    assert formulate(measurement, {"bytes": 0.5}).budgets["bytes"] == np.floor(0.5 * original)
    assert formulate(measurement, {"bytes": 1}).budgets["bytes"] == original
    assert formulate(measurement, {"bytes": 900}).budgets["bytes"] == 900
    assert set(formulate(measurement, {"bytes": 0.5, "macs": 0.9}).budgets) == {"bytes", "macs"}


@pytest.mark.parametrize("value", [0, -0.1, float("nan"), float("inf"), "half"])
def test_a_budget_that_is_no_positive_number_is_refused(measurement: Measurement, value: object) -> None:
    with pytest.raises(OptionsError, match="bytes must be a positive number"):
        formulate(measurement, {"bytes": value})  # type: ignore[dict-item]


def test_unknown_resources_and_no_budget_are_refused_with_what_is_known(measurement: Measurement) -> None:
    with pytest.raises(OptionsError, match="'watts'; measured are: bytes, macs"):
        formulate(measurement, {"watts": 0.5})
    with pytest.raises(OptionsError, match="at least one budget"):
        formulate(measurement, {})


def test_keeping_everything_uses_exactly_the_original(measurement: Measurement) -> None:
    problem = formulate(measurement, {"bytes": 1.0})
    keep = problem.evaluate([0] * problem.num_groups)
    assert keep.usage == {name: pytest.approx(use, rel=1e-12) for name, use in measurement.original.items()}
    assert keep.objective == 0


def test_pairs_off_gives_the_additive_problem(measurement: Measurement) -> None:
    with_pairs, without = (formulate(measurement, {"bytes": 0.5}, pairs=pairs) for pairs in (True, False))
    assert with_pairs.pairs
    assert not without.pairs
    np.testing.assert_array_equal(with_pairs.cost, without.cost)


def test_terms_between_parts_count_at_the_stated_strength(measurement: Measurement) -> None:
    with_pairs, without = (formulate(measurement, {"bytes": 1.0}, pairs=pairs) for pairs in (True, False))
    choice = [1] * len(measurement.parts) + [0]
    effects = consistent_rows(measurement.factor, measurement.cost)[with_pairs.flat(choice)[:-1]]
    between = 0.5 * (np.square(effects.sum(axis=0)).sum() - np.square(effects).sum())
    added = with_pairs.evaluate(choice).objective - without.evaluate(choice).objective
    assert added == pytest.approx(PAIR_STRENGTH * between, rel=1e-9)


@pytest.mark.parametrize("granularity", ["layer", 3])
def test_compress_holds_the_budget_to_the_byte_and_the_file_is_what_was_predicted(
    tmp_path: Path, granularity: str | int
) -> None:
    model, data = seeded(Residual), batches()
    result = compress(
        model,
        data,
        budget={"bytes": 0.45},
        options=OPTIONS,
        solver="anneal",
        time_limit=1,
        granularity=granularity,
        folder=tmp_path / "run",
        evaluate=lambda model: float(model(data[0]).detach().sum()),
    )
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["usage"]["bytes"] <= report["budgets"]["bytes"] == np.floor(0.45 * report["original"]["bytes"])
    loaded = load_compressed(tmp_path / "run" / "model.safetensors", lambda: seeded(Residual, seed=5))
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert result.report.loss_measured == pytest.approx(mean_loss(model, loaded, data), rel=1e-6)
    assert result.report.metric_after == pytest.approx(float(loaded(data[0]).detach().sum()), rel=1e-6)
    assert "| bytes |" in (tmp_path / "run" / "summary.md").read_text()
    assert Problem.load(tmp_path / "run" / "problem.npz").fingerprint() == result.problem.fingerprint()
    assert Solution.load(tmp_path / "run" / "solution.json").objective == result.solution.objective


def test_a_run_that_was_cut_goes_on_and_measures_nothing_twice(tmp_path: Path) -> None:
    model, data = seeded(Residual), batches(3)
    settings = {"budget": {"bytes": 0.5}, "options": OPTIONS, "solver": "greedy", "folder": tmp_path / "run"}

    def cut(_: object) -> None:
        raise KeyboardInterrupt

    measured: list[object] = []
    with pytest.raises(KeyboardInterrupt):
        compress(model, data, **settings, evaluate=cut, on_measure=measured.append)  # type: ignore[arg-type]
    assert len(measured) == 3
    assert not (tmp_path / "run" / "report.json").exists()
    result = compress(model, data, **settings, on_measure=measured.append)  # type: ignore[arg-type]
    assert len(measured) == 3
    assert (tmp_path / "run" / "report.json").exists()
    again = compress(model, data, **settings)  # type: ignore[arg-type]
    np.testing.assert_array_equal(again.solution.choice, result.solution.choice)


def test_a_run_on_shuffled_data_goes_on_as_if_it_had_not_been_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcompress.measuring.measure.SAVE_EVERY_S", -1)
    model = seeded(Residual)
    data = DataLoader(torch.cat(batches(3)), batch_size=10, shuffle=True)
    settings = {"budget": {"bytes": 0.5}, "options": OPTIONS, "solver": "greedy"}
    measured: list[int] = []

    def cut(progress: MeasureProgress) -> None:
        measured.append(progress.batches)
        if progress.batches == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(model, data, **settings, folder=tmp_path, on_measure=cut)  # type: ignore[arg-type]
    torch.manual_seed(99)
    resumed = compress(model, data, **settings, folder=tmp_path, on_measure=cut)  # type: ignore[arg-type]
    assert measured == [1, 2, *range(3, len(data) + 1)]
    whole = compress(model, data, **settings)  # type: ignore[arg-type]
    np.testing.assert_array_equal(resumed.measurement.cost, whole.measurement.cost)
    np.testing.assert_array_equal(resumed.measurement.factor, whole.measurement.factor)


def test_a_folder_with_another_run_is_refused(tmp_path: Path) -> None:
    model, data = seeded(Residual), batches()
    compress(model, data, budget={"bytes": 0.5}, options=OPTIONS, solver="greedy", folder=tmp_path / "run")
    with pytest.raises(OptionsError, match="differs in: budget"):
        compress(model, data, budget={"bytes": 0.4}, options=OPTIONS, solver="greedy", folder=tmp_path / "run")
    with pytest.raises(OptionsError, match="differs in: data"):
        compress(model, batches()[1:], budget={"bytes": 0.5}, options=OPTIONS, solver="greedy", folder=tmp_path / "run")


def test_a_folder_of_a_run_with_other_batch_norm_statistics_is_refused(tmp_path: Path) -> None:
    model, data = seeded(Residual), batches()
    settings = {"budget": {"bytes": 0.5}, "options": OPTIONS, "solver": "greedy", "folder": tmp_path / "run"}
    compress(model, data, **settings)  # type: ignore[arg-type]
    with pytest.raises(OptionsError, match="differs in: batch_norm"):
        compress(model, data, **settings, batch_norm_data=data)  # type: ignore[arg-type]


@pytest.mark.parametrize("numbers", [{"finetune_steps": -1}, {"finetune_steps": 10, "learning_rate": 0.0}])
def test_numbers_that_no_fine_tuning_can_have_are_refused_before_measuring(numbers: dict[str, Any]) -> None:
    measured: list[object] = []
    with pytest.raises(OptionsError, match="fine-tuning takes steps"):
        compress(seeded(Residual), batches(), budget={"bytes": 0.5}, on_measure=measured.append, **numbers)
    assert not measured


def test_a_damaged_value_in_the_folder_is_one_clear_error(tmp_path: Path) -> None:
    model, data = seeded(Residual), batches()
    compress(model, data, budget={"bytes": 0.5}, options=OPTIONS, solver="greedy", folder=tmp_path / "run")
    file = tmp_path / "run" / "measurement.npz"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(
        FileFormatError, match=r"measurement\.npz is not a qcompress measurement file, or not a whole one"
    ):
        compress(model, data, budget={"bytes": 0.5}, options=OPTIONS, solver="greedy", folder=tmp_path / "run")


def test_an_impossible_budget_names_the_smallest_possible_use() -> None:
    with pytest.raises(InfeasibleBudgetError, match="bytes: asked for at most 14.*smallest possible use is"):
        compress(seeded(Residual), batches(), budget={"bytes": 0.01}, options=OPTIONS)


def test_a_solver_that_finds_nothing_ends_with_a_clear_error() -> None:
    class Idle(Solver):
        name = "idle"
        summary = "does nothing"

        def run(self, problem: Problem, search: Search) -> None:
            """Offer nothing."""

        @classmethod
        def option_defaults(cls) -> dict[str, object]:
            return {}

    with pytest.raises(NoChoiceError, match="'idle' found no choice within the budgets.*UNKNOWN"):
        compress(seeded(Residual), batches(), budget={"bytes": 0.5}, options=OPTIONS, solver=Idle())


def test_tied_embedding_and_head_are_compressed_as_one(tmp_path: Path) -> None:
    model = seeded(TiedLanguageModel)
    data = [torch.randint(0, 11, (8, 3), generator=torch.Generator().manual_seed(3))]
    result = compress(model, data, budget={"bytes": 0.5}, folder=tmp_path / "run")
    head: nn.Linear = result.model.head  # type: ignore[assignment]
    assert head.weight is result.model.embed.weight  # type: ignore[union-attr]
    assert not torch.equal(head.weight, model.head.weight)  # type: ignore[arg-type,union-attr]
    loaded = load_compressed(tmp_path / "run" / "model.safetensors", lambda: seeded(TiedLanguageModel, seed=7))
    assert torch.equal(loaded(data[0]), result.model(data[0]))
