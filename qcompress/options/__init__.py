"""Options: what each part of a model may choose from, and the families that users choose from.

In the order of their imports: kinds (the table of transforms), base (a set of options), families, for_engines.
"""

from qcompress.options.base import Fitted, Options
from qcompress.options.families import SPARSITY, SPARSITY_IN_GROUPS, low_rank, prune_channels, prune_quantize
from qcompress.options.for_engines import gguf_types, integer_products
from qcompress.options.kinds import KINDS, OFFERS, transform_from_json

__all__ = [
    "Fitted",
    "Options",
    "SPARSITY",
    "SPARSITY_IN_GROUPS",
    "low_rank",
    "prune_channels",
    "prune_quantize",
    "gguf_types",
    "integer_products",
    "KINDS",
    "OFFERS",
    "transform_from_json",
]
