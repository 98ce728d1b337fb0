"""Packed models: the dense weights bit for bit where they are used, and only there."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qcompress import compress, finetune, pack_
from qcompress.compressed import packed as packing
from qcompress.compressed.apply import apply
from qcompress.compressed.file import load_compressed, save_compressed
from qcompress.compressed.packed import Packed
from qcompress.compressed.record import record_of
from qcompress.compressed.rows import packed_rows
from qcompress.errors import ArtefactError, ModelError
from qcompress.model.tensors import same_bits, total_bytes
from qcompress.options import low_rank, prune_quantize
from qcompress.transforms.base import Keep, Target, Transform, Weight
from qcompress.transforms.quantize.group_wise import GroupWise
from qcompress.transforms.quantize.prune_quantize import PruneQuantize
from qcompress.transforms.quantize.whole_filters import PruneFilters
from tests.measurements import KINDS, measured, solution
from tests.small_networks import KINDS as ODD_KINDS
from tests.small_networks import Recipe

RANKS = low_rank(ratios=(0.5,), kinds=("channels", "spatial", "tucker", "sliced"), slices=(2,), whitened=False)
OPTIONS = (
    prune_quantize(bits=(2, 3, 8, 12), sparsity=(0, 0.5))
    + RANKS
    + RANKS.then(prune_quantize(bits=(5,), sparsity=(0, 0.5)))
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def a_target(channels: int, columns: int, dtype: torch.dtype = torch.float32) -> Target:
    return Target(layer="Linear", channels=channels, per_channel=columns, dtype=dtype, macs=0)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    bits=st.integers(2, 16),
    sparsity=st.sampled_from([0, 0.3, 0.9]),
    channels=st.integers(1, 20),
    columns=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
)
def test_any_rows_are_those_of_the_decoded_weight(
    seed: int, bits: int, sparsity: float, channels: int, columns: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    target, transform = a_target(channels, columns, dtype), PruneQuantize(bits, sparsity)
    weight = torch.randn(channels, columns, generator=generator).to(dtype)
    weight[0] = 0
    stored = transform.encode(Weight(weight, target))
    whole = transform.decode(stored, target)
    rows = packed_rows([(transform, stored, target)])
    numbers = torch.randint(channels, (7,), generator=generator)
    assert same_bits(rows.rows(numbers), whole[numbers])
    start = int(torch.randint(channels, (), generator=generator))
    assert same_bits(rows.block(start, channels), whole[start:])
    assert same_bits(rows.rows(numbers[:0]), whole[:0])


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    bits=st.integers(2, 8),
    sparsity=st.sampled_from([0, 0.5]),
    group_size=st.sampled_from([None, 2, 7, 8, 16, 32]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    columns=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
)
def test_any_rows_in_groups_are_those_of_the_decoded_weight(
    seed: int,
    bits: int,
    sparsity: float,
    group_size: int | None,
    symmetric: bool,
    scale_dtype: str,
    columns: int,
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    target = a_target(11, columns, dtype)
    transform = GroupWise(bits, sparsity, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    weight = torch.randn(11, columns, generator=generator).to(dtype)
    stored = transform.encode(Weight(weight, target))
    whole = transform.decode(stored, target)
    rows = packed_rows([(transform, stored, target)])
    numbers = torch.tensor([10, 3, 3, 0])
    assert same_bits(rows.rows(numbers), whole[numbers])
    assert same_bits(rows.block(2, 11), whole[2:])


def test_blocks_in_different_forms_make_one_weight() -> None:
    transforms: list[Transform] = [Keep(), PruneQuantize(3), PruneFilters(bits=4, num_pruned=2), PruneQuantize(5, 0.5)]
    blocks: list[tuple[Transform, dict[str, Tensor], Target]] = []
    for channels, transform in zip((2, 5, 4, 3), transforms, strict=True):
        target = a_target(channels, 6)
        blocks.append((transform, transform.encode(Weight(torch.randn(channels, 6), target)), target))
    whole = torch.cat([transform.decode(stored, target) for transform, stored, target in blocks])
    rows = packed_rows(blocks)
    numbers = torch.tensor([13, 0, 7, 7, 2, 9, 1])
    assert same_bits(rows.rows(numbers), whole[numbers])
    assert same_bits(rows.block(0, 14), whole)


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)),
    dtype=st.sampled_from(DTYPES),
    granularity=st.sampled_from(["layer", 3]),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_a_packed_model_gives_the_outputs_of_the_dense_one(
    kind: str, dtype: torch.dtype, granularity: str | int, seed: int, data: st.DataObject
) -> None:
    torch.manual_seed(seed)
    make, make_batch = KINDS[kind]
    model, batch = make().eval().to(dtype), make_batch()
    batch = batch.to(dtype) if batch.is_floating_point() else batch
    measurement = measured(model, batch, OPTIONS, granularity)
    choice = [data.draw(st.integers(0, len(own) - 1)) for own in measurement.transforms]
    smaller = apply(model, measurement, solution(choice))
    packed = pack_(copy.deepcopy(smaller))
    for path, module in packed.named_modules():
        if isinstance(module, Packed):
            assert same_bits(module.weight, smaller.get_submodule(path).weight), path
    assert torch.equal(packed(batch), smaller(batch))  # no layer here is large enough to be run in blocks
    assert torch.equal(copy.deepcopy(packed)(batch), packed(batch))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), kind=st.sampled_from(ODD_KINDS), data=st.data())
def test_a_packed_odd_network_gives_the_same_outputs(seed: int, kind: str, data: st.DataObject) -> None:
    recipe = Recipe(seed, kind)
    model, batch = recipe.make(), recipe.batch()
    measurement = measured(model, batch, OPTIONS)
    choice = [data.draw(st.integers(0, len(own) - 1)) for own in measurement.transforms]
    smaller = apply(model, measurement, solution(choice))
    expected = smaller(batch)
    assert torch.equal(pack_(smaller)(batch), expected)


def quantized(model: nn.Module, batch: Tensor, bits: int = 4, sparsity: float = 0) -> nn.Module:
    measurement = measured(model, batch, prune_quantize(bits=(bits,), sparsity=(sparsity,)))
    return apply(model, measurement, solution([1] * len(measurement.parts)))


@pytest.mark.parametrize("features", [33, 64])
def test_a_large_linear_layer_is_decoded_a_block_at_a_time(features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BLOCK", 20 * features)
    batch = torch.randn(5, 3, features)
    smaller = quantized(nn.Sequential(nn.Linear(features, 70), nn.Linear(70, 9, bias=False)), batch)
    expected = smaller(batch)
    pack_(smaller)
    most = 0
    rows = smaller[0]._packed["weight"].rows
    decode = rows.rows

    def watched(numbers: Tensor) -> Tensor:
        nonlocal most
        most = max(most, len(numbers))
        return decode(numbers)

    monkeypatch.setattr(rows, "rows", watched)
    # blocks of a float32 product may add up in another order: a few units in the last place of sums of `features` terms
    torch.testing.assert_close(smaller(batch), expected, rtol=1e-5, atol=1e-5)
    assert most == 20


def test_an_embedding_decodes_only_the_rows_that_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = torch.tensor([[3, 99, 3], [0, 7, 99]])
    smaller = quantized(nn.Sequential(nn.Embedding(100, 12)), batch, sparsity=0.5)
    expected = smaller(batch)
    pack_(smaller)
    decoded: list[int] = []
    rows = smaller[0]._packed["weight"].rows
    decode = rows.rows
    monkeypatch.setattr(rows, "rows", lambda numbers: decoded.extend(numbers.tolist()) or decode(numbers))
    assert torch.equal(smaller(batch), expected)
    assert decoded == [0, 3, 7, 99]
    for wrong in (torch.tensor([100]), torch.tensor([-1])):
        with pytest.raises(IndexError, match="ids must be from 0 to 99, found"):
            smaller(wrong)
    assert smaller(torch.empty(0, 2, dtype=torch.int64)).shape == (0, 2, 12)


def test_memory_falls_to_what_is_stored() -> None:
    batch = torch.randn(2, 256)
    smaller = quantized(nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)), batch)
    assert total_bytes(smaller) == 4 * 2 * (256 * 256 + 256)
    pack_(smaller)
    assert total_bytes(smaller) == 4 * 2 * 256  # the biases
    record = record_of(smaller)
    assert record is not None
    stored = {own.data_ptr() for item in record.parts for own in item.stored.values()}
    held = [
        own
        for module in smaller.modules()
        if isinstance(module, Packed)
        for codes in module._packed.values()
        for own in vars(codes.rows).values()
    ]
    arrays = [own for own in held if isinstance(own, Tensor)]
    assert sum(own.untyped_storage().nbytes() for own in arrays if own.data_ptr() not in stored) == 2 * 1  # zero points


def test_tied_layers_share_their_codes() -> None:
    make, make_batch = KINDS["tied"]
    batch = make_batch()
    smaller = quantized(make().eval(), batch)
    expected = smaller(batch)
    pack_(smaller)
    assert smaller.embed._packed["weight"] is smaller.head._packed["weight"]
    assert torch.equal(smaller(batch), expected)


def test_a_layer_with_a_forward_of_its_own_keeps_it() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return 2 * super().forward(input)

    batch = torch.randn(4, 16)
    smaller = quantized(nn.Sequential(Doubled(16, 16)), batch)
    expected = smaller(batch)
    assert isinstance(pack_(smaller)[0], Doubled)
    assert torch.equal(smaller(batch), expected)


def test_an_attention_layer_that_reads_weights_itself_runs_packed() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model, batch = nn.Sequential(layer, nn.Flatten(), nn.Linear(96, 4)).eval(), torch.randn(8, 6, 16)
    smaller = quantized(model, batch)
    expected = smaller(batch)
    pack_(smaller)
    torch.testing.assert_close(smaller(batch), expected)  # with and without the fused kernel
    with torch.no_grad():
        torch.testing.assert_close(smaller(batch), expected)


def test_gradients_reach_the_inputs() -> None:
    batch = torch.randn(4, 16)
    smaller = quantized(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)), batch)
    first, second = batch.clone().requires_grad_(), batch.clone().requires_grad_()
    smaller(first).sum().backward()
    pack_(smaller)(second).sum().backward()
    assert torch.equal(first.grad, second.grad)


def test_a_file_is_loaded_packed(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16), nn.Flatten(), nn.Linear(64, 3))

    batch = torch.randint(50, (5, 4))
    smaller = quantized(make(), batch)
    path = save_compressed(smaller, tmp_path / "model").path
    packed: Any = load_compressed(path, make, packed=True)
    assert torch.equal(packed(batch), smaller(batch))
    assert total_bytes(packed) == 4 * (16 + 3)
    with pytest.raises(ArtefactError, match="the weights of this model are packed: save it before"):
        save_compressed(packed, tmp_path / "again")
    with pytest.raises(ModelError, match=r"packed, so that they cannot be trained: fine-tune it before pack_\(\)"):
        finetune(packed, [batch], 1, teacher=smaller)
    with pytest.raises(KeyError, match="'weight' already exists"):
        packed[1].weight = nn.Parameter(torch.zeros(16, 16))


class Mirrored(nn.Module):
    """A convolution and transposed ones that read its weight as other rows, in either order."""

    def __init__(self, transposed_first: bool, groups: int, channels: int) -> None:
        super().__init__()
        down = nn.Conv2d(4, 4 if groups > 1 else channels, 3, padding=1)
        up = nn.ConvTranspose2d(down.out_channels, 4, 3, padding=1)
        other = nn.ConvTranspose2d(down.out_channels, 4 * groups, 3, padding=1, groups=groups)
        up.weight = other.weight = down.weight
        if transposed_first:
            self.up, self.other, self.down = up, other, down
        else:
            self.down, self.other, self.up = down, other, up

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.down(x))
        return (self.up(inner) + self.other(inner)[:, :4]).flatten(1)


@pytest.mark.parametrize("transposed_first", [False, True])
@pytest.mark.parametrize(("groups", "channels"), [(1, 6), (1, 4), (2, 4)])
def test_a_weight_that_unlike_layers_share_is_compressed_and_packed(
    transposed_first: bool, groups: int, channels: int, tmp_path: Path
) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return Mirrored(transposed_first, groups, channels)

    batch = torch.randn(8, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    options = prune_quantize(bits=(4, 8), compensated=True)
    smaller = compress(make(), [batch], budget={"bytes": 0.4}, options=options, loss="mse", solver="greedy").model
    expected = smaller(batch)
    path = save_compressed(smaller, tmp_path / "model").path
    assert torch.equal(load_compressed(path, make)(batch), expected)
    packed = load_compressed(path, make, packed=True)
    assert isinstance(packed.down, Packed)
    assert torch.equal(packed(batch), expected)
    assert torch.equal(copy.deepcopy(packed)(batch), expected)


def test_what_is_not_compressed_or_was_changed_is_refused() -> None:
    with pytest.raises(ArtefactError, match="carries no record of a compression: pack a model"):
        pack_(nn.Linear(2, 2))
    smaller = quantized(nn.Sequential(nn.Linear(16, 16)), torch.randn(2, 16))
    with torch.no_grad():
        smaller[0].weight.add_(1)
    with pytest.raises(ArtefactError, match="the weight of '0' is no longer what apply"):
        pack_(smaller)
    assert isinstance(smaller[0].weight, nn.Parameter)


def packed_layers() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)), [torch.randn(8, 16)]
    return pack_(compress(model, data, budget={"bytes": 0.4}, solver="greedy", guard=False).model), data


def test_a_packed_model_is_refused_by_name_where_its_layers_are_to_change() -> None:
    packed, data = packed_layers()
    with pytest.raises(ModelError, match=r"the weights of '0' are packed and .* before pack_\(\)"):
        compress(packed, data, budget={"bytes": 0.4})


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_packed_weights_become_no_other_dtype(dtype: torch.dtype) -> None:
    packed, data = packed_layers()
    before = packed(data[0])
    with pytest.raises(ModelError, match=f"decode to torch.float32 and cannot be converted to {dtype}"):
        packed.to(dtype)
    assert torch.equal(packed.to(torch.float32)(data[0]), before)


def test_packing_twice_and_setting_a_packed_weight_are_refused_as_such() -> None:
    packed = pack_(compress(nn.Linear(64, 3), [torch.randn(8, 64)], budget={"bytes": 0.5}, solver="greedy").model)
    with pytest.raises(ArtefactError, match="packed already"):
        pack_(packed)
    with pytest.raises(ModelError, match="the weight of this PackedLinear is packed, so that neither functional_call"):
        torch.func.functional_call(packed, {"weight": torch.ones(3, 64)}, (torch.ones(1, 64),))
