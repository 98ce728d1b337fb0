"""Opened models: the same outputs as in memory, with no weights of a block beyond its own run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import qcompress
from qcompress.errors import ModelError
from qcompress.measurement import Measurement
from qcompress.model.building import LARGE_BYTES, parameters_on_meta
from qcompress.model.hugging_face import built
from qcompress.model.opened import Opened, open_model, opened_of
from qcompress.model.weight_files import WeightFiles
from tests.opened_models import in_memory, reconfigured, saved, tokens


def opened(model: torch.nn.Module) -> Opened:
    found = opened_of(model)
    assert found is not None
    return found


KINDS = ["Llama", "Qwen2", "Mistral", "Gemma2", "GPT2", "Phi3"]


@pytest.mark.parametrize(("kind", "shards"), [("Llama", True), *((kind, False) for kind in KINDS)])
def test_an_opened_model_gives_the_outputs_of_the_model_in_memory(kind: str, shards: bool, tmp_path: Path) -> None:
    more = {"head_dim": 8} if kind == "Gemma2" else {"pad_token_id": 0} if kind == "Phi3" else {}
    folder = saved(kind, tmp_path, shards=shards, **more)
    model, words = open_model(folder), tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(model(words).logits, in_memory(folder)(words).logits)


def test_tied_weights_and_half_precision_are_those_in_memory(tmp_path: Path) -> None:
    folder = saved("Llama", tmp_path, dtype=torch.bfloat16, tie_word_embeddings=True)
    model, words = open_model(folder), tokens(2, 9)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(model(words).logits, in_memory(folder)(words).logits)
    assert Measurement.fingerprint_of(model) == Measurement.fingerprint_of(in_memory(folder))


def test_norms_that_transformers_keeps_in_single_precision_stay_in_it(tmp_path: Path) -> None:
    more = {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    folder = saved("GptOss", tmp_path, dtype=torch.float16, **more)
    model, whole = open_model(folder), in_memory(folder)
    types = [{name: tensor.dtype for name, tensor in own.state_dict().items()} for own in (model, whole)]
    assert types[0] == types[1]
    assert {*types[0].values()} == {torch.float16, torch.float32}
    assert Measurement.fingerprint_of(model) == Measurement.fingerprint_of(whole)
    with torch.no_grad():
        assert torch.equal(model(tokens(2, 9)).logits, whole(tokens(2, 9)).logits)


def test_counters_are_no_norms_and_a_transformers_without_a_plan_of_types_keeps_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], architectures=["ResNetModel"])
    config.save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.PreTrainedModel, "_get_dtype_plan", lambda *_: {"normal*": torch.float32})
    types = {name: own.dtype for name, own in built(tmp_path, torch.float16).state_dict().items()}
    assert {types[name] for name in types if name.endswith("num_batches_tracked")} == {torch.int64}
    assert {types[name] for name in types if name.endswith("normalization.weight")} == {torch.float32}
    monkeypatch.delattr(transformers.PreTrainedModel, "_get_dtype_plan")
    plain = built(tmp_path, torch.float16)
    assert {own.dtype for own in plain.parameters()} == {torch.float16}


def test_dtype_is_what_is_computed_in(tmp_path: Path) -> None:
    model = open_model(saved("Llama", tmp_path, dtype=torch.bfloat16), dtype=torch.float32)
    assert model(tokens(1, 5)).logits.dtype == torch.float32


def test_only_the_block_that_runs_is_in_memory(tmp_path: Path) -> None:
    model = open_model(saved("Llama", tmp_path))
    held: list[list[bool]] = []

    def look(*_: object) -> None:
        held.append([not block.mlp.up_proj.weight.is_meta for block in model.model.layers])

    for block in model.model.layers:
        block.mlp.register_forward_hook(look)
    model(tokens(1, 5))
    assert held == [[True, False, False], [False, True, False], [False, False, True]]
    assert all(block.mlp.up_proj.weight.is_meta for block in model.model.layers)


def test_a_block_whose_run_fails_lets_go_of_its_weights(tmp_path: Path) -> None:
    model = open_model(saved("Llama", tmp_path))

    def fail(*_: object) -> None:
        raise RuntimeError("full disk")

    hook = model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="full disk"):
        model(tokens(1, 5))
    hook.remove()
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    assert model(tokens(1, 5)).logits.isfinite().all()


def test_loaded_keeps_a_block_for_several_runs(tmp_path: Path) -> None:
    model = open_model(saved("Llama", tmp_path))
    path = opened(model).blocks[1]
    with opened(model).loaded(path) as block:
        model(tokens(1, 5))
        assert not block.mlp.up_proj.weight.is_meta
    assert block.mlp.up_proj.weight.is_meta


def test_what_cannot_be_opened_is_told_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"not the folder of a Hugging Face model: it has no config\.json"):
        open_model(tmp_path)
    folder = saved("Llama", tmp_path / "a")
    (folder / "model.safetensors").rename(tmp_path / "away")
    with pytest.raises(ModelError, match="is a file; name the folder that holds"):
        WeightFiles(Path(__file__))
    with pytest.raises(ModelError, match="has no safetensors files"):
        open_model(folder)
    whole = (tmp_path / "away").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ModelError, match=r"is not a complete safetensors file: the data of .* lies outside the file"):
        open_model(folder)
    (folder / "model.safetensors").write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(ModelError, match=r"has the shape \(48, 32\) in .*, the model's is \(40, 32\)"):
        open_model(folder)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(ModelError, match=r"has no 'model\.layers\.3\..*under the names in the model's state dict"):
        open_model(folder)


def with_more(folder: Path, *names: str) -> Path:
    """Add tensors to a folder's file."""
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    save_file({**state, **{name: torch.ones(3) for name in names}}, folder / "model.safetensors")
    return folder


