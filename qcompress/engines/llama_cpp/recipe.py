"""The choice as a file for ``llama-quantize --tensor-type-file``, to reproduce it with llama.cpp's own tool."""

import re
from collections.abc import Iterable

from qcompress.engines.llama_cpp.container import TensorPlan
from qcompress.transforms.ggml.types import TYPES


def recipe_of(plans: Iterable[TensorPlan]) -> str:
    r"""Return a line ``name=type`` for every tensor of two or more dimensions; the names are regular expressions.

    >>> plan = TensorPlan(name="blk.0.attn_q.weight", shape=(2, 32), number=8, size_bytes=68, content=lambda: None)
    >>> recipe_of([plan])
    '^blk\\.0\\.attn_q\\.weight$=q8_0\n'
    """
    names = {kind.number: name.lower() for name, kind in TYPES.items()}
    return "".join(f"^{re.escape(plan.name)}$={names[plan.number]}\n" for plan in plans if len(plan.shape) > 1)


def is_recipe(content: bytes) -> bool:
    r"""Whether a file of this content is one for ``--tensor-type-file``: words ``name=type``, or nothing yet.

    >>> is_recipe(b"^output$=q6_k\nattn_v=Q5_K\n"), is_recipe(b"GGUF\x03"), is_recipe(b'{"a": 1}')
    (True, False, False)
    """
    types = [word.rpartition(b"=") for word in content.split()]
    return all(name and kind.decode("latin-1").upper() in TYPES for name, _, kind in types)
