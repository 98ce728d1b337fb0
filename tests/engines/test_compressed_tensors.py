"""Folders for transformers: what is written loads, in exactly the predicted bytes, with the emulation's outputs."""

import json
import random
from pathlib import Path

import pytest
import torch
from torch import nn

import qcompress
from qcompress.compressed.removal import remove_
from qcompress.engines.compressed_tensors import CompressedTensors, loaded
from qcompress.engines.legal import for_engine
from qcompress.errors import EngineError, ModelError
from qcompress.structure.find import find_sets
from qcompress.transforms.quantize.group_wise import GroupWise
from tests.engines.random_models import IN_GROUPS, llama, written
from tests.measurements import measured, solution

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")


ASYMMETRIC = qcompress.prune_quantize(bits=(3, 4, 8), group_size=(16, 32, None), symmetric=False)


def one_run(seed: int, folder: Path) -> None:
    """A random model and choice, written and run."""
    rng = random.Random(seed)  # noqa: S311
    model, batch = llama(rng)
    engine = CompressedTensors(
        fused=rng.random() < 0.5, shard_bytes=rng.choice([5_000_000_000, 20_000]), zero_points=rng.random() < 0.3
    )
    options = IN_GROUPS + ASYMMETRIC if engine.zero_points else IN_GROUPS
    assert written(engine, model, batch, options, rng, folder / f"small_{seed}").largest == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_a_random_model_runs_bit_for_bit_in_the_predicted_bytes(seed: int, tmp_path: Path) -> None:
    one_run(seed, tmp_path)


@pytest.mark.slow
def test_100_random_models_run_bit_for_bit_in_the_predicted_bytes(tmp_path: Path) -> None:
    for seed in range(100, 200):
        one_run(seed, tmp_path)


def test_groups_longer_than_every_row_leave_what_fits(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=16, intermediate_size=33, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=1, vocab_size=31)  # fmt: skip
    model, batch = LlamaForCausalLM(config).eval(), torch.randint(31, (2, 7))
    options = qcompress.prune_quantize(bits=(3, 5), group_size=(32, None))
    for seed in range(3):
        rng = random.Random(seed)  # noqa: S311
        assert written(CompressedTensors(), model, batch, options, rng, tmp_path / str(seed)).largest == 0.0


@pytest.fixture
def model() -> nn.Module:
    return llama(random.Random(3))[0]  # noqa: S311


def test_the_folder_says_how_each_layer_is_stored_and_brings_the_tokenizer(tmp_path: Path, model: nn.Module) -> None:
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "tokenizer.json").write_text("{}")
    batch = torch.randint(31, (2, 7))
    engine = CompressedTensors(tokenizer=str(tmp_path / "tokens"))
    legal = for_engine(engine, model, measured(model, batch, qcompress.prune_quantize(bits=(4,), group_size=16)))
    choice = [len(options) - 1 for options in legal.transforms]
    smaller = qcompress.apply(model, legal, solution(choice))
    path = qcompress.export(smaller, tmp_path / "small", target=engine).path
    names = {file.name for file in path.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    config = json.loads((path / "config.json").read_text())
    assert config["dtype"] == str(model.dtype).removeprefix("torch.")
    groups = config["quantization_config"]["config_groups"]
    told = {name for group in groups.values() for name in group["targets"]}
    assert told == {part.name for part, own in zip(legal.parts, choice, strict=True) if own}
    assert all(group["weights"]["num_bits"] == 4 for group in groups.values())
    assert qcompress.verify(path, smaller, [batch], target=engine).ok


def test_a_model_that_is_not_compressed_loads_as_it_is(tmp_path: Path, model: nn.Module) -> None:
    path = qcompress.export(model, tmp_path / "whole", target="compressed-tensors").path
    state = loaded(path).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["weight_packed", "weight_scale", "embed_tokens.weight", "norm.weight"])
