"""What a model that is read block by block cannot be measured in: it is told, with the true reason and what works."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qcompress
from qcompress.errors import ModelError
from qcompress.model.parts import UNCALLED, USED_BY_BLOCK
from tests.opened_models import in_memory, saved, tokens

OPTIONS = qcompress.prune_quantize(bits=(3, 4), sparsity=(0,))


class Block(nn.Module):
    """A block with a weight that is used without its layer's call, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.taken, self.idle = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.linear(torch.relu(self.called(x)), self.taken.weight.view(16, 16))


class Around(nn.Module):
    """Weights before and after the blocks that are used without their layers' calls; blocks are called in an order."""

    order: tuple[int, ...] = (0, 1, 2)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(8, 16), nn.ModuleList(Block() for _ in range(3)), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(x, self.stem.weight)
        for index in self.order:
            x = self.blocks[index](x)
        return nn.functional.linear(x, self.head.weight)


class Again(Around):
    order = (0, 1, 2, 1)


class Backwards(Around):
    order = (2, 1, 0)


def opened(make: Callable[[], nn.Module], place: Path) -> nn.Module:
    torch.manual_seed(0)
    save_file(make().state_dict(), place / "model.safetensors")
    return qcompress.open_model(place, model=make)


def data() -> list[Tensor]:
    return [torch.randn(4, 8, generator=torch.Generator().manual_seed(1))]


def test_weights_used_without_their_layers_call_are_named_as_such(tmp_path: Path) -> None:
    """In and around the blocks; a layer that no batch reaches has the other reason, and in memory all are measured."""
    measurement = qcompress.measure(opened(Around, tmp_path), data(), OPTIONS, method="sampled")
    reasons = {item.name: item.reason for item in measurement.unchanged}
    taken = ["stem", "head", *(f"blocks.{block}.taken" for block in range(3))]
    assert {name for name, reason in reasons.items() if reason == USED_BY_BLOCK} == set(taken)
    assert {name for name, reason in reasons.items() if reason == UNCALLED} == {f"blocks.{n}.idle" for n in range(3)}
    whole = qcompress.measure(Around(), data(), OPTIONS, method="sampled")
    assert set(taken) <= {part.name for part in whole.parts}
    assert sum(item.size_bytes for item in measurement.unchanged if item.name in taken) == 4 * (
        8 * 16 + 16 * 5 + 3 * 16 * 16
    )


@pytest.mark.filterwarnings("ignore")
def test_those_of_mamba_are_named_too(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=61, hidden_size=16, state_size=4, num_hidden_layers=2)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    measurement = qcompress.measure(qcompress.open_model(tmp_path), [tokens(1, 8)], OPTIONS, method="sampled")
    named = [item.name for item in measurement.unchanged if item.reason == USED_BY_BLOCK]
    assert named == [f"backbone.layers.{n}.mixer.{name}" for n in range(2) for name in ("conv1d", "dt_proj")]
    assert not any(item.reason == UNCALLED for item in measurement.unchanged)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Again, r"runs 'blocks\.1' 2 times, as one of several layers.*load it whole"),
        (Backwards, r"runs its blocks in the order blocks\.2, blocks\.1, blocks\.0.*load it whole"),
    ],
)
def test_blocks_not_run_once_and_in_order_are_refused_by_all_that_goes_through_them(
    make: Callable[[], nn.Module], message: str, tmp_path: Path
) -> None:
    """Losses would be those of another model."""
    model = opened(make, tmp_path)
    with pytest.raises(ModelError, match=message):
        qcompress.measure(model, data(), OPTIONS, method="sampled")
    with pytest.raises(ModelError, match=message):
        qcompress.mean_loss(model, model, data())
    assert qcompress.measure(make(), data(), OPTIONS, method="sampled").parts


def test_a_block_shared_by_all_layers_is_refused_and_measured_in_memory(tmp_path: Path) -> None:
    from transformers import AlbertConfig, AlbertForMaskedLM

    torch.manual_seed(0)
    words = {"vocab_size": 61, "embedding_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    AlbertForMaskedLM(AlbertConfig(**words, num_attention_heads=2)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"'albert\.encoder\.albert_layer_groups\.0' 3 times.*from_pretrained\(\)"):
        qcompress.measure(qcompress.open_model(tmp_path), [tokens(1, 8)], OPTIONS, method="sampled")
    assert qcompress.measure(in_memory(tmp_path), [tokens(1, 8)], OPTIONS, method="sampled").parts


def test_a_weight_that_is_not_finite_is_named_in_every_call(tmp_path: Path) -> None:
    folder = saved("Llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = qcompress.open_model(folder)
    for _ in range(2):
        with pytest.raises(ModelError, match=r"^the weight 'model\.layers\.1\.mlp\.up_proj\.weight' holds NaN or infi"):
            qcompress.measure(model, [tokens(2, 8)], OPTIONS, method="sampled")
        assert all(own.is_meta for name, own in model.named_parameters() if ".layers." in name)
