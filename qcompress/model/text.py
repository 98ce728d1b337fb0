"""Windows of tokens from plain text, for language models."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from formulations.files import AnyPath
from qcompress.errors import DataError, MissingError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Windows:
    """Disjoint windows of a text, each a batch of shape ``(1, length)``.

    Attributes:
        calibration: windows for measuring and fitting.
        validation: windows for checking choices.
        test: windows that are never used for fitting or choosing.
    """

    calibration: list[Tensor]
    validation: list[Tensor]
    test: list[Tensor]


def token_windows(folder: AnyPath, text: AnyPath, *, length: int = 512, count: int = 64) -> Windows:
    """Take windows spread evenly over a text: ``count`` for calibration, and a quarter of that for each other use.

    If the text has fewer windows, it is divided in the same proportion.

    Args:
        folder: folder of the model, with its tokenizer.
        text: file of plain text in UTF-8.
        length: number of tokens in a window.
        count: number of windows for calibration.

    Raises:
        DataError: the text is shorter than six windows, or is not text.
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
            f"windows (at most {len(ids) // 6} tokens)"
        )
    whole = ids[: number * length].view(number, 1, length)
    taken = min(number, count + 2 * max(count // 4, 1))
    chosen = [place * number // taken for place in range(taken)]
    uses: tuple[list[Tensor], ...] = ([], [], [])
    for place, window in enumerate(chosen):  # of six in a row, the third is for validation, the sixth for testing
        uses[{2: 1, 5: 2}.get(place % 6, 0)].append(whole[window])
    return Windows(calibration=uses[0], validation=uses[1], test=uses[2])
