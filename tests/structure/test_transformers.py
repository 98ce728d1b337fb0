"""Heads and widths of models as people write them: stored sizes, shared norms and position biases follow."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qcompress
from qcompress.compressed.removal import mask_, remove_
from qcompress.model.counting import count
from qcompress.model.losses import as_loss
from qcompress.model.tensors import total_bytes
from qcompress.structure.find import find_sets
from qcompress.structure.scores import sensitivity
from qcompress.structure.uses import uses_of
from solvers import judge

transformers = pytest.importorskip("transformers")

WORDS, LENGTH, HEADS = 60, 12, 4
DECODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": HEADS}


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=HEADS, n_positions=LENGTH, **special())
    return transformers.GPT2LMHeadModel(config)


def qwen3() -> nn.Module:
    config = transformers.Qwen3Config(num_key_value_heads=2, head_dim=8, **DECODER, **special())
    return transformers.Qwen3ForCausalLM(config)


def opt() -> nn.Module:
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "word_embed_proj_dim": 32}
    return transformers.OPTForCausalLM(transformers.OPTConfig(num_attention_heads=HEADS, **sizes, **special()))


def falcon() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": HEADS, "multi_query": False}
    return transformers.FalconForCausalLM(transformers.FalconConfig(**sizes, **special()))


def t5() -> nn.Module:
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=HEADS, **special())
    return transformers.T5EncoderModel(config)


def special() -> dict[str, int]:
    return {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def output(model: nn.Module, batch: Tensor) -> Tensor:
    given = model(batch)
    return given.logits if hasattr(given, "logits") else given.last_hidden_state


ATTENTION = {
    gpt2: ("transformer.h.0.attn.c_attn", HEADS),
    qwen3: ("model.layers.0.self_attn.q_proj", 2),  # two heads that share keys and values
    opt: ("model.decoder.layers.0.self_attn.k_proj", HEADS),
    falcon: ("transformer.h.0.self_attention.query_key_value", HEADS),
    t5: ("encoder.block.0.layer.0.SelfAttention.q", HEADS),  # of both layers: they share the biases of positions
}


@pytest.mark.parametrize("make", ATTENTION, ids=lambda make: make.__name__)
def test_heads_and_widths_are_removed_as_predicted(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, batch = make().eval(), torch.randint(3, WORDS, (2, LENGTH))
    sets, rng = find_sets(model, [batch], output).sets, np.random.default_rng(1)
    name, heads = ATTENTION[make]
    assert {item.name: item.num_units for item in sets}[name] == heads
    removed = {item.name: rng.choice(item.num_units, item.num_units // 2, replace=False) for item in sets}
    predicted = uses_of(model, sets, count(model, [batch], output)).of([item.num_units // 2 for item in sets])
    masked, smaller = (change(copy.deepcopy(model), sets, removed) for change in (mask_, remove_))
    with torch.no_grad():
        expected, found = output(masked, batch), output(smaller, batch)
        whole = output(model, batch)
    assert float((whole - expected).abs().max()) > 1e-3 * float(whole.abs().max())
    # sums of other lengths round otherwise
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5 * float(expected.abs().max()))
    assert total_bytes(smaller) == predicted["bytes"]
    assert count(smaller, [batch], output).macs == pytest.approx(predicted["macs"])


def test_gpt2_is_pruned_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = gpt2().eval(), list(torch.randint(3, WORDS, (8, LENGTH)).split(4))
    measurement = qcompress.measure(model, data, qcompress.prune_channels(keep=(0.5,)), forward=output)
    assert measurement.num_inputs["transformer.h.0.attn.c_proj"]  # its weight (in, out) is refitted as well
    problem = qcompress.formulate(measurement, {"macs": "100%"})
    smaller = qcompress.apply(model, measurement, judge(problem, [1] * problem.num_groups))
    assert smaller.transformer.h[0].attn.split_size == 16
    qcompress.save_compressed(smaller, tmp_path / "model.safetensors")
    loaded = qcompress.load_compressed(tmp_path / "model.safetensors", gpt2)
    with torch.no_grad():
        assert torch.equal(output(loaded, data[0]), output(smaller, data[0]))


@pytest.mark.parametrize("kind", ["table", "transposed"])
def test_layers_whose_outputs_are_a_second_dimension_have_options(kind: str) -> None:
    torch.manual_seed(0)
    table = nn.Sequential(nn.Embedding(30, 16), nn.Flatten(), nn.Linear(96, 5))
    up = nn.Sequential(nn.GroupNorm(1, 8), nn.ConvTranspose1d(8, 12, 2, 2), nn.Flatten(), nn.Linear(144, 5))
    model, batch, name = (
        (table, torch.randint(0, 30, (4, 6)), "0") if kind == "table" else (up, torch.randn(4, 8, 6), "1")
    )
    structure = find_sets(model, [batch])
    assert [item.name for item in structure.sets] == [name]
    assert name not in structure.kept
    measurement = qcompress.measure(model, [batch], qcompress.prune_channels(keep=(0.5,)))
    assert [part.name for part in measurement.parts] == [name]


class Odd(nn.Module):
    """Samples second, samples flattened with positions, and matrices outside layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(8, 3)
        self.matrix = nn.Parameter(torch.randn(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.first(x.transpose(0, 1)).relu()).relu()
        flat = hidden.transpose(0, 1).flatten(0, 1) @ self.matrix
        return self.third(flat.relu()).view(len(x), -1, 3).mean(1)


@pytest.mark.parametrize("scores", ["obs", "fisher", "l1"])
def test_any_place_of_the_samples_and_any_reader_is_scored(scores: str) -> None:
    torch.manual_seed(0)
    model, data = Odd().eval(), [torch.randn(4, 5, 6) for _ in range(2)]
    measurement = qcompress.measure(model, data, qcompress.prune_channels(keep=(0.5,), scores=scores))
    assert {part.name for part in measurement.parts} == {"first", "second", "matrix"}


def test_the_fisher_score_is_that_of_whole_samples_wherever_they_are() -> None:
    torch.manual_seed(0)
    model, batch = Odd().eval(), torch.randn(4, 5, 6)
    sets = find_sets(model, [batch]).sets
    by_name = {item.name: item for item in sets}
    found = sensitivity(model, [batch], sets, as_loss("mse"), None, 0).fisher
    probes = as_loss("mse").probes(model(batch).detach(), batch, torch.Generator().manual_seed(0))
    for item, place in ((by_name["first"], "second"), (by_name["matrix"], "third")):
        layer = model.get_submodule(place)
        output_by_probe = (probes * model(batch)).sum(-1).flatten()  # of every probe and sample
        gradients = torch.stack(
            [torch.autograd.grad(value, layer.weight, retain_graph=True)[0] for value in output_by_probe]
        )
        columns = next(axis for axis in item.axes if axis.tensor == f"{place}.weight").indices
        effects = (gradients * layer.weight.detach()).sum(1)[:, columns].sum(-1)
        wanted = 0.5 * effects.square().sum(0) / len(batch)
        torch.testing.assert_close(torch.from_numpy(found[item.name]).float(), wanted)


class Flat(nn.Module):
    """Attention and MLP in one module, beside the number of heads."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.norm, self.other_norm = nn.LayerNorm(24), nn.LayerNorm(24)
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)
        self.fc1, self.fc2 = nn.Linear(24, 48), nn.Linear(48, 24)

    def forward(self, x: Tensor) -> Tensor:
        samples, positions, width = x.shape
        shape = samples, positions, 3, self.num_heads, width // self.num_heads
        q, k, v = self.qkv(self.norm(x)).reshape(shape).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(samples, positions, width)
        x = x + self.proj(mixed)
        return x + self.fc2(self.fc1(self.other_norm(x)).relu())


@pytest.mark.parametrize("heads", [3, 4, 6])
def test_a_number_of_heads_does_not_follow_other_layers(heads: int) -> None:
    torch.manual_seed(0)
    model, batch = nn.Sequential(Flat(heads), Flat(heads), nn.Linear(24, 5)).eval(), torch.randn(4, 7, 24)
    sets = find_sets(model, [batch]).sets
    assert [item.name for item in sets] == ["0.fc1", "1.fc1"]
    removed = {item.name: np.arange(16) for item in sets}  # 32 of 48 stay
    masked, smaller = (change(copy.deepcopy(model), sets, removed) for change in (mask_, remove_))
    assert [smaller[index].num_heads for index in (0, 1)] == [heads, heads]
    with torch.no_grad():
        torch.testing.assert_close(smaller(batch), masked(batch), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("heads", [3, 4])
def test_a_number_of_heads_does_not_follow_the_width_of_the_stream(heads: int) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads = heads
            self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (
                layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
            )
            return self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.attention, self.last = nn.Linear(6, 24), Attention(), nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(x + self.attention(x))

    torch.manual_seed(0)
    sets = find_sets(Stream().eval(), [torch.randn(4, 7, 6)]).sets
    assert {item.name: item.num_units for item in sets} == {"first": 24, "attention.q": heads}


@pytest.mark.slow
def test_sets_that_only_run_when_cut_alike_are_kept() -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=HEADS, decoder_start_token_id=0, **special()
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    batch = {"input_ids": torch.randint(3, WORDS, (2, 8)), "decoder_input_ids": torch.randint(3, WORDS, (2, 6))}
    structure = find_sets(model, [batch])
    for block in (0, 1):
        assert f"decoder.block.{block}.layer.1.EncDecAttention.q" in structure.kept
    assert "encoder.block.0.layer.0.SelfAttention.q" in {item.name for item in structure.sets}
    for item in structure.sets:
        with torch.no_grad():
            remove_(copy.deepcopy(model), structure.sets, {item.name: [0]})(**batch)


def test_a_language_model_without_attention_is_warned_of() -> None:
    torch.manual_seed(0)
    model, data = gpt2().eval(), list(torch.randint(3, WORDS, (8, LENGTH)).split(4))
    options = {"*.attn.c_attn": qcompress.prune_channels(keep=(0.5, 0.0))}
    without, within = (
        qcompress.compress(model, data, budget={"bytes": share}, options=options, forward=output, guard=False)
        for share in ("71%", "99%")
    )
    assert any("all 2 attention layers on offer are left out" in text for text in without.report.warnings)
    assert not any("left out" in text for text in within.report.warnings)


def test_a_size_that_is_a_property_is_left_alone() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.other = nn.Linear(6, 8), nn.Linear(8, 3)

        @property
        def num_heads(self) -> int:
            return self.q.out_features // 2

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.q(x).relu())

    torch.manual_seed(0)
    model = Attention().eval()
    sets = find_sets(model, [torch.randn(4, 6)]).sets
    assert remove_(model, sets, {"q": [0, 1]}).num_heads == 3
