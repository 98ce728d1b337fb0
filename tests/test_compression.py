"""From measurement to the smaller model: budgets as asked, files as predicted, a cut run goes on."""

import importlib
import itertools
import json
import os
import re
import threading
import warnings
from collections.abc import Callable
from functools import partial
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
from qcompress.compressed.file import stored_parts
from qcompress.compressed.record import record_of
from qcompress.errors import DataError, ModelError, OptionsError
from qcompress.formulation import consistent_rows
from qcompress.model.samples import split_samples
from qcompress.run_folder import RunFolder
from solvers import NoChoiceError, Search, Solver, SolverError
from solvers.heuristic.greedy import Greedy
from tests.models import Residual, TiedLanguageModel, seeded
from tests.quick import slow_but

OPTIONS = prune_quantize(bits=(2, 4, 8), sparsity=(0, 0.5)) + low_rank(ratios=(0.5,), whitened=False)


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
    choice = [1] * len(measurement.parts)
    effects = consistent_rows(measurement.factor, measurement.cost)[with_pairs.flat(choice)]
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
    summary = (tmp_path / "run" / "summary.md").read_text()
    assert "| bytes |" in summary
    assert "- metric: " in summary
    assert Problem.load(tmp_path / "run" / "problem.npz").fingerprint() == result.problem.fingerprint()
    assert Solution.load(tmp_path / "run" / "solution.json").objective == result.solution.objective


def test_a_run_that_was_cut_goes_on_and_measures_nothing_twice(tmp_path: Path) -> None:
    model, data = seeded(Residual), batches(3)
    settings = {"budget": {"bytes": 0.5}, "options": OPTIONS, "solver": "greedy", "folder": tmp_path / "run"}

    def cut(evaluated: nn.Module) -> float:
        if evaluated is not model:
            raise KeyboardInterrupt
        return 0.5

    measured: list[object] = []
    total = 3 + len(split_samples(model, data).kept)  # those that were held out are measured after the guard
    with pytest.raises(KeyboardInterrupt):
        compress(model, data, **settings, evaluate=cut, on_measure=measured.append)  # type: ignore[arg-type]
    assert len(measured) == total
    assert not (tmp_path / "run" / "report.json").exists()
    result = compress(model, data, **settings, on_measure=measured.append)  # type: ignore[arg-type]
    assert len(measured) == total
    assert (tmp_path / "run" / "report.json").exists()
    again = compress(model, data, **settings)  # type: ignore[arg-type]
    np.testing.assert_array_equal(again.solution.choice, result.solution.choice)


def test_a_run_on_shuffled_data_goes_on_as_if_it_had_not_been_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcompress.measuring.accumulation.SAVE_EVERY_S", -1)
    model = seeded(Residual)
    data = DataLoader(torch.cat(batches(3)), batch_size=10, shuffle=True)
    settings = {"budget": {"bytes": 0.5}, "options": OPTIONS, "solver": "greedy"}
    measured: list[int] = []

    def cut(progress: MeasureProgress) -> None:
        measured.append(progress.batches)
        if len(measured) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(model, data, **settings, folder=tmp_path, on_measure=cut)  # type: ignore[arg-type]
    torch.manual_seed(99)
    resumed = compress(model, data, **settings, folder=tmp_path, on_measure=cut)  # type: ignore[arg-type]
    whole_passes = [*range(1, len(data) + 1)]
    assert measured[: len(data)] == whole_passes
    assert measured[len(data) :] == whole_passes[: len(measured) - len(data)]  # then the samples that were held out
    whole = compress(model, data, **settings)  # type: ignore[arg-type]
    np.testing.assert_array_equal(resumed.measurement.cost, whole.measurement.cost)
    np.testing.assert_array_equal(resumed.measurement.factor, whole.measurement.factor)


class Killed(BaseException):
    """The process is gone: nothing is written from here on."""


