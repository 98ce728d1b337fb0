"""Arguments of another kind than is wanted are refused by name, in every function that takes them."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from formulations import FileFormatError, Problem
from qcompress import (
    Measurement,
    Report,
    Solution,
    apply,
    apply_,
    compress,
    find_sets,
    finetune,
    formulate,
    load_compressed,
    mean_loss,
    measure,
    prune_quantize,
    refine,
    remeasure,
    save_compressed,
    solve,
    time_options,
)
from qcompress.agreement import agreement
from qcompress.errors import ArtefactError, DataError, ModelError, OptionsError

BITS = prune_quantize(bits=(2, 4, 8), sparsity=(0,))


def network(outputs: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, outputs))


def inputs() -> list[Tensor]:
    return [torch.randn(16, 8, generator=torch.Generator().manual_seed(index)) for index in range(2)]


@pytest.fixture(scope="module")
def made() -> tuple[Measurement, Problem, Solution]:
    measurement = measure(network(), inputs(), BITS)
    problem = formulate(measurement, {"bytes": 0.5})
    return measurement, problem, solve(problem, "greedy")


@pytest.mark.parametrize("seed", [None, "abc", math.nan, [1], 2**64, -1, 1.5, True])
def test_a_seed_is_a_whole_number_that_generators_take(seed: Any) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: compress(network(), inputs(), budget={"bytes": 0.5}, options=BITS, seed=seed),
        lambda: measure(network(), inputs(), BITS, seed=seed),
        lambda: finetune(network(), inputs(), 1, teacher=network(), seed=seed),
    ]
    for call in calls:
        with pytest.raises(OptionsError, match="^seed must be"):
            call()


@pytest.mark.parametrize("wrong", [None, 3, "model.pt", nn.Linear])
def test_what_is_no_model_is_refused_everywhere(wrong: Any, made: tuple[Measurement, Problem, Solution]) -> None:
    measurement, problem, solution = made
    assert solution.choice is not None
    choice = solution.choice
    calls: list[Callable[[], Any]] = [
        lambda: mean_loss(network(), wrong, inputs()),
        lambda: mean_loss(wrong, network(), inputs()),
        lambda: agreement(network(), wrong, inputs()),
        lambda: apply(wrong, measurement, solution),
        lambda: apply_(wrong, measurement, solution),
        lambda: find_sets(wrong, inputs()),
        lambda: finetune(wrong, inputs(), 1, teacher=network()),
        lambda: time_options(wrong, measurement, inputs()[0]),
        lambda: remeasure(wrong, inputs(), measurement, choice),
        lambda: refine(wrong, inputs(), measurement, problem, choice),
        lambda: save_compressed(wrong, "model.safetensors"),
    ]
    for call in calls:
        with pytest.raises(ModelError, match=r"must be a torch\.nn\.Module, found"):
            call()


@pytest.mark.parametrize(("loss", "outputs"), [("kl", 1), ("kl", 5), ("mse", 1), ("mse", 5)])
def test_outputs_of_other_shapes_are_not_compared(loss: str, outputs: int) -> None:
    with pytest.raises(ModelError, match=rf"\(16, 4\) of the original and \(16, {outputs}\) of the other model"):
        mean_loss(network(), network(outputs), inputs(), loss=loss)


@pytest.mark.parametrize("wrong", [None, 3, torch.zeros(16, 8)])
def test_what_are_no_batches_is_refused(wrong: Any) -> None:
    with pytest.raises(DataError, match="^data must be an iterable of batches"):
        mean_loss(network(), network(), wrong)


@pytest.mark.parametrize("wrong", [None, 3, "x", [0.5, 1.0], [[1, 2]], object()])
def test_what_is_no_choice_is_refused(wrong: Any, made: tuple[Measurement, Problem, Solution]) -> None:
    measurement, problem, _ = made
    with pytest.raises(ModelError, match="^a choice is a list with the number of an option for every part"):
        remeasure(network(), inputs(), measurement, wrong)
    with pytest.raises(ModelError, match="^a choice is a list with the number of an option for every part"):
        refine(network(), inputs(), measurement, problem, wrong)


@pytest.mark.parametrize("wrong", [[], 3, True, ("bytes",)])
def test_what_is_no_resource_to_minimize_is_refused(wrong: Any) -> None:
    with pytest.raises(OptionsError, match="^minimize must be the name of a resource"):
        compress(network(), inputs(), budget={"loss": 0.1}, minimize=wrong, options=BITS)


@pytest.mark.parametrize("wrong", [None, 3, b"x", []])
def test_what_is_no_path_is_refused(wrong: Any, made: tuple[Measurement, Problem, Solution]) -> None:
    for kind in (Measurement, Report, Solution, Problem):
        with pytest.raises(FileFormatError, match="^a file is named by its path"):
            kind.load(wrong)  # type: ignore[attr-defined]
    with pytest.raises(FileFormatError, match="^a file is named by its path"):
        made[0].save(wrong)
    with pytest.raises((FileFormatError, ArtefactError), match="^a file is named by its path"):
        load_compressed(wrong, network)


def test_the_solution_of_another_measurement_is_refused(made: tuple[Measurement, Problem, Solution]) -> None:
    other = measure(network(), inputs(), prune_quantize(bits=(3, 5, 6), sparsity=(0,)))
    solution = solve(formulate(other, {"bytes": 0.5}), "greedy")
    with pytest.raises(ModelError, match="^the solution was made from another measurement: it takes "):
        apply(network(), made[0], solution)
    apply(network(), other, solution)
