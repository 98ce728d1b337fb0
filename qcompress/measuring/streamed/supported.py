"""Options that models read block by block support: those that leave a layer in place and its inputs unrounded."""

from collections.abc import Iterable

from qcompress.errors import OptionsError
from qcompress.model.parts import Part
from qcompress.transforms.base import Offer, Transform


def require_supported(parts: Iterable[Part], offers: Iterable[Iterable[Offer]]) -> None:
    """Check that an opened model can be given the options of each part.

    Raises:
        OptionsError: names an option that it cannot be given, the part, and what works.
    """
    for part, listed in zip(parts, offers, strict=True):
        for offer in listed:
            if offer.replaces_layer(part.target):
                raise OptionsError(
                    f"{part.name!r} would become factors ({offer.label}); opened models only support quantization and "
                    "pruning: leave low_rank() out, or load the model whole"
                )
            rounds = offer.needs_ranges(part.target) or (isinstance(offer, Transform) and offer.activations is not None)
            if rounds:
                raise OptionsError(
                    f"{part.name!r} would round its inputs ({offer.label}), which opened models do not support: leave "
                    "integer_products() out, or load the model whole"
                )
