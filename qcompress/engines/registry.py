"""The table of engines. Adding an engine takes one file and one line here.

A separate package adds an engine in its ``pyproject.toml``:

    [project.entry-points."qcompress.engines"]
    my-engine = "my_package.my_module:MyEngine"
"""

import importlib
import importlib.metadata
from typing import Any

from qcompress.engines.base import Engine, EngineInfo
from qcompress.errors import EngineError, found

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
    """Return the class of an engine by its name.

    Raises:
        EngineError: there is no engine of that name; the message lists the known ones.
    """
    table = TABLE if name in TABLE else _table()
    if name not in table:
        raise EngineError(
            f"there is no engine {name!r}; known: {', '.join(table) or 'none'}. Without a target the package's own "
            "file, for PyTorch, is written"
        )
    module, _, attribute = table[name].partition(":")
    cls: type[Engine] = getattr(importlib.import_module(module), attribute)
    return cls


def as_engine(target: str | Engine, **settings: Any) -> Engine:
    """Return the engine that a name or an engine value stands for; its packages must be installed.

    Args:
        target: a name listed by `engines`, or an engine.
        settings: settings of the engine to change.

    Raises:
        EngineError: there is no such engine, or it does not have such a setting.
        OptionsError: a setting has a value of another kind.
        MissingError: a package is missing; the message says how to install it.
    """
    if not isinstance(target, (str, Engine)):
        raise EngineError(
            f"target must be the name of an engine or an Engine, found {found(target, Engine)}; "
            f"known: {', '.join(_table()) or 'none'}"
        )
    engine = engine_class(target)() if isinstance(target, str) else target
    engine.require()
    engine = engine.configured(settings) if settings else engine
    engine.require_settings()
    return engine


def engines() -> list[EngineInfo]:
    """List all engines, whether they can be used here, and what is missing if not. Imports none of their packages.

    As ``qcompress.engines`` is this function, an engine's class is imported by name, for example
    ``from qcompress.engines.onnxruntime import OnnxRuntime``, instead of being reached by attributes.

    >>> all(info.available or "pip install" in info.why_not for info in engines())
    True
    """
    return [engine_class(name).info() for name in _table()]
