"""The folder of a resumable run: every step runs once, and again only if something that it depends on has changed.

A journal, ``run.json``, records for every step the digests of its inputs (its key), the file of its value, how long it
took over all attempts, and whether it is finished; for the last run, which files it wrote and which it reused, and the
engine's file that was written from it; and what all runs wrote outside the folder (`qcompress.file_stamps`).

A value is reused only with exactly the same key. Steps may share a file (the model is written by whichever step is the
last): what overwrites the value of another step first removes that step from the journal, so that it runs again when it
is next needed. The step is marked as unfinished before its value is replaced and as finished after the new value is
written, so a process that dies in between loses time but never mixes two runs.
"""

import contextlib
import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from formulations import FileFormatError
from formulations.drafts import locked
from formulations.file_kinds import FileKind
from formulations.files import AnyPath
from qcompress.errors import ArtefactError, OptionsError, UncheckedWarning
from qcompress.file_stamps import is_among, records_in, with_last, with_next
from qcompress.identity import identify

JOURNAL = "run.json"
FILE_KIND = FileKind("qcompress run", version=1)
CODES = "codes"
"""Folder of the codes of a model that is read block by block."""

OWN_SUFFIXES = (".json", ".npz", ".safetensors", ".md", ".part", ".codes")
"""Suffixes of the files in a run folder."""

ATTEMPTS = 10
"""Number of times that a folder is made and locked while others remove it."""

BEAT_EVERY_S = 2.0
WRITTEN, REPLACED, REUSED = "written", "replaced", "reused"
"""What a run did with a file; "replaced" is a step's value of an earlier run whose inputs have changed."""

Value = TypeVar("Value")
Told = TypeVar("Told")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kept(Generic[Value]):
    """How the value of a step is stored: a file name in the folder, ``save(value, path)`` and ``load(path)``."""

    file: str
    save: Callable[[Value, Path], object]
    load: Callable[[Path], Value]


