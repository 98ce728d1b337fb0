"""What the caller gave is tried before anything is measured: the solver's kinds, tokens, losses, batches, metrics."""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from formulations import InfeasibleBudgetError
from qcompress import (
    TrueLoss,
    apply,
    apply_,
    compress,
    finetune,
    formulate,
    load_compressed,
    low_rank,
    measure,
    prune_channels,
    prune_quantize,
    refine,
    remeasure,
    solve,
    time_options,
    verify,
)
from qcompress.errors import DataError, OptionsError, QcompressError
from qcompress.model.batches import require_samples
from solvers import SolverError, UnsupportedProblemError
from solvers.composites.portfolio import Portfolio
from solvers.leap.errors import LeapTokenError

BITS = prune_quantize(bits=(4,), sparsity=(0,))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def inputs(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 6, generator=generator) for _ in range(count)]


def refused(error: type[Exception] | tuple[type[Exception], ...], match: str, **arguments: Any) -> Exception:
    """Check that `compress` refuses the arguments before it encodes or measures, and leaves nothing behind."""
    told: list[object] = []
    arguments = {"budget": {"bytes": 0.5}, "options": BITS, "time_limit": 5, "data": inputs(), **arguments}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "runs" / "one"
        with pytest.raises(error, match=match) as why:
            compress(
                network(), on_measure=told.append, on_encode=told.append, on_progress=told.append,
                **{"folder": folder, **arguments},
            )  # fmt: skip
        assert not list(Path(place).iterdir())
    assert not told
    return why.value


