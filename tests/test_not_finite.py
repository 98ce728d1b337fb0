"""Outputs that are finite for the original and not for a compressed model: another choice is taken, or it is said."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcompress import Report, Result, compress, formulate, measure, prune_quantize, refine, solve, steps
from qcompress.errors import ResultNotFiniteError
from qcompress.guard import HeldOutLosses, guard
from qcompress.measuring.true_loss import TrueLoss
from qcompress.model.samples import split_samples
from qcompress.pages.report_page import write_report_page
from qcompress.proposals import Proposal, proposals
from qcompress.steps import repeating
from solvers import judge
from tests.models import Residual, seeded

OPTIONS = prune_quantize(bits=(2, 4, 8), sparsity=(0,))


class Logarithm(nn.Module):
    """Its outputs are finite where a linear layer's are above a limit."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(self.b(torch.tanh(self.a(x))) + 0.3)


def near_the_limit() -> list[Tensor]:
    """Batches for which the original's outputs are finite, but not far from the limit."""
    model, found = Logarithm(), []
    for seed in range(6):
        x = torch.randn(200, 8, generator=torch.Generator().manual_seed(seed))
        output = model(x).detach()
        found.append(x[output.isfinite().all(1) & (output > -3).all(1)][:16])
    return found


def compressed(share: float, **more: Any) -> Result:
    given = {"budget": {"bytes": share}, "options": OPTIONS, "loss": "mse", "time_limit": 1, **more}
    return compress(Logarithm(), near_the_limit(), **given)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def inputs() -> Tensor:
    return torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


class Failing:
    """A forward whose output for one sample is NaN where the first layer has 8 bits."""

    def __init__(self, sample: Tensor) -> None:
        measurement = measure(network(), [inputs()], OPTIONS)
        weight = next(iter(measurement.weights(network())))
        self.sample, self.of_8_bits = sample, measurement.transforms[0][3].approximate(weight)

    def __call__(self, model: nn.Module, batch: Tensor) -> Tensor:
        output, marked = model(batch), (batch == self.sample).all(dim=1, keepdim=True)
        fails = torch.allclose(model[0].weight, self.of_8_bits, rtol=0, atol=1e-6)
        return torch.where(marked, torch.nan, output) if fails else output


def with_failing(share: float, **more: Any) -> tuple[Result, Failing]:
    (calibration,) = split_samples(network(), [inputs()]).calibration
    forward = Failing(calibration[0])
    result = compress(
        network(), [inputs()], budget={"bytes": share}, options=OPTIONS, forward=forward, time_limit=1, **more
    )
    return result, forward


def test_a_candidate_that_is_not_finite_on_what_was_measured_is_not_taken(tmp_path: Path) -> None:
    result, forward = with_failing(0.39, folder=tmp_path)
    assert bool(forward(result.model, inputs()).isfinite().all())
    tried = (*result.report.candidates, *result.report.undecided)
    assert any(candidate.loss_validation == np.inf for candidate in tried)
    assert Report.load(tmp_path / "report.json") == result.report
    write_report_page(tmp_path, tmp_path / "page.html")
    assert np.isfinite(result.report.loss_measured)


def test_what_is_chosen_from_all_samples_gives_way_to_the_guards_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    def again(*arguments: Any) -> Proposal:
        choice = arguments[4].best.choice.copy()
        choice[:2] = 3, 2
        return Proposal(name="8 bits, 4 bits", choice=choice)

    monkeypatch.setattr(steps, "choose_again", again)
    result, forward = with_failing(0.39)
    assert bool(forward(result.model, inputs()).isfinite().all())
    assert result.report.parts_moved == 0


