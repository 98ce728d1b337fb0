"""Random small models and choices for engines: shapes that are multiples of nothing, bias or none, tied, shared."""

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qcompress
from qcompress.budgets import FILE_BYTES
from qcompress.engines.base import Engine
from qcompress.engines.legal import for_engine
from qcompress.engines.verify import Difference, checked
from qcompress.measurement import Measurement
from tests.measurements import KINDS, Chain, measured, solution

IN_GROUPS = qcompress.prune_quantize(bits=(2, 3, 4, 5, 6, 8), group_size=(16, 32, None))
IN_GROUPS += qcompress.prune_quantize(bits=(2, 4, 8), sparsity=(0,))
RANKS = qcompress.low_rank(ratios=(0.5,), kinds=("channels", "spatial", "tucker"), whitened=False)
ALL = IN_GROUPS + qcompress.prune_quantize(bits=(2, 4, 8), group_size=(16, 32, None), symmetric=False)
ALL += RANKS + RANKS.then(qcompress.prune_quantize(bits=(4, 8), group_size=(16, None)))
WITH_INTEGERS = qcompress.integer_products(bits=(8, 7)) + qcompress.prune_quantize(bits=(4, 8), group_size=(16, None))


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


def network(rng: random.Random) -> tuple[nn.Module, Any]:
    """A network of any supported kind of layers, or of Linear layers of odd widths, and a batch."""
    torch.manual_seed(rng.randrange(10**6))
    kind = rng.choice([*KINDS, "wide", "wide", "words"])
    if kind == "words":
        return _words(rng)
    if kind != "wide":
        make, make_batch = KINDS[kind]
        return make().eval(), make_batch()
    widths = [rng.randrange(3, 90) for _ in range(4)]
    between = [nn.Linear(a, b, bias=rng.random() < 0.7) for a, b in pairwise(widths)]
    if rng.random() < 0.5:  # two layers that share a weight
        between += [nn.Linear(widths[-1], widths[-1]), nn.ReLU(), nn.Linear(widths[-1], widths[-1])]
        between[-1].weight = between[-3].weight
    shape = rng.choice([(3, widths[0]), (2, 5, widths[0]), (1, widths[0])])
    return Chain(*between).eval(), torch.randn(shape)


def _words(rng: random.Random) -> tuple[nn.Module, Tensor]:
    """An embedding and a head, which may share their weight."""
    count, width = rng.randrange(3, 60), rng.randrange(3, 90)
    words, head = nn.Embedding(count, width), nn.Linear(width, count, bias=rng.random() < 0.5)
    if rng.random() < 0.7:
        head.weight = words.weight
    shape = rng.choice([(3,), (2, 5)])
    return Chain(words, nn.Linear(width, width), nn.Tanh(), head).eval(), torch.randint(count, shape)


OFFERED = 4  # options at once in a random run


def written(
    engine: Engine, model: nn.Module, batch: Any, options: qcompress.Options, rng: random.Random, path: Path
) -> Difference:
    """What the engine gives for the model with random options that it runs, tied where it ties.

    Asserts that the file takes the bytes that were predicted of the choice, and that nothing is wrong with it.
    """
    some = qcompress.Options(tuple(rng.sample(options.offers, min(OFFERED, len(options.offers)))))
    measurement = measured(model, batch, some)
    smaller, predicted = model, None
    if any(not engine.refuse(part, own) for part, each in zip(measurement.parts, measurement.transforms, strict=True)
           for own in each[1:]):  # fmt: skip
        legal = for_engine(engine, model, measurement, batch)
        choice = random_choice(engine, legal, rng)
        smaller = qcompress.apply(model, legal, solution(choice))
        predicted = qcompress.formulate(legal, {FILE_BYTES: 1.0}, pairs=False).evaluate(choice).usage[FILE_BYTES]
    file = qcompress.export(smaller, path, target=engine, example=batch)
    assert predicted in (None, file.size_bytes), (file.size_bytes, predicted)
    size_bytes, difference, wrong, unknown = checked(engine, file.path, smaller, [batch])
    assert not wrong, wrong
    assert not unknown, unknown
    assert size_bytes == file.size_bytes
    return difference


def random_choice(engine: Engine, legal: Measurement, rng: random.Random) -> list[int]:
    """An option of every part."""
    choice = [rng.randrange(len(options)) for options in legal.transforms]
    place = {part.name: index for index, part in enumerate(legal.parts)}
    for names in engine.ties(legal.parts):
        for name in names[1:]:
            choice[place[name]] = choice[place[names[0]]]
    return choice