def shift_loss(shift: float) -> Callable[[Tensor, Tensor], Tensor]:
    def squared(output: Tensor, batch: Tensor) -> Tensor:
        return (output - shift).square().mean(dim=1)

    return squared


FULL: dict[str, Any] = {
    "budget": {"bytes": 0.5},
    "options": prune_quantize(bits=(2, 4), sparsity=(0,)),
    "solver": "lagrangian",
    "time_limit": None,
    "refine_rounds": 1,
    "finetune_steps": 2,
    "learning_rate": 1e-2,
}


@pytest.mark.parametrize("after", slow_but([False], [False, True]), ids=["before", "after"])
def test_a_run_that_is_killed_before_or_after_any_file_is_written_goes_on_as_if_nothing_had_happened(
    after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("qcompress.measuring.accumulation", "qcompress.training.finetune"):
        monkeypatch.setattr(f"{module}.SAVE_EVERY_S", -1)
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    data = [torch.randn(16, 6)]
    whole = compress(model, data, **FULL)
    replace, left = os.replace, 0

    def replace_until_killed(source: str, target: Path) -> None:
        nonlocal left
        left -= 1
        if left < 0 or (left == 0 and not after):
            raise Killed
        replace(source, target)
        if left == 0:
            raise Killed

    for kill in itertools.count(1):
        folder = tmp_path / f"{kill}"
        monkeypatch.setattr(os, "replace", replace_until_killed)
        left = kill
        try:
            compress(model, data, **FULL, folder=folder)
        except Killed:
            pass
        else:
            break  # more files are not written
        monkeypatch.setattr(os, "replace", replace)
        resumed = compress(model, data, **FULL, folder=folder)
        np.testing.assert_array_equal(resumed.solution.choice, whole.solution.choice)
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(resumed.model.state_dict()[name], tensor), (kill, name)
        assert resumed.report.loss_finetuned == whole.report.loss_finetuned
        assert resumed.report.refined == whole.report.refined
        assert not list(folder.glob("*.part"))
    assert kill > 20


STARTED: dict[str, Any] = {"budget": {"bytes": 0.5}, "options": OPTIONS, "solver": "greedy", "loss": shift_loss(1.0)}


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        ({}, set()),
        ({"budget": {"bytes": 0.3}}, {"solve", "apply"}),
        pytest.param({"solver": "lagrangian"}, {"solve"}, marks=pytest.mark.slow),
        ({"solver": Greedy()}, set()),
        pytest.param({"time_limit": 7}, {"solve"}, marks=pytest.mark.slow),
        ({"pairs": False}, {"solve"}),
        pytest.param({"evaluate": lambda model: 1.0}, set(), marks=pytest.mark.slow),
        pytest.param({"batch_norm_data": batches()}, {"apply"}, marks=pytest.mark.slow),
        ({"refine_rounds": 1}, {"refine"}),
        ({"loss": shift_loss(1.0)}, set()),
        ({"loss": shift_loss(2.0)}, {"measure", "solve", "apply"}),
        pytest.param({"forward": lambda model, batch: model(batch)}, {"measure", "apply"}, marks=pytest.mark.slow),
        pytest.param({"method": "direct"}, {"measure", "solve", "apply"}, marks=pytest.mark.slow),
        ({"seed": 1}, {"measure", "solve", "apply"}),
        pytest.param({"granularity": 3}, {"measure", "solve", "apply"}, marks=pytest.mark.slow),
        ({"options": prune_quantize(bits=(3,))}, {"measure", "solve", "apply"}),
    ],
)
def test_what_changed_is_made_anew_and_what_is_still_true_is_reused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changed: dict[str, Any], again: set[str]
) -> None:
    model, data = seeded(Residual), batches()
    compress(model, data, **STARTED, folder=tmp_path)
    made: set[str] = set()
    once = RunFolder.once

    def noted(run: RunFolder, step: str, make: Any, **settings: Any) -> Any:
        return once(run, step, lambda cache: (made.add(step), make(cache))[1], **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "once", noted)
        result = compress(model, data, **{**STARTED, **changed}, folder=tmp_path)
    fresh = compress(model, data, **{**STARTED, **changed})
    assert made - {"apply", "guard", "repeat", "measure_held_out"} == again - {"apply"}
    assert "measure_held_out" not in made or "measure" in again
    assert ("guard" in made) == bool(again)
    assert result.problem.fingerprint() == fresh.problem.fingerprint()
    np.testing.assert_array_equal(result.solution.choice, fresh.solution.choice)
    assert result.report.loss_measured == fresh.report.loss_measured
    for name, tensor in fresh.model.state_dict().items():
        assert torch.equal(result.model.state_dict()[name], tensor)


