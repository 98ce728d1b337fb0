"""The forecast of the time that measuring an opened model takes."""

from typing import Any

import pytest
from torch import nn

from qcompress.measuring.options_by_layer import Offered
from qcompress.measuring.streamed import forecast_time
from qcompress.options import Options, prune_quantize


def encoded(monkeypatch: pytest.MonkeyPatch, module: nn.Module, options: Options) -> list[tuple[int, bool]]:
    """Rows that are encoded for a forecast, and whether second moments of their inputs are given."""
    found: list[tuple[int, bool]] = []

    def noted(self: Options, weight: Any) -> tuple[()]:
        assert all(offer.resolve(weight) is not None for offer in self.offers)
        found.append((len(weight.rows), weight.moments is not None))
        return ()

    monkeypatch.setattr(Options, "for_weight", noted)
    assert forecast_time._layers_encoding_s(module, options, {}) >= 0
    return found


def test_compensation_is_part_of_the_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    compensated = prune_quantize(bits=(4,), sparsity=(0,), compensated=True)
    layer = nn.Linear(8, 200)
    assert encoded(monkeypatch, layer, compensated) == [(1, True), (1, True), (forecast_time.ROWS, True)]
    assert encoded(monkeypatch, nn.Conv1d(8, 200, 3), compensated)[-1] == (forecast_time.ROWS, False)


def test_a_weight_that_two_layers_share_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    monkeypatch.setattr(forecast_time, "_layers_encoding_s", lambda module, options, known: 1.0)
    offered = Offered.of(prune_quantize(bits=(4,), sparsity=(0,)))
    assert forecast_time._encoding_s({"a": first, "b": second}, offered) == 2
    second.weight = first.weight
    assert forecast_time._encoding_s({"a": first, "b": second, "c": nn.ReLU()}, offered) == 1
