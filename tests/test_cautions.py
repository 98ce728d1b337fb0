"""What a report recommends is accepted for a run of the same kind, and errors say what would work."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompress import (
    compress,
    formulate,
    integer_products,
    measure,
    prune_channels,
    prune_quantize,
    refine,
    remeasure,
)
from qcompress.cautions import LEAST_NATS, LEAST_NATS_FAR, what_helps
from qcompress.errors import OptionsError
from qcompress.model.opened import open_model
from tests.opened_models import in_memory, saved, tokens

BITS = prune_quantize(bits=(2, 8), sparsity=(0,))
CHANNELS = prune_channels(keep=(0.5,))
KINDS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "codes": ({"options": BITS}, {"refine_rounds", "method"}),
    "codes, measured one by one": ({"options": BITS, "method": "direct"}, {"refine_rounds"}),
    "codes, refined": ({"options": BITS, "refine_rounds": 1}, {"method"}),
    "rounded activations": ({"options": integer_products(bits=(8,)) + BITS}, {"method"}),
    "channels": ({"options": CHANNELS}, {"rounds"}),
    "channels and codes": ({"options": CHANNELS + BITS}, {"rounds", "method"}),
    "channels in rounds": ({"options": CHANNELS, "rounds": 2}, set()),
}


def network() -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))


def data() -> list[Tensor]:
    return list(torch.randn(32, 6, generator=torch.Generator().manual_seed(0)).split(16))


def different() -> list[Tensor]:
    """Batches on which losses are far from those predicted from `data`."""
    return [20 * batch for batch in data()]


def recommended(warnings: tuple[str, ...]) -> dict[str, Any]:
    """The arguments in the warning that says what helps."""
    (warning,) = (text for text in warnings if "What helps: more calibration samples" in text)
    named = re.findall(r"[(, ](\w+)=('\w+'|\d+)", warning.partition("What helps")[2])
    return {name: ast.literal_eval(value) for name, value in named}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_report_recommends_is_accepted(kind: str) -> None:
    own, expected = KINDS[kind]
    given: dict[str, Any] = {"budget": {"bytes": 0.6}, "validation": different(), "loss": "mse", "time_limit": 2, **own}
    helps = recommended(compress(network(), data(), **given).report.warnings)
    assert helps.keys() == expected
    for name, value in helps.items():
        compress(network(), data(), **{**given, name: value})


@pytest.mark.parametrize("options", [BITS, CHANNELS + BITS])
def test_a_given_measurement_is_not_told_to_measure_otherwise(options: Any) -> None:
    measurement = measure(network(), data(), options, loss="mse")
    given: dict[str, Any] = {"budget": {"bytes": 0.6}, "validation": different(), "loss": "mse", "time_limit": 2}
    result = compress(network(), data(), measurement=measurement, **given)
    helps = recommended(result.report.warnings)
    assert measure(network(), data(), options, loss="mse", method=helps.pop("method")).method == "direct"
    assert helps.keys() == ({"refine_rounds"} if options is BITS else set())
    if helps:
        compress(network(), data(), measurement=measurement, **given, **helps)


@pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")
def test_of_an_opened_model_only_the_whole_one_is_told_to_be_measured_otherwise(tmp_path: Path) -> None:
    folder, batches = saved("Llama", tmp_path), [tokens(2, 5)]
    opened = open_model(folder)
    said = what_helps(measure(opened, batches, BITS, method="sampled"), opened=True)
    assert said.endswith("and costs measured one by one with the model loaded whole (method='direct')")
    assert "refine_rounds=2" in said
    words: dict[str, Any] = {"budget": {"bytes": 0.9}, "options": BITS, "method": "sampled", "time_limit": 2}
    compress(opened, batches, refine_rounds=2, **words)
    assert "refine_rounds" not in what_helps(
        measure(opened, batches, BITS, method="sampled"), opened=True, refined=True
    )
    whole: dict[str, Any] = {"options": BITS, "method": "direct", "refine_rounds": 2, "time_limit": 2}
    compress(in_memory(folder), batches, budget={"bytes": 0.9}, **whole)
    with pytest.raises(OptionsError, match="rounds= is for channels, which are removed from models in memory"):
        compress(opened, batches, budget={"bytes": 0.6}, options=BITS, method="sampled", rounds=2)


@pytest.mark.parametrize(
    ("asked", "works"),
    [
        ({"refine_rounds": 2}, "refine_rounds= is not supported for channels: rounds= measures again between removals"),
        ({"granularity": 4}, "granularity= is not supported for channels: prune_channels(granularity=...) removes blo"),
        (
            {"budget": {"bits_per_weight": 4, "bytes": 0.5}, "granularity": 4},
            "a budget for bits_per_weight, granularity= is not supported for channels: give budgets for bytes, macs "
            "and latency_s; prune_channels(granularity=...) removes blocks",
        ),
        (
            {"budget": {"file_bytes": 0.5, "loss": 1.0}, "minimize": "bytes"},
            "a budget for file_bytes, minimize= is not supported for channels: give budgets for bytes, macs and",
        ),
    ],
)
def test_an_error_about_channels_says_what_would_work(asked: dict[str, Any], works: str) -> None:
    with pytest.raises(OptionsError, match=re.escape(works)):
        compress(network(), data(), **{"budget": {"bytes": 0.5}, "options": CHANNELS, **asked})


def test_measured_channels_are_not_measured_around_a_choice() -> None:
    measurement = measure(network(), data(), CHANNELS)
    with pytest.raises(OptionsError, match=r"rounds= \(with options=, not measurement=\) measures again"):
        compress(network(), data(), budget={"macs": 0.6}, measurement=measurement, refine_rounds=2)
    problem, choice = formulate(measurement, {"macs": 1.0}), [0] * len(measurement.parts)
    for again in (
        lambda: remeasure(network(), data(), measurement, choice),
        lambda: refine(network(), data(), measurement, problem, choice),
    ):
        with pytest.raises(OptionsError, match="rounds= of compress.* measures again between removals"):
            again()


def test_the_guide_says_of_which_differences_there_is_no_warning() -> None:
    guide = (Path(__file__).parents[1] / "docs" / "guides" / "measuring.md").read_text()
    for nats in (LEAST_NATS, LEAST_NATS_FAR):
        assert f"up to {nats:.0e} nats".replace("e-0", "e-") in " ".join(guide.split())


@pytest.mark.parametrize(
    ("last", "given", "told"),
    [
        (nn.Softmax(-1), {}, True),
        (nn.LogSoftmax(-1), {}, False),
        (nn.Identity(), {}, False),
        (nn.Softmax(-1), {"loss": "mse"}, False),
        (nn.Softmax(-1), {"forward": lambda model, batch: model(batch).clamp(min=1e-30).log()}, False),
    ],
)
def test_outputs_that_are_probabilities_already_are_told(last: nn.Module, given: dict[str, Any], told: bool) -> None:
    model = nn.Sequential(network(), last)
    report = compress(model, data(), budget={"bytes": 0.5}, options=BITS, time_limit=1, **given).report
    assert told == any("the model's outputs are probabilities" in warning for warning in report.warnings)