def test_other_data_in_any_batch_and_another_model_are_measured(tmp_path: Path) -> None:
    model, data = seeded(Residual), batches(3)
    measured: list[object] = []

    def run(model: nn.Module, data: list[Tensor]) -> int:
        measured.clear()
        compress(model, data, **STARTED, folder=tmp_path, on_measure=measured.append)
        return len(measured)

    def every(data: list[Tensor]) -> int:
        return 3 + len(split_samples(model, data).kept)

    other = [*data[:2], data[2] + 1e-6]
    assert [run(model, data), run(model, data)] == [every(data), 0]
    assert run(model, other) == every(other)
    assert run(seeded(Residual, seed=1), data) in (3, every(data))  # a uniform setting that won needs no costs


@pytest.mark.parametrize("more", [{}, {"finetune_steps": 2}, {"batch_norm_data": batches()}])
def test_the_result_evaluates_like_its_file_and_the_callers_model_keeps_its_mode(
    tmp_path: Path, more: dict[str, Any]
) -> None:
    model, data, seen = seeded(Residual).train(), batches(), []
    model.body.eval()  # type: ignore[operator,union-attr]
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def metric(network: nn.Module) -> float:
        seen.append(any(module.training for module in network.modules()))
        return float(network(data[0]).sum())

    settings = {**STARTED, **more, "evaluate": metric, "folder": tmp_path}
    first, again = (compress(model, data, **settings).model for _ in range(2))
    loaded = load_compressed(tmp_path / "model.safetensors", lambda: seeded(Residual).train())
    for smaller in (first, again):
        assert not any(module.training for module in smaller.modules())
        assert torch.equal(smaller(data[0]), loaded(data[0]))
    assert seen == [False] * 4
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("run", [partial(compress, budget={"bytes": 0.5}), partial(measure, options=OPTIONS)])
def test_data_of_a_shape_that_the_model_does_not_take_is_one_clear_error(run: Callable[..., object]) -> None:
    with pytest.raises(
        DataError, match=r"does not accept the first batch \(a tensor of shape \(4, 3, 5, 5\)\): .*channels"
    ):
        run(seeded(Residual), [torch.randn(4, 3, 5, 5)])


def test_a_measurement_of_another_day_is_used_in_the_place_of_measuring(tmp_path: Path) -> None:
    model, data = seeded(Residual), batches()
    settings = {"budget": {"bytes": 0.4}, "solver": "greedy"}
    whole = compress(model, data, options=OPTIONS, **settings)  # type: ignore[arg-type]
    whole.measurement.save(tmp_path / "measurement.npz")
    measured: list[object] = []
    for folder in (None, tmp_path / "run", tmp_path / "run"):
        given = Measurement.load(tmp_path / "measurement.npz")
        result = compress(
            model,
            data,
            measurement=given,
            on_measure=measured.append,
            folder=folder,
            **settings,  # type: ignore[arg-type]
        )
        assert result.problem.fingerprint() == whole.problem.fingerprint()
        assert result.report.loss_measured == whole.report.loss_measured
    assert not measured


