"""Budgets in words: what is asked for, exactly, and one clear error for what cannot be meant."""

import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from formulations import InfeasibleBudgetError
from qcompress import (
    Measurement,
    Options,
    compress,
    compressed_size,
    formulate,
    low_rank,
    measure,
    prune_quantize,
    save_compressed,
    solve,
)
from qcompress.budgets import Limit, limits, parse, split_loss
from qcompress.errors import OptionsError
from tests.models import Residual, TiedLanguageModel, seeded
from tests.quick import slow_but


def batches() -> list[Tensor]:
    return [torch.randn(16, 2, 5, 5, generator=torch.Generator().manual_seed(0))]


@pytest.fixture(scope="module")
def measurement() -> Measurement:
    return measure(seeded(Residual), batches(), prune_quantize(bits=(2, 4, 8), sparsity=(0,)))


@pytest.mark.parametrize(
    ("resource", "asked", "value"),
    [
        ("bytes", "120 kB", 120_000),
        ("bytes", "120kB", 120_000),
        ("bytes", "1.5 MB", 1_500_000),
        ("bytes", "1.5 MiB", 1.5 * 2**20),
        ("bytes", "2 GB", 2e9),
        ("bytes", "1_000 bytes", 1000),
        ("bytes", "1e3 B", 1000),
        ("bytes", "64 KiB", 65_536),
        ("latency_s", "0.5 s", 0.5),
        ("latency_s", "20 ms", 0.02),
        ("latency_s", "300 us", 3e-4),
        ("macs", "3 M", 3e6),
        ("bits_per_weight", "4.25 bits", 4.25),
        ("bits_per_weight", 4.25, 4.25),
        ("bits_per_weight", 0.9, 0.9),
        ("bytes", 120_000, 120_000),
        ("bytes", np.int64(120_000), 120_000),
        ("bytes", torch.tensor(120_000.0), 120_000),
        ("bytes", "120_000", 120_000),
    ],
)
def test_amounts(resource: str, asked: Any, value: float) -> None:
    found = parse(resource, asked)
    assert found.value == pytest.approx(value, rel=1e-15)
    assert not found.is_share


@pytest.mark.parametrize(
    ("resource", "asked"),
    [("bytes", "15%"), ("bytes", "15 %"), ("bytes", 0.15), ("bytes", "0.15"), ("bytes", np.float32(0.15)),
     ("latency_s", "15%"), ("bits_per_weight", "15%"), ("anything", "15%")],
)  # fmt: skip
def test_shares(resource: str, asked: Any) -> None:
    found = parse(resource, asked)
    assert found.is_share
    assert found.value == pytest.approx(0.15, rel=1e-6)


@given(hundredths=st.integers(1, 9999), original=st.integers(1, 10**12))
def test_a_share_is_exact_to_the_byte(hundredths: int, original: int) -> None:
    share = parse("bytes", f"{hundredths / 100}%").amount(original)
    assert share == Fraction(hundredths, 10_000) * original // 1


@pytest.mark.parametrize("asked", ["", "kB", "-5 kB", "0 kB", "0%", "half", "5 kB 3", "nan", "inf", "1..5", 0, -1, True,
                                   None, float("nan"), [5], "1e999"])  # fmt: skip
def test_what_is_no_positive_amount_is_refused(asked: Any) -> None:
    with pytest.raises(OptionsError, match="the budget for bytes must be a positive number"):
        parse("bytes", asked)


@pytest.mark.parametrize(
    ("resource", "asked", "error"),
    [
        ("bytes", "5 s", r"has no unit 's'; known: %, B, bytes, kB"),
        ("bytes", "5 KB", r"has no unit 'KB'.*kB is 1,000 bytes, KiB 1,024"),
        ("latency_s", "5 kB", r"has no unit 'kB'; known: %, s, ms"),
        ("anything", "5 kB", r"has no unit 'kB'; known: %$"),
    ],
)
def test_an_unknown_unit_is_refused_with_those_there_are(resource: str, asked: str, error: str) -> None:
    with pytest.raises(OptionsError, match=error):
        parse(resource, asked)