def test_a_tensor_that_differs_in_the_file_is_found_out(tmp_path: Path, model: nn.Module, kind: str) -> None:
    batch, engine = torch.randint(31, (2, 7)), CompressedTensors()
    legal = for_engine(engine, model, measured(model, batch, IN_GROUPS))
    choice = [len(options) - 1 for options in legal.transforms]
    smaller = qcompress.apply(model, legal, solution(choice))
    path = qcompress.export(smaller, tmp_path / "small", target=engine).path
    assert engine.check(path, smaller) == ""
    content = bytearray((path / "model.safetensors").read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    name = next(name for name in header if name.endswith(kind))
    content[8 + int.from_bytes(content[:8], "little") + header[name]["data_offsets"][0]] ^= 1
    (path / "model.safetensors").write_bytes(content)
    weight = name.partition(".weight")[0] + ".weight"
    assert engine.check(path, smaller) == f"{weight!r} in the folder is not the model's"


def test_a_folder_without_a_tensor_of_the_model_is_found_out(tmp_path: Path, model: nn.Module) -> None:
    path = qcompress.export(model, tmp_path / "whole", target="compressed-tensors").path
    model.register_buffer("another", torch.zeros(1))
    assert CompressedTensors().check(path, model) == "the folder lacks 'another'"


@pytest.mark.parametrize(
    ("content", "told"),
    [(b'{"dtype"', "cannot be read as JSON"), (None, "cannot be read as JSON"), (b"{}", "names no dtype of the model")],
)
def test_a_damaged_configuration_is_one_clear_error(
    tmp_path: Path, model: nn.Module, content: bytes | None, told: str
) -> None:
    path = qcompress.export(model, tmp_path / "whole", target="compressed-tensors").path
    if content is None:
        (path / "config.json").unlink()
    else:
        (path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=f"config.json {told}"):
        qcompress.verify(path, model, [torch.randint(31, (2, 7))], target="compressed-tensors")


def test_a_packed_model_is_not_written_again_and_a_wrong_scheme_is_one_clear_error(
    tmp_path: Path, model: nn.Module
) -> None:
    batch, engine = torch.randint(31, (2, 7)), CompressedTensors()
    legal = for_engine(engine, model, measured(model, batch, qcompress.prune_quantize(bits=(4,), group_size=16)))
    smaller = qcompress.apply(model, legal, solution([len(options) - 1 for options in legal.transforms]))
    path = qcompress.export(smaller, tmp_path / "small", target=engine).path
    with pytest.raises(EngineError, match=r"builds '.*\.weight', which the model does not have .* loaded packed"):
        qcompress.export(loaded(path), tmp_path / "again", target=engine)
    config = (path / "config.json").read_bytes()
    (path / "config.json").write_bytes(config.replace(b'"num_bits": 4', b'"num_bits": 8'))
    with pytest.raises(EngineError, match="transformers does not load"):
        qcompress.verify(path, smaller, [batch], target=engine)


def test_layers_that_vllm_fuses_are_tied(model: nn.Module) -> None:
    parts = measured(model, torch.randint(31, (2, 7)), IN_GROUPS).parts
    first = "model.layers.0."
    ties = CompressedTensors().ties(parts)
    assert tuple(f"{first}self_attn.{name}_proj" for name in "qkv") in ties
    assert (f"{first}mlp.gate_proj", f"{first}mlp.up_proj") in ties
    assert CompressedTensors(fused=False).ties(parts) == []


def test_what_the_engine_does_not_run_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(31, 24), nn.Linear(24, 31, bias=False), nn.Linear(31, 8))
    model[1].weight = model[0].weight
    tied, alone = measured(model, torch.randint(31, (2, 7)), IN_GROUPS).parts
    engine = CompressedTensors()
    assert "shared by several modules" in engine.refuse(tied, GroupWise(4))
    assert engine.refuse(alone, GroupWise(4)) == ""
    assert "31 inputs are not a multiple of 16" in engine.refuse(alone, GroupWise(4, group_size=16))
    assert "not an integer format" in engine.refuse(alone, GroupWise(4, 0.5))
    assert "set zero_points=True" in engine.refuse(alone, GroupWise(4, symmetric=False))
    assert CompressedTensors(zero_points=True).refuse(alone, GroupWise(4, symmetric=False)) == ""
    assert "4 and 8 bits" in CompressedTensors(zero_points=True).refuse(alone, GroupWise(3, symmetric=False))
    with pytest.raises(EngineError, match="writes models of transformers .* found Sequential"):
        qcompress.export(model, tmp_path / "x", target=engine)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_is_no_folder_is_refused(tmp_path: Path, model: nn.Module) -> None:
    engine = CompressedTensors(tokenizer=str(tmp_path / "nowhere"))
    with pytest.raises(EngineError, match="tokenizer must be a folder"):
        qcompress.export(model, tmp_path / "x", target=engine)
    assert list(tmp_path.iterdir()) == []


def test_a_model_with_channels_removed_is_refused_before_anything_is_written(tmp_path: Path, model: nn.Module) -> None:
    batch = torch.randint(0, 50, (2, 8))
    sets = find_sets(model, [batch]).sets
    narrower = remove_(model, sets, {item.name: [0] for item in sets if item.num_units > 1})
    with pytest.raises(EngineError, match="from its configuration transformers builds"):
        qcompress.export(narrower, tmp_path / "x", target="compressed-tensors")
    assert list(tmp_path.iterdir()) == []
