"""How a sentence encoder makes one embedding of its tokens' states, as defined in a sentence-transformers folder."""

import json
from pathlib import Path
from typing import Final

from torch import Tensor

from qcompress.errors import EngineError

MEAN: Final = 1
POOLINGS: Final = {MEAN: "mean", 2: "cls", 3: "lasttoken"}
"""GGUF's numbers for the poolings that sentence-transformers calls so."""


def pooling_type(folder: Path) -> int:
    """Return GGUF's number for the pooling of a folder; the mean if the folder names none.

    Raises:
        EngineError: the folder asks for another pooling, for several at once, or for layers after it.
    """
    place, modules = "1_Pooling", folder / "modules.json"
    for module in json.loads(modules.read_bytes()) if modules.is_file() else ():
        kind = str(module["type"]).rpartition(".")[2]
        place = module["path"] if kind == "Pooling" else place
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise EngineError(
                f"{folder} makes its embeddings with a module {kind!r}, which has no place in a GGUF file"
            )
    file = folder / place / "config.json"
    if not file.is_file():
        return MEAN
    settings = json.loads(file.read_bytes())
    modes = settings.get("pooling_mode") or [
        name.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
        for name, wanted in settings.items()
        if name.startswith("pooling_mode_") and wanted is True
    ]
    names = [modes] if isinstance(modes, str) else list(modes)
    numbers = [number for number, name in POOLINGS.items() if names == [name]]
    if not numbers:
        raise EngineError(
            f"{file} asks for the pooling {' and '.join(names) or 'none'}, but a GGUF file can have one of "
            f"{', '.join(POOLINGS.values())}"
        )
    return numbers[0]


def pooled(states: Tensor, number: int) -> Tensor:
    """Pool states ``(samples, tokens, width)`` without padding to ``(samples, width)``, by GGUF's number.

    >>> import torch
    >>> pooled(torch.tensor([[[1.0], [2.0], [6.0]]]), 1)
    tensor([[3.]])
    """
    return {"mean": states.mean(1), "cls": states[:, 0], "lasttoken": states[:, -1]}[POOLINGS[number]]