def test_a_measurement_of_another_model_or_loss_or_with_options_beside_it_is_refused(measurement: Measurement) -> None:
    model, data, budget = seeded(Residual), batches(), {"bytes": 0.5}
    with pytest.raises(ModelError, match="not the model that was measured"):
        compress(seeded(Residual, seed=1), data, budget=budget, measurement=measurement)
    with pytest.raises(OptionsError, match="made with the loss 'kl', found 'mse'"):
        compress(model, data, budget=budget, measurement=measurement, loss="mse")
    with pytest.raises(OptionsError, match="options .*or measurement, not both"):
        compress(model, data, budget=budget, measurement=measurement, options=OPTIONS)


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"finetune_steps": -1}, "fine-tuning takes steps and patience from 1"),
        ({"finetune_steps": 1.5}, "fine-tuning takes steps and patience from 1"),
        (
            {"finetune_steps": 10, "learning_rate": 0.0},
            "a learning rate above 0, found steps=10, patience=1, learning_rate=0.0",
        ),
        ({"refine_rounds": -1}, "refine_rounds must be a whole number from 0"),
        ({"time_limit": 0}, "time_limit must be a number above 0, found 0"),
        ({"time_limit": float("nan")}, "time_limit must be a number above 0, found nan"),
        ({"seed": -1}, "seed must be a whole number from 0, found -1"),
        ({"seed": True}, "seed must be a whole number from 0, found True"),
        ({"solver": "gredy"}, "no solver is called 'gredy'; known: auto"),
        ({"solver": 3}, "solver must be a name"),
        ({"method": "guess"}, "method must be one of fisher, direct"),
        ({"loss": "l1"}, "loss must be 'kl', 'kl-tail', 'mse' or a callable"),
        ({"granularity": 0}, "granularity must be 'layer' or a number of channels"),
        ({"pairs": 2.0}, "pairs must be True, False or a strength"),
        ({"options": [4, 8]}, "options must be qcompress.Options"),
        ({"forward": "model(batch)"}, "forward must be a callable"),
        ({"evaluate": 0.9}, "evaluate must be a callable"),
        ({"data": iter(batches())}, "read more than once"),
        ({"batch_norm_data": iter(batches())}, "read more than once"),
        ({"validation": []}, "validation is empty: give at least one batch"),
        ({"folder": "/proc/nowhere"}, "the run folder /proc/nowhere cannot be written"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_what_cannot_be_done_is_told_before_the_first_pass(wrong: dict[str, Any], error: str) -> None:
    ran: list[object] = []

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        ran.append(batch)
        return model(batch)

    asked: dict[str, Any] = {
        "model": seeded(Residual), "data": batches(), "budget": {"bytes": 0.5}, "forward": forward, **wrong
    }  # fmt: skip
    with pytest.raises((OptionsError, ModelError, DataError, SolverError), match=re.escape(error)):
        compress(**asked)
    assert not ran


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.trace(nn.Linear(5, 3), torch.ones(1, 5), check_trace=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("factory", "error"),
    [
        (scripted, "the model is scripted"),
        (Lazy, "'head' is lazy and has no weight yet: run one batch"),
        (lambda: nn.Linear(5, 3, device="meta"), "weight of the model is on the meta device"),
        (lambda: "resnet20", "model must be a torch.nn.Module, found str"),
    ],
)
def test_a_model_that_cannot_be_looked_at_is_refused_by_name(factory: Callable[[], Any], error: str) -> None:
    with pytest.raises(ModelError, match=error):
        compress(factory(), [torch.ones(2, 5)], budget={"bytes": 0.5})
    with pytest.raises(ModelError, match=error):
        measure(factory(), [torch.ones(2, 5)], OPTIONS)


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    settings: dict[str, Any] = {"options": OPTIONS, "solver": "greedy"}
    plain = compress(seeded(Residual), batches(), budget={"bytes": 700}, seed=1, time_limit=5, **settings)
    given = compress(
        seeded(Residual),
        batches(),
        budget={"bytes": np.float32(700)},
        seed=np.int64(1),  # type: ignore[arg-type]
        time_limit=torch.tensor(5.0),  # type: ignore[arg-type]
        refine_rounds=np.int64(0),  # type: ignore[arg-type]
        evaluate=lambda model: torch.tensor(0.5),  # type: ignore[arg-type,return-value]
        **settings,
    )
    assert given.problem.fingerprint() == plain.problem.fingerprint()
    assert given.solution.choice is not None
    np.testing.assert_array_equal(given.solution.choice, plain.solution.choice)
    assert given.report.metric_before == 0.5


@pytest.mark.parametrize("value", [float("nan"), "good", torch.ones(2)])
def test_an_evaluation_that_is_no_number_is_one_clear_error(value: Any) -> None:
    with pytest.raises(OptionsError, match="what evaluate\\(model\\) returns for the original must be a finite number"):
        compress(
            seeded(Residual),
            batches(),
            budget={"bytes": 0.5},
            options=OPTIONS,
            solver="greedy",
            evaluate=lambda _: value,
        )


def test_layers_are_skipped_and_given_options_of_their_own(tmp_path: Path) -> None:
    options = {"head": prune_quantize(bits=(8,), sparsity=(0,)), "*": prune_quantize(bits=(2,), sparsity=(0,))}
    settings: dict[str, Any] = {"budget": {"bytes": 0.8}, "solver": "greedy", "folder": tmp_path}
    result = compress(seeded(Residual), batches(), options=options, skip="stem", **settings)
    labels = {
        part.name: set(own) for part, own in zip(result.measurement.parts, result.measurement.labels, strict=True)
    }
    assert "stem" not in labels
    assert labels["head"] == {"keep", "8 bits"}
    again = compress(seeded(Residual), batches(), options=options, skip="body.*", **settings)
    assert "stem" in {part.name for part in again.measurement.parts}


def test_a_damaged_value_in_the_folder_is_one_clear_error(tmp_path: Path) -> None:
    model, data = seeded(Residual), batches()
    compress(model, data, budget={"bytes": 0.5}, options=OPTIONS, solver="greedy", folder=tmp_path / "run")
    file = tmp_path / "run" / "measurement.npz"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(
        FileFormatError, match=r"measurement\.npz is not a qcompress measurement file, or an incomplete one"
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


def test_a_model_is_copied_before_it_is_measured() -> None:
    """What a run leaves in the model (here an activation with its graph, which no copy can take) does not matter."""

    class Stashing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x):
            self.stash = self.fc(x)
            return self.stash

    result = compress(Stashing(), [torch.randn(8, 16)], budget={"bytes": 0.4}, solver="greedy")
    assert isinstance(result.model, Stashing)


@pytest.mark.parametrize("change", ["forward", "lock", "closed"])
def test_what_cannot_be_copied_is_refused_before_anything_is_measured(change) -> None:
    model, data, forward = nn.Sequential(nn.Linear(8, 8)), [torch.randn(4, 8)], None
    if change == "forward":
        forward = lambda given, batch: model(batch)  # noqa: E731
    elif change == "lock":
        model[0].lock = threading.Lock()
    else:
        old = model[0].forward
        model[0].forward = lambda x: 2 * old(x)
    with pytest.raises(ModelError, match=r"apply_\(model, measurement, solution\)"):
        compress(
            model, data, budget={"bytes": 0.4}, forward=forward, on_measure=lambda progress: pytest.fail("measured")
        )


def test_the_report_names_what_is_stored_after_fine_tuning(tmp_path) -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), [torch.randn(64, 16)]
    options = prune_quantize(bits=(3,), sparsity=(0,), compensated=True)
    for steps, word in ((0, "3 bits, compensated"), (40, "3 bits")):
        folder = tmp_path / str(steps)
        result = compress(
            model, data, budget={"bytes": 0.3}, options=options, solver="greedy", finetune_steps=steps, folder=folder,
            learning_rate=1e-2,
        )  # fmt: skip
        labels = [part.option for part in result.report.parts]
        assert labels == [item.transform.label for item in record_of(result.model).parts]
        assert labels == [item.transform.label for item in stored_parts(folder / "model.safetensors")]
        assert word in labels


