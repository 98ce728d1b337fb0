"""Every field of a configuration that changes outputs: either the GGUF file computes with it, or it is refused."""

import pytest
import torch
import transformers

import qcompress
from qcompress.engines.llama_cpp import assumptions, running
from qcompress.engines.llama_cpp.architectures import ARCHITECTURES
from qcompress.engines.llama_cpp.assumptions import (
    ASSUMPTIONS,
    WITHOUT_EFFECT,
    WRITTEN,
    declared_fields,
    require_expressible,
)
from qcompress.engines.llama_cpp.engine import LlamaCpp
from qcompress.engines.llama_cpp.header import header_of
from qcompress.engines.llama_cpp.reading import read_gguf
from qcompress.errors import EngineError
from tests.engines.tiny import KINDS, tiny, words

ENGINE = LlamaCpp(threads=1)
WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
LARGEST = {"gemma2": 46, "gemma3_text": 62}


def rope(kind="default", **settings):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **settings}}


def yarn(**settings):
    return rope("yarn", **{"factor": 4.0, "original_max_position_embeddings": 32, **settings})


def two_ropes(full=None, local=None):
    """Gemma 3's two rotations, in a model with layers of both kinds."""
    whole = {"rope_type": "default", "rope_theta": 1e6, **(full or {})}
    window = {"rope_type": "default", "rope_theta": 10_000.0, **(local or {})}
    return {"num_hidden_layers": 7, "rope_parameters": {"full_attention": whole, "sliding_attention": window}}


