"""Checks of a language model's configuration before its text is used: kind of model, positions and vocabulary."""

from pathlib import Path
from typing import Any

from qcompress.errors import DataError, ModelError
from qcompress.model.text import Windows

POSITIONS = ("max_position_embeddings", "max_seq_len")
"""Names of the number of positions in configurations of transformers."""

ROTARY = ("rope_parameters", "rope_scaling", "rope_theta", "rotary_dim")
"""Settings of models that compute positions and run beyond their number."""

AFTER_PADDING = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "mpnet", "longformer")
"""Kinds of models whose positions are counted from behind the number of the padding token."""


def require_one_text(config: Any, place: Path) -> None:
    """Check that a model takes a text by itself.

    Raises:
        ModelError: it is an encoder with a decoder, which takes two.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{place} is an encoder-decoder model ({config.model_type}), which plain text is not enough for: it needs "
            "pairs of texts. In Python, load it whole, and give compress() batches of input_ids and decoder_input_ids "
            "and a forward= that returns the logits"
        )


def require_positions(config: Any, place: Path, length: int) -> None:
    """Check that windows of a text are not longer than a model has positions; rotary ones have no end.

    Raises:
        DataError: they are.
    """
    text = config.get_text_config()
    name = next((name for name in POSITIONS if isinstance(getattr(text, name, None), int)), None)
    rotary = any(getattr(text, word, None) is not None for word in ROTARY)
    if name is None or rotary:
        return
    positions = getattr(text, name) - (text.pad_token_id + 1 if text.model_type in AFTER_PADDING else 0)
    if 0 < positions < length:
        raise DataError(
            f"windows of {length:,} tokens are longer than the {positions:,} positions of {place} "
            f"({text.attribute_map.get(name, name)} of its configuration): give a smaller length (--length {positions})"
        )


def require_vocabulary(config: Any, place: Path, windows: Windows) -> None:
    """Check that a model knows all tokens of some windows.

    Raises:
        DataError: it does not; the message names one.
    """
    known = getattr(config.get_text_config(), "vocab_size", None)
    used = max(int(window.max()) for window in (*windows.calibration, *windows.validation, *windows.test))
    if isinstance(known, int) and used >= known:
        raise DataError(
            f"the tokenizer of {place} gives tokens up to {used:,}, but the model's vocabulary ends at {known - 1:,} "
            "(vocab_size of its configuration): the tokenizer belongs to another model"
        )
