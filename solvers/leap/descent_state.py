"""Store the progress of a descent over parts of a problem in a file, so that an interrupted run can resume.

The file is written before a part is sent and after its answer has arrived, so that a killed process loses neither the
best choice nor a part that was sent. Its name is derived from the problem and the settings, so the same call finds it
again. A run that finishes removes it.
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
class DescentState:
    """The state of a descent between two steps.

    Attributes:
        path: path of the file.
        seed: seed of the blocks and parts.
        room: maximum number of variables of a part.
        start: objective of the first choice, in the problem's unit.
        choice: the best choice so far.
        passes: number of passes that were started.
        blocks: groups of the remaining parts of this pass; the last part is next.
        quiet: whether this pass has improved nothing so far.
        parts: reports on the completed parts.
        job: file name of the job of the part in progress, if it has one.
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

    def next(self, **changes: Any) -> "DescentState":
        """Return the state with some fields replaced, and write its file."""
        state = dataclasses.replace(self, **changes)
        value = {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name != "path"}
        FILE_KIND.write_json(state.path, value)
        return state

    @classmethod
    def load(cls, path: Path) -> "DescentState | None":
        """Read the state that an interrupted run left, or None.

        Raises:
            FileFormatError: the file is of another kind, incomplete, or has another version.
        """
        if not path.exists():
            return None
        value = FILE_KIND.read_json(path)
        with FILE_KIND.building(path, "delete it to start again"):
            state = cls(path=path, **value)
            blocks = tuple(tuple(block) for block in state.blocks)
            return dataclasses.replace(state, choice=tuple(state.choice), blocks=blocks, parts=tuple(state.parts))


def descent_path(folder: str, settings: Any) -> Path:
    """Return the path of the descent with these ``settings`` (which JSON can store), unique for each descent."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return Path(folder) / f"qpu-decomposed-{digest[:16]}{SUFFIX}"