@pytest.mark.parametrize("pairs", [False, True])
def test_the_smallest_bytes_for_a_loss_are_those_of_brute_force(tmp_path: Path, pairs: bool) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)))
    data = [torch.randn(32, 8)]
    settings: dict[str, Any] = {"options": prune_quantize(bits=(2, 3, 4, 8), sparsity=(0,)), "pairs": pairs}
    settings |= {"solver": "brute-force", "folder": tmp_path / "run", "guard": False}
    every = formulate(measure(model, data, settings["options"]), {"bytes": 1.0}, pairs=pairs)
    judged = [every.evaluate(choice) for choice in itertools.product(*(range(len(own)) for own in every.options))]
    for limit in (0.05, 0.001, 1e-6):
        result = compress(model, data, minimize="bytes", budget={"loss": limit}, **settings)
        smallest = min(one.usage["bytes"] for one in judged if one.objective <= limit)
        least_loss = min(one.objective for one in judged if one.usage["bytes"] <= smallest)
        assert result.report.usage["bytes"] == result.report.budgets["bytes"] == smallest
        assert result.report.loss_predicted == pytest.approx(least_loss, rel=1e-9, abs=1e-15)
        assert result.report.smallest is not None
        assert result.report.smallest["at_least"] == smallest
        assert f"at most {limit:g}: {smallest:,.0f}, proven to be the smallest" in result.report.to_markdown()
        again = compress(model, data, minimize="bytes", budget={"loss": limit}, **settings)
        assert again.report.smallest == result.report.smallest


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ({"budget": {"loss": 0.1}}, "a budget for the loss needs a resource to minimize"),
        ({"budget": {"bytes": 0.1}, "minimize": "bytes"}, "needs a limit for the predicted loss"),
        ({"budget": {"loss": 0.1}, "minimize": "watts"}, "no resource is called 'watts'"),
        ({"budget": {"loss": -0.1}, "minimize": "bytes"}, "the budget for the loss must be a number above 0"),
    ],
)
def test_a_loss_and_what_is_to_be_small_belong_together(asked: dict[str, Any], error: str) -> None:
    with pytest.raises(OptionsError, match=error):
        compress(seeded(Residual), batches(), **asked)


