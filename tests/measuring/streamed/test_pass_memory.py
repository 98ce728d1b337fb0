"""The memory of a pass is counted from what a block keeps, whatever its code is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompress
from qcompress.errors import OptionsError
from qcompress.measuring.streamed.forecast_memory import unit_forecasts
from qcompress.measuring.streamed.pass_memory import pass_bytes
from qcompress.measuring.streamed.sweep import temporary_sweep
from qcompress.model.parts import survey
from tests.opened_models import saved, tokens

NEAREST = qcompress.prune_quantize(bits=(4,), sparsity=(0,))


def counted(model: nn.Module, data: list[Tensor], most: float = float("inf")) -> tuple[int, bool]:
    with temporary_sweep(model, data, None) as sweep:
        parts = [part for part in survey(model, data[:1]).parts if part.name.startswith(sweep.opened.blocks[0])]
        return pass_bytes(sweep, 0, parts, most)


def kept(model: nn.Module, data: Tensor) -> int:
    """Bytes of different tensors that autograd saves in the pass of a block."""
    storages: dict[int, Tensor] = {}

    def note(value: Tensor) -> Tensor:
        storages[value.untyped_storage().data_ptr()] = value
        return value

    with temporary_sweep(model, [data], None) as sweep, sweep.opened.loaded(sweep.opened.blocks[0]):
        module = model.get_submodule(sweep.opened.blocks[0])
        weights = {own.untyped_storage().data_ptr() for own in module.parameters()}
        for own in module.parameters():
            own.requires_grad_(True)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
            output = sweep.through(0, 0, sweep.hidden(0, 0).requires_grad_())
        assert output.requires_grad
    return sum(value.untyped_storage().nbytes() for place, value in storages.items() if place not in weights)


@pytest.mark.parametrize(
    ("kind", "attention"), [("Llama", "eager"), ("Llama", "sdpa"), ("Gemma2", "eager"), ("Mixtral", "eager")]
)
def test_all_that_a_block_keeps_is_counted(kind: str, attention: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {"Gemma2": {"head_dim": 8}, "Mixtral": {"num_local_experts": 3}}.get(kind, {})
    model = qcompress.open_model(saved(kind, tmp_path, **more))
    model.set_attn_implementation(attention)
    found = {}
    for length in (128, 256):
        longest = tokens(1, length)
        found[length], stopped = counted(model, [tokens(1, 9), longest])
        assert not stopped
        assert kept(model, longest) <= found[length] <= 3 * kept(model, longest)
    if attention == "eager":
        scores = 4 * 4 * (256**2 - 128**2)  # 4 heads, 4 bytes
        assert found[256] - found[128] >= 2 * scores


def test_half_precision_is_counted_as_it_is_checked(tmp_path: Path) -> None:
    sizes = []
    for dtype in (torch.float32, torch.bfloat16):
        model = qcompress.open_model(saved("Llama", tmp_path / str(dtype), dtype=dtype))
        sizes.append(counted(model, [tokens(1, 64)])[0])
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)


def test_a_block_that_looks_at_values_is_stopped_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = qcompress.open_model(saved("Mixtral", tmp_path, num_local_experts=3)), [tokens(1, 256)]
    whole, _ = counted(model, data)
    size, stopped = counted(model, data, most=whole // 4)
    assert stopped
    assert whole // 4 < size < whole
    monkeypatch.setattr("qcompress.measuring.streamed.forecast_memory.pass_bytes", lambda *_: (2 * whole, True))
    with pytest.raises(OptionsError, match=r"memory=10 MB was given, but more than .* are needed"):
        qcompress.measure(model, data, NEAREST, method="sampled", memory="10 MB")


def test_memory_that_runs_out_is_not_taken_for_a_wish_for_half_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = qcompress.open_model(saved("Llama", tmp_path, dtype=torch.bfloat16)), [tokens(1, 9)]
    with temporary_sweep(model, data, None) as sweep:
        block = sweep.chain.block

        def fails(index: int, hidden: Tensor, call: Any) -> Tensor:
            if hidden.dtype == torch.float32:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes")
            return block(index, hidden, call)

        monkeypatch.setattr(sweep.chain, "block", fails)
        parts = [part for part in survey(model, data).parts if part.name.startswith(sweep.opened.blocks[0])]
        with pytest.raises(RuntimeError, match="allocate memory"):
            pass_bytes(sweep, 0, parts, float("inf"))


def test_attention_that_stores_its_scores_is_refused_in_too_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qcompress.measuring.streamed.forecast import COMPILING

    resident = 10**9  # memory of the process changes while other tests' garbage is freed
    for module in ("measure", "forecast_memory"):
        monkeypatch.setattr(f"qcompress.measuring.streamed.{module}.resident_bytes", lambda: resident)
    model = qcompress.open_model(saved("Llama", tmp_path))
    model.set_attn_implementation("eager")
    data = [tokens(1, 1024)]
    passing, _ = counted(model, data)
    with pytest.raises(OptionsError, match=r"but about .* are needed"):
        qcompress.measure(model, data, NEAREST, method="sampled", memory=resident + COMPILING + passing // 2)
    qcompress.measure(model, data, NEAREST, method="sampled", memory=resident + COMPILING + 2 * passing)


def test_a_block_has_room_beside_it_for_options_outside_the_blocks_that_are_run_alone(tmp_path: Path) -> None:
    """Their codes stay in memory from the first block to the last, and one of them is decoded."""
    model = qcompress.open_model(saved("Llama", tmp_path))

    def blocks_need(**more: Any) -> tuple[int, int]:
        with temporary_sweep(model, [tokens(1, 9)], None) as sweep:
            parts = survey(model, [tokens(1, 9)], **more).parts
            options = {part.name: NEAREST for part in parts}
            *blocks, _ = unit_forecasts(sweep, parts, options, torch.zeros(1, 9, 61))
        outside = [part.target for part in parts if sweep.opened.block_of(part.modules[0]) is None]
        sizes = [offer.size_bytes(target) for target in outside for offer in NEAREST.offers]
        return max(unit.options for unit in blocks), sum(sizes) + max((own.dense_bytes for own in outside), default=0)

    (whole, beside), (alone, nothing) = blocks_need(), blocks_need(left_out=lambda path, _: "layers" not in path)
    assert nothing == 0 < beside == whole - alone
