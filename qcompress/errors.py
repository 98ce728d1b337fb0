"""Errors of the PyTorch side.

QcompressError
├── ModelError       (ValueError)  no supported layer, an output that is not a tensor, another model than was measured
│   ├── ChainError                 blocks that cannot be run one after the other
│   ├── NoChannelsError            no channel that can be removed
│   └── NotFiniteError             an output that holds NaN or infinity
│       └── ResultNotFiniteError   that of a compressed model, where the original's is finite
├── DataError        (ValueError)  calibration data that is empty, cannot be read twice or is not finite
├── OptionsError     (ValueError)  options that do not exist or do not fit
├── ArtefactError    (ValueError)  a compressed-model file that is incomplete or does not fit the model
├── EngineError      (ValueError)  a model, layer, option or setting that an engine does not support, or no such engine
│   └── BatchError                 batches that the engine, or the model by itself, does not take
├── VerificationError (RuntimeError) an engine's file that differs from its prediction
└── MissingError     (ImportError) an optional package is missing; the message says what to install

Errors of problems and solvers are those of `formulations.errors` and `solvers.errors`.
"""


class QcompressError(Exception):
    """Base of every error that this package raises on purpose."""


class ModelError(QcompressError, ValueError):
    """A model that cannot be handled."""


class ChainError(ModelError):
    """A model whose blocks are not a chain, so that they cannot be run one after the other."""


class NoChannelsError(ModelError):
    """A model without a channel that can be removed."""


class NotFiniteError(ModelError):
    """A model whose output holds NaN or infinity."""


class ResultNotFiniteError(NotFiniteError):
    """A compressed model whose output holds NaN or infinity where the original's does not."""


class DataError(QcompressError, ValueError):
    """Calibration data that cannot be used."""


class OptionsError(QcompressError, ValueError):
    """Options that do not exist or do not fit."""


class ArtefactError(QcompressError, ValueError):
    """A compressed-model file that is incomplete or does not fit the model."""


class EngineError(QcompressError, ValueError):
    """A model, layer, option or setting that an engine does not support, or an engine that does not exist."""


class BatchError(EngineError):
    """Batches that an engine, or the model without ``forward=``, does not accept."""


class VerificationError(QcompressError, RuntimeError):
    """An engine's file that differs from its prediction."""


class MissingError(QcompressError, ImportError):
    """An optional package is missing."""


class AutocastWarning(UserWarning):
    """A call was made under autocast, which is switched off in it."""


class UncheckedWarning(UserWarning):
    """A run resumes from its folder, and something that it depends on cannot be checked for changes."""


def found(value: object, wanted: type) -> str:
    """Say what was given in place of an instance of ``wanted``: its type, or the class that was not called.

    >>> found(3, QcompressError), found(DataError, QcompressError), found(int, QcompressError)
    ('int', 'the class DataError; write DataError()', 'the class int')
    """
    if not isinstance(value, type):
        return type(value).__name__
    return f"the class {value.__name__}" + (f"; write {value.__name__}()" if issubclass(value, wanted) else "")
