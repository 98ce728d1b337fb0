"""What is saved is what was measured and what comes back, however a model holds its tensors."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qcompress.compressed.apply import apply
from qcompress.compressed.copying import own_copy
from qcompress.compressed.file import compressed_size, load_compressed, save_compressed
from qcompress.errors import ArtefactError, ModelError
from qcompress.model.tensors import held_tensors, same_bits, total_bytes
from qcompress.options import low_rank, prune_quantize
from tests.measurements import measured, predicted_bytes, solution
from tests.small_networks import KINDS, Recipe

RANKS = low_rank(ratios=(0.5,), kinds=("channels", "spatial", "tucker"), whitened=False)
OPTIONS = (
    prune_quantize(bits=(2, 5, 8), sparsity=(0, 0.5))
    + RANKS
    + RANKS.then(prune_quantize(bits=(4, 8), sparsity=(0, 0.5)))
)


def same_tensors(one: nn.Module, other: nn.Module) -> bool:
    first, second = held_tensors(one), held_tensors(other)
    return [item.name for item in first] == [item.name for item in second] and all(
        same_bits(item.tensor, twin.tensor) for item, twin in zip(first, second, strict=True)
    )


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(KINDS),
    granularity=st.sampled_from(["layer", 3]),
    data=st.data(),
)
def test_any_network_takes_the_predicted_bytes_and_comes_back_bit_for_bit(
    seed: int, kind: str, granularity: str | int, data: st.DataObject
) -> None:
    recipe = Recipe(seed, kind)
    model, batch = recipe.make(), recipe.batch()
    before = [item.tensor.clone() for item in held_tensors(model)]
    expected = model(batch)
    measurement = measured(model, batch, OPTIONS, granularity)
    choice = [data.draw(st.integers(0, len(options) - 1)) for options in measurement.transforms]
    smaller = apply(model, measurement, solution(choice))
    assert all(map(same_bits, before, [item.tensor for item in held_tensors(model)]))
    assert torch.equal(model(batch), expected)
    with tempfile.TemporaryDirectory() as folder:
        size = compressed_size(smaller)
        saved = save_compressed(smaller, Path(folder) / "model")
        assert saved.payload_bytes == size.payload_bytes == predicted_bytes(measurement, choice)
        assert saved.file_bytes == size.file_bytes == saved.path.stat().st_size
        loaded = load_compressed(saved.path, lambda: recipe.make(weights=1))
        assert same_tensors(loaded, smaller)
        assert torch.equal(loaded(batch), smaller(batch))
        again = save_compressed(loaded, Path(folder) / "again")
        assert again.path.read_bytes() == saved.path.read_bytes()


class Turned(nn.Module):
    """Two parameters on one storage, one of them turned: each would be stored in its own way, over the other."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Linear(32, 16, bias=False)
        self.d = nn.Linear(16, 32, bias=False)
        self.d.weight = nn.Parameter(self.e.weight.detach().t())
        self.fc = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.d(torch.tanh(self.e(x))))


def test_parameters_on_one_storage_stay_as_they_are_and_count_once() -> None:
    model, batch = Turned(), torch.randn(4, 32)
    assert total_bytes(model) == 4 * (16 * 32 + 32 * 32 + 32)
    measurement = measured(model, batch, OPTIONS)
    assert [part.name for part in measurement.parts] == ["fc"]
    assert {item.name: item.reason for item in measurement.skipped} == {
        "e": "its weight shares memory with 'd.weight', which would change with it",
        "d": "its weight shares memory with 'e.weight', which would change with it",
    }
    smaller = apply(model, measurement, solution([1]))
    assert smaller.d.weight.data_ptr() == smaller.e.weight.data_ptr() != model.e.weight.data_ptr()


def test_a_copy_shares_what_its_original_shares() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            base = torch.arange(24.0)
            self.whole = nn.Parameter(base.reshape(4, 6))
            self.part = nn.Parameter(base[6:12])
            self.register_buffer("far", base[10:20])
            self.alone = nn.Parameter(torch.zeros(3))

    copied = own_copy(Views())
    with torch.no_grad():
        copied.whole.add_(1)
    assert same_tensors(copied, Views()) is False
    assert torch.equal(copied.part, torch.arange(7.0, 13.0))
    assert torch.equal(copied.far, torch.arange(11.0, 21.0))


def test_state_dict_hooks_change_nothing(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        model._register_state_dict_hook(
            lambda module, state, prefix, metadata: state.update({name: own.clone() for name, own in state.items()})
        )
        return model

    model = make()
    measurement = measured(model, torch.randn(2, 16), OPTIONS)
    smaller = apply(model, measurement, solution([1, 2]))
    saved = save_compressed(smaller, tmp_path / "model")
    assert saved.payload_bytes == predicted_bytes(measurement, [1, 2]) < 1000
    assert same_tensors(load_compressed(saved.path, make), smaller)


def test_layers_in_a_plain_list_are_named_counted_saved_and_loaded(tmp_path: Path) -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 8)
            self.layers = [nn.Linear(8, 8, bias=False), nn.ReLU(), (nn.Linear(8, 8),)]

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layers[2][0](self.layers[1](self.layers[0](x))))

    model, batch = Listed(), torch.randn(4, 8)
    measurement = measured(model, batch, OPTIONS)
    assert measurement.original["bytes"] == 4 * (3 * 64 + 16)
    assert {item.name: item.size_bytes for item in measurement.skipped} == {"layers[0]": 256, "layers[2][0]": 288}
    assert "use nn.ModuleList" in measurement.skipped[0].reason
    smaller = apply(model, measurement, solution([1]))
    saved = save_compressed(smaller, tmp_path / "model")
    assert saved.payload_bytes == predicted_bytes(measurement, [1])
    loaded = load_compressed(saved.path, Listed)
    assert torch.equal(loaded(batch), smaller(batch))


