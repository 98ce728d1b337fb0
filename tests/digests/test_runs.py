"""What calls in one run folder take for the same: a run is known by what it began with."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompress.compression import Result, compress
from qcompress.options import prune_quantize
from tests.models import seeded

OPTIONS = prune_quantize(bits=(2, 3, 4), sparsity=(0,))


class Storing(nn.Module):
    """Keeps what it computed, and counts how often."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.calls, self.seen = nn.Linear(8, 16), nn.Linear(16, 4), 0, []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.hidden = self.first(x).relu()
        self.seen.append(x.shape)
        out: Tensor = self.last(self.hidden)
        return out


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 8, generator=generator), torch.arange(16) % 4) for _ in range(3)]


def run(folder: Path, model: nn.Module | None = None, **more: Any) -> Result:
    given = {"budget": {"bytes": 0.4}, "options": OPTIONS, "solver": "greedy", "folder": folder, **more}
    return compress(seeded(Storing) if model is None else model, batches(), **given)


class CutError(Exception):
    """Ends a run."""


def test_a_run_with_a_loss_that_keeps_a_list_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    def with_loss(folder: Path, **more: Any) -> Result:
        history: list[float] = []

        def loss(output: Tensor, batch: Any) -> Tensor:
            history.append(float(output.detach().sum()))
            return nn.functional.cross_entropy(output, batch[1], reduction="none")

        return run(folder, loss=loss, finetune_steps=40, **more)

    def cut(progress: Any) -> None:
        if progress.step:
            raise CutError

    with pytest.raises(CutError):
        with_loss(tmp_path / "cut", on_finetune=cut)
    resumed = with_loss(tmp_path / "cut")  # its list is shorter than that of the call that measured
    whole = with_loss(tmp_path / "whole")
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name])


def test_what_a_model_stores_counts_as_it_is_when_the_call_begins(tmp_path: Path) -> None:
    model = seeded(Storing)

    def measures() -> bool:
        told: list[Any] = []
        run(tmp_path, model, on_measure=told.append)
        return bool(told)

    assert measures()
    assert not measures()
    model(batches()[0][0])
    assert measures()


def test_what_passes_store_in_a_loss_or_forward_does_not_count(tmp_path: Path) -> None:
    def measures(**more: Any) -> bool:
        told: list[Any] = []
        seen: list[float] = []

        def forward(model: nn.Module, batch: Any) -> Tensor:
            seen.append(time.perf_counter())
            output: Tensor = model(batch[0])
            return output

        def loss(output: Tensor, batch: Any) -> Tensor:
            seen.append(time.perf_counter())
            return nn.functional.cross_entropy(output, batch[1], reduction="none")

        if "evaluate" in more:
            more["evaluate"] = lambda model: float(forward(model, batches()[0]).detach().sum())
        run(tmp_path, forward=forward, loss=loss, on_measure=told.append, **more)
        return bool(told)

    assert measures()
    assert not measures()
    assert not measures(evaluate=True)


def test_a_cut_training_goes_on_whatever_mode_the_model_is_in(tmp_path: Path) -> None:
    def cut(progress: Any) -> None:
        if progress.step:
            raise CutError

    model = seeded(Storing)
    with pytest.raises(CutError):
        run(tmp_path, model.train(), finetune_steps=20, on_finetune=cut)
    assert run(tmp_path, model.eval(), finetune_steps=20).report.usage["bytes"] > 0


def test_weights_that_are_frozen_are_trained_again_without_them(tmp_path: Path) -> None:
    model = seeded(Storing)
    run(tmp_path, model, finetune_steps=20)
    model.last.bias.requires_grad_(False)
    tuned = run(tmp_path, model, finetune_steps=20)
    assert torch.equal(tuned.model.last.bias, model.last.bias)  # type: ignore[union-attr,arg-type]


def test_times_are_taken_again_with_another_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = {"bytes": 0.9, "latency_s": 10.0}
    told: list[Any] = []
    for threads, timed in ((1, True), (1, False), (2, True)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        told.clear()
        run(tmp_path, budget=budget, on_timing=told.append)
        assert bool(told) == timed
