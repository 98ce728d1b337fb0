"""Which engines there are: a written table. Adding one is one file and one line here.

A package of its own adds an engine in its ``pyproject.toml``:

    [project.entry-points."qcompress.engines"]
    my-engine = "my_package.my_module:MyEngine"
"""

import importlib
import importlib.metadata
from typing import Any

from qcompress.engines.base import Engine, EngineInfo
from qcompress.errors import EngineError

ENTRY_POINTS = "qcompress.engines"

TABLE: dict[str, str] = {
    "llama.cpp": "qcompress.engines.llama_cpp.engine:LlamaCpp",
    "compressed-tensors": "qcompress.engines.compressed_tensors:CompressedTensors",
    "onnxruntime": "qcompress.engines.onnxruntime:OnnxRuntime",
}


def _table() -> dict[str, str]:
    plugins = {point.name: point.value for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    return plugins | TABLE


def engine_class(name: str) -> type[Engine]:
    """The class behind a name.

    Raises:
        EngineError: no such name; lists the known ones.
    """
    table = TABLE if name in TABLE else _table()
    if name not in table:
        raise EngineError(f"no engine is called {name!r}; known: {', '.join(table) or 'none'}")
    module, _, attribute = table[name].partition(":")
    cls: type[Engine] = getattr(importlib.import_module(module), attribute)
    return cls


def as_engine(target: str | Engine, **settings: Any) -> Engine:
    """The engine that a name or an engine value stands for, with its packages there.

    Args:
        target: a name of `engines`, or an engine.
        settings: of it, to set anew.

    Raises:
        EngineError: no such name, or a setting that it does not have.
        MissingError: a package is missing; says how to install it.
    """
    if not isinstance(target, (str, Engine)):
        raise EngineError(
            f"target must be the name of an engine or an Engine, found {type(target).__name__}; "
            f"known: {', '.join(_table()) or 'none'}"
        )
    engine = engine_class(target)() if isinstance(target, str) else target
    engine.require()
    return engine.configured(settings) if settings else engine


def engines() -> list[EngineInfo]:
    """Every engine, whether it can be used here, and what is missing if not. Imports none of their packages.

    >>> all(info.available or "pip install" in info.why_not for info in engines())
    True
    """
    return [engine_class(name).info() for name in _table()]
