"""Language models on the command line: ``hf:FOLDER`` or ``gguf:FILE``, with plain text as data."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # the measuring side is imported only by commands that measure
    from torch import nn

    from qcompress.model.text import Windows

FOLDER, FILE = "hf:", "gguf:"
METHOD = "sampled"
TEXT = "Language models (MODEL hf:FOLDER or gguf:FILE)"


def is_language_model(model: str) -> bool:
    """Whether the argument MODEL names a language model's folder or file."""
    return model.startswith((FOLDER, FILE))


def place_of(model: str) -> Path:
    """Return the folder of ``hf:FOLDER``, or the file of ``gguf:FILE``.

    Raises:
        typer.BadParameter: there is no such folder or file.
        ModelError: the folder has no usable ``config.json``, or holds quantized weights.
        EngineError: the file is damaged, or of an architecture that is not supported.
    """
    kind, _, name = model.partition(":")
    if not name.strip():
        raise typer.BadParameter(f"{model!r} names nothing; give hf:FOLDER or gguf:FILE.")
    place = Path(name)
    if model.startswith(FOLDER) and not place.is_dir():
        raise typer.BadParameter(
            f"there is no folder {str(place)!r}; hf:FOLDER names the folder of a language model, gguf:FILE a GGUF file."
        )
    if model.startswith(FILE) and not place.is_file():
        raise typer.BadParameter(f"there is no file {str(place)!r}; gguf:FILE names a language model's GGUF file.")
    if kind == "hf":
        from qcompress.model.hugging_face import require_original

        require_original(place)
    else:
        from qcompress.engines.llama_cpp.reading import require_readable

        require_readable(place)
    return place


def whole(place: Path) -> "nn.Module":
    """Load a language model into memory: from a folder in the precision that it has there, from GGUF in float32."""
    if place.is_file():
        from qcompress.engines.llama_cpp.reading import read_gguf

        return read_gguf(place)
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(place, dtype="auto", local_files_only=True).eval()
    return model


def text_windows(place: Path, text: Path, *, length: int, count: int = 64) -> "Windows":
    """Take windows of a text that a language model accepts; see `qcompress.model.text.token_windows`.

    Raises:
        EngineError: the place is a GGUF file of an encoder.
        ModelError: the place is the folder of an encoder with a decoder.
        DataError: the windows have more tokens than the model positions, or tokens that it does not know.
    """
    from qcompress.measuring.memory import return_free_memory
    from qcompress.model.text import token_windows
    from qcompress.model.text_limits import require_one_text, require_positions, require_vocabulary

    with _readable(place) as source:
        config = _config_of(place)
        require_one_text(config, place)
        require_positions(config, place, length)
        windows = token_windows(source, text, length=length, count=count)
    return_free_memory()  # of the whole text's tokens, many times its size
    require_vocabulary(config, place, windows)
    return windows


def _readable(place: Path) -> AbstractContextManager[Path]:
    """Return a context with the folder, or a GGUF file, whose tokenizer transformers reads."""
    if place.is_dir():
        return nullcontext(place)
    from qcompress.engines.llama_cpp.tokenizer_file import readable

    return readable(place)


def _config_of(place: Path) -> Any:
    """Return the configuration of a language model as transformers has it."""
    if place.is_dir():
        from qcompress.model import hugging_face

        return hugging_face.config_of(place)
    from qcompress.engines.llama_cpp import reading

    return reading.config_of(place)


@dataclass(frozen=True, kw_only=True)
class TextFlags:
    """Calibration text and maximum memory for a language model."""

    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Plain text for calibration, split into windows of tokens.", rich_help_panel=TEXT
        ),
    ] = None
    windows: Annotated[
        int,
        typer.Option(
            help="Number of calibration windows, spread evenly over the text. A quarter as many are used for "
            "validation, and another quarter for the final test.",
            min=4,
            rich_help_panel=TEXT,
        ),
    ] = 64
    length: Annotated[int, typer.Option(help="Number of tokens in a window.", min=2, rich_help_panel=TEXT)] = 512
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="AMOUNT",
            help="Maximum memory for measuring, for example 4GB; the model of hf:FOLDER is then read block by block "
            "(without an engine and for compressed-tensors always).",
            rich_help_panel=TEXT,
        ),
    ] = None

    def language_model(
        self, model: str, data: str | None, method: str | None, *, by_block: bool
    ) -> "tuple[nn.Module, Windows] | None":
        """Return the language model and the windows of the text; None for any other MODEL.

        Args:
            model: the argument MODEL.
            data: the argument DATA, if given.
            method: how to measure, if given.
            by_block: whether the model of a folder is read block by block, or loaded whole.

        Raises:
            typer.BadParameter: flags or arguments that cannot be combined.
        """
        if not is_language_model(model):
            if self.text is not None or self.memory is not None:
                raise typer.BadParameter("--text and --memory are for MODEL hf:FOLDER or gguf:FILE.")
            return None
        if self.text is None or data is not None:
            raise typer.BadParameter(f"{model!r} takes its data from --text FILE, without DATA.")
        by_block = by_block and model.startswith(FOLDER)
        if self.memory is not None and not by_block:
            raise typer.BadParameter(
                "--memory is for hf:FOLDER and engines that write a model block by block; here it is loaded whole."
            )
        if by_block and method not in (None, METHOD):
            raise typer.BadParameter(
                f"--method {method} needs the model in memory, but hf:FOLDER is read block by block here: use --method "
                f"{METHOD}, the default."
            )
        import qcompress
        from qcompress.measuring.streamed.forecast import as_bytes

        as_bytes(self.memory)
        place = place_of(model)
        windows = text_windows(place, self.text, length=self.length, count=self.windows)
        return qcompress.open_model(place) if by_block else whole(place), windows

    def arguments(self, method: str | None) -> dict[str, Any]:
        """Return the arguments ``method`` (`METHOD` if none is given) and ``memory`` for a language model."""
        return {"method": METHOD if method is None else method, "memory": self.memory}