def test_words_and_numbers_give_the_same_problem(measurement: Measurement) -> None:
    original = measurement.original["bytes"]
    assert formulate(measurement, {"bytes": "50%"}).budgets == formulate(measurement, {"bytes": 0.5}).budgets
    assert formulate(measurement, {"bytes": "0.9 kB"}).budgets["bytes"] == 900
    assert formulate(measurement, {"bytes": "100%"}).budgets["bytes"] == original
    assert Limit(0.29, is_share=True).amount(100) == 29  # as floats, 0.29 * 100 is below 29


def test_bits_per_weight_are_the_bits_of_what_has_a_choice_over_its_weights() -> None:
    options = prune_quantize(bits=(2, 4, 8), sparsity=(0, 0.5))
    data = [torch.randint(0, 11, (8, 3), generator=torch.Generator().manual_seed(3))]
    for factory, given_data in ((Residual, batches()), (TiedLanguageModel, data)):
        measurement = measure(seeded(factory), given_data, options, granularity=3)
        for asked in (9, 12.5, "40%"):
            problem = formulate(measurement, {"bits_per_weight": asked})
            choice = solve(problem, "greedy").choice
            assert choice is not None
            bits = weights = 0
            for part, transforms, option in zip(measurement.parts, measurement.transforms, choice, strict=False):
                assert len(transforms) > 1
                bits += 8 * transforms[option].size_bytes(part.target)
                weights += part.target.num_weights
            usage = problem.evaluate(choice).usage["bits_per_weight"]
            assert usage == pytest.approx(bits / weights, rel=1e-12)
            assert usage <= (0.4 * 32 if asked == "40%" else asked) * (1 + 1e-12)  # type: ignore[operator]


def test_bits_per_weight_at_a_number_that_a_choice_meets_exactly_take_that_choice() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(64, 32, bias=False), nn.ReLU(), nn.Linear(32, 16, bias=False)))
    measurement = measure(model, [torch.randn(32, 64)], prune_quantize(bits=(2, 3, 4), sparsity=(0,)))
    loose = formulate(measurement, {"bits_per_weight": 32})
    for choice in ([1, 2], [3, 1], [2, 2]):
        use = loose.evaluate(choice).usage["bits_per_weight"]
        assert formulate(measurement, {"bits_per_weight": use}).evaluate(choice).feasible
        assert not formulate(measurement, {"bits_per_weight": use * (1 - 1e-9)}).evaluate(choice).feasible


def test_a_share_of_bits_or_seconds_is_not_rounded_to_a_whole_number() -> None:
    measurement = measure(seeded(Residual), batches(), prune_quantize(bits=(2, 4, 8), sparsity=(0,)))
    assert formulate(measurement, {"bits_per_weight": "45%"}).budgets["bits_per_weight"] == pytest.approx(0.45 * 32)
    times = {"latency_s": np.zeros_like(measurement.resources["bytes"])}
    timed = replace(
        measurement,
        resources={**measurement.resources, **times},
        fixed={**measurement.fixed, "latency_s": 2.0},
        original={**measurement.original, "latency_s": 2.0},
    )
    assert limits(timed, {"latency_s": "80%"}) == {"latency_s": pytest.approx(1.6)}


def test_the_report_of_a_run_by_bits_per_weight_names_them() -> None:
    result = compress(seeded(Residual), batches(), budget={"bits_per_weight": 9.5, "bytes": "90%"}, solver="greedy")
    report = result.report
    assert report.usage["bits_per_weight"] <= report.budgets["bits_per_weight"] == 9.5
    assert report.original["bits_per_weight"] == 32
    assert "bits_per_weight" in report.to_markdown()


