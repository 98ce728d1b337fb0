"""The progress of a descent over parts of a problem, in a file, so that an interrupted run resumes.

The file is written before a part goes out and after its answer is in, so that a killed process loses neither the
best choice nor a part that was sent. Its name is made of the problem and what was asked; the same call finds it again.
A run that came to its end removes it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formulations.file_kinds import FileKind

FILE_KIND = FileKind("qcompress descent", version=1)
SUFFIX = ".descent.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Descent:
    """The state between two steps.

    Attributes:
        path: the file.
        seed: of blocks and parts.
        room: maximum number of variables of a part.
        start: objective of the first choice, in the problem's unit.
        choice: the best so far.
        passes: how many were begun.
        blocks: groups of the parts that this pass still has to do; the last one is next.
        quiet: this pass improved nothing so far.
        parts: what is told of each part that is done.
        job: file name of the job of the part that is under way, if it has one.
    """

    path: Path
    seed: int
    room: int
    start: float
    choice: tuple[int, ...]
    passes: int = 0
    blocks: tuple[tuple[int, ...], ...] = ()
    quiet: bool = False
    parts: tuple[Mapping[str, Any], ...] = ()
    job: str | None = None

    def next(self, **changes: Any) -> "Descent":
        """The state with some fields set anew, its file written."""
        state = dataclasses.replace(self, **changes)
        value = {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name != "path"}
        FILE_KIND.write_json(state.path, value)
        return state

    @classmethod
    def load(cls, path: Path) -> "Descent | None":
        """Read the state that an interrupted run left, or None.

        Raises:
            FileFormatError: the file is of another kind, not whole, or of a newer version.
        """
        if not path.exists():
            return None
        value = FILE_KIND.read_json(path)
        with FILE_KIND.building(path, "delete it to begin anew"):
            state = cls(path=path, **value)
            blocks = tuple(tuple(block) for block in state.blocks)
            return dataclasses.replace(state, choice=tuple(state.choice), blocks=blocks, parts=tuple(state.parts))


def descent_path(folder: str, settings: Any) -> Path:
    """The file of the descent with these ``settings`` (JSON-able), which no other descent shares."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return Path(folder) / f"qpu-decomposed-{digest[:16]}{SUFFIX}"
