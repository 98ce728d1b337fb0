"""Files of compressed models: exact bytes, bit for bit back, and one clear error for everything else."""

import base64
import copy
import json
import pickle
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qcompress.compressed.apply import apply
from qcompress.compressed.factored import fold_
from qcompress.compressed.file import load_compressed, save_compressed, stored_parts
from qcompress.compressed.record import record_of
from qcompress.errors import ArtefactError
from qcompress.options import low_rank, prune_quantize
from tests.measurements import KINDS, Chain, Mixed, measured, option_like, predicted_bytes, solution
from tests.models import TiedLanguageModel

OPTIONS = prune_quantize(bits=(2, 5, 8), sparsity=(0, 0.5)) + low_rank(
    ratios=(0.4, 0.7), kinds=("channels",), whitened=False
)
RANKS = low_rank(
    ratios=(0.5, 0.8), energies=(0.6,), kinds=("channels", "spatial", "tucker", "sliced"), slices=(2, 3), whitened=False
)
GROUPS = prune_quantize(bits=(3, 8), sparsity=(0, 0.5), group_size=(4, None), symmetric=False) + prune_quantize(
    bits=(2, 4), group_size=(2, 16), scale_dtype="bfloat16"
)
JOINT = (
    OPTIONS
    + GROUPS
    + RANKS.then(prune_quantize(bits=(5,), group_size=8))
    + RANKS
    + RANKS.then(prune_quantize(bits=(4, 8), sparsity=(0, 0.5)))
)