@pytest.mark.parametrize("budget", ["150%", "100%", "1 MB", 1e9])
def test_a_budget_that_the_original_meets_is_accepted_and_said(budget: float | str) -> None:
    report = compress(seeded(Residual), batches(), budget={"bytes": budget}, solver="greedy").report
    said = [warning for warning in report.warnings if warning.startswith("the budget for bytes is ")]
    assert len(said) == 1
    assert said[0].endswith(f"which the original meets already with {report.original['bytes']:,.0f}")


def test_an_unknown_resource_is_refused_before_measuring() -> None:
    measured: list[object] = []
    for budget, error in (
        ({"watts": 3}, "'watts'; measured are: bytes, macs, latency_s, bits_per_weight"),
        ({}, "at least one budget"),
        ({"bytes": "5 parsecs"}, "has no unit 'parsecs'"),
    ):
        with pytest.raises(OptionsError, match=error):
            compress(seeded(Residual), batches(), budget=budget, on_measure=measured.append)  # type: ignore[arg-type]
    assert not measured


def test_a_budget_below_the_smallest_possible_says_what_is_fixed_and_why() -> None:
    with pytest.raises(InfeasibleBudgetError) as caught:
        compress(seeded(Residual), batches(), budget={"bytes": "1%"})
    told = str(caught.value)
    needed = re.search(r"; bytes needs at least (\d+)%\.", told)
    assert needed is not None
    share = int(needed[1])
    assert compress(seeded(Residual), batches(), budget={"bytes": f"{share}%"}, solver="greedy").solution.feasible
    with pytest.raises(InfeasibleBudgetError, match=f"needs at least {share}%"):
        compress(seeded(Residual), batches(), budget={"bytes": f"{share - 1}%"})
    for asked in (share, str(share)):
        with pytest.raises(InfeasibleBudgetError, match=f"; if a share of the original was meant, write '{share}%'. "):
            compress(seeded(Residual), batches(), budget={"bytes": asked})
    assert "the smallest possible use is" in told
    assert (
        "are fixed: part 'norm': 24 bytes (vectors such as scales, biases and statistics are too small to compress); "
        "everything else, such as biases" in told
    )
    assert caught.value.problem is not None


@pytest.mark.parametrize("asked", [100, 150, "100", "99 B", "0.099 kB"])
def test_a_percentage_is_suggested_only_where_it_may_have_been_meant(asked: float | str) -> None:
    with pytest.raises(InfeasibleBudgetError, match="the smallest possible use is") as caught:
        compress(seeded(Residual), batches(), budget={"bytes": asked})
    assert "share of the original" not in str(caught.value)
    assert "?" not in str(caught.value)


@pytest.mark.parametrize("share", slow_but([0.999, 0.6], [0.999, 0.8, 0.6, 0.5]))
@pytest.mark.parametrize(
    "options", [prune_quantize(bits=(2, 4, 8)), low_rank(whitened=False) + prune_quantize(bits=(4,))], ids=str
)
def test_a_budget_for_the_file_holds_to_the_byte_and_wastes_little(
    tmp_path: Path, share: float, options: Options
) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 9)))
    data = [torch.randn(16, 64)]
    settings: dict[str, Any] = {
        "options": options,
        "solver": "lagrangian",
        "granularity": 16 if share < 0.8 else "layer",
        "guard": False,  # the predicted best, whatever it truly loses
    }
    result = compress(model, data, budget={"file_bytes": share}, folder=tmp_path, **settings)
    report, size = result.report, (tmp_path / "model.safetensors").stat().st_size
    assert size == report.usage["file_bytes"] <= report.budgets["file_bytes"]
    by_bytes = compress(model, data, budget={"bytes": report.budgets["file_bytes"] - 2500}, **settings)
    assert report.loss_predicted <= by_bytes.report.loss_predicted
    assert save_compressed(by_bytes.model, tmp_path / "other.safetensors").file_bytes <= report.budgets["file_bytes"]


