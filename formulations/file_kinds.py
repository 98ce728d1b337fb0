"""Kinds of files: each has a name and a version, and every reader refuses the same things in the same words.

A module that stores a value states its kind once, as ``FILE_KIND = FileKind("qcompress problem", version=2)``; the
header that is written and the checks of what is read follow from it. Arrays go into one ``.npz`` with a JSON header,
everything else into JSON. Arrays of Python objects are neither written nor read, so no pickle is ever loaded.
"""

import contextlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from formulations.errors import FileFormatError, FormulationError
from formulations.files import AnyPath, read_json, replacing, write_json


@dataclass(frozen=True, slots=True)
class FileKind:
    """One kind of file.

    Args:
        name: what such a file is, in its header and in errors.
        version: the version that is written, and the newest that is read.
        oldest: the oldest version that is read.

    >>> note = FileKind("note", version=2)
    >>> note.header
    {'kind': 'note', 'version': 2}
    >>> note.require({"kind": "note", "version": 3}, "a.json")
    Traceback (most recent call last):
    ...
    formulations.errors.FileFormatError: a.json is a note file of version 3; this program reads up to version 2
    """

    name: str
    version: int
    oldest: int = 1

    @property
    def header(self) -> dict[str, Any]:
        """What every file of this kind says about itself."""
        return {"kind": self.name, "version": self.version}

    def require(self, header: Any, where: object) -> None:
        """Refuse a header of another kind or of a version that is not read; ``where`` names its origin.

        Raises:
            FileFormatError: it is refused.
        """
        kind = header.get("kind") if isinstance(header, Mapping) else header
        if not isinstance(header, Mapping) or kind != self.name:
            raise FileFormatError(f"{where} is not a {self.name} file: its header says {kind!r}")
        version = header.get("version")
        if type(version) is not int or not self.oldest <= version <= self.version:
            versions = f"up to version {self.version}" if self.oldest == 1 else f"version {self.oldest}"
            versions += f" to {self.version}" if 1 < self.oldest < self.version else ""
            raise FileFormatError(
                f"{where} is a {self.name} file of version {version!r}; this program reads {versions}"
            )

    @contextlib.contextmanager
    def building(self, where: object, hint: str = "") -> Iterator[None]:
        """A ``with`` block that builds a value from what was read; its errors name ``where`` and end with the ``hint``.

        Raises:
            FileFormatError: the content lacks something, or something in it has the wrong type or shape.
        """
        try:
            yield
        except FormulationError:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise FileFormatError(
                f"{where} is not a whole {self.name} file: {error!r}{hint and '; ' + hint}"
            ) from error

    def write_json(self, path: AnyPath, content: Mapping[str, Any]) -> None:
        """Write ``content`` below the kind's header as JSON, whole or not at all."""
        write_json(path, {**self.header, **content})

    def read_json(self, path: AnyPath) -> dict[str, Any]:
        """Read the content that `write_json` wrote, without the kind's header.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: it holds no JSON object, or one of another kind or version.
        """
        value = read_json(path, self.name)
        return self.content(value, path)

    def content(self, value: Mapping[str, Any], where: object) -> dict[str, Any]:
        """``value`` without the kind's header.

        Raises:
            FileFormatError: the header is of another kind or version.
        """
        self.require(value, where)
        return {name: entry for name, entry in value.items() if name not in ("kind", "version")}

    def write_arrays(self, path: AnyPath, header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write arrays and a JSON header as one ``.npz`` file, whole or not at all.

        Raises:
            ValueError: an array of Python objects, which only a pickle could hold, or a header with not-a-number.
        """
        if objects := [name for name, array in arrays.items() if array.dtype.hasobject]:
            raise ValueError(f"arrays of Python objects cannot be stored: {', '.join(objects)}")
        text = json.dumps({**self.header, **header, "arrays": sorted(arrays)}, allow_nan=False)
        with replacing(path) as file:
            np.savez(file, header=np.frombuffer(text.encode(), dtype=np.uint8), **dict(arrays))  # type: ignore[arg-type]

    def read_arrays(self, path: AnyPath) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Read back the header and the arrays that `write_arrays` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: the file is cut short, of another kind or version, or holds a pickle.
        """
        with Path(path).open("rb") as file:
            try:
                header, arrays = _read_archive(file)
            except MemoryError:
                raise
            except Exception as error:  # zipfile and numpy answer damage with a dozen kinds of exceptions
                raise FileFormatError(
                    f"{path} is not a {self.name} file, or not a whole one (cut short, damaged, or with a pickle in "
                    f"it, which is never loaded): {error}"
                ) from error
        self.require(header, path)
        if header.get("arrays") != sorted(arrays):
            raise FileFormatError(
                f"{path} is not a whole {self.name} file: its header lists the arrays {header.get('arrays')}, "
                f"it holds {sorted(arrays)}"
            )
        return header, arrays


def kind_of(path: AnyPath) -> str:
    """The name of the kind that a file's header gives; nothing else of the file is read.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: it has no header of ours.
    """
    with Path(path).open("rb") as file:
        try:
            if zipfile.is_zipfile(file):
                file.seek(0)
                with np.load(file, allow_pickle=False) as archive:
                    header = json.loads(archive["header"].tobytes())
            else:
                file.seek(0)
                header = json.loads(file.read())
            return str(header["kind"])
        except MemoryError:
            raise
        except Exception as error:  # whatever damage does to zipfile, numpy and json
            raise FileFormatError(f"{path} is not a file of qcompress, or not a whole one: {error}") from error


def _read_archive(file: IO[bytes]) -> tuple[Any, dict[str, NDArray[Any]]]:
    if damaged := zipfile.ZipFile(file).testzip():  # before numpy believes a shape and asks for that much memory
        raise ValueError(f"the checksum of {damaged} does not fit")
    file.seek(0)
    with np.load(file, allow_pickle=False) as archive:
        if "header" not in archive:
            raise ValueError("it has no header")
        arrays = dict(archive)
    return json.loads(arrays.pop("header").tobytes()), arrays
