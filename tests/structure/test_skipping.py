"""Attention layers and MLPs that are left out as a whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompress
from qcompress.compressed.bypassed import Bypassed
from qcompress.compressed.copying import own_copy
from qcompress.compressed.removal import mask_, remove_
from qcompress.errors import ArtefactError, ModelError
from qcompress.measurement import Measurement
from qcompress.model import forward as forwards
from qcompress.model.counting import count
from qcompress.model.tensors import total_bytes
from qcompress.options import Options
from qcompress.structure.find import find_sets
from qcompress.structure.uses import uses_of
from solvers import Solution, judge
from tests.architectures import architecture

SAME = 1e-4  # relative: float32 sums of other lengths round otherwise
LEAVING_OUT = qcompress.prune_channels(keep=(0.5, 0.0))


class Branches(nn.Module):
    """MLPs with connections around them, and a chain that nothing goes around."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 16)
        self.gated = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(depth))
        self.chain = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for gated in self.gated:
            x = x + gated(x)
        return self.chain(x)


def seeded(depth: int = 2) -> Branches:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return Branches(depth).eval()


def ids(samples: int = 3) -> Tensor:
    return torch.randint(31, (samples, 7), generator=torch.Generator().manual_seed(samples))


def chosen(measurement: Measurement, choice: list[int]) -> Solution:
    problem = qcompress.formulate(measurement, {"bytes": 1.0})
    return judge(problem, choice)


@pytest.mark.parametrize(("name", "modules"), [
    ("llama", {"model.layers.0.self_attn", "model.layers.0.mlp"}),
    ("bert", {"bert.encoder.layer.0.attention.self", "bert.encoder.layer.0.intermediate"}),
    ("vit", {"vit.layers.0.mlp"}),  # without its only attention, the output would not depend on the image
    ("gpt2", {"transformer.h.0.mlp"}),
])  # fmt: skip
def test_a_transformer_without_its_branches_computes_what_the_masked_one_does_and_uses_what_was_predicted(
    name: str, modules: set[str]
) -> None:
    pytest.importorskip("transformers")
    own = architecture(name)
    model, batch = own.make(), own.data[0]
    sets = find_sets(model, own.data).sets
    assert {bypass.path for item in sets for bypass in item.bypasses} >= modules
    for skipped in ([item for item in sets if item.bypasses], *([item] for item in sets if item.bypasses)):
        everything = {item.name: range(item.num_units) for item in skipped}
        smaller = remove_(own_copy(model), sets, everything)
        gone = {bypass.path for item in skipped for bypass in item.bypasses}
        assert gone == {path for path, module in smaller.named_modules() if isinstance(module, Bypassed)}
        with torch.no_grad():
            expected, found = (forwards.run(m, batch) for m in (mask_(own_copy(model), sets, everything), smaller))
        assert float((expected - found).abs().max()) <= SAME * float(expected.abs().max())
        kept = [item.num_units if item not in skipped else 0 for item in sets]
        uses = uses_of(model, sets, count(model, own.data[:1], None)).of(kept)
        assert uses["bytes"] == total_bytes(smaller)
        assert uses["macs"] == pytest.approx(count(smaller, own.data[:1], None).macs, rel=1e-9)


def test_what_nothing_goes_around_cannot_be_left_out() -> None:
    model = seeded()
    sets = {item.name: item for item in find_sets(model, [ids()]).sets}
    assert sets.pop("embed").bypasses == ()
    assert {name: [own.path for own in item.bypasses] for name, item in sets.items()} == {
        "gated.0.0": ["gated.0"], "gated.1.0": ["gated.1"], "chain.0": [],
    }  # fmt: skip
    with pytest.raises(ModelError, match="one must stay"):
        remove_(model, [*sets.values()], {"chain.0": range(12)})
    measurement = qcompress.measure(model, [ids()], LEAVING_OUT)
    labels = dict(zip((part.name for part in measurement.parts), measurement.labels, strict=True))
    assert labels["chain.0"] == ("keep", "6 of 12 channels")
    assert labels["gated.0.0"] == ("keep", "12 of 24 channels", "0 of 24 channels")


def test_one_sample_shows_nothing_but_the_next_batch_does() -> None:
    one, other = ids(2).split(1)
    assert not any(item.bypasses for item in find_sets(seeded(), [one]).sets)
    assert any(item.bypasses for item in find_sets(seeded(), [one, other]).sets)