class RunFolder:
    """The values of a run as files; with ``path`` None, nothing is stored.

    Runs open it by `alone`; reading it makes nothing.

    Attributes:
        path: the folder, or None.
        wall_s: step → seconds it took over all attempts.
        last_files: file → "written", "replaced" or "reused", for the last run in the folder before this one.

    Raises:
        OptionsError: the folder has no name or cannot be written.
        FileFormatError: the journal is incomplete.

    >>> import tempfile, pathlib
    >>> folder, kept = tempfile.mkdtemp(), Kept("note.txt", lambda text, path: path.write_text(text), Path.read_text)
    >>> RunFolder(folder).once("write", lambda cache: "made", key={"by": "me"}, kept=kept)
    'made'
    >>> RunFolder(folder).once("write", lambda cache: "made again", key={"by": "me"}, kept=kept)
    'made'
    >>> RunFolder(folder).once("write", lambda cache: "made again", key={"by": "you"}, kept=kept)
    'made again'
    """

    def __init__(self, path: AnyPath | None) -> None:
        if path is not None and not os.fspath(path):
            raise OptionsError("the name of the run folder is empty; '.' is the current folder")
        self.path = None if path is None else Path(path)
        self.wall_s: dict[str, float] = {}
        self.last_files: dict[str, str] = {}
        self._steps: dict[str, dict[str, Any]] = {}
        self._files: dict[str, str] = {}
        self._output: str | None = None
        self._written: list[dict[str, Any]] = []
        self._running: tuple[str, float, float] | None = None  # step, start of attempt, earlier seconds
        self._last_beat = 0.0
        self._warned: set[str] = set()
        if self.path is not None:
            self._open(self.path)

    @classmethod
    @contextlib.contextmanager
    def alone(cls, path: AnyPath | None) -> Iterator["RunFolder"]:
        """Make the folder, and keep other processes from running in it during the ``with`` block.

        After an error, what was made is removed if it is empty. A lock ends with its process. Windows and some network
        drives have none.

        Raises:
            OptionsError: another run is in progress there; or as for the class.
        """
        run = cls(path)
        if run.path is None:
            yield run
            return
        new = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
        with contextlib.ExitStack() as stack:
            held: bool | None = False
            for _ in range(ATTEMPTS):
                with contextlib.suppress(FileNotFoundError):  # a run that failed has just removed it
                    run.path.mkdir(parents=True, exist_ok=True)
                    held = stack.enter_context(locked(run.path))
                    break
            if held is False:
                raise OptionsError(
                    f"another run is in progress in {run.path}: wait until it has ended, or name another folder"
                )
            try:
                yield cls(path)  # as it is now that nobody else writes to it
            except BaseException:
                for folder in new:
                    with contextlib.suppress(OSError):  # something was written there
                        folder.rmdir()
                raise

    @property
    def steps(self) -> dict[str, dict[str, Any]]:
        """Step → its entry in the journal: ``key``, ``file``, ``wall_s`` and whether it is ``done``."""
        return dict(self._steps)

    def once(
        self,
        step: str,
        make: Callable[[Path | None], Value],
        *,
        key: Mapping[str, Any],
        kept: Kept[Value],
    ) -> Value:
        """Return the value of a step: loaded if it is the last that was stored there and has this key, otherwise made.

        Args:
            step: name of the step.
            make: function that makes the value. Its argument is the path of a file or folder for intermediate progress.
                If this path still exists afterwards, the step ended early: its value is stored, and the next run
                resumes from it.
            key: name → value of everything that the step's value depends on (see `qcompress.identity.identify`).
            kept: how the value is stored.

        Warns:
            UncheckedWarning: a value of the key cannot be inspected, so a change of it would go unnoticed.
        """
        if self.path is None:
            with self.timed(step):
                return make(None)
        digests = self._digests(step, key)
        file, part = self.path / kept.file, self.path / f"{step}.part"
        earlier = self._steps.get(step, {"key": digests, "file": None, "wall_s": 0.0, "done": False})
        changed = sorted(
            name for name in digests.keys() | earlier["key"].keys() if digests.get(name) != earlier["key"].get(name)
        )
        same = not changed and earlier["file"] == kept.file
        if same and earlier["done"] and file.exists():
            _logger.info("%s: %s is reused", self.path, kept.file)
            with _explaining_damage():
                value = kept.load(file)
            self._note(kept.file, REUSED)
            self.wall_s[step] = earlier["wall_s"]
            return value
        if changed:
            _logger.info("%s: %s is computed again, because of another %s", self.path, kept.file, ", ".join(changed))
            remove(part)
            remove(part.with_name(f"{part.name}.part"))  # what the step itself had begun
        elif earlier["done"]:
            _logger.info(
                "%s: %s is computed again, because it is missing or was overwritten by another step",
                self.path,
                kept.file,
            )
        wall_s = earlier["wall_s"] if same else 0.0
        self._steps[step] = {"key": digests, "file": kept.file, "wall_s": wall_s, "done": False}
        self._write()
        with self.timed(step):
            value = make(part)
        how = REPLACED if file.exists() and not same else WRITTEN
        self._overwriting(kept.file)
        kept.save(value, file)
        self._steps[step]["done"] = not part.exists()
        if part.exists():
            self._files[part.name] = WRITTEN
        self._note(kept.file, how)
        return value

    def save(self, file: str, save: Callable[[Path], object]) -> None:
        """Write what is made in every run, with ``save(path)``; without a folder nothing is written."""
        if self.path is not None:
            self._overwriting(file)
            save(self.path / file)
            self._note(file, WRITTEN)

    def discard(self, file: str) -> None:
        """Remove a file that this run does not make, so that a file of an earlier run is not mistaken for its own."""
        if self.path is not None:
            remove(self.path / file)

    def exporting(self, output: Path, draft: Path) -> None:
        """Record that an engine's file, complete at ``draft``, is about to take its place (see `has_written`)."""
        self._written = with_next(self._written, output, draft)
        self._write()

    def exported(self, output: Path) -> None:
        """Record which engine's file was written from this run (see `output_of`)."""
        self._written = with_last(self._written, output)
        self._output = str(output.resolve())
        self._write()

    @contextlib.contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the duration of the block to the time of a step."""
        before, begun = self._steps.get(step, {}).get("wall_s", self.wall_s.get(step, 0.0)), time.perf_counter()
        self._running = (step, begun, before)
        try:
            yield
        finally:
            self._note_time()
            self._running = None
            if step in self._steps:
                self._write()

    def watched(self, callback: Callable[[Told], None] | None) -> Callable[[Told], None]:
        """Wrap a progress callback so that it also saves the running step's time, in case the process is killed."""

        def tell(progress: Told) -> None:
            if self._running is not None and time.perf_counter() - self._last_beat > BEAT_EVERY_S:
                self._last_beat = time.perf_counter()
                self._note_time()
                self._write()
            if callback is not None:
                callback(progress)

        return tell

    def _overwriting(self, file: str) -> None:
        """Forget the steps whose finished value is about to be overwritten."""
        self._steps = {
            step: entry for step, entry in self._steps.items() if not (entry["done"] and entry["file"] == file)
        }
        self._write()

    def _note(self, file: str, how: str) -> None:
        if how != REUSED or file not in self._files:  # a step may run twice, for example with a tighter budget
            self._files[file] = REPLACED if self._files.get(file) == REPLACED else how
        self._write()

    def _note_time(self) -> None:
        assert self._running is not None  # noqa: S101
        step, begun, before = self._running
        self.wall_s[step] = before + time.perf_counter() - begun
        if step in self._steps:
            self._steps[step]["wall_s"] = self.wall_s[step]

    def _digests(self, step: str, key: Mapping[str, Any]) -> dict[str, str]:
        identities = {name: identify(value, name) for name, value in key.items()}
        unchecked = dict.fromkeys(item for identity in identities.values() for item in identity.unchecked)
        if new := [item for item in unchecked if item not in self._warned]:
            self._warned.update(new)
            warnings.warn(
                f"{step} depends on something that cannot be checked ({'; '.join(new)}): if it changed since the "
                f"run in {self.path}, delete the folder, otherwise an outdated result may be reused",
                UncheckedWarning,
                stacklevel=2,
            )
        return {name: identity.digest for name, identity in identities.items()}

    def _open(self, path: Path) -> None:
        if not (path / JOURNAL).exists():
            place = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
            if not place.is_dir():
                what = "a file" if place.exists() else "a link that leads nowhere"
                raise OptionsError(f"the run folder {path}: {place} is {what}; name a folder for the results")
            try:
                with tempfile.TemporaryDirectory(dir=place):
                    return
            except OSError as error:
                raise OptionsError(f"the run folder {path} cannot be written: {error}") from error
        with _explaining_damage():
            journal = FILE_KIND.read_json(path / JOURNAL)
        steps, files = journal.get("steps"), journal.get("files")
        if not (isinstance(steps, dict) and isinstance(files, dict) and all(map(_is_entry, steps.values()))):
            raise FileFormatError(
                f"{path / JOURNAL} is not a complete {FILE_KIND.name} file: its steps or files are damaged; delete it"
            )
        self._steps, self.last_files, self._written = steps, files, records_in(journal)

    def _write(self) -> None:
        if self.path is not None:
            self.path.mkdir(parents=True, exist_ok=True)
            journal = {"steps": self._steps, "files": self._files, "output": self._output, "written": self._written}
            FILE_KIND.write_json(self.path / JOURNAL, journal)