def test_stored_tensors_that_the_model_lacks_are_refused(tmp_path: Path) -> None:
    folder = saved("Llama", tmp_path / "fewer")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ModelError, match=r"holds 'model\.layers\.2\..*which the model does not have \(9 such tensors"):
        open_model(folder)
    with pytest.raises(
        ModelError, match=r"holds 'model\.layers\.0\.self_attn\.q_proj\.bias', which the model does not"
    ):
        open_model(with_more(saved("Llama", tmp_path / "bias"), "model.layers.0.self_attn.q_proj.bias"))


def test_stored_tensors_that_transformers_ignores_are_accepted(tmp_path: Path) -> None:
    old = "model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"
    folder = with_more(saved("Llama", tmp_path / "tied", tie_word_embeddings=True), *old)
    (folder / "model.safetensors").rename(folder / "x.safetensors")
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "x.safetensors")
    (folder / "x.safetensors").unlink()
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    save_file({"another.format": torch.ones(2)}, folder / "consolidated.safetensors")
    words = tokens(1, 5)
    with torch.no_grad():
        assert torch.equal(open_model(folder)(words).logits, in_memory(folder)(words).logits)
    open_model(with_more(saved("GPT2", tmp_path / "old"), "transformer.h.0.attn.bias"))


def other_weights(folder: Path, name: str) -> None:
    """Add a file in which every tensor of ``model.safetensors`` or of its shards has other values."""
    from safetensors.torch import load_file, save_file

    state = {key: 2 * own for file in folder.glob("*.safetensors") for key, own in load_file(file).items()}
    save_file(state, folder / name, {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "shards", "config"),
    [
        ("model_backup.safetensors", False, {}),
        ("model-00001-of-00002.safetensors", False, {}),
        ("consolidated.safetensors", True, {}),
        ("model.safetensors", True, {}),
        ("mine.safetensors", False, {"transformers_weights": "mine.safetensors"}),
        ("mine.safetensors", False, {"extra_files": ["mine.safetensors"]}),
    ],
)
def test_the_files_are_read_that_transformers_reads(
    name: str, shards: bool, config: dict[str, Any], tmp_path: Path
) -> None:
    folder = saved("Llama", tmp_path, shards=shards)
    other_weights(folder, name)
    reconfigured(folder, **config)
    with torch.no_grad():
        found, expected = (model(tokens(1, 5)).logits for model in (open_model(folder), in_memory(folder)))
    assert torch.equal(found, expected)


def test_files_that_transformers_reads_for_a_kind_of_model_only_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers
    from safetensors.torch import load_file, save_file

    folder = saved("Llama", tmp_path)
    state = load_file(folder / "model.safetensors")
    save_file({"lm_head.weight": state.pop("lm_head.weight")}, folder / "head.safetensors")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"no 'lm_head\.weight' .*model\.safetensors is read alone where there is one"):
        open_model(folder)
    monkeypatch.setattr(transformers.LlamaConfig, "extra_files", ("head.safetensors", "none.safetensors"))
    assert open_model(folder)(tokens(1, 5)).logits.shape == (1, 5, 61)


def test_a_file_that_the_configuration_names_must_be_there(tmp_path: Path) -> None:
    folder = saved("Llama", tmp_path)
    reconfigured(folder, transformers_weights="mine.safetensors")
    with pytest.raises(ModelError, match=r"config\.json names 'mine\.safetensors' under transformers_weights"):
        open_model(folder)


def test_a_name_in_two_files_of_which_none_comes_first_is_refused(tmp_path: Path) -> None:
    folder = saved("Llama", tmp_path)
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    other_weights(folder, "backup.safetensors")
    with pytest.raises(ModelError, match=r"backup\.safetensors and .*mine\.safetensors hold 'lm_head\.weight'"):
        open_model(folder)


