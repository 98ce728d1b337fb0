"""What flows between the units of an opened model: everything that carries gradients is followed, or refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import qcompress
from qcompress.errors import ModelError
from tests.models import seeded

OPTIONS = qcompress.prune_quantize(bits=(4, 6), sparsity=(0,))


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.last = kind, nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor, side: Tensor | None = None, *, also: dict[str, Tensor] | None = None) -> Tensor:
        inner = torch.tanh(self.first(x + (0 if side is None else side) + (0 if also is None else also["also"])))
        if self.kind == "straight-through":
            inner = inner + (torch.round(2 * inner) / 2 - inner).detach()
        if self.kind == "detached":
            return 3 * x + 0.02 * self.last(inner) + self.last(inner.detach()).detach()
        return x + self.last(inner)


class Chain(nn.Module):
    """A stem, blocks that may get more than hidden states, and a head."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.stem, self.condition = kind, nn.Linear(6, 16), nn.Linear(6, 16)
        self.blocks, self.head = nn.ModuleList(Block(kind) for _ in range(3)), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        start = self.stem(x)
        condition, h = self.condition(x), 0.1 * start
        for block in self.blocks:
            if self.kind == "start":
                h = block(h, 3 * start)
            elif self.kind == "encoder":
                h = block(h, also={"also": condition})
            else:
                h = block(h)
        return 2 * self.head(h + 0.1 * condition)


def opened_and_whole(kind: str, folder: Path) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    model = seeded(lambda: Chain(kind))
    save_file(model.state_dict(), folder / "model.safetensors")
    opened = qcompress.open_model(folder, model=lambda: Chain(kind), blocks="blocks")
    return opened, model, [torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


@pytest.mark.parametrize("kind", ["plain", "start", "encoder"])
def test_gradients_of_all_that_blocks_are_given_reach_what_is_before_them(kind: str, tmp_path: Path) -> None:
    opened, whole, data = opened_and_whole(kind, tmp_path)
    found, expected = (qcompress.measure(model, data, OPTIONS, method="sampled") for model in (opened, whole))
    assert found.labels == expected.labels
    np.testing.assert_allclose(found.cost, expected.cost, rtol=1e-4, atol=1e-12)  # sums in another order


def test_side_inputs_survive_an_interruption(tmp_path: Path) -> None:
    opened, _, data = opened_and_whole("encoder", tmp_path)
    whole = qcompress.measure(opened, data, OPTIONS, method="sampled")

    def interrupted_at(stop: int) -> Callable[[Any], None]:
        def interrupt(progress: Any) -> None:
            if progress.batches == stop:
                raise KeyboardInterrupt

        return interrupt

    settings: dict[str, Any] = {"method": "sampled", "cache": tmp_path / "cache"}
    for stop in range(4, 8):
        with pytest.raises(KeyboardInterrupt):
            qcompress.measure(opened, data, OPTIONS, on_progress=interrupted_at(stop), **settings)
    again = qcompress.measure(opened, data, OPTIONS, **settings)
    np.testing.assert_array_equal(again.cost, whole.cost)
    assert not (tmp_path / "cache").exists()


def test_a_gradient_that_is_wrong_inside_a_block_is_found(tmp_path: Path) -> None:
    opened, _, data = opened_and_whole("detached", tmp_path)
    found = qcompress.measure(opened, data, OPTIONS, method="sampled")
    parts = [f"blocks.{index}.{name}" for index in range(3) for name in ("first", "last")]
    alone = {part.name for part, options in zip(found.parts, found.transforms, strict=True) if len(options) == 1}
    assert set(found.no_choice) == alone == set(parts)
    assert all("the outputs do not follow its gradient" in why for why in found.no_choice.values())


def test_a_block_that_passes_a_wrong_gradient_to_those_before_it_is_refused(tmp_path: Path) -> None:
    opened, _, data = opened_and_whole("straight-through", tmp_path)
    with pytest.raises(
        ModelError, match=r"outputs of 'blocks.\d' do not follow the gradient of its inputs .* load the"
    ):
        qcompress.measure(opened, data, OPTIONS, method="sampled")


def test_an_encoder_is_measured_through_the_decoders_blocks(tmp_path: Path) -> None:
    import transformers

    config = transformers.WhisperConfig(
        vocab_size=40, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=3, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=10,
        max_target_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = seeded(lambda: transformers.WhisperForConditionalGeneration(config))
    model.save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(0)
    data = [
        {
            "input_features": torch.randn(2, 8, 20, generator=generator),
            "decoder_input_ids": torch.randint(3, 40, (2, 6), generator=generator),
        }
    ]
    found, expected = (
        qcompress.measure(own, data, OPTIONS, method="sampled") for own in (qcompress.open_model(tmp_path), model)
    )
    assert found.labels == expected.labels
    np.testing.assert_allclose(found.cost, expected.cost, rtol=1e-3, atol=1e-10)
