"""Keys and values take what transformers' own cache takes, and a budget for memory leaves room for them."""

import pytest
import torch
from torch import nn

import qcompress
from formulations import InfeasibleBudgetError
from qcompress.errors import ModelError, OptionsError
from qcompress.kv_cache import cache_bytes
from tests.engines.tiny import KINDS, tiny, words

DECODERS = [kind for kind in KINDS if kind != "bert"]


@pytest.mark.parametrize("kind", DECODERS)
def test_the_cache_takes_what_transformers_holds(kind, tmp_path):
    model = tiny(kind, tmp_path)
    with torch.no_grad():
        held = model(words(0, samples=3, length=12), use_cache=True).past_key_values
    counted = sum(tensor.numel() for layer in held.layers for tensor in (layer.keys, layer.values)) * 4
    assert cache_bytes(model, 12, samples=3, number_bytes=4) == counted


def test_a_layer_with_a_window_holds_the_window_and_a_batch_in_whole_steps(tmp_path):
    model = tiny("gemma2", tmp_path, sliding_window=5)  # every second layer has the window
    config = model.config
    word = 2 * config.num_key_value_heads * config.head_dim * 2
    windows = config.layer_types.count("sliding_attention")
    assert 0 < windows < config.num_hidden_layers
    for length, kept in ((12, 12), (700, 700), (5000, 768)):  # 5 + 512 words in steps of 256
        expected = (windows * kept + (config.num_hidden_layers - windows) * length) * word
        assert cache_bytes(model, length) == expected


def test_an_encoder_keeps_no_keys_and_values(tmp_path):
    with pytest.raises(ModelError, match="in both directions .* give a budget for file_bytes"):
        cache_bytes(tiny("bert", tmp_path), 100)


def test_file_and_cache_fit_into_the_memory(tmp_path):
    model = tiny("llama", tmp_path)
    cache = cache_bytes(model, 100)
    assert qcompress.memory_budget(model, 10 * cache, context=100) == {"file_bytes": 9 * cache}
    result = qcompress.compress(
        model, [words(0, samples=4)], budget=qcompress.memory_budget(model, cache + 300_000, context=100),
        options=qcompress.prune_quantize(bits=(2, 4, 8), sparsity=(0,)), method="sampled", guard=False, time_limit=2,
    )  # fmt: skip
    assert result.report.usage["file_bytes"] + cache <= cache + 300_000


def test_what_cannot_be_meant_is_refused(tmp_path):
    model = tiny("llama", tmp_path)
    with pytest.raises(InfeasibleBudgetError, match="more than the budget of 1,000: ask for a shorter"):
        qcompress.memory_budget(model, 1000, context=4096)
    with pytest.raises(OptionsError, match="an amount of bytes, such as '2 GB', found '50%'"):
        qcompress.memory_budget(model, "50%", context=4096)
    with pytest.raises(ModelError, match="Linear has no language model config"):
        cache_bytes(nn.Linear(2, 2), 10)
    with pytest.raises(OptionsError, match="context"):
        cache_bytes(model, 0)