WRITTEN_CASES = [
    *((kind, {"rms_norm_eps": 0.1}) for kind in KINDS if kind != "bert"),
    *((kind, rope("linear", factor=4.0)) for kind in ("llama", "mistral", "gemma", "qwen2")),
    *((kind, yarn()) for kind in ("llama", "qwen3", "gemma2")),
    *((kind, {"tie_word_embeddings": not KINDS[kind].get("tie_word_embeddings")})
      for kind in ("llama", "mistral", "qwen2", "qwen3", "phi3")),
    ("llama", rope(rope_theta=300.0)),
    ("llama", yarn(attention_factor=1.13863)),
    ("llama", {"hidden_act": "swish"}),
    ("llama", {"head_dim": 32}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("mistral", {"sliding_window": 128}),
    ("qwen2", WINDOW | {"sliding_window": 128}),
    ("qwen3", WINDOW | {"max_window_layers": 2}),
    ("gemma", {"hidden_act": "gelu_new"}),
    ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    ("gemma2", {"sliding_window": 8, "hidden_activation": "gelu"}),
    ("gemma2", {"num_hidden_layers": 46, "head_dim": 32, "query_pre_attn_scalar": 16}),
    ("gemma3_text", {"sliding_window": 8, "num_hidden_layers": 7, "hidden_activation": "gelu"}),
    ("gemma3_text", {"tie_word_embeddings": False}),
    ("gemma3_text", two_ropes(full={"rope_theta": 500.0})),
    ("gemma3_text", two_ropes(full={"rope_type": "linear", "factor": 8.0})),
    ("phi3", rope(partial_rotary_factor=0.5)),
    ("phi3", {"sliding_window": 128, "num_key_value_heads": 4}),
    ("bert", {"hidden_act": "gelu_new", "layer_norm_eps": 0.1}),
    ("bert", {"type_vocab_size": 1}),
    ("bert", {"type_vocab_size": 3}),
]  # fmt: skip

REFUSED_CASES = [
    *((kind, {"hidden_act": "gelu"}, "hidden_act") for kind in ("llama", "mistral", "qwen2", "qwen3", "phi3")),
    *((kind, {"hidden_act": "relu"}, "hidden_act") for kind in ("gemma", "bert")),
    *((kind, {"hidden_activation": "relu"}, "hidden_activation") for kind in LARGEST),
    *((kind, {"sliding_window": 8}, "sliding_window") for kind in ("mistral", "phi3")),
    *((kind, WINDOW, "sliding_window") for kind in ("qwen2", "qwen3")),
    *((kind, {"attention_bias": True}, "attention_bias") for kind in ("qwen3", "gemma", *LARGEST)),
    *((kind, {"use_bidirectional_attention": True}, "bidirectional") for kind in ("gemma", *LARGEST)),
    *((kind, {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar") for kind in LARGEST),
    *((kind, {"num_hidden_layers": layers, "head_dim": 32, "query_pre_attn_scalar": 32}, "query_pre_attn_scalar")
      for kind, layers in LARGEST.items()),
    *((kind, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types") for kind in LARGEST),
    *((kind, {"sliding_window": None}, "sliding_window") for kind in LARGEST),
    *((kind, {"tie_word_embeddings": False}, "tie_word_embeddings") for kind in ("gemma", "gemma2")),
    *((kind, {"head_dim": 32}, "head_dim") for kind in ("qwen2", "phi3")),
    *(("gemma2", {f"{place}_logit_softcapping": None}, f"{place}_logit_softcapping") for place in ("attn", "final")),
    *(("gemma3_text", {f"{place}_logit_softcapping": 3.0}, f"{place}_logit_soft") for place in ("attn", "final")),
    ("bert", {"is_decoder": True}, "is_decoder"),
    ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
    ("gemma3_text", two_ropes(local={"rope_theta": 500.0}), "rope_theta of the layers with a window"),
    ("gemma3_text", two_ropes(local={"rope_type": "linear", "factor": 2.0}), "local rotary positions of type 'linear'"),
    *((kind, rope(partial_rotary_factor=0.5), "partial_rotary_factor") for kind in ("llama", "qwen2", "gemma")),
    *(("llama", yarn(**{field: value}), field) for field, value in
      (("beta_fast", 16.0), ("beta_slow", 2.0), ("truncate", False), ("attention_factor", 2.0))),
    ("llama", yarn(mscale=1.0, mscale_all_dim=0.5), "attention_factor"),
    ("llama", rope("dynamic", factor=4.0), "type 'dynamic'"),
    ("qwen2", rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=64), "type 'llama3'"),
    ("phi3", rope("longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8,
                  original_max_position_embeddings=64), "type 'longrope'"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes"), WRITTEN_CASES, ids=str)
def test_llama_cpp_computes_what_is_written(kind, changes, tmp_path):
    """The texts are longer than the windows; float32 sums in another order, and GELU's tables, stay under 0.02."""
    model, text = tiny(kind, tmp_path / "model", **changes), words(3, samples=1, length=60)
    path = qcompress.export(model, tmp_path / "whole.gguf", target=ENGINE).path
    wanted = ENGINE.emulate(model, [text]).outputs[0]
    assert (running.run(path, [text], 1).outputs[0] - wanted).abs().max() < 0.02 * wanted.std()
    if "hidden_act" not in changes and "hidden_activation" not in changes:
        again = LlamaCpp(source=str(path)).emulate(read_gguf(path), [text]).outputs[0]
        torch.testing.assert_close(again, wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("kind", "changes", "named"), REFUSED_CASES, ids=str)
def test_what_llama_cpp_does_not_compute_is_refused(kind, changes, named, tmp_path):
    (tmp_path / "tokenizer.json").touch()  # refused before it is read
    config = transformers.AutoConfig.for_model(kind, **(KINDS[kind] | changes))
    with torch.device("meta"):
        factory = transformers.AutoModel if kind == "bert" else transformers.AutoModelForCausalLM
        model = factory.from_config(config)
    with pytest.raises(EngineError, match=named):
        header_of(model, str(tmp_path))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_field_of_a_configuration_is_accounted_for(kind):
    """A field that a later version of transformers adds is refused where it is not the default, and found here."""
    config = transformers.AutoConfig.for_model(kind, **KINDS[kind])
    known = {assumption.field for assumption in ASSUMPTIONS[kind]} | WRITTEN | WITHOUT_EFFECT
    assert declared_fields(type(config)) <= known
    require_expressible(config)


def test_a_field_that_is_not_known_must_have_its_default(monkeypatch):
    config = transformers.AutoConfig.for_model("llama", **KINDS["llama"], mlp_bias=True)
    require_expressible(config)
    monkeypatch.setattr(assumptions, "WRITTEN", WRITTEN - {"mlp_bias"})
    with pytest.raises(EngineError, match=r"mlp_bias=True, but llama.cpp computes .* with the default False"):
        require_expressible(config)


def test_a_short_window_is_refused_before_anything_is_measured(tmp_path):
    """Texts within the window would be verified as equal, and longer ones would differ."""
    model = tiny("mistral", tmp_path / "model", sliding_window=24)
    with pytest.raises(
        EngineError, match=r"sliding_window=24, but llama.cpp computes .* attention to the whole context"
    ):
        qcompress.compress(model, [words(0)], budget={"file_bytes": "50%"}, target=ENGINE, output=tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()
