"""Kinds of files, each with a name and a version, and the checks that all readers share.

A module that stores a value declares its kind once, as ``FILE_KIND = FileKind("qcompress problem", version=2)``. The
header that is written and the checks on reading follow from it. Arrays go into one ``.npz`` with a JSON header,
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
from formulations.files import AnyPath, as_path, read_json, replacing, write_json


@dataclass(frozen=True, slots=True)
class FileKind:
    """One kind of file.

    Args:
        name: name of the kind, used in the file's header and in error messages.
        version: the version that is written, and the only one that is read.

    >>> note = FileKind("note", version=2)
    >>> note.header
    {'kind': 'note', 'version': 2}
    >>> note.require({"kind": "note", "version": 3}, "a.json")
    Traceback (most recent call last):
    ...
    formulations.errors.FileFormatError: a.json is a note file of version 3; this program reads version 2
    """

    name: str
    version: int

    @property
    def header(self) -> dict[str, Any]:
        """The kind and version as every file of this kind stores them."""
        return {"kind": self.name, "version": self.version}

    def require(self, header: Any, where: object) -> None:
        """Check that ``header`` is of this kind and version; ``where`` names its origin in errors.

        Raises:
            FileFormatError: the header is of another kind or version.
        """
        kind = header.get("kind") if isinstance(header, Mapping) else header
        if not isinstance(header, Mapping) or kind != self.name:
            raise FileFormatError(f"{where} is not a {self.name} file: its header says {kind!r}")
        version = header.get("version")
        if type(version) is not int or version != self.version:
            raise FileFormatError(
                f"{where} is a {self.name} file of version {version!r}; this program reads version {self.version}"
            )

    @contextlib.contextmanager
    def building(self, where: object, hint: str = "") -> Iterator[None]:
        """Run a ``with`` block that builds a value from file content; its errors name ``where`` and end with ``hint``.

        Raises:
            FileFormatError: an entry of the content is missing or has the wrong type or shape.
        """
        try:
            yield
        except FormulationError:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise FileFormatError(
                f"{where} is not a complete {self.name} file: {error!r}{hint and '; ' + hint}"
            ) from error

    def write_json(self, path: AnyPath, content: Mapping[str, Any]) -> None:
        """Write the kind's header and ``content`` as JSON, atomically."""
        write_json(path, {**self.header, **content})

    def read_json(self, path: AnyPath) -> dict[str, Any]:
        """Read the content that `write_json` wrote, without the kind's header.

        Raises:
            FileNotFoundError: the file does not exist.
            FileFormatError: the file holds no JSON object, or one of another kind or version.
        """
        value = read_json(path, self.name)
        return self.content(value, path)

    def content(self, value: Mapping[str, Any], where: object) -> dict[str, Any]:
        """Return ``value`` without the kind's header.

        Raises:
            FileFormatError: the header is of another kind or version.
        """
        self.require(value, where)
        return {name: entry for name, entry in value.items() if name not in ("kind", "version")}

    def write_arrays(self, path: AnyPath, header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write arrays and a JSON header as one ``.npz`` file, atomically.

        Raises:
            ValueError: an array holds Python objects, which would need a pickle, or the header contains NaN.
        """
        if objects := [name for name, array in arrays.items() if array.dtype.hasobject]:
            raise ValueError(f"arrays of Python objects cannot be stored: {', '.join(objects)}")
        text = json.dumps({**self.header, **header, "arrays": sorted(arrays)}, allow_nan=False)
        with replacing(path) as file:
            np.savez(file, header=np.frombuffer(text.encode(), dtype=np.uint8), **dict(arrays))  # type: ignore[arg-type]

    def read_arrays(self, path: AnyPath) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Read back the header and the arrays that `write_arrays` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            FileFormatError: the file is truncated, of another kind or version, or contains a pickle.
        """
        with as_path(path).open("rb") as file:
            try:
                header, arrays = _read_archive(file)
            except MemoryError:
                raise
            except Exception as error:  # zipfile and numpy raise many kinds of exceptions for damaged files
                raise FileFormatError(
                    f"{path} is not a {self.name} file, or an incomplete one (truncated, damaged, or with a pickle in "
                    f"it, which is never loaded): {error}"
                ) from error
        self.require(header, path)
        if header.get("arrays") != sorted(arrays):
            raise FileFormatError(
                f"{path} is not a complete {self.name} file: its header lists the arrays {header.get('arrays')}, "
                f"it holds {sorted(arrays)}"
            )
        return header, arrays


def kind_of(path: AnyPath) -> str:
    """Return the name of the kind in a file's header; in a file of JSON lines every line has one.

    Raises:
        FileNotFoundError: the file does not exist.
        FileFormatError: the file has no readable qcompress header.
    """
    with Path(path).open("rb") as file:
        try:
            if zipfile.is_zipfile(file):
                file.seek(0)
                with np.load(file, allow_pickle=False) as archive:
                    header = json.loads(archive["header"].tobytes())
            else:
                file.seek(0)
                first = file.readline()
                try:
                    header = json.loads(first)
                except ValueError:
                    header = json.loads(first + file.read())
            return str(header["kind"])
        except MemoryError:
            raise
        except Exception as error:  # zipfile, numpy and json raise many kinds for damaged files
            raise FileFormatError(f"{path} is not a qcompress file, or an incomplete one: {error}") from error


def _read_archive(file: IO[bytes]) -> tuple[Any, dict[str, NDArray[Any]]]:
    if damaged := zipfile.ZipFile(file).testzip():  # before numpy allocates memory for a damaged shape
        raise ValueError(f"the checksum of {damaged} does not match")
    file.seek(0)
    with np.load(file, allow_pickle=False) as archive:
        if "header" not in archive:
            raise ValueError("it has no header")
        arrays = dict(archive)
    return json.loads(arrays.pop("header").tobytes()), arrays
