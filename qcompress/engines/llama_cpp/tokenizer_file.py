"""A GGUF file whose tokenizer transformers reads, for a file of any decoder that this engine supports.

transformers reads tokenizers of some architectures only, though a tokenizer does not depend on the architecture beyond
its family: Gemma 1 has the rules of Gemma 2. So it is given the header alone, under the name of the relative.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qcompress.engines.llama_cpp.container import Value, write
from qcompress.engines.llama_cpp.reading import require_readable
from qcompress.errors import EngineError

RELATIVES = {"gemma": "gemma2"}
ARCHITECTURE = "general.architecture"


@contextlib.contextmanager
def readable(file: Path) -> Iterator[Path]:
    """Yield the file itself, or a temporary one with its tokenizer.

    Raises:
        EngineError: the file is damaged, has an unsupported architecture, or is an encoder.
    """
    header = require_readable(file)
    name = header.architecture.name
    if header.architecture.encoder:
        raise EngineError(
            f"{file} is an encoder ({name}), for which there is no loss on plain text: in Python, load it with "
            "read_gguf and give compress() batches of ids and a forward= that returns one tensor"
        )
    if (relative := RELATIVES.get(name)) is None:
        yield file
        return
    values = {
        key.replace(f"{name}.", f"{relative}.", 1) if key.startswith(f"{name}.") else key: value
        for key, value in header.values.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder) / file.name
        write(alone, values | {ARCHITECTURE: Value.of(relative)}, [])
        yield alone
