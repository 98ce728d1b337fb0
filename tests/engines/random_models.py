"""Random small models and choices for engines: shapes that are multiples of nothing, bias or none, tied, shared."""

import random
from typing import Any

import torch
from torch import Tensor, nn

import qcompress
from qcompress.engines.base import Engine
from qcompress.engines.legal import for_engine
from qcompress.measurement import Measurement
from tests.measurements import measured, solution

IN_GROUPS = qcompress.prune_quantize(bits=(2, 3, 4, 5, 6, 8), group_size=(16, 32, None)) + qcompress.prune_quantize(
    bits=(2, 4, 8), sparsity=(0,)
)
ALL = IN_GROUPS + qcompress.prune_quantize(bits=(2, 4, 8), group_size=(16, 32, None), symmetric=False)


def llama(rng: random.Random) -> tuple[nn.Module, Tensor]:
    """A language model of transformers, and a batch."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads, head_width = rng.choice([(2, 8), (3, 10), (4, 16)])
    config = LlamaConfig(
        hidden_size=heads * head_width,
        intermediate_size=rng.choice([33, 48, 96]),
        num_hidden_layers=rng.choice([1, 2]),
        num_attention_heads=heads,
        num_key_value_heads=rng.choice([1, heads]),
        vocab_size=rng.choice([31, 64]),
        tie_word_embeddings=rng.random() < 0.5,
        attention_bias=rng.random() < 0.5,
        mlp_bias=rng.random() < 0.5,
    )
    torch.manual_seed(rng.randrange(10**6))
    dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
    return LlamaForCausalLM._from_config(config, dtype=dtype).eval(), torch.randint(31, (2, 7))


def chosen(engine: Engine, model: nn.Module, batch: Any, options: qcompress.Options, rng: random.Random) -> nn.Module:
    """The model with random options that the engine runs, tied where it ties."""
    legal = for_engine(engine, model, measured(model, batch, options), batch)
    return qcompress.apply(model, legal, solution(random_choice(engine, legal, rng)))


def random_choice(engine: Engine, legal: Measurement, rng: random.Random) -> list[int]:
    """An option of every part."""
    choice = [rng.randrange(len(options)) for options in legal.transforms]
    place = {part.name: index for index, part in enumerate(legal.parts)}
    for names in engine.ties(legal.parts):
        for name in names[1:]:
            choice[place[name]] = choice[place[names[0]]]
    return choice
