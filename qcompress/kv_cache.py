"""Memory of a language model at a context length: its weights and its cache of keys and values.

The size of the cache does not depend on the chosen options, so a memory budget becomes a smaller budget for the file.
"""

from typing import Any

from torch import nn

from formulations import InfeasibleBudgetError
from qcompress.budgets import FILE_BYTES, Amount, parse
from qcompress.errors import ModelError, OptionsError
from qcompress.scalars import as_whole

HALF = 2
"""Bytes of a float16 number; engines store keys and values in float16 by default."""

BATCH, STEP = 512, 256
"""llama.cpp keeps a sliding window and the words of one batch beside it, in whole steps."""


def cache_bytes(model: nn.Module, context: int, *, samples: int = 1, number_bytes: float = HALF) -> int:
    """Return the bytes of all keys and values at a context length.

    Args:
        model: a transformers model or opened model; its ``config`` gives the layers, the key/value heads and their
            width. The cache of a layer with a sliding window is limited to the window and one batch, as in llama.cpp.
        context: context length in tokens.
        samples: number of texts processed at a time.
        number_bytes: bytes per number in the cache.

    Raises:
        ModelError: the model has no such config, or it keeps no keys and values, or in another form.
        OptionsError: ``context`` or ``samples`` is below 1.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=4,
    ...                      num_key_value_heads=2, vocab_size=16)
    >>> cache_bytes(LlamaForCausalLM(config), 100)  # 3 layers x keys and values x 2 heads x 2 numbers x 2 bytes x 100
    4800
    """
    length, count = as_whole(context, "context", least=1), as_whole(samples, "samples", least=1)
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "num_hidden_layers"):
        raise ModelError(f"{type(model).__name__} has no language model config that gives the size of its cache")
    directions = {module.is_causal for module in model.modules() if hasattr(module, "is_causal")}
    if directions == {False}:
        raise ModelError(
            f"{type(model).__name__} reads texts in both directions and keeps no keys and values: its memory is the "
            f"size of its file, so give a budget for {FILE_BYTES}"
        )
    text: Any = config.get_text_config()
    if getattr(text, "kv_lora_rank", None):
        raise ModelError(
            f"{type(model).__name__} keeps its keys and values in a compressed form, which is not known here"
        )
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    window = getattr(text, "sliding_window", None) or length
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise ModelError(f"the cache of layers of type {', '.join(sorted(unknown))} is not known here")
    window = -(-(window + BATCH) // STEP) * STEP
    words = sum(min(length, window) if kind == "sliding_attention" else length for kind in kinds)
    return int(words * 2 * heads * width * count * number_bytes)


def memory_budget(
    model: nn.Module, memory: Amount, *, context: int, samples: int = 1, number_bytes: float = HALF
) -> dict[str, float]:
    """Return a budget for `qcompress.compress` with which file and cache together fit into the given memory.

    The budget is meant for engines that hold weights in memory as they are in the file, like llama.cpp. It does not
    include the memory for activations.

    Args:
        model: same as in `cache_bytes`.
        memory: bytes, such as ``"2 GB"``.
        context: same as in `cache_bytes`.
        samples: same as in `cache_bytes`.
        number_bytes: same as in `cache_bytes`.

    Raises:
        InfeasibleBudgetError: the cache alone exceeds the memory.
        OptionsError: ``memory`` is not an amount of bytes.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=4,
    ...                      num_key_value_heads=2, vocab_size=16)
    >>> memory_budget(LlamaForCausalLM(config), "10 kB", context=100)
    {'file_bytes': 5200.0}
    """
    limit = parse(FILE_BYTES, memory)
    if limit.is_share:
        raise OptionsError(f"memory must be an amount of bytes, such as '2 GB', found {memory!r}")
    cache = cache_bytes(model, context, samples=samples, number_bytes=number_bytes)
    if cache >= limit.value - 1:  # a budget of up to 1 would be a share
        raise InfeasibleBudgetError(
            f"the keys and values of {samples} x {context:,} tokens take {cache:,} bytes, more than the budget of "
            f"{limit.value:,.0f}: ask for a shorter context"
        )
    return {FILE_BYTES: limit.value - cache}
