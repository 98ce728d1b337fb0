"""Plain text as windows of tokens for a language model."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from formulations.files import AnyPath
from qcompress.errors import DataError, MissingError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Windows:
    """Windows of a text, each a batch ``(1, length)`` of its own, no token in two of them.

    Attributes:
        calibration: to measure and fit on.
        validation: to check choices on.
        test: that nothing is fitted to or chosen by.
    """

    calibration: list[Tensor]
    validation: list[Tensor]
    test: list[Tensor]


def token_windows(folder: AnyPath, text: AnyPath, *, length: int = 512, count: int = 64) -> Windows:
    """Windows spread evenly over a text: ``count`` for calibration, and a quarter of that for each other use.

    A text of fewer windows is divided in the same proportion.

    Args:
        folder: of the model, with its tokenizer.
        text: a file of plain text in UTF-8.
        length: tokens of a window.
        count: windows for calibration.

    Raises:
        DataError: the text is shorter than six windows, or no text.
        MissingError: transformers is missing.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingError("tokenizers need transformers: pip install 'qcompress[compressed-tensors]'") from error
    try:
        content = Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{text} cannot be read as plain text: {error}") from error
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(content)["input_ids"], dtype=torch.long)
    number = len(ids) // length
    if number < 6:
        raise DataError(
            f"{text} has {len(ids):,} tokens, which are {number} windows of {length}: give a longer text, or shorter "
            f"windows ({len(ids) // 6} tokens at most)"
        )
    whole = ids[: number * length].view(number, 1, length)
    taken = min(number, count + 2 * max(count // 4, 1))
    chosen = [place * number // taken for place in range(taken)]
    uses: tuple[list[Tensor], ...] = ([], [], [])
    for place, window in enumerate(chosen):  # of six in a row, the third checks and the sixth tests
        uses[{2: 1, 5: 2}.get(place % 6, 0)].append(whole[window])
    return Windows(calibration=uses[0], validation=uses[1], test=uses[2])