def test_fine_tuning_picks_its_step_on_the_samples_kept_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    module, looked_at = importlib.import_module("qcompress.steps.finishing"), []
    tune = module.finetune

    def spied(*given: Any, **named: Any) -> nn.Module:
        looked_at.append((given[1], named["validation"]))
        return tune(*given, **named)

    monkeypatch.setattr(module, "finetune", spied)
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)), [torch.randn(32, 8)]
    settings: dict[str, Any] = {"budget": {"bytes": 0.3}, "solver": "greedy", "finetune_steps": 4}
    guarded = compress(model, data, **settings)
    trained_on, kept = looked_at[0]
    rows = torch.cat([*trained_on, *kept])
    assert (len(torch.cat(list(kept))), len(torch.unique(rows, dim=0))) == (8, 32)
    assert guarded.report.loss_validation == pytest.approx(mean_loss(model, guarded.model, kept), rel=1e-5)
    compress(model, data, guard=False, **settings)
    assert looked_at[1] == (data, data)


def test_results_describe_themselves_in_a_line() -> None:
    model, data = seeded(Residual, 0), batches()
    result = compress(model, data, budget={"bytes": 0.5}, options=prune_quantize(bits=(4, 8)), time_limit=2)
    assert repr(result).startswith("<Result: ")
    assert f"of {result.report.original['bytes']:,.0f} bytes" in repr(result.report)
    assert repr(result.measurement).startswith(f"<Measurement: {len(result.measurement.parts)} parts, ")
    assert max(map(len, (repr(result), repr(result.report), repr(result.measurement)))) < 300
