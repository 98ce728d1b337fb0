"""What a batch says of the decoder's positions, where an encoder and a decoder have positions of their own."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qcompress.errors import DataError

MASK, DECODER = "attention_mask", "decoder_"

IGNORED = -100
"""The label of a position that has none."""


def has_decoder(batch: Mapping[Any, Any]) -> bool:
    """Whether a batch has inputs of a decoder."""
    return any(str(name).startswith(DECODER) for name in batch)


def require_decoder_mask(model: nn.Module, batch: Any) -> None:
    """Check that it is known which outputs of an encoder with a decoder are padding.

    Models of transformers make the decoder's inputs from labels. Their padding is not that of ``attention_mask``, which
    is the encoder's.

    Raises:
        DataError: a padded batch has labels, and nothing of the decoder.
    """
    if not isinstance(batch, Mapping) or has_decoder(batch):
        return
    labels, mask = batch.get("labels"), batch.get(MASK)
    if not isinstance(labels, Tensor) or labels.ndim != 2:  # of classes, not of words
        return
    padded = bool((labels == IGNORED).any()) or (isinstance(mask, Tensor) and bool((mask == 0).any()))
    if padded and any(getattr(getattr(each, "config", None), "is_encoder_decoder", False) for each in model.modules()):
        raise DataError(
            "a padded batch has labels, from which the model makes its decoder's inputs, but does not say which of "
            f"them are padding: add {DECODER}{MASK}=(labels != {IGNORED}).long(), or give decoder_input_ids="
            f"model.prepare_decoder_input_ids_from_labels(labels) with {DECODER}{MASK} instead of labels"
        )