def payload_of(path: Path) -> int:
    tensors = safetensors.torch.load_file(path)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def same_state(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(
        torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first
    )


@settings(max_examples=20, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    granularity=st.sampled_from(["layer", 1, 4]),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_a_file_takes_the_predicted_bytes_and_comes_back_bit_for_bit(
    kind: str, dtype: torch.dtype, granularity: str | int, seed: int, data: st.DataObject
) -> None:
    torch.manual_seed(seed)
    make, make_batch = KINDS[kind]
    model, batch = make().eval().to(dtype), make_batch()
    batch = batch.to(dtype) if batch.is_floating_point() else batch
    measurement = measured(model, batch, JOINT, granularity)
    choice = [data.draw(st.integers(0, len(own) - 1)) for own in measurement.transforms]
    smaller = apply(model, measurement, solution(choice))
    with tempfile.TemporaryDirectory() as folder:
        saved = save_compressed(smaller, Path(folder) / "model.safetensors")
        assert saved.payload_bytes == payload_of(saved.path) == predicted_bytes(measurement, choice)
        assert saved.file_bytes == saved.path.stat().st_size
        loaded = load_compressed(saved.path, lambda: make().eval().to(dtype))
        assert same_state(loaded, smaller)
        assert torch.equal(loaded(batch), smaller(batch))
        again = save_compressed(loaded, Path(folder) / "again.safetensors")
        assert again.path.read_bytes() == saved.path.read_bytes()


@pytest.fixture
def smaller() -> nn.Module:
    """A mixed network with quantized, kept and factored layers."""
    torch.manual_seed(0)
    model = Mixed().eval()
    with torch.no_grad():
        model.stem.weight[:, :2] *= 1e-3  # so that pruning pays
    measurement = measured(model, torch.randn(4, 3, 6, 6), OPTIONS)
    choice = option_like(measurement, "prune_quantize")
    names = [part.name for part in measurement.parts]
    choice[names.index("wide")] = option_like(measurement, "low_rank")[names.index("wide")]
    choice[names.index("grouped")] = 0
    stem = measurement.transforms[names.index("stem")]
    choice[names.index("stem")] = next(i for i, own in enumerate(stem) if getattr(own, "sparsity", 0))
    return apply(model, measurement, solution(choice))


@pytest.fixture
def saved(smaller: nn.Module, tmp_path: Path) -> Path:
    return save_compressed(smaller, tmp_path / "model.safetensors").path


def test_tied_weights_are_written_once_and_tied_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TiedLanguageModel(words=40)
    measurement = measured(model, torch.randint(40, (3, 5)), OPTIONS)
    tied = apply(model, measurement, solution([0] * len(measurement.parts)))
    saved = save_compressed(tied, tmp_path / "model")
    assert saved.payload_bytes == measurement.original["bytes"]
    loaded = load_compressed(saved.path, lambda: TiedLanguageModel(words=40))
    assert loaded.head.weight is loaded.embed.weight
    assert same_state(loaded, tied)


def test_buffers_and_kept_weights_may_change_before_saving(smaller: nn.Module, tmp_path: Path) -> None:
    with torch.no_grad():
        smaller.get_submodule("norm").running_mean.fill_(3)
        smaller.get_submodule("grouped").weight.add_(1)
        smaller.get_submodule("fc").bias.add_(1)
    loaded = load_compressed(save_compressed(smaller, tmp_path / "model").path, Mixed)
    assert same_state(loaded, smaller)


def test_a_copy_of_a_compressed_model_is_saved_as_well(smaller: nn.Module, saved: Path, tmp_path: Path) -> None:
    copied = save_compressed(copy.deepcopy(smaller), tmp_path / "copy")
    assert copied.path.read_bytes() == saved.read_bytes()


def test_a_model_without_record_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="Mixed carries no record of a compression"):
        save_compressed(Mixed(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def fine_tune(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_submodule("fc").weight[0, 0] += 1e-6


def fine_tune_factor(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_submodule("wide.expand").weight.mul_(1.001)


def remove_layer(model: nn.Module) -> None:
    model.fc = nn.Identity()


def to_half(model: nn.Module) -> None:
    model.half()


@pytest.mark.parametrize(
    ("change", "layer"),
    [(fine_tune, "fc"), (fine_tune_factor, "wide"), (fold_, "wide"), (remove_layer, "fc"), (to_half, "stem")],
)
def test_a_weight_that_was_changed_is_named_and_nothing_is_written(
    smaller: nn.Module, saved: Path, change: Callable[[nn.Module], object], layer: str
) -> None:
    before = saved.read_bytes()
    change(smaller)
    with pytest.raises(ArtefactError, match=f"the weight of '{layer}' is no longer what apply"):
        save_compressed(smaller, saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 3}

        def set_extra_state(self, state: object) -> None:
            pass

    model = nn.Sequential(nn.Linear(8, 8), Extra(8, 8))
    measurement = measured(model, torch.randn(2, 8), OPTIONS)
    with pytest.raises(ArtefactError, match=r"'1\._extra_state' is dict, not a tensor"):
        save_compressed(apply(model, measurement, solution([1, 1])), tmp_path / "model")


def test_a_file_cut_anywhere_is_refused(saved: Path) -> None:
    content = saved.read_bytes()
    for length in [*range(64), *range(64, len(content), 97), len(content) - 1]:
        saved.write_bytes(content[:length])
        with pytest.raises(ArtefactError, match="not a complete compressed model|not a qcompress compressed model"):
            load_compressed(saved, Mixed)


def test_a_flipped_bit_in_any_array_is_noticed(saved: Path) -> None:
    content = saved.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for place in range(start, len(content), 71):
        saved.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(ArtefactError, match="is damaged: its arrays do not have the checksum"):
            load_compressed(saved, Mixed)


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (pytest.fail, ("the pickle was loaded",))

    torch.save(Mixed().state_dict(), tmp_path / "torch")
    (tmp_path / "pickle").write_bytes(pickle.dumps(Bomb()))
    for name in ("torch", "pickle"):
        with pytest.raises(ArtefactError, match="is a pickle .*, which is never loaded"):
            load_compressed(tmp_path / name, Mixed)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("just some words, and many more of them")
    (tmp_path / "cut").write_bytes((0x0480).to_bytes(8, "little") + b"{")  # a length that starts as a pickle does
    for name in ("text", "cut"):
        with pytest.raises(ArtefactError, match="not a complete compressed model"):
            load_compressed(tmp_path / name, Mixed)
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(ArtefactError, match="it has no 'qcompress' header"):
        load_compressed(tmp_path / "other", Mixed)
    with pytest.raises(FileNotFoundError):
        load_compressed(tmp_path / "absent", Mixed)


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> None:
    """Write a file anew with another index or header."""
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["qcompress"])
    index = json.loads(zlib.decompress(base64.b85decode(header["index"])))
    change(index, header)
    header["index"] = base64.b85encode(zlib.compress(json.dumps(index).encode())).decode()
    path.write_bytes(
        safetensors.torch.save(safetensors.torch.load(path.read_bytes()), {"qcompress": json.dumps(header)})
    )


@pytest.mark.parametrize("found", [{"version": 4}, {"version": 2}, {"version": "1"}, {"kind": "something else"}])
def test_another_version_or_another_kind_is_refused(saved: Path, found: dict[str, Any]) -> None:
    rewritten(saved, lambda tensors, header: header.update(found))
    with pytest.raises(ArtefactError, match="this program reads version 3|is not a qcompress compressed model file"):
        load_compressed(saved, Mixed)


def test_a_header_that_is_no_json_is_refused(saved: Path) -> None:
    for header in ("{", "[]", "{}"):
        saved.write_bytes(safetensors.torch.save({"a": torch.zeros(1)}, {"qcompress": header}))
        with pytest.raises(ArtefactError, match="is damaged: no readable header|its header says"):
            load_compressed(saved, Mixed)


@pytest.mark.parametrize(
    "change",
    [
        lambda index, header: index.pop("layers"),
        lambda index, header: index.pop("names"),
        lambda index, header: index["names"].pop(),
        lambda index, header: index["layers"].pop(),
        lambda index, header: index["layers"][0][1].append(0),
        lambda index, header: index["layers"][0][1].__setitem__(0, 99),
        lambda index, header: index["plain"].pop(),
        lambda index, header: index["plain"].append([0, 10**6]),
        lambda index, header: index["transforms"][0].update(kind="zip"),
        lambda index, header: index["stores"][0][1].update(dtype="float33"),
        lambda index, header: index["stores"][0][1].update(channels=3),
        lambda index, header: index["stores"][0][2].pop(),
        lambda index, header: index["shapes"].__setitem__(0, ["float32", [7]]),
        lambda index, header: header.pop("digest"),
        lambda index, header: index.clear(),
    ],
)
def test_a_file_with_another_index_is_refused(
    saved: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]
) -> None:
    rewritten(saved, lambda index, header: None)
    load_compressed(saved, Mixed)
    rewritten(saved, change)
    with pytest.raises(ArtefactError, match="is damaged|another architecture"):
        load_compressed(saved, Mixed)


def test_a_model_with_another_digest_is_refused(saved: Path) -> None:
    rewritten(saved, lambda index, header: header.update(digest="0" * 64))
    with pytest.raises(ArtefactError, match="is not the one that was saved: its tensors have another digest"):
        load_compressed(saved, Mixed)


def without_head() -> nn.Module:
    model = Mixed()
    del model.fc
    return model


def wider_head() -> nn.Module:
    model = Mixed()
    model.fc = nn.Linear(7, 5)
    return model


def other_head() -> nn.Module:
    model = Mixed()
    model.fc = nn.Conv2d(6, 5, 1)
    return model


def other_norm() -> nn.Module:
    model = Mixed()
    model.norm = nn.GroupNorm(2, 8)
    return model


def head_without_bias() -> nn.Module:
    model = Mixed()
    model.fc.bias = None
    return model


def other_kernel() -> nn.Module:
    model = Mixed()
    model.wide = nn.Conv2d(8, 16, (1, 9))
    return model


def in_groups() -> nn.Module:
    model = Mixed()
    model.wide = nn.Conv2d(16, 16, 3, groups=2)
    return model


def one_layer_more() -> nn.Module:
    model = Mixed()
    model.extra = nn.Linear(2, 2)
    return model


@pytest.mark.parametrize(
    ("factory", "difference"),
    [
        (without_head, "it has no layer 'fc'"),
        (wider_head, "'fc' has 5 channels of 7 weights, in the file 5 of 6"),
        (other_head, "'fc' is Conv2d, in the file Linear"),
        (other_norm, "it lacks 'norm.num_batches_tracked'"),
        (head_without_bias, "it lacks 'fc.bias'"),
        (other_kernel, "'wide' has a kernel of 1×9 in 1 groups, in the file a kernel of 3×3 in 1 groups"),
        (in_groups, "'wide' has a kernel of 3×3 in 2 groups, in the file"),
        (one_layer_more, "it has 'extra.bias', the file has not"),
        (lambda: Mixed().half(), "'depthwise.bias' is float16 \\(8,\\), in the file float32 \\(8,\\).* more"),
        (lambda: nn.Identity(), "it has no layer 'stem'.* and 3 more"),
    ],
)
def test_another_architecture_is_refused_with_what_differs(
    saved: Path, factory: Callable[[], nn.Module], difference: str
) -> None:
    with pytest.raises(ArtefactError, match=f"another architecture than .*{difference}"):
        load_compressed(saved, factory)


def test_weights_shared_otherwise_are_another_architecture(tmp_path: Path) -> None:
    def untied() -> nn.Module:
        model = TiedLanguageModel()
        model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
        return model

    for make, other in ((TiedLanguageModel, untied), (untied, TiedLanguageModel)):
        model = make()
        measurement = measured(model, torch.randint(11, (3, 5)), OPTIONS)
        path = save_compressed(apply(model, measurement, solution([1] * len(measurement.parts))), tmp_path / "m").path
        with pytest.raises(ArtefactError, match=r"'head\.weight' .*shared with 'embed\.weight'"):
            load_compressed(path, other)


def test_a_factory_that_gives_no_module_is_refused(saved: Path) -> None:
    with pytest.raises(ArtefactError, match="must return a torch module, found dict"):
        load_compressed(saved, dict)  # type: ignore[type-var]


def test_a_loaded_model_is_in_evaluation_mode_whatever_the_factory_gives(saved):
    """A fresh module trains: its batch norm would take the statistics of the batch, and outputs would differ."""
    loaded = load_compressed(saved, lambda: Mixed().train())
    assert not any(module.training for module in loaded.modules())


def test_the_loaded_model_keeps_the_record(saved: Path, smaller: nn.Module) -> None:
    before, record = record_of(smaller), record_of(load_compressed(saved, Mixed))
    assert before is not None
    assert record is not None
    assert [(item.part, item.transform) for item in record.parts] == [
        (item.part, item.transform) for item in before.parts
    ]
    assert [item.transform for item in stored_parts(saved)] == [item.transform for item in record.parts]


def test_one_layer_alone_is_saved(tmp_path: Path) -> None:
    model = nn.Linear(16, 16)
    measurement = measured(model, torch.randn(2, 16), OPTIONS)
    smaller = apply(model, measurement, solution([2]))
    loaded = load_compressed(save_compressed(smaller, tmp_path / "one").path, lambda: nn.Linear(16, 16))
    assert same_state(loaded, smaller)


def test_overlapping_views_are_stored_in_full(tmp_path: Path) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            both = torch.arange(12.0).reshape(4, 3)
            self.fc = nn.Linear(3, 8)
            self.register_buffer("upper", both[:2])
            self.register_buffer("turned", both.T)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x + self.turned[:, 0])

    model = Views()
    measurement = measured(model, torch.randn(2, 3), OPTIONS)
    smaller = apply(model, measurement, solution([1]))
    saved = save_compressed(smaller, tmp_path / "views")
    assert saved.payload_bytes == predicted_bytes(measurement, [1])
    assert same_state(load_compressed(saved.path, Views), smaller)


def test_layers_in_a_chain_keep_their_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Chain(nn.Linear(16, 16), nn.Linear(16, 16))
    measurement = measured(model, torch.randn(2, 16), low_rank(ratios=(0.5,), whitened=False))
    smaller = apply(model, measurement, solution([1, 0]))
    loaded = load_compressed(
        save_compressed(smaller, tmp_path / "m").path, lambda: Chain(nn.Linear(16, 16), nn.Linear(16, 16))
    )
    assert list(loaded.state_dict()) == [
        "layers.0.reduce.weight",
        "layers.0.expand.weight",
        "layers.0.expand.bias",
        "layers.1.weight",
        "layers.1.bias",
    ]