@pytest.mark.parametrize("codes", [Options(()), qcompress.prune_quantize(bits=(4,), sparsity=(0,))], ids=["", "codes"])
def test_models_without_branches_are_measured_applied_fitted_saved_and_loaded(codes: Options, tmp_path: Path) -> None:
    model, data = seeded(), [ids(8)]
    measurement = qcompress.measure(model, data, LEAVING_OUT + codes)
    measurement.save(tmp_path / "measurement.npz")
    measurement = Measurement.load(tmp_path / "measurement.npz")
    labels = dict(zip((part.name for part in measurement.parts), measurement.labels, strict=True))
    problem = qcompress.formulate(measurement, {"bytes": 1.0, "macs": 1.0})
    choice = [next(
        (i for i, label in enumerate(labels[name]) if label.startswith("0 of" if name == "gated.0.0" else "4 bits")), 0
    ) for name in labels]  # fmt: skip
    solution = judge(problem, choice)
    smaller = qcompress.apply(model, measurement, solution)
    assert isinstance(smaller.gated[0], Bypassed)
    size = qcompress.compressed_size(smaller).payload_bytes
    if codes.offers:
        assert size <= solution.usage["bytes"] <= size + 2 * len(measurement.coded)  # rounding up to whole bytes
    else:
        assert solution.usage["bytes"] == size
        alone = qcompress.mean_loss(model, smaller, data)
        assert solution.objective == pytest.approx(alone, rel=1e-3)  # measured on the masked network
        qcompress.fit_in_turn_(smaller, model, data)
        assert qcompress.mean_loss(model, smaller, data) <= alone * (1 + 1e-6)
    qcompress.save_compressed(smaller, tmp_path / "model.safetensors")
    loaded = qcompress.load_compressed(tmp_path / "model.safetensors", Branches)
    assert repr(loaded) == repr(smaller)
    torch.testing.assert_close(loaded(ids()), smaller(ids()), rtol=0, atol=0)
    qcompress.save_compressed(loaded, tmp_path / "again.safetensors")
    again = qcompress.load_compressed(tmp_path / "again.safetensors", lambda: own_copy(model))
    torch.testing.assert_close(again(ids()), smaller(ids()), rtol=0, atol=0)


def test_a_file_is_refused_by_another_architecture(tmp_path: Path) -> None:
    model = seeded()
    measurement = qcompress.measure(model, [ids()], LEAVING_OUT)
    names = [part.name for part in measurement.parts]
    smaller = qcompress.apply(model, measurement, chosen(measurement, [2 * (name == "gated.1.0") for name in names]))
    qcompress.save_compressed(smaller, tmp_path / "model.safetensors")
    with pytest.raises(ArtefactError, match=r"no module 'gated\.1'"):
        qcompress.load_compressed(tmp_path / "model.safetensors", lambda: Branches(1))


@pytest.mark.parametrize(
    "codes",
    [pytest.param(Options(()), marks=pytest.mark.slow), qcompress.prune_quantize(bits=(4,), sparsity=(0,))],
    ids=["", "codes"],
)
def test_rounds_go_on_in_a_network_without_a_branch(codes: Options, tmp_path: Path) -> None:
    result = qcompress.compress(
        seeded(), [ids(16)], budget={"macs": "45%"}, options=LEAVING_OUT + codes, rounds=2, time_limit=2,
        folder=tmp_path / "run",
    )  # fmt: skip
    assert any(isinstance(module, Bypassed) for module in result.model.modules())
    assert result.report.usage["macs"] <= 0.45 * result.report.original["macs"]
    loaded = qcompress.load_compressed(tmp_path / "run" / "model.safetensors", Branches)
    torch.testing.assert_close(loaded(ids()), result.model(ids()), rtol=0, atol=0)