def test_a_file_that_is_too_large_at_first_is_made_smaller(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("qcompress.compressed.file_bytes.ROOM_PER_PART", -8)
    model, data = seeded(lambda: nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 9))), [torch.randn(16, 64)]
    options = prune_quantize(bits=tuple(range(2, 9)), sparsity=(0,))
    result = compress(
        model, data, budget={"file_bytes": "8 kB"}, options=options, granularity=2, solver="lagrangian", guard=False,
        folder=tmp_path,
    )  # fmt: skip
    assert (tmp_path / "model.safetensors").stat().st_size == result.report.usage["file_bytes"] <= 8000


@pytest.mark.parametrize("granularity", ["layer", 8])
def test_a_file_budget_that_the_smallest_file_just_meets_is_met(granularity: str | int) -> None:
    model, data = seeded(lambda: nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 9))), [torch.randn(16, 64)]
    settings: dict[str, Any] = {
        "options": prune_quantize(bits=(2, 4), sparsity=(0,)), "granularity": granularity, "guard": False,
        "solver": "lagrangian",
    }  # fmt: skip
    measurement = measure(model, data, settings["options"], granularity=granularity)
    smallest = formulate(measurement, {"bytes": 1.0}).minimum_usage()["bytes"]
    file_bytes = compressed_size(compress(model, data, budget={"bytes": smallest}, **settings).model).file_bytes
    result = compress(model, data, budget={"file_bytes": file_bytes}, **settings)
    assert result.report.usage["file_bytes"] == compressed_size(result.model).file_bytes <= file_bytes
    with pytest.raises(InfeasibleBudgetError):
        compress(model, data, budget={"file_bytes": file_bytes - 1}, **settings)


@pytest.mark.parametrize("budget", ["15%", ["bytes=15%"], 0.15])
def test_budgets_that_are_no_mapping_are_one_clear_error(budget: Any) -> None:
    with pytest.raises(OptionsError, match="budgets are a mapping such as {'bytes': '15%'}, found"):
        compress(nn.Linear(4, 2), [torch.zeros(2, 4)], budget=budget)


@pytest.mark.parametrize("resource", ["bytes", "macs", "latency_s", "file_bytes", "bits_per_weight"])
def test_a_limit_stays_what_it_is_however_small(resource: str) -> None:
    for limit in (Limit(0.5, is_share=False), Limit(2.0, is_share=True)):
        assert parse(resource, limit) is limit


def test_a_share_is_no_limit_on_the_loss() -> None:
    with pytest.raises(OptionsError, match="found a share, 0.5"):
        split_loss({"loss": Limit(0.5, is_share=True)}, "bytes")
    assert split_loss({"loss": Limit(0.5, is_share=False)}, "bytes") == ({"bytes": "100%"}, 0.5)


def test_a_limit_in_nats_is_none_of_squares() -> None:
    settings = {"minimize": "bytes", "budget": {"loss": "0.02 nats"}}
    with pytest.raises(OptionsError, match="the loss 'mse' is not in nats: give a number, 0.02"):
        compress(nn.Linear(4, 2), [torch.zeros(2, 4)], loss="mse", **settings)
    assert split_loss(settings["budget"], "bytes", "kl-tail") == ({"bytes": "100%"}, 0.02)


def test_the_smallest_file_is_within_what_is_proven_of_it() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 5))
    result = compress(
        network, [torch.randn(32, 32) for _ in range(4)], minimize="file_bytes", budget={"loss": 0.01}, guard=False,
        options=prune_quantize(bits=(2, 4, 8), sparsity=(0,)),
    )  # fmt: skip
    assert result.report.smallest is not None
    smallest, file_bytes = result.report.smallest, result.report.usage["file_bytes"]
    assert smallest["at_least"] <= smallest["usage"] == file_bytes
    assert f"{file_bytes:,.0f}, proven to need at least" in result.report.to_markdown()