def require_no_file_of_its_own(folder: AnyPath | None, output: Path) -> None:
    """Check that an engine's file does not overwrite a file of the run folder.

    Raises:
        OptionsError: it would.
    """
    if folder is None:
        return
    own, place = Path(folder).resolve(), output.resolve()
    if place == own or (place.parent == own and (place.suffix in OWN_SUFFIXES or place.name == CODES)):
        raise OptionsError(
            f"output={str(output)!r} is a place that the run folder {folder} uses itself: name another file or folder"
        )


def output_of(folder: Path) -> Path | None:
    """Return the engine's file that was written from the last run in a folder, or None if there is no such run or file.

    Raises:
        FileFormatError: the journal is incomplete.
    """
    if not (folder / JOURNAL).exists():
        return None
    output = FILE_KIND.read_json(folder / JOURNAL).get("output")
    return Path(output) if isinstance(output, str) else None


def has_written(folder: AnyPath | None, output: Path) -> bool:
    """Whether ``output`` was written by a run in a folder and has not changed since.

    Raises:
        FileFormatError: the journal is incomplete.
    """
    if folder is None or not (journal := Path(folder) / JOURNAL).exists():
        return False
    return is_among(records_in(FILE_KIND.read_json(journal)), output)


def remove(path: Path) -> None:
    """Remove a file, or a folder with its contents, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _explaining_damage() -> Iterator[None]:
    """Add what to do to an error about the contents of a file of the folder, read inside the block."""
    try:
        yield
    except (FileFormatError, ArtefactError) as error:
        error.args = (f"{error}. Delete this file, and the same call makes it again",)
        raise


def _is_entry(entry: Any) -> bool:
    fields = {"key": dict, "file": str, "wall_s": float, "done": bool}
    return isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in fields.items())