@pytest.fixture
def without_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("DWAVE_API_TOKEN", "DWAVE_CONFIG_FILE", "DWAVE_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("solver", ["dp", Portfolio(solvers=("dp",))])
def test_a_solver_that_takes_no_pair_terms_is_refused_before_measuring(solver: Any) -> None:
    refused(UnsupportedProblemError, "'dp' takes no pair terms", solver=solver)
    assert compress(network(), inputs(), budget={"bytes": 0.5}, options=BITS, solver=solver, pairs=False).model


@pytest.mark.parametrize("options", [prune_channels(), prune_channels(keep=(0.5,)) + BITS])
def test_budgets_with_pair_terms_are_known_before_measuring(options: Any) -> None:
    match = "the budget for bytes has pair terms, which are priced into the objective, and solver 'dp' takes no"
    refused(UnsupportedProblemError, match, options=options, solver="dp", pairs=False)
    refused(UnsupportedProblemError, "'dp' takes no pair terms", options=options, solver="dp")


def test_channels_that_share_no_weight_are_solved_without_pair_terms() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    result = compress(
        model, inputs(), budget={"bytes": 0.7}, options=prune_channels(), solver="dp", pairs=False, guard=False
    )
    assert result.report.usage["bytes"] <= result.report.budgets["bytes"]


def test_a_measurement_that_is_given_tells_its_pair_terms() -> None:
    measurement = measure(network(), inputs(), BITS)
    refused(UnsupportedProblemError, "'dp' takes no pair terms", measurement=measurement, options=None, solver="dp")


@pytest.mark.usefixtures("without_token")
@pytest.mark.parametrize("solver", ["leap-cqm", "leap-bqm", "leap-nl", "qpu", "qpu-decomposed"])
def test_a_missing_token_is_told_before_measuring(solver: str) -> None:
    refused(LeapTokenError, "no D-Wave API token", solver=solver)


@pytest.mark.usefixtures("without_token")
def test_services_take_no_budgets_with_pair_terms_which_is_told_before_measuring(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DWAVE_API_TOKEN", "none")
    refused(UnsupportedProblemError, "would be called for many prices", options=prune_channels(), solver="leap-cqm")


@pytest.mark.usefixtures("without_token")
@pytest.mark.parametrize("solver", ["dp", "leap-cqm"])
def test_refining_checks_its_solver_before_it_measures(solver: str) -> None:
    model, data, told = network(), inputs(), []
    measurement = measure(model, data, BITS)
    problem = formulate(measurement, {"bytes": 0.5})
    choice = solve(problem, "greedy").choice
    assert choice is not None
    with pytest.raises(SolverError, match="takes no pair terms|no D-Wave API token"):
        refine(model, data, measurement, problem, choice, solver=solver, on_progress=told.append)
    assert not told


LOSSES: dict[str, tuple[Callable[..., Any], str]] = {
    "scalar": (lambda output, batch: output.mean(), r"one number per sample: expected \(\d+,\), found \(\)"),
    "arity": (lambda output: output.mean(1), r"loss\(output, batch\) failed for a tensor of shape .*: TypeError: "),
    "raises": (lambda output, batch: batch["labels"], r"loss\(output, batch\) failed for .*: IndexError: "),
    "NaN": (lambda output, batch: output.mean(1) * math.nan, r"loss\(output, batch\) is NaN or infinite"),
    "NaN gradient": (lambda output, batch: (0 * output).sum(1).sqrt(), r"gradient of loss.* is NaN or infinite"),
    "no gradient": (lambda output, batch: output.argmax(1).double(), r"loss\(output, batch\) has no gradient"),
}


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("wrong", LOSSES)
def test_a_loss_of_the_caller_is_tried_before_options_are_encoded(wrong: str, given: bool) -> None:
    loss, match = LOSSES[wrong]
    if not given:
        refused(QcompressError, match, loss=loss)
        refused(QcompressError, match, loss=loss, options=prune_channels())
        refused(QcompressError, match, loss=loss, minimize="bytes", budget={"loss": 0.1})
        return

    def switched(*arguments: Any) -> Any:
        return loss(*arguments) if switch else arguments[0].square().sum(1)

    switched.__qualname__, switch = "both", False
    measurement = measure(network(), inputs(), BITS, loss=switched)
    switch = True
    refused(QcompressError, match.split(r"\(output")[0], measurement=measurement, options=None, loss=switched)


@pytest.mark.parametrize("method", ["fisher", "direct", "sampled"])
@pytest.mark.parametrize("wrong", LOSSES)
def test_measuring_tries_the_loss_before_it_encodes(wrong: str, method: str) -> None:
    loss, match = LOSSES[wrong]
    told: list[object] = []
    with pytest.raises(QcompressError, match=match):
        measure(network(), inputs(), BITS, loss=loss, method=method, on_encode=told.append, on_progress=told.append)
    assert not told


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        ([], "batch_norm_data is empty: give at least one batch"),
        ([torch.zeros(4, 5)], r"does not accept a batch for batch norms \(a tensor of shape \(4, 5\)\)"),
        ([torch.zeros(4, 6), torch.zeros(1, 6)], r"does not accept a batch for batch norms \(a tensor of shape \(1, 6"),
    ],
)
def test_batches_for_batch_norms_are_tried_before_measuring(batches: list[Tensor], match: str) -> None:
    refused(QcompressError, match, batch_norm_data=batches)


def test_every_shape_of_validation_is_tried_before_measuring() -> None:
    refused(QcompressError, r"does not accept .*\(4, 5\)", validation=[torch.zeros(4, 6), torch.zeros(4, 5)])


def failing(model: nn.Module) -> float:
    raise KeyError("labels")


@pytest.mark.parametrize(
    ("evaluate", "match"),
    [
        (lambda model: None, r"what evaluate\(model\) returns for the original must be a finite number, found None"),
        (lambda model: math.nan, r"what evaluate\(model\) returns for the original must be a finite number, found nan"),
        (lambda: 0.5, r"evaluate\(model\) failed on the original: TypeError: "),
        (failing, r"evaluate\(model\) failed on the original: KeyError: 'labels'"),
    ],
)
def test_a_metric_is_tried_on_the_original_before_measuring(evaluate: Any, match: str) -> None:
    refused(QcompressError, match, evaluate=evaluate)


def training(model: nn.Module) -> float:
    with torch.no_grad():
        next(model.parameters()).mul_(2.0)
    return 0.5


def test_a_metric_that_changes_weights_is_named_at_once() -> None:
    refused(OptionsError, r"^evaluate\(model\) changed 0.weight of the original", evaluate=training)


