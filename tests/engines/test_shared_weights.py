"""Weights that several layers share: every file holds all that its engine reads, in the predicted bytes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import qcompress
from qcompress.engines.base import Engine
from qcompress.engines.compressed_tensors import CompressedTensors, loaded
from qcompress.engines.legal import for_engine
from qcompress.engines.llama_cpp.engine import LlamaCpp
from qcompress.engines.llama_cpp.reading import read_gguf
from qcompress.engines.verify import checked
from qcompress.errors import EngineError
from tests.engines.tiny import tiny, words
from tests.measurements import measured, solution
from tests.quick import slow_but

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")

IN_GROUPS = qcompress.prune_quantize(bits=(4,), group_size=16)
ENGINES = {
    "compressed-tensors": (CompressedTensors(), IN_GROUPS),
    "llama.cpp": (LlamaCpp(threads=1), qcompress.gguf_types(("Q4_0",))),
}


def mlp(model: nn.Module) -> None:
    model.model.layers[1].mlp = model.model.layers[0].mlp


def one_weight(model: nn.Module) -> None:
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight


def queries(model: nn.Module) -> None:
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight


def norms(model: nn.Module) -> None:
    model.model.layers[1].input_layernorm.weight = model.model.layers[0].input_layernorm.weight


def head(model: nn.Module) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def smallest(engine: Engine, model: nn.Module, options: qcompress.Options) -> tuple[nn.Module, int]:
    """The model with the last option of every part, and its predicted bytes."""
    legal = for_engine(engine, model, measured(model, words(0), options))
    choice = [len(own) - 1 for own in legal.transforms]
    sizes = engine.sizes(model, legal.parts, legal.transforms)
    return qcompress.apply(model, legal, solution(choice)), sizes.of(choice)


@pytest.mark.parametrize("share", slow_but([one_weight, norms, head], [mlp, one_weight, queries, norms, head]))
@pytest.mark.parametrize("name", ENGINES)
def test_a_model_that_shares_weights_is_written_whole(
    name: str, share: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    engine, options = ENGINES[name]
    model = tiny("llama", tmp_path / "model", tie_word_embeddings=False)
    share(model)
    small, predicted = smallest(engine, model, options)
    for which, size_bytes in ((model, None), (small, predicted)):
        path = tmp_path / f"{size_bytes}"
        file = qcompress.export(which, path, target=engine)
        found, _, wrong, _ = checked(engine, path, which, [words(1)])
        assert not wrong
        assert found == file.size_bytes == (size_bytes or found)
        back = loaded(path) if name == "compressed-tensors" else read_gguf(path)
        with torch.no_grad():
            torch.testing.assert_close(back(words(1)).logits, which(words(1)).logits, rtol=1e-5, atol=1e-5)


def test_an_output_layer_that_the_configuration_ties_must_be_the_vocabulary(tmp_path: Path) -> None:
    model = tiny("llama", tmp_path / "model")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
    data, untied = [words(0)], "'lm_head.weight' are two weights, .* set model.config.tie_word_embeddings = False"
    with pytest.raises(EngineError, match=untied):
        qcompress.compress(model, data, budget={"bytes": 0.5}, options=IN_GROUPS, target="compressed-tensors",
                           on_measure=pytest.fail)  # fmt: skip
    with pytest.raises(EngineError, match=untied):
        qcompress.export(model, tmp_path / "small", target="compressed-tensors")
    model.config.tie_word_embeddings = False
    qcompress.export(model, tmp_path / "small", target="compressed-tensors")
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path / "small")(words(1)).logits, model(words(1)).logits)


def test_layers_that_transformers_does_not_load_packed_are_refused_first() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, vocab_size=64, decoder_start_token_id=0)
    ).eval()
    batch = {"input_ids": words(0), "decoder_input_ids": words(1)}
    with pytest.raises(EngineError, match="does not load it packed, because T5ForConditionalGeneration initialises"):
        qcompress.compress(model, [batch], budget={"bytes": 0.5}, options=IN_GROUPS, target="compressed-tensors",
                           on_measure=pytest.fail)  # fmt: skip


def test_layers_beside_ones_that_transformers_does_not_load_packed_are_still_packed(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=1, state_size=4, vocab_size=64)).eval()
    engine, batch = CompressedTensors(), words(0)
    legal = for_engine(engine, model, measured(model, batch, IN_GROUPS))
    packed = {part.name for part, own in zip(legal.parts, legal.transforms, strict=True) if len(own) > 1}
    assert packed == {"backbone.layers.0.mixer.in_proj", "backbone.layers.0.mixer.x_proj"}
    assert "does not load it packed" in legal.no_choice["backbone.layers.0.mixer.out_proj"]
    small = qcompress.apply(model, legal, solution([len(own) - 1 for own in legal.transforms]))
    qcompress.export(small, tmp_path / "small", target=engine)
    assert checked(engine, tmp_path / "small", small, [batch])[2] == ""
