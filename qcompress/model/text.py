"""Windows of tokens from plain text, for language models."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formulations.files import AnyPath
from formulations.formatting import plural
from qcompress.errors import DataError, MissingError

LEAST = 2
"""Number of tokens in the shortest window, of which one is predicted."""


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


def token_windows(source: AnyPath, text: AnyPath, *, length: int = 512, count: int = 64) -> Windows:
    """Take windows spread evenly over a text: ``count`` for calibration, and a quarter of that for each other use.

    If the text has fewer windows, it is divided in the same proportion.

    Args:
        source: folder of the model, with its tokenizer, or its GGUF file.
        text: file of plain text in UTF-8.
        length: number of tokens in a window.
        count: number of windows for calibration.

    Raises:
        DataError: the text is shorter than six windows, or is not text; or the tokenizer cannot be read.
        MissingError: transformers is missing.
    """
    try:
        content = Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{text} cannot be read as plain text: {error}") from error
    ids = torch.tensor(_tokenizer(Path(source))(content)["input_ids"], dtype=torch.long)
    number = len(ids) // length
    if len(ids) < 6 * LEAST:
        raise DataError(
            f"{text} has {plural(len(ids), 'token')}, which is too little: give a longer text (windows of {length:,} "
            f"tokens need {6 * length:,})"
        )
    if number < 6:
        raise DataError(
            f"{text} has {len(ids):,} tokens, which are {number} windows of {length}: give a longer text, or shorter "
            f"windows (at most {len(ids) // 6} tokens)"
        )
    whole = ids[: number * length].view(number, 1, length)
    taken = min(number, count + 2 * max(count // 4, 1))
    chosen = [place * number // taken for place in range(taken)]
    group, rest = min(taken, 6), max(taken // 6, 1)
    uses: tuple[list[Tensor], ...] = ([], [], [])
    for place, window in enumerate(chosen):  # of six in a row, the third is for validation, the sixth for testing
        use = {(group - 1) // 2: 1, group - 1: 2}.get(place % group, 0) if place < group * rest else 0
        uses[use].append(whole[window].clone())  # not a view of the whole text's tokens
    return Windows(calibration=uses[0], validation=uses[1], test=uses[2])


def _tokenizer(source: Path) -> Any:
    """Return the tokenizer of a folder or, as transformers converts it, of a GGUF file."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingError("tokenizers need transformers: pip install 'qcompress[compressed-tensors]'") from error
    if not source.is_file():
        try:
            return AutoTokenizer.from_pretrained(source, local_files_only=True)
        except Exception as error:  # whatever is missing or wrong, or new to transformers
            raise DataError(
                f"{source} has no tokenizer that transformers can read (tokenizer.json or tokenizer.model, and "
                f"tokenizer_config.json); copy them there, from where the model is from: {error}"
            ) from error
    with tempfile.TemporaryDirectory() as alone:  # beside other files, transformers would read those as well
        (Path(alone) / source.name).symlink_to(source.resolve())
        try:
            return AutoTokenizer.from_pretrained(alone, gguf_file=source.name)
        except Exception as error:  # whatever is wrong with the tokenizer, or new to transformers
            raise DataError(
                f"transformers cannot read the tokenizer of {source} ({error}); give the model's folder, hf:FOLDER"
            ) from error