class Cached(nn.Module):
    """A buffer that no state dict takes, which grows with what the model is run on."""

    angles: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("angles", torch.zeros(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.angles) < x.shape[1]:
            self.angles = torch.arange(x.shape[1]).float()
        return self.fc(x) + self.angles[: x.shape[1], None]


def test_a_buffer_that_grew_is_saved_as_it_is(tmp_path: Path) -> None:
    model = Cached()
    measurement = measured(model, torch.randn(2, 4, 8), OPTIONS)
    smaller = apply(model, measurement, solution([1]))
    smaller(torch.randn(2, 9, 8))
    saved = save_compressed(smaller, tmp_path / "model")
    assert saved.payload_bytes == predicted_bytes(measurement, [1]) + 4 * (9 - 4)
    loaded = load_compressed(saved.path, Cached)
    assert same_tensors(loaded, smaller)
    assert "angles" not in loaded.state_dict()


def test_other_bytes_than_predicted_are_an_error_and_nothing_is_written(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    measurement = measured(model, torch.randn(2, 16), OPTIONS)
    smaller = apply(model, measurement, solution([1, 1]))
    smaller.register_parameter("more", nn.Parameter(torch.zeros(5)))
    for write in (compressed_size, lambda changed: save_compressed(changed, tmp_path / "model")):
        with pytest.raises(ArtefactError, match=r"the model takes .* bytes, not the .* that were predicted"):
            write(smaller)
    assert list(tmp_path.iterdir()) == []
    model.more = [nn.Linear(2, 2)]  # type: ignore[assignment]
    with pytest.raises(ModelError, match="what is left unchanged takes 152 bytes, but 128 were measured"):
        apply(model, measurement, solution([1, 1]))


def test_a_factory_whose_tensors_share_memory_otherwise_is_refused(tmp_path: Path) -> None:
    def apart() -> nn.Module:
        model = Turned()
        model.d.weight = nn.Parameter(model.d.weight.detach().clone())
        return model

    for make, other in ((Turned, apart), (apart, Turned)):
        model = make()
        measurement = measured(model, torch.randn(2, 32), OPTIONS)
        smaller = apply(model, measurement, solution([0] * len(measurement.parts)))
        path = save_compressed(smaller, tmp_path / "model").path
        with pytest.raises(ArtefactError, match=r"'d\.weight' is .*"):
            load_compressed(path, other)


def test_a_sparse_buffer_is_refused_by_name_before_anything_is_measured() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model.register_buffer("mask", torch.eye(8).to_sparse())
    with pytest.raises(ModelError, match="'mask' is a sparse tensor"):
        measured(model, torch.randn(2, 8), OPTIONS)


def resnet(blocks: int = 3) -> nn.Module:
    """The layers of ResNet-20 for CIFAR-10, with the names that such checkpoints have; all of one path."""
    layers: dict[str, nn.Module] = {"conv1": nn.Conv2d(3, 16, 3, padding=1, bias=False), "bn1": nn.BatchNorm2d(16)}
    width = 16
    for stage in range(3):
        for block in range(blocks):
            out = 16 * 2**stage
            for half in (1, 2):
                name = f"layer{stage + 1}_{block}_conv{half}"
                stride = 2 if out != width else 1
                layers[name] = nn.Conv2d(width, out, 3, stride=stride, padding=1, bias=False)
                layers[name.replace("conv", "bn")] = nn.BatchNorm2d(out)
                width = out
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "linear": nn.Linear(64, 10)}
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model.eval()


@pytest.mark.parametrize("granularity", ["layer", 4])
def test_a_file_takes_at_most_2_percent_and_2_kb_more_than_its_arrays(granularity: str | int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = resnet()
    options = prune_quantize(bits=(2, 3, 4, 5, 6), sparsity=(0, 0.5))
    measurement = measured(model, torch.randn(2, 3, 32, 32), options, granularity)
    choice = torch.randint(1, 6, (len(measurement.parts),)).tolist()
    choice = [min(own, len(offered) - 1) for own, offered in zip(choice, measurement.transforms, strict=True)]
    saved = save_compressed(apply(model, measurement, solution(choice)), tmp_path / "model")
    assert saved.file_bytes <= 1.02 * saved.payload_bytes + 2048


class Named(nn.Linear):
    """A layer with a class of its own that computes as PyTorch's."""


class Doubled(nn.Linear):
    """A layer that computes otherwise."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return 2 * super().forward(input)


@pytest.mark.parametrize("kind", [nn.Linear, Named, Doubled])
def test_layers_of_a_class_of_their_own_come_back(kind: type[nn.Linear], tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(kind(16, 16), kind(16, 16))

    batch = torch.randn(4, 16)
    model = make()
    measurement = measured(model, batch, OPTIONS)
    smaller = apply(model, measurement, solution([len(options) - 1 for options in measurement.transforms]))
    path = save_compressed(smaller, tmp_path / "model").path
    assert torch.equal(load_compressed(path, make)(batch), smaller(batch))
    if kind is Doubled:
        with pytest.raises(ArtefactError, match="'0' is Linear, in the file Doubled"):
            load_compressed(path, lambda: nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)))