SMALL = {"vocab_size": 31, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {**SMALL, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
           "num_key_value_heads": 2, "head_dim": 4}  # fmt: skip
GENERATING: dict[str, tuple[str, dict[str, Any], list[str]]] = {  # class, configuration, attention that can be left out
    "alike": ("LlamaForCausalLM", DECODER, [f"model.layers.{layer}.self_attn" for layer in range(4)]),
    "of two kinds": (  # the first of each kind of place in the cache tells the length of the text
        "Gemma2ForCausalLM", {**DECODER, "sliding_window": 4, "query_pre_attn_scalar": 4},
        ["model.layers.2.self_attn", "model.layers.3.self_attn"],
    ),
    "with an encoder": (
        "BartForConditionalGeneration",
        {**SMALL, "d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "forced_eos_token_id": None},
        ["model.decoder.layers.0.encoder_attn", "model.decoder.layers.0.self_attn",
         "model.decoder.layers.1.encoder_attn", "model.decoder.layers.1.self_attn", "model.encoder.layers.0.self_attn"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", GENERATING)
def test_a_language_model_without_attention_generates_with_its_cache_as_without(kind: str) -> None:
    hub: Any = pytest.importorskip("transformers")
    name, settings, expected = GENERATING[kind]
    maker = getattr(hub, name)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = maker(maker.config_class(**settings)).eval()
        for parameter in model.parameters():  # so that what is written depends on all of the text
            parameter.data += 0.2 * torch.randn_like(parameter)
    batch = {"input_ids": ids(), **({"decoder_input_ids": ids()} if kind == "with an encoder" else {})}
    sets = find_sets(model, [batch]).sets
    by_path = {item.bypasses[0].path: item for item in sets if item.bypasses and "attn" in item.bypasses[0].path}
    assert sorted(by_path) == expected
    asked: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    for item in by_path.values():
        smaller = remove_(own_copy(model), sets, {item.name: range(item.num_units)})
        with_cache, without = (smaller.generate(ids(), **asked, use_cache=used) for used in (True, False))
        assert torch.equal(with_cache, without)


class Residual(nn.Module):
    """Residual branches on channels that can be cut as well: Linear layers, or convolutions of images of any size."""

    def __init__(self, layer: Any, *, bias: bool) -> None:
        super().__init__()
        self.first, self.last = layer(3, 8), layer(8, 2)
        branches = (nn.Sequential(layer(8, 12), nn.ReLU(), layer(12, 8, bias=bias)) for _ in range(2))
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for branch in self.branches:
            x = x + branch(x)
        return self.last(x)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("images", [False, True])
def test_a_branch_is_left_out_while_the_width_it_is_added_to_is_cut(images: bool, bias: bool) -> None:
    def layer(inputs: int, outputs: int, **given: Any) -> nn.Module:
        return nn.Conv2d(inputs, outputs, 3, padding=1, **given) if images else nn.Linear(inputs, outputs, **given)

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model, batch = Residual(layer, bias=bias).eval(), torch.randn(3, 3, 6, 6) if images else torch.randn(8, 3)
        other = torch.randn(2, 3, 9, 7) if images else torch.randn(2, 5, 3)
    sets = find_sets(model, [batch]).sets
    assert {item.name for item in sets if item.bypasses} == {"branches.0.0", "branches.1.0"}
    for whole in (["branches.0.0"], ["branches.0.0", "branches.1.0"]):
        removed = {"first": [1, 2, 5], **dict.fromkeys(whole, range(12))}
        smaller, masked = remove_(own_copy(model), sets, removed), mask_(own_copy(model), sets, removed)
        for given in (batch, other):
            torch.testing.assert_close(smaller(given), masked(given), rtol=SAME, atol=SAME)
        kept = [item.num_units - len(removed.get(item.name, ())) for item in sets]
        uses = uses_of(model, sets, count(model, [batch], None)).of(kept)
        assert uses["bytes"] == total_bytes(smaller)
        assert uses["macs"] == pytest.approx(count(smaller, [batch], None).macs, rel=1e-9)
    one_left = remove_(own_copy(model), sets, {"branches.0.0": range(12)})
    assert {item.name for item in find_sets(one_left, [batch]).sets} == {"first", "branches.1.0"}


@pytest.mark.parametrize(
    "codes",
    [pytest.param(Options(()), marks=pytest.mark.slow), qcompress.prune_quantize(bits=(4,), sparsity=(0,))],
    ids=["", "codes"],
)
def test_branches_and_the_width_around_them_are_cut_in_rounds_saved_and_loaded(codes: Options, tmp_path: Path) -> None:
    def network() -> nn.Module:
        return Residual(nn.Linear, bias=True).eval()

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        model, data = network(), [torch.randn(16, 3) for _ in range(2)]
    options = qcompress.prune_channels(keep=(0.75, 0.0)) + codes
    result = qcompress.compress(  # without any branch, the network has 9.4 % of its macs
        model, data, budget={"macs": "8%"}, options=options, loss="mse", rounds=2, time_limit=2, guard=False
    )
    assert any(isinstance(module, Bypassed) for module in result.model.modules())
    assert isinstance(result.model.first, nn.Linear)
    assert result.model.first.out_features < 8
    qcompress.save_compressed(result.model, tmp_path / "model.safetensors")
    loaded = qcompress.load_compressed(tmp_path / "model.safetensors", network)
    torch.testing.assert_close(loaded(data[0]), result.model(data[0]), rtol=0, atol=0)


def test_products_with_a_slice_of_a_weight_are_traced() -> None:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = nn.Transformer(16, 4, 1, 1, 32, batch_first=True).eval()  # attention to an encoder slices one weight
        structure = find_sets(model, [torch.randn(2, 5, 16)], lambda network, x: network(x, x.flip(1)))
    assert {item.name for item in structure.sets} == {"encoder.layers.0.linear1", "decoder.layers.0.linear1"}
    assert "does not run without some units" in structure.kept["decoder.layers.0.multihead_attn"]


def test_one_batch_is_fitted_in_one_run_as_several_are_layer_by_layer() -> None:
    model, batch = seeded(), ids(8)
    measurement = qcompress.measure(model, [batch], LEAVING_OUT)
    smaller = qcompress.apply(model, measurement, chosen(measurement, [1] * len(measurement.parts)))
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    whole = qcompress.fit_in_turn_(own_copy(smaller), model, [batch])
    handle.remove()
    assert len(calls) == 1
    for size in (4, 3, 1):  # the same samples are fitted to, and tested on, whatever the batches
        in_turn = qcompress.fit_in_turn_(own_copy(smaller), model, list(batch.split(size)))
        for one, other in zip(whole.parameters(), in_turn.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)  # sums of float32 in another order
    assert any(not torch.equal(one, other) for one, other in zip(whole.parameters(), smaller.parameters(), strict=True))