def test_a_tied_weight_that_is_stored_with_two_values_is_refused(tmp_path: Path) -> None:
    """It would not be tied by transformers, so that the opened model would be another one."""
    folder = saved("Llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(ModelError, match=r"are one weight in the model, but differ in .*tie_word_embeddings"):
        open_model(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_a_damaged_json_file_is_named(name: str, tmp_path: Path) -> None:
    folder = saved("Llama", tmp_path, shards=True)
    (folder / name).write_text("{")
    with pytest.raises(
        ModelError, match=name.partition(".")[0] if name == "config.json" else r"generation|index\.json"
    ):
        open_model(folder)


@pytest.mark.parametrize("missing", [1, 2])
def test_a_missing_file_of_several_is_named_as_missing(tmp_path: Path, missing: int) -> None:
    folder = saved("Llama", tmp_path, shards=True)
    files = sorted(folder.glob("*.safetensors"))
    for file in files[:missing]:
        file.unlink()
    with pytest.raises(ModelError, match=rf"has no {files[0].name} \({missing} of the {len(files)} files") as refused:
        open_model(folder)
    assert "Errno" not in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_without_a_type_in_the_config_that_of_the_files_is_computed_in(tmp_path: Path, dtype: torch.dtype) -> None:
    """As transformers does for dtype="auto"; a type that is asked for comes first."""
    import transformers

    folder = saved("Llama", tmp_path, dtype=dtype, shards=True)
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype
    model = open_model(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {expected} == {dtype}
    assert {parameter.dtype for parameter in open_model(folder, dtype=torch.float64).parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"dtype": "nonsense"}, "dtype 'nonsense'"),
        ({"dtype": "Tensor"}, "dtype 'Tensor'"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"dtype": 3}, "dtype 3"),
        ({"dtype": ["float16"]}, r"dtype \['float16'\]"),
        ({"dtype": None, "torch_dtype": "half precision"}, "torch_dtype 'half precision'"),
    ],
)
def test_a_type_in_the_config_that_cannot_be_computed_in_is_named(
    values: dict[str, Any], found: str, tmp_path: Path
) -> None:
    folder = saved("Llama", tmp_path)
    reconfigured(folder, **values)
    with pytest.raises(
        ModelError, match=rf"config\.json has {found}, and it must be one of float64, float32, .*without"
    ):
        open_model(folder)


def without_architectures(folder: Path) -> Path:
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_config_without_architectures_is_that_of_a_language_model(tmp_path: Path) -> None:
    folder, words = saved("Llama", tmp_path, tie_word_embeddings=True), tokens(2, 9)
    expected = in_memory(folder)(words).logits
    model = open_model(without_architectures(folder))
    assert type(model).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        assert torch.equal(model(words).logits, expected)


def test_a_config_without_architectures_or_language_model_is_that_of_the_model_without_a_head(tmp_path: Path) -> None:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    transformers.ViTModel(config).save_pretrained(tmp_path)
    assert type(open_model(without_architectures(tmp_path))).__name__ == "ViTModel"


def test_an_architecture_that_transformers_does_not_know_is_named(tmp_path: Path) -> None:
    folder = saved("Llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["FooForBar"]}))
    with pytest.raises(ModelError, match="transformers has no 'FooForBar'"):
        open_model(folder)


def test_weights_that_are_not_finite_are_named_when_they_are_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved("Llama", tmp_path)
    state = load_file(folder / "model.safetensors")
    state["model.layers.2.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"'model\.layers\.2\.mlp\.up_proj\.weight' holds NaN"):
        open_model(folder)(tokens(1, 5))


def test_a_model_on_the_meta_device_that_was_not_opened_is_refused() -> None:
    with pytest.raises(ModelError, match="meta device"):
        qcompress.measure(torch.nn.Linear(2, 2, device="meta"), [torch.ones(1, 2)], qcompress.prune_quantize())


def test_every_tensor_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = saved("Llama", tmp_path, dtype=torch.float16, shards=True)
    files = WeightFiles(folder)
    expected = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    assert set(files) == set(expected)
    assert all(torch.equal(files.read(name), expected[name]) for name in files)


def test_building_a_model_allocates_no_weights() -> None:
    """They would leave holes of their size in the address space, which may be limited."""
    allocated: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.device.type == "cpu":
                allocated.append(found.nbytes)
            return found

    with parameters_on_meta(), Watch():
        large, small = nn.Linear(200, 100), nn.Linear(3, 2)
    assert max(allocated) < LARGE_BYTES
    assert all(own.is_meta for module in (large, small) for own in module.parameters())
    assert not nn.Linear(200, 100).weight.is_meta


def test_a_buffer_without_values_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    folder, build = saved("Llama", tmp_path), transformers.LlamaForCausalLM._from_config

    def with_buffer(*given: Any, **named: Any) -> nn.Module:
        model = build(*given, **named)
        model.register_buffer("table", torch.empty(200, 100), persistent=False)
        return model

    monkeypatch.setattr(transformers.LlamaForCausalLM, "_from_config", with_buffer)
    with pytest.raises(ModelError, match="the buffer 'table' has no values when the model is built"):
        open_model(folder)