class Root(nn.Module):
    """Its outputs are finite only where a layer's are above a limit, which is as near to the data as is asked for."""

    def __init__(self, seed: int, batches: list[Tensor], *, beyond: float = 1e-4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(10, 24), nn.Linear(24, 4)
        self.limit = 0.0
        with torch.no_grad():
            self.limit = min(float(self.before(batch).min()) for batch in batches) - beyond

    def before(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.b(torch.relu(self.a(x))))

    def forward(self, x: Tensor) -> Tensor:
        return (self.before(x) - self.limit).sqrt()


def random_batches(seed: int) -> list[Tensor]:
    return [torch.randn(32, 10, generator=torch.Generator().manual_seed(10 * seed + number)) for number in range(3)]


@pytest.mark.parametrize("method", ["fisher", "sampled", "direct"])
@pytest.mark.parametrize("seed", range(6))
def test_weights_that_leave_the_domain_are_never_taken_for_the_originals(method: str, seed: int) -> None:
    data = random_batches(seed)
    model = Root(seed, data)
    try:
        measurement = measure(model, data, prune_quantize(bits=(8,), sparsity=(0,)), method=method, loss="mse")
    except ResultNotFiniteError as error:
        assert re.search("the loss with '[ab]' at '8 bits' is not finite; leave that option out", str(error))  # noqa: PT017
    else:
        assert np.isfinite(measurement.cost).all()
    far = Root(seed, data, beyond=10.0)
    assert not measure(far, data, prune_quantize(bits=(8,), sparsity=(0,)), method=method, loss="mse").tried


def test_a_layer_that_only_ends_the_domain_has_an_effect() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.gate = nn.Linear(10, 4), nn.Linear(10, 4, bias=False)
            nn.init.constant_(self.gate.weight, 1e-3)

        def forward(self, x: Tensor) -> Tensor:
            ended = self.gate.weight.abs().max() > 1e-3
            return self.a(x) + torch.where(ended, torch.nan, 0.0)

    assert {item.name for item in measure(Gated(), random_batches(0), OPTIONS).parts} == {"a", "gate"}


def test_an_option_that_is_not_finite_on_held_out_samples_leaves_the_guards_choice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = 0

    def fails(*_: Any, **__: Any) -> None:
        nonlocal calls
        calls += 1
        raise ResultNotFiniteError("the loss with 'a' at '2 bits' is not finite; leave that option out")

    monkeypatch.setattr(repeating, "with_more_samples", fails)
    result = compress(network(), [inputs()], budget={"bytes": 0.4}, options=OPTIONS, time_limit=1)
    assert calls == 1
    assert result.report.parts_moved == 0


def test_where_no_choice_is_finite_the_error_says_whose_outputs_are_not() -> None:
    with pytest.raises(
        ResultNotFiniteError, match="outputs of the compressed model for a batch .* hold NaN or infinity"
    ):
        compressed(0.26)


def test_the_best_of_the_others_is_taken_if_the_best_is_not_finite_on_the_data() -> None:
    model, data = seeded(Residual), [torch.randn(8, 2, 8, 8, generator=torch.Generator().manual_seed(0))]
    measurement = measure(model, data, OPTIONS)
    problem = formulate(measurement, {"bytes": 0.4})
    tried = list(proposals(measurement, problem, solve(problem, "brute-force")))
    losses = {item.choice.tobytes(): float(number + 1) for number, item in enumerate(reversed(tried))}

    def seen(item: Any) -> HeldOutLosses:
        return HeldOutLosses.of(np.full(4, losses[item.choice.tobytes()]))

    first = guard(measurement, problem, tried, seen).best.choice
    asked: list[bytes] = []

    def is_finite(item: Any) -> bool:
        asked.append(item.choice.tobytes())
        return (item.choice != first).any()

    found = guard(measurement, problem, tried, seen, is_finite=is_finite)
    assert asked == [first.tobytes(), found.best.choice.tobytes()]
    assert {own.loss_validation for own in found.candidates if own.loss_validation == np.inf} == {np.inf}
    everything = guard(measurement, problem, tried, seen, is_finite=lambda _: False)
    assert everything.won.loss_validation == np.inf


def test_refining_passes_over_choices_that_are_not_finite() -> None:
    data = near_the_limit()
    measurement = measure(Logarithm(), data, OPTIONS, loss="mse")
    problem = formulate(measurement, {"bytes": 0.9})
    true_loss = TrueLoss(Logarithm(), measurement, data, loss="mse")
    worst = judge(problem, np.array([1] * len(measurement.parts) + [0] * (problem.num_groups - len(measurement.parts))))
    assert true_loss(worst.choice) == np.inf
    with pytest.raises(ResultNotFiniteError, match="of the choice to refine are not finite"):
        refine(Logarithm(), data, measurement, problem, worst.choice, loss="mse")
    best = refine(Logarithm(), data, measurement, problem, solve(problem, "brute-force").choice, loss="mse")
    assert np.isfinite(best.loss)