def test_running_statistics_that_a_metric_changes_are_put_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def accuracy(network: nn.Module) -> float:
        network.train()
        return float(network(inputs()[0]).argmax(1).eq(0).float().mean())

    given = {"budget": {"bytes": 0.7}, "options": BITS, "solver": "greedy"}
    result, plain = (compress(model, inputs(), **given, evaluate=own) for own in (accuracy, None))
    assert not result.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, result.model.state_dict()[name])


def test_a_metric_is_taken_once_of_the_original_and_once_of_the_result(tmp_path: Path) -> None:
    seen: list[nn.Module] = []

    def metric(model: nn.Module) -> float:
        seen.append(model)
        return float(torch.rand(())) + len(seen)

    model = network()
    for count in (1, 2):  # the second run resumes
        result = compress(
            model, inputs(), budget={"bytes": 0.5}, options=BITS, solver="greedy", evaluate=metric, folder=tmp_path
        )
        assert [item is model for item in seen] == [True, False] * count
        before, after = result.report.metric_before, result.report.metric_after
        assert before is not None
        assert after is not None
        assert math.floor(before) + 1 == math.floor(after)
    plain = compress(model, inputs(), budget={"bytes": 0.5}, options=BITS, solver="greedy")
    assert plain.report.loss_measured == result.report.loss_measured


@pytest.mark.parametrize(
    "wrong",
    [
        {"guard": "yes"}, {"guard": 0}, {"finetune_steps": True}, {"finetune_steps": False}, {"granularity": True},
        {"finetune_steps": 1, "learning_rate": True}, {"finetune_steps": 1, "learning_rate": math.inf},
        {"refine_rounds": -1}, {"rounds": True}, {"data": []}, {"solver": "gredy"}, {"time_limit": True},
        {"time_limit": -1}, {"seed": True}, {"loss": "l1"}, {"budget": {"bytes": True}}, {"budget": {"bytes": 1e-9}},
        {"folder": ""}, {"validation": []}, {"jobs": 0}, {"measurement": "x.npz", "options": None},
        {"skip": "zzz*"}, {"only": "zzz*"}, {"options": {"zzz*": BITS}}, {"only": "zzz*", "options": prune_channels()},
        {"minimize": "bytes", "budget": {"loss": 0.1}, "only": "zzz*"},
    ],
    ids=str,
)  # fmt: skip
def test_a_request_that_is_refused_leaves_nothing_behind(
    wrong: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    why = refused((QcompressError, SolverError, InfeasibleBudgetError), "found|no|empty|budget", **wrong)
    if "zzz*" in str(wrong):
        assert "no layer has a name like 'zzz*'; there are: 0" in str(why)
    assert not list(tmp_path.iterdir())


def test_options_beside_a_measurement_are_refused_in_all_their_forms() -> None:
    measurement = measure(network(), inputs(), BITS)
    for more in ({"options": BITS}, {"options": None, "skip": "0"}, {"options": None, "only": "0"}):
        refused(QcompressError, "a measurement has its own options", measurement=measurement, **more)


def test_only_booleans_are_taken_for_booleans() -> None:
    measurement = measure(network(), inputs(), BITS)
    problem = formulate(measurement, {"bytes": 0.5})
    calls: list[tuple[str, Callable[[], object]]] = [
        ("whitened", lambda: low_rank(whitened="no")),  # type: ignore[arg-type]
        ("packed", lambda: load_compressed("model.safetensors", network, packed="no")),  # type: ignore[arg-type]
        ("memory", lambda: verify("x.onnx", network(), inputs(), target="onnxruntime", memory=1)),  # type: ignore[arg-type]
        *((name, lambda name=name: solve(problem, "greedy", **{name: "no"})) for name in ("bound", "presolve", "wait")),
    ]
    for name, call in calls:
        with pytest.raises((QcompressError, SolverError), match=f"{name} must be True or False, found"):
            call()


def test_booleans_are_not_taken_for_numbers() -> None:
    model, data = network(), inputs()
    measurement = measure(model, data, BITS)
    problem = formulate(measurement, {"bytes": 0.5})
    calls: list[Callable[[], object]] = [
        lambda: solve(problem, "anneal", seed=True),
        lambda: solve(problem, "anneal", seed=1.5),  # type: ignore[call-overload]
        lambda: solve(problem, "greedy", time_limit=True),
        lambda: formulate(measurement, {"bytes": 0.5}, changes=True),
        lambda: finetune(model, data, True, teacher=model),
        lambda: finetune(model, data, 2, teacher=model, patience=True),
        lambda: finetune(model, data, 2, teacher=model, patience=1.5),  # type: ignore[arg-type]
        lambda: finetune(model, data, 2, teacher=model, learning_rate="1"),  # type: ignore[arg-type]
        lambda: time_options(model, measurement, data[0], repeats=True),
        lambda: measure(model, data, BITS, granularity=True),
    ]
    for call in calls:
        with pytest.raises((QcompressError, SolverError), match="number|takes steps"):
            call()


def test_a_path_in_place_of_a_measurement_or_solution_says_what_reads_it() -> None:
    model, data, measurement = network(), inputs(), measure(network(), inputs(), BITS)
    problem = formulate(measurement, {"bytes": 0.5})
    solution, path = solve(problem, "greedy"), cast(Any, "x.npz")
    calls: list[Callable[[], object]] = [
        lambda: formulate(path, {"bytes": 0.5}),
        lambda: compress(model, data, budget={"bytes": 0.5}, measurement=path),
        lambda: apply(model, path, solution),
        lambda: apply_(model, path, solution),
        lambda: time_options(model, path, data[0]),
        lambda: refine(model, data, path, problem, cast(Any, solution.choice)),
        lambda: remeasure(model, data, path, cast(Any, solution.choice)),
        lambda: TrueLoss(model, path, data),
    ]
    for call in calls:
        with pytest.raises(
            QcompressError, match=r"measurement must be .*, found str 'x.npz': Measurement.load\(path\)"
        ):
            call()
    with pytest.raises(QcompressError, match=r"solution must be .*, found str: Solution.load\(path\)"):
        apply(model, measurement, path)


@pytest.mark.parametrize("options", [prune_channels(), prune_channels(keep=(0.5,)) + BITS])
@pytest.mark.parametrize("given", [False, True])
def test_a_budget_that_channels_cannot_keep_says_which_stay_and_why(options: Any, given: bool) -> None:
    measurement = measure(network(), inputs(), options) if given else None
    with pytest.raises(InfeasibleBudgetError, match=r"macs needs at least \d+%") as why:
        compress(
            network(), inputs(), budget={"macs": 0.01}, options=None if given else options, measurement=measurement
        )
    if not given or not measurement or not measurement.coded:  # with codes a measurement lists what has neither
        assert str(why.value).endswith(". The channels of some layers stay (5: it reaches the output)")


def test_the_callers_metric_may_write_into_the_run_folder(tmp_path: Path) -> None:
    def noted(_: nn.Module) -> float:
        with (tmp_path / "run" / "log.txt").open("a") as log:
            log.write("x")
        return 1.0

    compress(network(), inputs(), budget={"bytes": 0.5}, options=BITS, folder=tmp_path / "run", evaluate=noted)
    assert (tmp_path / "run" / "log.txt").read_text() == "xx"


@pytest.mark.parametrize(
    "numbers", [{"patience": np.int64(4)}, {"patience": math.inf}, {"learning_rate": torch.tensor(1e-3)}]
)
def test_fine_tuning_takes_numbers_of_other_libraries(numbers: dict[str, Any]) -> None:
    before = dict(numbers)
    finetune(network(), inputs(), 2, teacher=network(), **numbers)
    assert numbers == before


def test_a_folder_below_a_link_that_leads_nowhere_is_refused_as_such(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(OptionsError, match="a link that leads nowhere"):
        compress(network(), inputs(), budget={"bytes": 0.5}, options=BITS, folder=tmp_path / "link" / "run")


def test_a_batch_of_texts_may_hold_an_empty_tensor() -> None:
    require_samples({"texts": ["a", "bb"], "mask": torch.empty(0)})
    with pytest.raises(DataError, match="holds no sample"):
        require_samples({"x": torch.empty(0, 3), "flag": True, "none": None})
